"""The control of maps and parameters at once: as many softmax maps as `vitdiff`, and as many parameters.

    python train.py --plugin runs/controls/more.py --model vitboth --seed 0 1 2 3 4

Parameters are those of models of MNIST: patches of 7 pixels, 2 blocks.
"""

from vit import MODELS, SelfAttention

# 37,194 parameters; vitdiff has 37,290
MODELS["vitboth"] = dict(attention=SelfAttention, num_heads=4, mlp_dim=160)
