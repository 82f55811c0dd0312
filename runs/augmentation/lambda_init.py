"""`vitdiff` with one lambda_init in all blocks, in place of 0.8 - 0.6 exp(-0.3 depth), which is 0.2 and 0.36.

    python train.py --plugin runs/augmentation/lambda_init.py --model vitdiffinit50 --dataset fashionmnist
"""

from vit import MODELS, doubled_diff_attention


def with_lambda_init(value):
    def make_attention(dim, num_heads, depth, qkv_bias=False):
        attention = doubled_diff_attention(dim, num_heads, depth=depth, qkv_bias=qkv_bias)
        attention.lambda_init = value
        return attention
    return make_attention


for percent in (50, 80, 95):
    MODELS[f"vitdiffinit{percent}"] = dict(attention=with_lambda_init(percent / 100))
