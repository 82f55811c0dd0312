"""Other depths and one larger size, each a row of its own, so that their records lie in one folder.

    python train.py --plugin runs/trials/sizes/plugin.py --model vitdepth8 vitdiffdepth8 --seed 0 1 2 3 4
"""

from vit import MODELS

for name in ("vit", "vitdiff"):
    for depth in (1, 2, 4, 8):
        MODELS[f"{name}depth{depth}"] = MODELS[name] | dict(depth=depth)

for name in ("vit", "vitdiff", "vitdiffpaper"):  # heads as wide as those of the small models, an MLP of thrice the width
    heads = MODELS[name].get("num_heads", 2)
    MODELS[f"{name}large"] = MODELS[name] | dict(dim=64, depth=6, num_heads=2 * heads, mlp_dim=192)
