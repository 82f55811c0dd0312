"""What the difference of the branches leaves of a change, beside 1 - lambda, which the algebra says of a common one.

    python runs/trials/checks/algebra.py        writes algebra.csv beside this file, in a few minutes

By the weights of seed 0 of every model with two branches, but for `vitsumscaled`, which scales its first branch, too:
on the test split, how many times as large the change is in the output of a head as in its first branch (a ratio of root
mean squares), under the shift and under the fluctuation alone of Gaussian noise of severity 3; the same of the clean
outputs around their mean over the images (signal); and 1 - lambda, the mean sum of a row of the map. Means over heads,
and tokens that the next layer reads.
"""

import sys
from pathlib import Path

import torch

from intervention import HERE, batches, data, records, stack

import analysis

CONDITIONS = {"clean": None, "shift": "gaussian_noise_shift", "fluctuation": "gaussian_noise_fluctuation"}


def attenuation(change):
    """Of outputs (K, B, H, N, e), first branch first and sum last: the root of the ratio of their energies."""
    first, *_, output = change.double().square().sum((1, 3, 4))  # (H,) each
    return (output / first).sqrt().mean().item()


@torch.no_grad()
def rows_of(run, split):
    settings, _ = records.read_config(run)
    model = stack.load_model(run, settings).eval()
    outputs = {name: [torch.cat(parts, 1) for parts in zip(*(
        analysis.head_outputs(model, images) for images, _ in batches(
            split, settings, corruption, 3 if corruption else 0)))] for name, corruption in CONDITIONS.items()}
    maps = [torch.cat(parts) for parts in zip(*(
        model.attention_maps(images) for images, _ in data.evaluation_batches(split, settings)))]
    for block, (clean, attention_map) in enumerate(zip(outputs["clean"], maps)):
        if len(clean) < 3:  # a single branch
            return
        changes = {name: outputs[name][block] - clean for name in ("shift", "fluctuation")}
        yield dict(dataset=settings["dataset"], model=settings["model"], block=block,
                   one_minus_lambda=attention_map[:, :, :clean.shape[3]].sum(-1).mean().item(),
                   **{name: attenuation(change) for name, change in changes.items()},
                   signal=attenuation(clean - clean.mean(1, keepdim=True)))


def main():
    folders = [HERE.parents[2] / name for name in ("reference", "controls")]
    records.execute_plugin(folders[1] / "plugin.py")
    splits, rows = {}, []
    for run in sorted(run for folder in folders for run in folder.glob("*-seed0")):
        dataset = run.name.split("-")[0]
        if not data.is_cluttered(dataset) and "vitsumscaled" not in run.name:
            if dataset not in splits:
                splits[dataset] = data.load_splits(dataset, HERE.parents[3] / "data", torch.device("cpu"))["test"]
            rows += rows_of(run, splits[dataset])
            print(run.name, flush=True)
    records.write_csv(HERE.parent / "algebra.csv", rows, number="{:.3f}")


if __name__ == "__main__":
    main()
