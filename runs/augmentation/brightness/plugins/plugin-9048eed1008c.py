"""Controls: models that are one change away from a model of vit.py, to tell which part of it makes a difference.

    python train.py --plugin runs/controls/plugin.py --model vitheads --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks.
"""

from torch import nn

from diff_attention import (DiffAttention, DiffAttentionV2, differential_attention, differential_branches,
                            differential_map, merge_heads, softmax_attention)
from vit import MODELS, SelfAttention


class SumAttention(DiffAttentionV2):
    """Version 2 with + in place of -: the sign. 35,210 parameters, as many as `vitdiffv2`.

        head_i = (softmax(q_2i k_i' / sqrt(d)) + sigmoid(lambda_i) softmax(q_2i+1 k_i' / sqrt(d))) v_i,  lambda = W x

    The rows of its maps sum to 1 + sigmoid(lambda). The recorded lambda is the weight taken away, here a negative one.
    """

    def lam(self, x):
        """-sigmoid(lambda): x (B, N, dim) -> (B, H, N, 1)."""
        return -super().lam(x)


class ScaledSumAttention(DiffAttentionV2):
    """Version 2 with + in place of -, scaled so that the rows sum to what those of version 2 do, 1 - s. 35,210
    parameters, as many as `vitdiffv2`.

        head_i = (1 - s_i) / (1 + s_i) (softmax(q_2i k_i' / sqrt(d)) + s_i softmax(q_2i+1 k_i' / sqrt(d))) v_i
        s = sigmoid(W x)
    """

    def attention_map(self, x):
        """The weights that multiply the values: x (B, N, dim) -> (B, H, N, N), rows sum to 1 - s."""
        q, k, _ = self.project(x)
        s = self.lam(x)
        return (1 - s) / (1 + s) * differential_map(q, k, -s)

    def branches(self, x):
        """The two terms of a head: x (B, N, dim) -> two of (B, H, N, d)."""
        q, k, v = self.project(x)
        s = self.lam(x)
        return [(1 - s) / (1 + s) * term for term in differential_branches(q, k, v, -s)]

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        s = self.lam(x[:, :keep])
        return self.proj(merge_heads((1 - s) / (1 + s) * differential_attention(q[:, :, :keep], k, v, -s)))


class AbsSumDiffAttention(DiffAttention):
    """Version 1 as in `vitdiff`, with +|lambda| in place of -lambda. 37,290 parameters, as many as `vitdiff`.

        head = (1 - lambda_init) RMSNorm((softmax(q1 k1' / sqrt(d)) + |lambda| softmax(q2 k2' / sqrt(d))) v)

    The rows of its maps sum to 1 + |lambda|, a factor that the norm of the heads takes out again.
    """

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, dim // num_heads, qkv_bias, proj_bias)

    def lam(self):
        """-|lambda|, a scalar."""
        return -super().lam().abs()


class UnnormedDiffAttention(DiffAttention):
    """Version 1 as in `vitdiff`, without the norm of the heads and the factor 1 - lambda_init. 37,258 parameters, 32
    fewer than `vitdiff`.

        head = (softmax(q1 k1' / sqrt(d)) - lambda softmax(q2 k2' / sqrt(d))) v
    """

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, dim // num_heads, qkv_bias, proj_bias)
        del self.sub_norm

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        return self.proj(merge_heads(differential_attention(q[:, :, :keep], k, v, self.lam().type_as(q))))


class CenteredAttention(SelfAttention):
    """Self-attention less a share of the mean value: what is common to all tokens is taken away without a second map.
    33,162 parameters, 128 more than `vit`.

        head_i = (softmax(q_i k_i' / sqrt(d)) - sigmoid(lambda_i) / N) v_i,  lambda = W x
    """

    def __init__(self, dim, num_heads, depth=0, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, qkv_bias, proj_bias)
        self.lambda_proj = nn.Linear(dim, num_heads, bias=False)

    def lam(self, x):
        """sigmoid(lambda) for each token and head: x (B, N, dim) -> (B, H, N, 1)."""
        return self.lambda_proj(x).sigmoid().mT.unsqueeze(-1)

    def mean_lambda(self, x):
        """The weight of the mean, a scalar: the mean over the tokens x (B, N, dim) and the heads."""
        return self.lam(x).mean()

    def attention_map(self, x):
        """The signed weights that multiply the values: x (B, N, dim) -> (B, H, N, N), rows sum to 1 - lam(x)."""
        return super().attention_map(x) - self.lam(x) / x.shape[1]

    def branches(self, x):
        """The two terms of a head, its map's and that of the mean: x (B, N, dim) -> two of (B, H, N, d)."""
        *_, v = self.project(x)
        return [*super().branches(x), -self.lam(x) * v.mean(dim=2, keepdim=True)]

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        heads = softmax_attention(q[:, :, :keep], k, v) - self.lam(x[:, :keep]) * v.mean(dim=2, keepdim=True)
        return self.proj(merge_heads(heads))


class NormedAttention(SelfAttention):
    """Self-attention with the norm of differential attention, version 1. 33,066 parameters, 32 more than `vit`.

        head = RMSNorm(softmax(q k' / sqrt(d)) v)
    """

    def __init__(self, dim, num_heads, depth=0, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, qkv_bias, proj_bias)
        self.sub_norm = nn.RMSNorm(dim // num_heads, eps=1e-5)

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        heads = softmax_attention(q[:, :, :keep], k, v)
        return self.proj(merge_heads(self.sub_norm(heads.type_as(self.sub_norm.weight))))


MODELS["vitheads"] = dict(attention=SelfAttention, num_heads=4)  # as many softmax maps as vitdiff; 33,034 parameters
MODELS["vitmatched"] = dict(attention=SelfAttention, mlp_dim=160)  # as many parameters as vitdiff: 37,194 and 37,290
MODELS["vitboth"] = dict(attention=SelfAttention, num_heads=4, mlp_dim=160)  # as many of both; 37,194 parameters
MODELS["vitsum"] = dict(attention=SumAttention)
MODELS["vitsumscaled"] = dict(attention=ScaledSumAttention)
MODELS["vitdiffabs"] = dict(attention=AbsSumDiffAttention)
MODELS["vitdiffnonorm"] = dict(attention=UnnormedDiffAttention)
MODELS["vitcentered"] = dict(attention=CenteredAttention)
MODELS["vitheadnorm"] = dict(attention=NormedAttention)
