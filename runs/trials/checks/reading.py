"""How long a folder of ten thousand pictures takes to be read as a data set.

    python runs/trials/checks/reading.py        writes reading.csv beside this file

Ten classes of a thousand pictures of 32x32 pixels, half PNG and half JPEG, are written to a temporary folder and read
three times, as they are and resized to 24 pixels: the median of the seconds.
"""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy
from PIL import Image

from intervention import HERE, records

import pictures


def write_folder(folder):
    random = numpy.random.default_rng(0)
    for number in range(10_000):
        path = folder / ("train" if number % 10_000 < 8_000 else "test") / f"class{number % 10}"
        path.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8))
        image.save(path / f"{number}.{'jpg' if number % 20 < 10 else 'png'}")


def measure_seconds(folder, side):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pictures.read(folder, side)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name))
        rows = [dict(pictures=10_000, side=32, resized_to=side or 32, seconds=measure_seconds(Path(name), side),
                     cores=os.cpu_count(), machine=platform.machine()) for side in (None, 24)]
    records.write_csv(HERE.parent / "reading.csv", rows, number="{:.2f}")
