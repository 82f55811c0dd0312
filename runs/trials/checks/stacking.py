"""When three seeds side by side cost less than three seeds one after the other on a CPU, by threads, width and tokens.

    python runs/trials/checks/stacking.py        writes stacking.csv beside this file, in half an hour on two idle cores

Whole compiled training steps of `vit` on random images, 128 in a batch: medians of turns, in milliseconds a seed.
"""

import platform
import statistics

import torch

from intervention import HERE, data, records, stack

import benchmark
import machine
import train

CPU, SEEDS = torch.device("cpu"), [0, 1, 2]
SIDES = {17: (28, 7), 26: (30, 6), 37: (30, 5), 50: (28, 4), 65: (32, 4)}  # tokens: pixels a side of an image, of a patch
POINTS = {  # threads: widths and tokens
    1: [(32, 17), (32, 37), (32, 50), (64, 17), (64, 37), (128, 17)],
    2: [(32, 17), (32, 37), (32, 50), (32, 65), (64, 17), (64, 26), (64, 37), (64, 65), (128, 17), (128, 37)],
}


def settings_of(dim, tokens):
    name, (side, patch_size) = f"random{tokens}", SIDES[tokens]
    data.DATASETS[name] = data.DATASETS["mnist"] | dict(image_size=side)
    flags = f"--dim {dim} --mlp-dim {4 * dim} --head-hidden-dim {4 * dim} --patch-size {patch_size}"
    return train.resolve_settings(train.parse_flags(flags.split()), "vit", name, 0, CPU)


def measure(threads, dim, tokens):
    """A row of stacking.csv: steps of one seed and of three side by side, in turns."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    settings, side = settings_of(dim, tokens), SIDES[tokens][0]
    split = data.Split(torch.randint(256, (5_000, 1, side, side), dtype=torch.uint8), torch.randint(10, (5_000,)))
    steps = [benchmark.make_step(settings, seeds, split, CPU, compiled=True) for seeds in (SEEDS[:1], SEEDS)]
    one, three = (1e3 * statistics.median(times) for times in benchmark.time_in_turn(steps, CPU, rounds=6, calls=8))
    return dict(threads=threads, dim=dim, tokens=tokens, one=one, three=three / 3, ratio=three / 3 / one,
                machine=platform.machine())


if __name__ == "__main__":
    machine.keep_freed_memory()
    rows = [measure(threads, *point) for threads, points in POINTS.items() for point in points]
    records.write_csv(HERE.parent / "stacking.csv", rows, number="{:.2f}")
