"""Differential attention: the difference of two softmax maps weighs the values, so that what both maps share cancels.

The first five functions, up to `differential_attention`, are the mathematics alone and need nothing but torch: lift
them out if they are all you want. Under autocast the products are in its precision, and all between them, softmax,
lambda and the difference of two nearly equal maps, is in float32.
`DiffAttention` is version 1 (Ye et al. 2024, "Differential Transformer", arXiv 2410.05258, equations 1 to 3);
`DiffAttentionV2` is version 2 (Microsoft, January 2026, microsoft/unilm, Diff-Transformer-V2).
"""

import math

import torch
from torch import nn


def widen(x):
    """x in float32, or as it is where its own type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_map(q, k):
    """softmax(q k' / sqrt(d)), the rows of which sum to 1: q (..., M, d), k (..., N, d) -> (..., M, N), in float32 or
    wider."""
    # Autocast would see to that on CUDA, but not on a CPU, and not under torch.vmap, which takes softmax apart first.
    return widen(q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)


def softmax_attention(q, k, v):
    """softmax(q k' / sqrt(d)) v: q (..., M, d), k (..., N, d), v (..., N, e) -> (..., M, e), of the type of v.

    Two plain products: at these sizes they beat the fused kernel on a CPU, and they can be mapped over seeds anywhere.
    """
    return softmax_map(q, k).type_as(v) @ v


def differential_map(q, k, lam):
    """softmax(q1 k1' / sqrt(d)) - lam softmax(q2 k2' / sqrt(d)), the rows of which sum to 1 - lam.

    Shapes as in `differential_attention`: q (..., 2H, M, d), k (..., 2H, N, d) -> (..., H, M, N), in float32 or wider.
    """
    first, second = softmax_map(q, k).unflatten(-3, (-1, 2)).unbind(-3)  # (..., H, M, N) each
    return first - lam * second


def differential_attention(q, k, v, lam):
    """(softmax(q1 k1' / sqrt(d)) - lam softmax(q2 k2' / sqrt(d))) v, equation 1 of arXiv 2410.05258.

    The two branches of a head are adjacent: q1, k1 of head i are heads 2i of q and k, q2, k2 are heads 2i + 1.

    Args:
        q, k: queries (..., 2H, M, d) and keys (..., 2H, N, d) of both branches; M is N, or less for fewer queries.
        v: values, (..., H, N, e).
        lam: the weight of the second branch, a scalar or (..., H, M, 1), of any type: float32 keeps it exact where q,
            k and v are in half precision.

    Returns:
        (..., H, M, e), neither normalised nor projected, of the type of v.
    """
    return differential_map(q, k, lam).type_as(v) @ v


def differential_branches(q, k, v, lam):
    """The two terms of differential_attention: [softmax(q1 k1' / sqrt(d)) v, -lam softmax(q2 k2' / sqrt(d)) v]."""
    first, second = softmax_map(q, k).unflatten(-3, (-1, 2)).unbind(-3)  # (..., H, M, N) each
    return [first.type_as(v) @ v, -lam * (second.type_as(v) @ v)]


class SizeError(ValueError):
    """Sizes of a model that do not fit together."""


def check_heads(dim, num_heads, branches=1):
    """Raise a SizeError unless the width `dim` is divisible by `num_heads` heads of `branches` equal parts."""
    if num_heads < 1 or dim % (num_heads * branches):
        parts = f"{num_heads} heads" + (f" of {branches} branches" if branches > 1 else "")
        raise SizeError(f"width {dim} is not divisible by {parts}: choose another width or number of heads")


def split_heads(x, num_heads):
    """(B, N, num_heads * d) -> (B, num_heads, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, N, d) -> (B, N, H * d)."""
    return x.transpose(1, 2).flatten(2)


class DiffAttention(nn.Module):
    """Multi-head differential attention, version 1 (arXiv 2410.05258): tokens (B, N, dim) -> (B, N, dim).

        lambda_init = 0.8 - 0.6 exp(-0.3 depth)
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        head = (1 - lambda_init) RMSNorm((softmax(q1 k1' / sqrt(d)) - lambda softmax(q2 k2' / sqrt(d))) v)

    Args:
        dim: width of the tokens.
        num_heads: heads H; each has two branches of q and k, and values of width dim / H.
        depth: index of the block from 0 (the paper's l is depth + 1); it sets lambda_init.
        head_dim: width d of q and k per branch. None is the paper's dim / H / 2, at which q and k together are as
            wide as those of self-attention.
        qkv_bias, proj_bias: whether the projections have biases.

    Raises:
        SizeError: if the heads do not divide the width.
    """

    def __init__(self, dim, num_heads, depth, head_dim=None, qkv_bias=False, proj_bias=True):
        super().__init__()
        check_heads(dim, num_heads, branches=2 if head_dim is None else 1)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads // 2 if head_dim is None else head_dim
        branches = 2 * num_heads * self.head_dim
        self.widths = [branches, branches, dim]  # of q, k, v in the rows of qkv
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(self.head_dim)) for _ in range(4))
        self.sub_norm = nn.RMSNorm(dim // num_heads, eps=1e-5)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, x):
        """x (B, N, dim) -> q, k (B, 2H, N, d) and v (B, H, N, dim / H)."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        return split_heads(q, 2 * self.num_heads), split_heads(k, 2 * self.num_heads), split_heads(v, self.num_heads)

    def lam(self):
        """lambda of equation 2, a scalar, in float32 or the parameters' own type where that is wider."""
        first = (widen(self.lambda_q1) * widen(self.lambda_k1)).sum().exp()
        second = (widen(self.lambda_q2) * widen(self.lambda_k2)).sum().exp()
        return first - second + self.lambda_init

    def mean_lambda(self, x=None):
        """The weight of the second branch, a scalar; it does not depend on the tokens x, which may be left out."""
        return self.lam()

    def attention_map(self, x):
        """The signed weights that multiply the values: x (B, N, dim) -> (B, H, N, N), rows sum to 1 - lambda."""
        q, k, _ = self.project(x)
        return differential_map(q, k, self.lam())

    def branches(self, x):
        """The terms that a head adds up before its norm: x (B, N, dim) -> [A1 v, -lambda A2 v], (B, H, N, dim / H)."""
        q, k, v = self.project(x)
        return differential_branches(q, k, v, self.lam())

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        heads = differential_attention(q[:, :, :keep], k, v, self.lam())
        heads = self.sub_norm(heads.type_as(self.sub_norm.weight))  # under autocast a norm is in float32
        return self.proj(merge_heads((1 - self.lambda_init) * heads))


class DiffAttentionV2(nn.Module):
    """Multi-head differential attention, version 2 (Microsoft, 2026): tokens (B, N, dim) -> (B, N, dim).

        head_i = (softmax(q_2i k_i' / sqrt(d)) - sigmoid(lambda_i) softmax(q_2i+1 k_i' / sqrt(d))) v_i,  lambda = W x

    Query heads 2i and 2i + 1 share key and value head i; lambda is projected from x for each token and head; there
    is neither a norm on the heads nor a lambda_init.

    Args:
        dim: width of the tokens.
        num_heads: heads H of k and v, of width d = dim / H; q has 2H of them.
        depth: not used; here so that every attention is called alike.
        qkv_bias, proj_bias: whether the projections have biases.

    Raises:
        SizeError: if the heads do not divide the width.
    """

    def __init__(self, dim, num_heads, depth=0, qkv_bias=False, proj_bias=True):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.widths = [2 * dim, dim, dim]  # of q, k, v in the rows of qkv
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias)
        self.lambda_proj = nn.Linear(dim, num_heads, bias=False)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, x):
        """x (B, N, dim) -> q, k (B, 2H, N, d), each head of k twice, and v (B, H, N, d)."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        k = split_heads(k, self.num_heads).repeat_interleave(2, dim=1)
        return split_heads(q, 2 * self.num_heads), k, split_heads(v, self.num_heads)

    def lam(self, x):
        """sigmoid(lambda), the weight of the second branch for each token and head: x (B, N, dim) -> (B, H, N, 1), in
        float32 or wider."""
        return widen(self.lambda_proj(x)).sigmoid().mT.unsqueeze(-1)

    def mean_lambda(self, x):
        """The weight of the second branch, a scalar: the mean over the tokens x (B, N, dim) and the heads."""
        return self.lam(x).mean()

    def attention_map(self, x):
        """The signed weights that multiply the values: x (B, N, dim) -> (B, H, N, N), rows sum to 1 - lam(x)."""
        q, k, _ = self.project(x)
        return differential_map(q, k, self.lam(x))

    def branches(self, x):
        """The terms that a head adds up: x (B, N, dim) -> [A1 v, -sigmoid(lambda) A2 v], each (B, H, N, d)."""
        q, k, v = self.project(x)
        return differential_branches(q, k, v, self.lam(x))

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        return self.proj(merge_heads(differential_attention(q[:, :, :keep], k, v, self.lam(x[:, :keep]))))
