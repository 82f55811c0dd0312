"""How large the test set's own error is: what another test set of as many images would change in a difference.

    python runs/trials/checks/outcomes.py FOLDER        writes outcomes.csv beside this file

FOLDER has the runs of `vit`, `vitdiff` and `vitdiffv2` with weights, as they are before gather.py gathers them. Of
each image and model the share of seeds (and of severities) that answer it wrongly is an outcome; the difference of two
models is the mean over the images of the difference of their outcomes, so its error is that mean's: deviation of the
differences over the root of the number of images. correlation: between the outcomes of the two models.
"""

import sys
from pathlib import Path

import torch

from intervention import HERE, batches, data, records, stack

CONDITIONS = {"clean": [(None, 0)]} | {name: [(f"gaussian_noise_{name}", severity) for severity in range(1, 6)]
                                       for name in ("shift", "fluctuation")}


@torch.no_grad()
def outcomes(runs, split, corrupted):
    """The share of runs and conditions that answer each image wrongly, in percent: (N,)."""
    wrong = torch.zeros(len(split.labels), dtype=torch.double)
    for run in runs:
        settings, _ = records.read_config(run)
        model = stack.load_model(run, settings).eval()
        for condition in corrupted:
            wrong += torch.cat([model(images).argmax(1) != labels
                                for images, labels in batches(split, settings, *condition)])
    return 100 * wrong / len(runs) / len(corrupted)


def main(folder):
    rows = []
    for dataset in ("mnist", "fashionmnist"):
        split = data.load_splits(dataset, HERE.parents[3] / "data", torch.device("cpu"))["test"]
        for name, corrupted in CONDITIONS.items():
            found = {model: outcomes(sorted(folder.glob(f"{dataset}-{model}-seed*")), split, corrupted)
                     for model in ("vit", "vitdiff", "vitdiffv2")}
            for model in ("vitdiff", "vitdiffv2"):
                pair = torch.stack([found[model], found["vit"]])
                difference = pair[0] - pair[1]
                rows.append(dict(
                    dataset=dataset, condition=name, models=f"{model} - vit", difference=difference.mean().item(),
                    error=difference.std().item() / len(difference) ** 0.5, correlation=pair.corrcoef()[0, 1].item()))
                print(*rows[-1].values(), flush=True)
    records.write_csv(HERE.parent / "outcomes.csv", rows, number="{:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
