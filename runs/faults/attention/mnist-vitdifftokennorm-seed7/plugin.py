"""Faults of the published comparison's first differential attention, November 2024.

    python train.py --plugin runs/faults/attention/plugin.py --model vitdifftokennorm vitdiffnovember --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks.
"""

import torch
from torch import nn

from diff_attention import DiffAttention, differential_attention, merge_heads
from vit import MODELS


class TokenNormDiffAttention(DiffAttention):
    """Version 1 as in `vitdiff`, with a norm across tokens: GroupNorm of 4 groups of channels, each over all tokens of
    an image, in place of RMSNorm on each token and head. 37,386 parameters, 96 more than `vitdiff`."""

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, dim // num_heads, qkv_bias, proj_bias)
        self.sub_norm = nn.GroupNorm(4, dim)

    def forward(self, x):
        """x (B, N, dim) -> (B, N, dim)."""
        q, k, v = self.project(x)
        tokens = merge_heads(differential_attention(q, k, v, self.lam().type_as(q)))
        tokens = self.sub_norm(tokens.type_as(self.sub_norm.weight).mT).mT
        return self.proj((1 - self.lambda_init) * tokens)


class NovemberDiffAttention(TokenNormDiffAttention):
    """All faults of its differential attention at once: the norm across tokens; in place of lambda's vectors one number
    a head, drawn from a standard normal; lambda_init for layer l - 1; no factor 1 - lambda_init. 37,274 parameters.

        lambda = exp(lambda_q1 lambda_k1) - exp(lambda_q2 lambda_k2) + 0.8 - 0.6 exp(-0.3 (depth - 1)), for each head
    """

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth - 1, qkv_bias, proj_bias)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(num_heads)) for _ in range(4))

    def lam(self):
        """lambda of each head, (H, 1, 1)."""
        first = (self.lambda_q1 * self.lambda_k1).exp()
        second = (self.lambda_q2 * self.lambda_k2).exp()
        return (first - second + self.lambda_init)[:, None, None]

    def mean_lambda(self, x):
        """The weight of the second branch, a scalar: the mean over the heads."""
        return self.lam().mean()

    def forward(self, x):
        """x (B, N, dim) -> (B, N, dim)."""
        q, k, v = self.project(x)
        tokens = merge_heads(differential_attention(q, k, v, self.lam().type_as(q)))
        return self.proj(self.sub_norm(tokens.type_as(self.sub_norm.weight).mT).mT)


MODELS["vitdifftokennorm"] = dict(attention=TokenNormDiffAttention)
MODELS["vitdiffnovember"] = dict(attention=NovemberDiffAttention)
