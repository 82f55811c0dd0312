"""Controls of the sign: + in place of -, where the sums of the maps' rows cannot make the difference.

    python train.py --plugin runs/controls/sums/plugin.py --model vitdiffsum vitsumscaled --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks. The recorded lambda is 1 less the sum of a row.
"""

from diff_attention import DiffAttention, DiffAttentionV2, differential_attention, differential_map, merge_heads
from vit import MODELS


class SumDiffAttention(DiffAttention):
    """Version 1 as in `vitdiff`, with + in place of -. 37,290 parameters, as many as `vitdiff`.

        head = (1 - lambda_init) RMSNorm((softmax(q1 k1' / sqrt(d)) + lambda softmax(q2 k2' / sqrt(d))) v)

    The rows of its maps sum to 1 + lambda, a factor that the norm of the heads takes out again.
    """

    def __init__(self, dim, num_heads, depth, qkv_bias=False, proj_bias=True):
        super().__init__(dim, num_heads, depth, dim // num_heads, qkv_bias, proj_bias)

    def lam(self):
        """-lambda, a scalar."""
        return -super().lam()


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

    def forward(self, x, keep=None):
        """x (B, N, dim) -> (B, N, dim), or the first `keep` tokens of it, which attend to all."""
        q, k, v = self.project(x)
        s = self.lam(x[:, :keep])
        return self.proj(merge_heads((1 - s) / (1 + s) * differential_attention(q[:, :, :keep], k, v, -s)))


MODELS["vitdiffsum"] = dict(attention=SumDiffAttention)
MODELS["vitsumscaled"] = dict(attention=ScaledSumAttention)
