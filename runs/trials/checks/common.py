"""Whether what noise changes alike in all images decides the answers: it is taken out of the outputs of the heads.

    python runs/trials/checks/common.py FOLDER      writes common.csv beside this file

FOLDER has runs on CIFAR-10 with weights. Each test image goes through a model as it is and, three ways, under the
fluctuation of Gaussian noise of severity 3. In each block, what a noisy way changes in the outputs of the heads, before
norm and projection, has a part that all images share at a token, its mean over them (common), and the rest (own). A way
keeps (left) both, or its (own) or (common) part alone, in the second block of what the first block made of that way.
Noise that goes around the heads, through the residual stream, stays. Test error in percent, a row a run.
"""

import sys
from pathlib import Path

import torch

from intervention import HERE, batches, data, finish, records, stack

CHANGES = {"left": lambda change: change, "own": lambda change: change - change.mean(0),
           "common": lambda change: change.mean(0)}


def by_parts(function, *tensors):
    """A function of images, applied to some of them at a time."""
    return torch.cat([function(*part) for part in zip(*(tensor.split(500) for tensor in tensors))])


def errors_of(run, settings, labels, clean, noisy):
    """Test error in percent: {way: error}, of the clean images (B, C, H, W) and of the noisy ones."""
    model = stack.load_model(run, settings).eval()
    ways = {"clean": by_parts(model.embed, clean)} | dict.fromkeys(CHANGES, by_parts(model.embed, noisy))
    for block in model.blocks:
        heads = {name: by_parts(lambda x: sum(block.attn.branches(block.norm1(x))), x) for name, x in ways.items()}
        for name, change in CHANGES.items():
            heads[name] = heads["clean"] + change(heads[name] - heads["clean"])
        for name, x in ways.items():
            x = x + by_parts(lambda outputs: finish(block.attn, outputs), heads[name])
            ways[name] = by_parts(lambda x: x + block.mlp(block.norm2(x)), x)
    answers = {name: by_parts(lambda x: model.head(model.norm(x[:, 0])).argmax(1), x) for name, x in ways.items()}
    return {name: 100 * (found != labels).float().mean().item() for name, found in answers.items()}


@torch.no_grad()
def main(folder):
    runs, rows = sorted(folder.glob("cifar10-*-seed*")), []
    settings, _ = records.read_config(runs[0])
    split = data.load_splits("cifar10", HERE.parents[3] / "data", torch.device("cpu"))["test"]
    clean, noisy = (torch.cat([images for images, _ in batches(split, settings, *corrupted)])
                    for corrupted in [(), ("gaussian_noise_fluctuation", 3)])
    for run in runs:
        settings, _ = records.read_config(run)
        if settings["plugin"]:
            records.execute_plugin(records.find_run_plugin(run, settings["plugin"]))
        rows.append(dict(model=settings["model"], seed=settings["seed"]) | errors_of(
            run, settings, split.labels, clean, noisy))
        print(*rows[-1].values(), flush=True)
    records.write_csv(HERE.parent / "common.csv", rows, number="{:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
