"""The control of version 1's sign: + in place of -, and a weight that cannot turn it.

    python train.py --plugin runs/controls/sums/kept.py --model vitdiffabs --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks. The recorded lambda is 1 less the sum of a row.
"""

from diff_attention import DiffAttention
from vit import MODELS


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


MODELS["vitdiffabs"] = dict(attention=AbsSumDiffAttention)
