"""Whether the gradients of the two maps oppose each other and whether that makes the gradient of the answer longer, as
has been published of attacks (arXiv 2510.00517, whose lemma is of the Jacobians of both maps by the input).

    python runs/trials/checks/gradients.py OUT.csv RUN...        adds a row a run, condition and block to OUT.csv

RUNs are folders with weights, of models of one map (their rows have the distance alone) or of two. Means over the first
1,000 test images; conditions: clean, and pgd, the end of one ascent of attack.py at the epsilon of the protocol.

    map_cosine      between the gradients by the pixels of both maps, A1 and A2, weighted by the same random numbers
                    (four draws): the premise, if it is below 0
    held_cosine     between those of the margin through A1 v and through lambda A2 v, the values v held
    branch_cosine   the same, through the values as well
    norm_ratio      the norm of the second of these two over that of the first
    amplification   the norm of the gradient through the difference over that through A1 v alone: the consequence, if
                    it is above 1
    distance        the margin over the sum of the absolute gradient, of images answered rightly: to first order, the
                    epsilon that an attack needs
"""

import csv
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from intervention import HERE, data, finish, records, stack

import attack
import plugins
from diff_attention import softmax_map

EPSILONS = {"mnist": 0.04, "fashionmnist": 0.02, "cifar10": 1 / 255}
COSINES = ["map_cosine", "held_cosine", "branch_cosine"]
PROBES = 4


def through(outputs, x, upstream):
    """The gradient by x of each of two outputs, weighted alike: (B, C H W) each."""
    return [torch.autograd.grad(output, x, upstream, retain_graph=True)[0].flatten(1) for output in outputs]


def block_figures(attn, tokens, terms, heads, margin, x, generator):
    """The figures of one block of two maps, {name: (B,)}."""
    q, k, v = attn.project(tokens)
    maps = softmax_map(q, k).unflatten(-3, (-1, 2)).unbind(-3)
    probes = [through(maps, x, torch.randn(maps[0].shape, generator=generator)) for _ in range(PROBES)]
    (upstream,) = torch.autograd.grad(margin, heads, retain_graph=True)
    lam = attn.lam(tokens) if "lambda_proj" in attn._modules else attn.lam()
    held = through([maps[0] @ v.detach(), lam * (maps[1] @ v.detach())], x, upstream)
    first, second = branches = through([terms[0], -terms[1]], x, upstream)
    return dict(map_cosine=torch.stack([F.cosine_similarity(*pair) for pair in probes]).mean(0),
                held_cosine=F.cosine_similarity(*held), branch_cosine=F.cosine_similarity(*branches),
                norm_ratio=second.norm(dim=1) / first.norm(dim=1),
                amplification=(first - second).norm(dim=1) / first.norm(dim=1))


def figures_of(model, x, labels, settings, generator):
    """Images x (B, C, H, W) from 0 to 1 -> for each block {name: (B,)}, nan of images answered wrongly."""
    x = x.clone().requires_grad_()
    tokens, blocks = model.embed(data.normalize(255 * x, settings["dataset"])), []
    for block in model.blocks:
        given = block.norm1(tokens)
        terms = block.attn.branches(given)
        heads = sum(terms)
        blocks.append((block.attn, given, terms, heads))
        tokens = tokens + finish(block.attn, heads)
        tokens = tokens + block.mlp(block.norm2(tokens))
    right, wrong = attack.right_and_wrong(model.head(model.norm(tokens[:, 0]))[None], labels[None])
    margin = (right - wrong.amax(2))[0]
    (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
    distance = torch.where(margin > 0, margin / gradient.flatten(1).abs().sum(1), torch.nan).detach()
    return [dict(distance=distance) | (block_figures(*block, margin.sum(), x, generator) if len(block[2]) == 2 else {})
            for block in blocks]


def rows_of(run):
    settings, _ = records.read_config(run)
    plugins.execute_plugins(plugins.keep_plugins(run.parent, settings.get("plugin")))
    model = stack.load_model(run, settings).eval()
    net, split = stack.StackedModel([model]), data.load_splits(
        settings["dataset"], HERE.parents[3] / "data", torch.device("cpu"))["test"]
    _, pixels = next(data.evaluation_pixels(split, settings))
    draws = torch.rand(pixels.shape, generator=data.generator_of("attack"))
    generator, found = data.generator_of("gradients"), {}
    for x, labels, numbers in data.cache_sized(pixels / 255, split.labels[:len(pixels)], draws):
        targets = attack.answer(net, x[None], labels[None], settings)[2].argmax(2)  # the likeliest of the wrong classes
        *_, (moved, _, _) = attack.ascend(net, x[None], labels[None], targets, numbers, EPSILONS[settings["dataset"]],
                                          settings)
        for condition, images in [("clean", x), ("pgd", moved[0])]:
            for block, figures in enumerate(figures_of(model, images, labels, settings, generator)):
                for name, values in figures.items():
                    found.setdefault((condition, block), {}).setdefault(name, []).append(values)
    for (condition, block), figures in found.items():
        yield dict(folder=run.parent.name, model=settings["model"], dataset=settings["dataset"], seed=settings["seed"],
                   condition=condition, block=block) | {
            name: f"{torch.cat(figures[name]).nanmean():.6g}" if name in figures else ""
            for name in [*COSINES, "norm_ratio", "amplification", "distance"]}


def main(out, *folders):
    rows = list(csv.DictReader(open(out, newline=""))) if Path(out).exists() else []
    for run in map(Path, folders):
        rows += rows_of(run)
        print(*rows[-1].values(), flush=True)
        records.write_csv(out, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
