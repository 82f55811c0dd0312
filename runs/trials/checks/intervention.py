"""Whether what the heads make of a noise decides the answers: their outputs exchanged, in the middle of the model.

    python runs/trials/checks/intervention.py FOLDER        writes intervention.csv beside this file

FOLDER has runs of `vit`, `vitdiff` and `vitdiffv2` with weights. Each image goes through the model twice, as it is and
under the shift or the fluctuation alone of Gaussian noise of severity 3; on the second way the outputs of the heads in
all blocks, before norm and projection, are (left) left as they are, (clean) exchanged for those of the first way, or
(undone) for those of the first way plus what the noise changes in the first branch alone, so that nothing of it is
cancelled. Mean test error in percent over the seeds, and half its 95% interval.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[3]))
import corruptions
import data
import records
import stack
import stats
from diff_attention import merge_heads

OUTPUTS = {"left": lambda clean, noisy: sum(noisy), "clean": lambda clean, noisy: sum(clean),
           "undone": lambda clean, noisy: sum(clean) + noisy[0] - clean[0]}


def batches(split, settings, corruption=None, severity=0):
    """A split in its own order, under a corruption or clean: pairs of normalised images (B, C, H, W) and labels (B,)."""
    if not severity:
        return data.evaluation_batches(split, settings)
    return ((images, labels) for _, images, labels in corruptions.corrupted_batches(
        split, settings, [corruption], [severity]))


def finish(attn, heads):
    """What an attention makes of the outputs of its heads (B, H, N, e)."""
    if hasattr(attn, "sub_norm"):
        heads = (1 - attn.lambda_init) * attn.sub_norm(heads)
    return attn.proj(merge_heads(heads))


def answers(model, clean, noisy):
    """The classes that a model sees in noisy images: {exchange: (B,)}."""
    clean = model.embed(clean)
    ways = dict.fromkeys(OUTPUTS, model.embed(noisy))
    for block in model.blocks:
        terms = block.attn.branches(block.norm1(clean))
        for name, exchange in OUTPUTS.items():
            x = ways[name]
            x = x + finish(block.attn, exchange(terms, block.attn.branches(block.norm1(x))))
            ways[name] = x + block.mlp(block.norm2(x))
        clean = clean + finish(block.attn, sum(terms))
        clean = clean + block.mlp(block.norm2(clean))
    return {name: model.head(model.norm(x[:, 0])).argmax(1) for name, x in ways.items()}


@torch.no_grad()
def errors_of(run, split, part):
    settings, _ = records.read_config(run)
    model = stack.load_model(run, settings).eval()
    wrong = dict.fromkeys(OUTPUTS, 0)
    for (clean, labels), (noisy, _) in zip(*(batches(split, settings, *corrupted)
                                             for corrupted in [(), (f"gaussian_noise_{part}", 3)])):
        for name, found in answers(model, clean, noisy).items():
            wrong[name] += (found != labels).sum().item()
    return [100 * count / len(split.labels) for count in wrong.values()]


def main(folder):
    rows = []
    for dataset in ("mnist", "fashionmnist"):
        split = data.load_splits(dataset, HERE.parents[3] / "data", torch.device("cpu"))["test"]
        for part, model in itertools.product(["shift", "fluctuation"], ["vit", "vitdiff", "vitdiffv2"]):
            columns = zip(*(errors_of(run, split, part) for run in sorted(folder.glob(f"{dataset}-{model}-seed*"))))
            rows.append(dict(dataset=dataset, part=part, model=model))
            for name, errors in zip(OUTPUTS, columns):
                rows[-1] |= {name: statistics.fmean(errors), f"{name}_half": stats.half_interval(errors)}
            print(*rows[-1].values(), flush=True)
    records.write_csv(HERE.parent / "intervention.csv", rows, number="{:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
