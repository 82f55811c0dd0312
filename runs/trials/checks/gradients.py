"""Whether the gradients of the two branches oppose each other, as has been published of attacks (arXiv 2510.00517).

    python runs/trials/checks/gradients.py OUT.csv RUN...        adds a row a run, condition and block to OUT.csv

RUNs are folders of differential models with weights. The gradient of the margin by the pixels goes through the heads of
a block in two parts: through the first branch, A1 v, and through minus the second, lambda A2 v, of which the difference
counts. cosine: between these two, mean over the first 1,000 test images. norm_ratio: the norm of the second over that
of the first, mean over images. Where the cosine is below 0 the difference is larger than each. Conditions: clean, and
pgd, the images after 40 steps of the attack of attack.py at the epsilon of the protocol.
"""

import csv
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from intervention import HERE, data, finish, records, stack

import attack
import plugins

EPSILONS = {"mnist": 0.04, "fashionmnist": 0.02, "cifar10": 1 / 255}


def branch_gradients(model, x, labels, settings):
    """Images x (B, C, H, W) from 0 to 1 -> for each block the cosine and the ratio of the norms, (2, B)."""
    x = x.clone().requires_grad_()
    tokens, blocks = model.embed(data.normalize(255 * x, settings["dataset"])), []
    for block in model.blocks:
        terms = block.attn.branches(block.norm1(tokens))
        heads = sum(terms)
        blocks.append((terms, heads))
        tokens = tokens + finish(block.attn, heads)
        tokens = tokens + block.mlp(block.norm2(tokens))
    logits = model.head(model.norm(tokens[:, 0]))
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margin = (wrong - logits.gather(1, labels[:, None]).squeeze(1)).sum()
    found = []
    for (first, second), heads in blocks:
        (upstream,) = torch.autograd.grad(margin, heads, retain_graph=True)
        through = [torch.autograd.grad(term, x, upstream, retain_graph=True)[0].flatten(1) for term in (first, -second)]
        norms = [gradient.norm(dim=1) for gradient in through]
        found.append(torch.stack([F.cosine_similarity(*through), norms[1] / norms[0]]))
    return found


def rows_of(run):
    settings, _ = records.read_config(run)
    plugins.execute_plugins(plugins.keep_plugins(run.parent, settings.get("plugin")))
    model = stack.load_model(run, settings).eval()
    net, split = stack.StackedModel([model]), data.load_splits(
        settings["dataset"], HERE.parents[3] / "data", torch.device("cpu"))["test"]
    _, pixels = next(data.evaluation_pixels(split, settings))
    draws = torch.rand(pixels.shape, generator=data.generator_of("attack"))
    sums = {}
    for x, labels, numbers in data.cache_sized(pixels / 255, split.labels[:len(pixels)], draws):
        *_, (moved, _, _) = attack.ascend(net, x[None], labels[None], numbers, EPSILONS[settings["dataset"]], settings)
        for condition, images in [("clean", x), ("pgd", moved[0])]:
            for block, figures in enumerate(branch_gradients(model, images, labels, settings)):
                sums.setdefault((condition, block), []).append(figures)
    for (condition, block), parts in sums.items():
        cosine, ratio = torch.cat(parts, 1).mean(1).tolist()
        yield dict(folder=run.parent.name, model=settings["model"], dataset=settings["dataset"], seed=settings["seed"],
                   condition=condition, block=block, cosine=f"{cosine:.6f}", norm_ratio=f"{ratio:.6f}")


def main(out, *folders):
    rows = list(csv.DictReader(open(out, newline=""))) if Path(out).exists() else []
    for run in map(Path, folders):
        rows += rows_of(run)
        print(*rows[-1].values(), flush=True)
        records.write_csv(out, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
