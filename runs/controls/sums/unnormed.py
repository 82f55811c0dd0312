"""The control that completes sign and norm of version 1: + and no norm.

    python train.py --plugin runs/controls/sums/unnormed.py --model vitdiffsumnonorm --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks. The recorded lambda is 1 less the sum of a row.
"""

from diff_attention import DiffAttention, differential_attention, merge_heads
from vit import MODELS


class UnnormedSumDiffAttention(DiffAttention):
    """Version 1 as in `vitdiff` with + in place of -, without the norm of the heads and the factor 1 - lambda_init.
    37,258 parameters, as many as `vitdiffnonorm`.

        head = (softmax(q1 k1' / sqrt(d)) + lambda softmax(q2 k2' / sqrt(d))) v
    """

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, dim // num_heads, qkv_bias, proj_bias)
        del self.sub_norm

    def lam(self):
        """-lambda, a scalar."""
        return -super().lam()

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        return self.proj(merge_heads(differential_attention(q[:, :, :keep], k, v, self.lam().type_as(q))))


MODELS["vitdiffsumnonorm"] = dict(attention=UnnormedSumDiffAttention)
