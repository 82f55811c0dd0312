"""Whether a published set of attacks breaks images that the attack of attack.py does not break.

    pip install torchattacks scipy        into another environment that has torch, such as a copy of the project's
    python runs/trials/checks/autoattack.py OUT.csv RUN...        adds rows to OUT.csv for each run and epsilon

AutoAttack (Croce and Hein 2020, arXiv 2003.01690), here the parts that torchattacks 3.5.1 has of it, on the first 1,000
test images: apgd_ce and apgd_t (100 steps; all nine wrong classes), fab_t (likewise) and square, a random search of
1,000 queries, which needs no gradient. error: of test images, in percent. more: images that an attack breaks and pgd
does not break; fewer: the other way round.

    pgd, fgsm             those of attack.py
    pgd_40                pgd with twice the steps
    pgd_5                 images that any of five random starts of pgd breaks
    apgd_ce, apgd_t, fab_t    one after the other, each on the images that are left; the figure counts all so far
    square                alone, on all images
    autoattack            images that any of these four breaks
"""

import csv
import sys
from pathlib import Path

import torch
import torchattacks

from intervention import HERE, data, records, stack

import attack
import plugins

TARGETS = {0.04: (9, 3), 0.08: (9, 3), 0.16: (9, 3), 0.02: (3, 0), 0.01: (3, 0)}  # epsilon: of apgd_t, of fab_t
BATCH, RESTARTS, STEPS, QUERIES = 250, 5, 100, 1_000


class FromPixels(torch.nn.Module):
    """A model of images (B, C, H, W) from 0 to 1, as the package needs it."""

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, x):
        return self.model(data.normalize(255 * x, self.settings["dataset"]))


def break_by_pgd(net, clean, labels, draws, epsilon, settings):
    """Which of images (B, C, H, W) from 0 to 1 our attacks break: {attack: (B,)}. draws: (RESTARTS, B, C, H, W)."""
    x, y = clean[None], labels[None]
    ((_, found),) = attack.attack(net, x, y, draws[0], settings, [epsilon])
    broken = {name: found[name][1][0] >= 0 for name in ("pgd", "fgsm")}
    ((_, twice),) = attack.attack(net, x, y, draws[0], settings, [epsilon], 2 * attack.STEPS)
    broken |= dict(pgd_40=twice["pgd"][1][0] >= 0, pgd_5=broken["pgd"].clone())
    for numbers in draws[1:]:
        left = (~broken["pgd_5"]).nonzero().squeeze(1)
        if len(left):
            ((_, again),) = attack.attack(net, x[:, left], y[:, left], numbers[left], settings, [epsilon])
            broken["pgd_5"][left] = again["pgd"][1][0] >= 0
    return broken


@torch.no_grad()
def break_by(attacker, clean, labels, epsilon):
    """Which of the images an attack of the package breaks, (B,)."""
    moved = attacker(clean, labels)
    assert (moved - clean).abs().max() < epsilon + 1e-6 and 0 <= moved.min() and moved.max() <= 1
    return attacker.model(moved).argmax(1) != labels


def break_by_autoattack(model, clean, labels, epsilon):
    settings, (of_apgd, of_fab) = dict(eps=epsilon, steps=STEPS), TARGETS[epsilon]
    parts = dict(apgd_ce=torchattacks.APGD(model, **settings),
                 apgd_t=torchattacks.APGDT(model, **settings, n_classes=of_apgd + 1))
    if of_fab:
        parts["fab_t"] = torchattacks.FAB(model, **settings, multi_targeted=True, n_classes=of_fab + 1)
    broken, so_far = {}, model(clean).argmax(1) != labels
    for name, attacker in parts.items():
        left = (~so_far).nonzero().squeeze(1)
        if len(left):
            so_far[left] = break_by(attacker, clean[left], labels[left], epsilon)
        broken[name] = so_far.clone()
    square = break_by(torchattacks.Square(model, eps=epsilon, n_queries=QUERIES), clean, labels, epsilon)
    return broken | dict(square=square, autoattack=so_far | square)


def rows_of(run, epsilon):
    settings, _ = records.read_config(run)
    plugins.execute_plugins(plugins.keep_plugins(run.parent, settings.get("plugin")))
    model = FromPixels(stack.load_model(run, settings), settings).eval().requires_grad_(False)
    net = stack.StackedModel([stack.load_model(run, settings)]).eval().requires_grad_(False)
    split = data.load_splits(settings["dataset"], HERE.parents[3] / "data", torch.device("cpu"))["test"]
    clean = next(data.evaluation_pixels(split, settings))[1][:attack.ATTACKED_IMAGES] / 255
    generators = [data.generator_of("attack", *[start] * (start > 0)) for start in range(RESTARTS)]
    draws = torch.stack([torch.rand(clean.shape, generator=generator) for generator in generators], 1)
    parts = zip(*(whole.split(BATCH) for whole in (clean, split.labels[:len(clean)], draws)))
    batches = [break_by_pgd(net, x, labels, numbers.transpose(0, 1), epsilon, settings)
               | break_by_autoattack(model, x, labels, epsilon) for x, labels, numbers in parts]
    broken = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [dict(model=settings["model"], epsilon=f"{epsilon:g}", attack=name, error=f"{100 * wrong.float().mean():.1f}",
                 more=(wrong & ~broken["pgd"]).sum().item(), fewer=(broken["pgd"] & ~wrong).sum().item())
            for name, wrong in broken.items()]


def main(out, *folders):
    rows = list(csv.DictReader(open(out, newline=""))) if Path(out).exists() else []
    done = {(row["model"], float(row["epsilon"])) for row in rows}
    for epsilon in TARGETS:
        for run in map(Path, folders):
            if (records.read_config(run)[0]["model"], epsilon) not in done:
                rows += rows_of(run, epsilon)
                records.write_csv(out, rows)
                print(*(f"{name} {value}" for row in rows[-8:] for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
