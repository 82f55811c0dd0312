"""Train the compact vision transformers of vit.py and leave a record of every epoch.

    python train.py --model vitdiff --dataset mnist
    python train.py --model all --dataset mnist fashionmnist --seed 0 1 2 3 4
    torchrun --nproc-per-node 2 train.py --dim 256 --depth 8
    python train.py --benchmark

A run is a folder, runs/mnist-vitdiff-seed0: args.txt, config.json, metrics.csv, summary.json, best.pt, last.pt.
The same command run again skips what is finished and goes on, exactly, with what was broken off. The seeds of a model
are trained side by side, as one stack; torchrun shares the batches out among processes.
"""

import argparse
import contextlib
import csv
import ctypes
import difflib
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import warnings
import weakref
import zlib
from collections import namedtuple
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes off the same run
    fcntl = None

# What each data set is, and `defaults`, the flags whose default depends on it. Mean and deviation are those of the
# training archive's pixels, from 0 to 1. Augmentation keeps the class: a mirrored garment is one, a mirrored digit not.
DIGITS = dict(epochs=20, lr=6e-3, muon_lr=5e-3, weight_decay=0.1, patch_size=7, distractors=0, rotation=15.0,
              scale=0.15, shear=0.15, shift=1.0, flip=False)
# A cluttered data set: each image somewhere on a larger canvas, with fragments of others, as in Mnih et al. 2014
# (arXiv 1406.6247); `object_size` is the image's own size. What is augmented is the image, not the canvas: the canvases
# are new in every epoch, and without affine maps of the images on them `vit` learns faster.
CLUTTER = dict(epochs=20, lr=3e-3, muon_lr=1e-2, weight_decay=0.03, patch_size=6, distractors=4, rotation=0.0,
               scale=0.0, shear=0.0, shift=0.0)
DATASETS = {
    "mnist": dict(
        source="MNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.1307], std=[0.3081],
        defaults=DIGITS),
    "fashionmnist": dict(
        source="FashionMNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.2860], std=[0.3530],
        defaults=dict(epochs=30, lr=3e-3, muon_lr=5e-3, weight_decay=0.1, patch_size=7, distractors=0,
                      rotation=3.0, scale=0.05, shear=0.05, shift=0.5, flip=True),
        system_folder="/usr/share/datasets/fashion-mnist"),  # of Debian's package dataset-fashion-mnist
    "kmnist": dict(
        source="KMNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.1918], std=[0.3483],
        defaults=DIGITS),
    "cifar10": dict(
        source="CIFAR10", image_size=32, in_channels=3, sizes=(50_000, 10_000),
        mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616],
        defaults=dict(epochs=30, lr=3e-3, muon_lr=5e-3, weight_decay=0.1, patch_size=4, distractors=0,
                      rotation=0.0, scale=0.0, shear=0.0, shift=4.0, flip=True)),
}
DATASETS |= {f"cluttered{name}": DATASETS[name] | dict(
    image_size=60, object_size=28, mean=[mean], std=[std], defaults=DATASETS[name]["defaults"] | CLUTTER)
    for name, mean, std in [("mnist", 0.0430, 0.1876), ("fashionmnist", 0.0879, 0.2391)]}
FRAGMENT = 8  # pixels a side of what distracts on a canvas
# How the images of a trained model's test are damaged, at severities 1 to 5: the same for every model and data set.
# Impulse and shot noise are those of MNIST-C (Mu and Gilmer 2019, arXiv 1906.02337), by amounts of our own.
CORRUPTIONS = {
    "gaussian_noise": [0.04, 0.08, 0.12, 0.16, 0.2],  # deviation of what is added, of the way from black to white
    "impulse_noise": [0.01, 0.03, 0.06, 0.1, 0.15],  # share of the pixels that turn black or white
    "shot_noise": [30, 10, 4, 1.5, 0.5],  # photons that a white pixel has on average
    "occlusion": [2, 4, 6, 8, 10],  # pixels a side of black squares, 4 for each 28x28 pixels
    "distractors": [2, 4, 6, 8, 10],  # the same of fragments of other images of the split
    "blur": [0.5, 1.0, 1.5, 2.0, 2.5],  # deviation of a Gaussian, in pixels
}
NUM_CLASSES = 10
VALIDATION_SIZE = 5_000
EVALUATION_BATCH = 1_000
AUGMENTATION_NOISE = 7  # random numbers an image
NO_AUGMENTATION = dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False)
SIZE_FLAGS = ["patch_size", "dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "patch_norm", "qkv_bias",
              "dropout"]
RECIPE_FLAGS = ["epochs", "batch_size", "optimizer", "lr", "muon_lr", "weight_decay", "warmup", "decay", "clip",
                "label_smoothing", "distractors", *NO_AUGMENTATION]
RECORDS = ["summary.json", "config.json", "args.txt", "metrics.csv", "noise.csv", "attention.csv", "attention.npz",
           "best.pt", "last.pt"]


class UserError(Exception):
    """What the user can put right: `main` prints it as one line and exits with 2."""


def first_line(error):
    """What an exception says, cut to one line; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class NoAugmentation(argparse.Action):
    """--no-augment is short for five flags, so that flags after it, or it after an @file, override as flags do."""

    def __call__(self, parser, args, values, option_string=None):
        vars(args).update(NO_AUGMENTATION)


def number(kind, what, is_right):
    """An argparse type: a `kind` (int or float) for which `is_right` holds, described by `what`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if is_right(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return parse


def by_dataset(flag):
    """The default of a flag that depends on the data set, for --help."""
    return "(default: " + ", ".join(f"{name} {facts['defaults'][flag]}" for name, facts in DATASETS.items()) + ")"


def make_parser():
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@", allow_abbrev=False,
        epilog="@FILE reads flags from FILE, such as the args.txt of a run; a later flag overrides an earlier one.")
    positive = number(int, "a whole number of at least 1", lambda value: value >= 1)
    rate = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
    share = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    probability = number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)

    group = parser.add_argument_group("what to train: every combination of")
    group.add_argument("--model", nargs="+", default=["vitdiff"], metavar="NAME",
                       help="vit, vitbalanced, vitdiff, vitdiffpaper, vitdiffv2 or any row of MODELS in vit.py; "
                            "all for every row (default: vitdiff)")
    group.add_argument("--dataset", nargs="+", default=["mnist"], metavar="NAME",
                       help=f"{', '.join(DATASETS)} (default: mnist)")
    group.add_argument("--seed", nargs="+", default=[0], metavar="N",
                       type=number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
                       help="of the initial weights, batch order, augmentation and dropout (default: 0)")
    group.add_argument("--distractors", metavar="N",
                       type=number(int, "a whole number of at least 0", lambda value: value >= 0),
                       help="fragments of other images on each canvas of a cluttered data set (default: 4)")

    group = parser.add_argument_group("sizes; the model's own where left out")
    group.add_argument("--patch-size", type=positive, metavar="N", help=f"pixels a side {by_dataset('patch_size')}")
    group.add_argument("--dim", type=positive, metavar="N", help="width of the tokens (default: 32; vitbalanced 48)")
    group.add_argument("--depth", type=positive, metavar="N", help="blocks (default: 2)")
    group.add_argument("--num-heads", type=positive, metavar="N", help="heads (default: 2; vitdiffpaper 1)")
    group.add_argument("--mlp-dim", type=positive, metavar="N", help="hidden width of a block's MLP (default: 128)")
    group.add_argument("--head-hidden-dim", metavar="N",
                       type=number(int, "a whole number of at least 0", lambda value: value >= 0),
                       help="hidden width of the classifier, 0 for a linear one (default: 128)")
    group.add_argument("--patch-norm", action=argparse.BooleanOptionalAction,
                       help="a norm after the patch embedding (default: yes)")
    group.add_argument("--qkv-bias", action=argparse.BooleanOptionalAction, help="biases of q, k, v (default: no)")

    group = parser.add_argument_group("recipe, the same for every model")
    group.add_argument("--epochs", type=positive, metavar="N", help=by_dataset("epochs"))
    group.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images (default: %(default)s)")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="muon",
                       help="muon is Muon for the matrices and AdamW for the rest (default: %(default)s)")
    group.add_argument("--lr", type=rate, metavar="X", help=f"peak of AdamW {by_dataset('lr')}")
    group.add_argument("--muon-lr", type=rate, metavar="X", help=f"peak of Muon {by_dataset('muon_lr')}")
    group.add_argument("--weight-decay", type=rate, metavar="X",
                       help=f"decoupled; not on norms, biases, tokens, lambda {by_dataset('weight_decay')}")
    group.add_argument("--warmup", type=share, default=0.05, metavar="X",
                       help="share of the steps in which the learning rate rises (default: %(default)s)")
    group.add_argument("--decay", type=share, default=1.0, metavar="X",
                       help="share of the steps in which it falls to 0 at the end (default: %(default)s)")
    group.add_argument("--clip", type=rate, default=1.0, metavar="X",
                       help="largest norm of the gradient, 0 for any (default: %(default)s)")
    group.add_argument("--label-smoothing", type=probability, default=0.1, metavar="X",
                       help="in every loss, validation and test too (default: %(default)s)")
    group.add_argument("--dropout", type=probability, default=0.0, metavar="X", help="default: %(default)s")

    group = parser.add_argument_group("augmentation, drawn anew for each training image in each epoch")
    group.add_argument("--rotation", type=rate, metavar="X", help=f"degrees at most {by_dataset('rotation')}")
    group.add_argument("--scale", type=probability, metavar="X", help=f"stretch each way at most {by_dataset('scale')}")
    group.add_argument("--shear", type=probability, metavar="X", help=f"slant at most {by_dataset('shear')}")
    group.add_argument("--shift", type=rate, metavar="X", help=f"pixels each way at most {by_dataset('shift')}")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help=f"mirror every other image {by_dataset('flip')}")
    group.add_argument("--no-augment", nargs=0, action=NoAugmentation, default=argparse.SUPPRESS, help="none of these")

    group = parser.add_argument_group("where and how")
    group.add_argument("--device", default="auto", metavar="NAME",
                       help="cpu, cuda, cuda:1, mps or auto: CUDA, then MPS, then CPU (default: %(default)s)")
    group.add_argument("--amp", choices=["auto", "off", "bfloat16", "float16"], default="auto",
                       help="precision of the forward pass; auto is, on CUDA, bfloat16 where the card has it, else "
                            "float16, and off elsewhere (default: %(default)s)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="fuse the model and its gradient with torch.compile: pays on long runs and needs a C++ "
                            "compiler, on CUDA Triton; there the whole step is captured as a CUDA graph, too "
                            "(default: no)")
    group.add_argument("--stack", type=positive, metavar="N",
                       help="seeds trained side by side at most, 1 for one after the other (default: all)")
    group.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="default: %(default)s")
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    group.add_argument("--overwrite", action="store_true", help="start afresh where a run exists")
    group.add_argument("--analysis", action=argparse.BooleanOptionalAction, default=True,
                       help="after the test, write noise.csv, attention.csv and attention.npz: how the model takes "
                            "corrupted images, and what it attends to (default: yes)")
    group.add_argument("--eval", type=Path, metavar="RUN",
                       help="test a finished run's best.pt again and write its analysis (takes --device, --data-dir "
                            "and --no-analysis alone)")
    group.add_argument("--benchmark", nargs="?", choices=["steps", "growth"], const="steps",
                       help="train nothing: time the training steps of these flags, of several --seed also the stack, "
                            "with --compile also compiled; or, by growth, how time and memory grow with width, depth, "
                            "tokens and batch. Writes benchmark.csv or growth.csv, and a table, into --runs-dir")
    return parser


def check_name(kind, name, names):
    """Raise a UserError that suggests the nearest of `names` unless `name` is one of them."""
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown {kind} {name!r}: {hint}There are {', '.join(names)}")


def parse_flags(argv=None):
    """The command line's flags, checked as far as they can be without torch; a wrong one exits with 2."""
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        for name in args.dataset:
            check_name("data set", name, DATASETS)
            training_size = DATASETS[name]["sizes"][0] - VALIDATION_SIZE
            if args.batch_size > training_size:
                raise UserError(f"argument --batch-size: {args.batch_size} is more than the {training_size} training "
                                f"images of {name}: choose a smaller one")
            if args.distractors and "object_size" not in DATASETS[name]:
                raise UserError(f"argument --distractors: {name} has none: choose "
                                f"{' or '.join(key for key in DATASETS if 'object_size' in DATASETS[key])}")
        for flag, path in [("--data-dir", args.data_dir), ("--runs-dir", args.runs_dir)]:
            if path.exists() and not path.is_dir():
                raise UserError(f"argument {flag}: {path} is a file: name a folder")
        for name, value in vars(args).items() if args.eval else []:
            if name not in ("eval", "device", "data_dir", "analysis") and value != parser.get_default(name):
                raise UserError(f"--eval takes everything else from the run: leave out --{name.replace('_', '-')}")
    except UserError as error:
        parser.error(str(error))
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        parser.error(f"an @file does not hold flags ({error}): write one flag and its values a line")
    return args


if __name__ == "__main__":
    parse_flags()  # so that --help and a wrong flag are answered before the seconds that importing torch takes

import numpy
import torch
from torch import distributed
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from vit import MODELS, ViT, build_model

Split = namedtuple("Split", "images labels")  # uint8 (N, C, H, W) and int64 (N,)


def started_by_torchrun():
    return distributed.is_available() and distributed.is_torchelastic_launched()


def process_rank():
    """The number of this process among those that torchrun connected, from 0; 0 without torchrun."""
    return distributed.get_rank() if started_by_torchrun() and distributed.is_initialized() else 0


def process_count():
    return distributed.get_world_size() if started_by_torchrun() and distributed.is_initialized() else 1


@contextlib.contextmanager
def talking():
    """Where processes talk to each other, the death of one is an error in the others: a UserError that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"process {process_rank()} has lost another one, which stopped or died ({first_line(error)}): "
                        "run the same command again to go on after the last whole epoch") from None


def stop(*_):
    """What a process does at SIGTERM, which torchrun sends to all others when one has died."""
    raise UserError(f"process {process_rank()} was stopped, as torchrun does when another one has stopped or died: "
                    "run the same command again to go on after the last whole epoch")


def add_up(tensor):
    """Put in place of a tensor its sum over all processes."""
    with talking():
        distributed.all_reduce(tensor)


def from_first(make):
    """What `make()` returns in the first process, in every process: it alone reads and writes the runs' folders."""
    box = [make() if process_rank() == 0 else None]
    if process_count() > 1:
        with talking():
            distributed.broadcast_object_list(box)
    return box[0]


def find_archives(source, data_dir):
    """Where torchvision's class `source` looks: the folder, {archive: MD5} and the names of what they unpack to."""
    if hasattr(source, "resources"):
        return data_dir / source.__name__ / "raw", dict(source.resources), [Path(n).stem for n, _ in source.resources]
    return data_dir, {source.filename: source.tgz_md5}, [source.base_folder]


def unpack(name, source, data_dir):
    """Unpack a data set next to its archives, downloading what is not there. What is there is never changed."""
    from torchvision.datasets.utils import check_integrity
    folder, archives, unpacked = find_archives(source, data_dir)
    if all((folder / item).exists() for item in unpacked):
        return
    folder.mkdir(parents=True, exist_ok=True)
    missing = [archive for archive in archives if not (folder / archive).exists()]
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=data_dir) as staging:  # so that files appear whole
        stage = staging / folder.relative_to(data_dir)
        stage.mkdir(parents=True, exist_ok=True)
        for archive in archives.keys() - missing:
            if not check_integrity(folder / archive, archives[archive]):
                raise UserError(f"{folder / archive} is cut short or not the original archive: move it away and put "
                                "the original in its place, or run again with a network to download it")
            shutil.copyfile(folder / archive, stage / archive)
        try:
            system_folder = Path(DATASETS[name].get("system_folder", staging))
            if len(missing) == len(archives) and all((system_folder / archive).exists() for archive in archives):
                for archive, item in zip(archives, unpacked):  # packed anew, so their MD5 sums are others
                    with gzip.open(system_folder / archive) as packed, open(stage / item, "wb") as file:
                        shutil.copyfileobj(packed, file)
            source(staging, download=True)
        except (RuntimeError, urllib.error.URLError, ConnectionError, TimeoutError, EOFError):
            raise UserError(f"{name} is not there and could not be downloaded: put {', '.join(missing)} "
                            f"into {folder}") from None
        for item in stage.iterdir():
            if not (folder / item.name).exists():
                os.replace(item, folder / item.name)


def check_unpacked(name, source, data_dir):
    """Raise a UserError that names the first unpacked file that is not what it should be."""
    from torchvision.datasets.utils import check_integrity
    folder, _, unpacked = find_archives(source, data_dir)
    if hasattr(source, "resources"):
        side = DATASETS[name].get("object_size", DATASETS[name]["image_size"])
        shapes = [shape for size in DATASETS[name]["sizes"] for shape in [(size, side, side), (size,)]]
        checks = [(folder / item, is_idx(folder / item, shape)) for item, shape in zip(unpacked, shapes, strict=True)]
    else:
        members = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        paths = [(folder / unpacked[0] / item, md5) for item, md5 in members]
        checks = [(path, check_integrity(path, md5)) for path, md5 in paths]
    for path, right in checks:
        if not right:
            raise UserError(f"{path} is cut short or not the original: move it away and run again, "
                            "and it is unpacked afresh from its archive")


def is_idx(path, shape):
    """Whether the file is, by header and size, an array of bytes of this shape in the IDX format."""
    header = struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape)
    with open(path, "rb") as file:
        return file.read(len(header)) == header and path.stat().st_size == len(header) + math.prod(shape)


def load_splits(name, data_dir, device):
    """The data set's splits on the device: {"train": Split, "val": Split, "test": Split}; of a cluttered one, the
    images that are put on canvases.

    The 5,000 validation images are drawn from the training archive by a generator of fixed seed: the same for every
    model and seed.
    """
    import torchvision
    source = getattr(torchvision.datasets, DATASETS[name]["source"])
    unpack(name, source, data_dir)
    check_unpacked(name, source, data_dir)

    def read(train):
        archive = source(data_dir, train=train)
        images = torch.as_tensor(archive.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)  # (N, C, H, W)
        return images.contiguous(), torch.as_tensor(archive.targets)

    def split(images, labels):
        return Split(images.to(device), labels.to(device))

    images, labels = read(train=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order[:VALIDATION_SIZE], order[VALIDATION_SIZE:]
    return {"train": split(images[train], labels[train]), "val": split(images[val], labels[val]),
            "test": split(*read(train=False))}


@functools.cache
def pixel_centers(height, width, device):
    """Rows x, y and 1 of all pixels (3, H W); the image reaches from -1 to 1. Made once, as pixel_statistics is."""
    x, y = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (width, height))
    return torch.stack([x.repeat(height), y.repeat_interleave(width), torch.ones(height * width, device=device)])


def augment(pixels, noise, settings):
    """Mirror and map affinely, each image by its own draw: pixels (B, C, H, W) from 0 to 255, background 0; noise (B, 7),
    -1 to 1."""
    if settings["flip"]:
        pixels = torch.where(noise[:, 6, None, None, None] < 0, pixels.flip(3), pixels)
    if not any(settings[name] for name in ("rotation", "scale", "shear", "shift")):
        return pixels
    if pixels.device.type == "mps":  # which has no bicubic interpolation
        return augment(pixels.cpu(), noise.cpu(), settings | dict(flip=False)).to(pixels.device)
    angle = math.radians(settings["rotation"]) * noise[:, 0]
    wide, tall = (1 + settings["scale"] * noise[:, 1:3]).unbind(1)
    slant = settings["shear"] * noise[:, 3]
    right, down = (2 * settings["shift"] / pixels.shape[-1] * noise[:, 4:6]).unbind(1)  # the image is 2 wide
    cos, sin = angle.cos(), angle.sin()
    # A point of the new image is looked up in the old one at rotate(slant(stretch(point))) + shift.
    theta = torch.stack([cos * wide, (cos * slant - sin) * tall, right,
                         sin * wide, (sin * slant + cos) * tall, down], dim=1).unflatten(1, (2, 3))
    height, width = pixels.shape[2:]
    grid = theta.flatten(0, 1) @ pixel_centers(height, width, pixels.device)  # F.affine_grid takes five times as long
    grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
    # Bilinear interpolation would blur the images that a model learns from, and not those that it is tested on.
    return F.grid_sample(pixels, grid, mode="bicubic", align_corners=False).clamp(0, 255)


@functools.cache
def pixel_statistics(dataset, device):
    """Mean and deviation (C, 1, 1) on the device, made once: at every step it would be a copy from the host."""
    return [torch.tensor(DATASETS[dataset][key], device=device).view(-1, 1, 1) for key in ("mean", "std")]


def normalize(pixels, dataset):
    """Pixels (B, C, H, W) from 0 to 255 -> mean 0 and deviation 1 over the training archive."""
    mean, std = pixel_statistics(dataset, pixels.device)
    return (pixels / 255 - mean) / std


def is_cluttered(settings):
    return "object_size" in DATASETS[settings["dataset"]]


def clutter(images, own, noise, split, settings):
    """Images (B, C, h, w) each somewhere on a canvas (B, C, H, W), with fragments of other images of the split; or as
    they are, where the data set is not cluttered.

    own (B,): which images of the split these are. noise (B, 2 + 5 D), from -1 to 1: for the place and D fragments.
    """
    if not is_cluttered(settings):
        return images
    size = DATASETS[settings["dataset"]]["image_size"]
    top, left = pick(noise[:, :2, None], size - images.shape[-1] + 1).unbind(1)
    canvas = images.new_zeros(*images.shape[:2], size, size)
    return add_fragments(paste(canvas, images.unsqueeze(1), top, left), own, noise[:, 2:], split, FRAGMENT)


def add_fragments(pixels, own, noise, split, side):
    """Paste squares, cut anywhere from other images of the split, anywhere onto pixels (B, C, H, W).

    noise (B, 5 D), from -1 to 1: for each fragment its image, where it is cut and where it is pasted.
    """
    if not noise.shape[1]:
        return pixels
    other, *places = noise.unflatten(1, (-1, 5)).unbind(2)  # (B, D) each
    count, channels, height, width = split.images.shape
    other = (own[:, None] + 1 + pick(other, count - 1)) % count
    sizes = [height, width, *pixels.shape[2:]]
    top, left, new_top, new_left = (pick(place, size - side + 1) for place, size in zip(places, sizes))
    cut = torch.arange(side, device=pixels.device)
    fragments = split.images[
        other[:, :, None, None, None], torch.arange(channels, device=pixels.device)[:, None, None],
        (top[:, :, None] + cut)[:, :, None, :, None], (left[:, :, None] + cut)[:, :, None, None, :]]
    return paste(pixels, fragments.type_as(pixels), new_top, new_left)


def pick(noise, count):
    """A whole number from 0 to count - 1 for each number of noise from -1 to 1."""
    return ((noise + 1) / 2 * count).long().clamp_max(count - 1)


def paste(pixels, pieces, top, left):
    """Add pieces (B, D, C, h, w) to pixels (B, C, H, W) at rows `top` and columns `left` (B, D), within 0 to 255."""
    height, width = (torch.arange(side, device=pixels.device) for side in pieces.shape[3:])
    rows, columns = top[:, :, None, None] + height[:, None], left[:, :, None, None] + width
    index = (rows * pixels.shape[3] + columns).flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1)  # (B, C, D h w)
    total = pixels.flatten(2).scatter_add(2, index, pieces.transpose(1, 2).flatten(2))
    return total.clamp(0, 255).view_as(pixels)


def corrupt(pixels, name, severity, own, split):
    """Damage pixels (B, C, H, W) from 0 to 255 as CORRUPTIONS says, the same way at every call; severity 0 is none.

    own (B,): which images of the split these are. The random numbers are those of the first of them and of the name,
    so that a higher severity is more of the same.
    """
    if severity == 0:
        return pixels
    if name == "shot_noise" and pixels.device.type == "mps":  # which has no Poisson distribution
        return corrupt(pixels.cpu(), name, severity, own, split).to(pixels.device)
    amount, device = CORRUPTIONS[name][severity - 1], pixels.device
    squares = round(4 * pixels[0, 0].numel() / 28**2)
    generator = torch.Generator(device).manual_seed(mix_seed(name, own[0].item()))
    if name == "gaussian_noise":
        return (pixels + 255 * amount * torch.randn(pixels.shape, generator=generator, device=device)).clamp(0, 255)
    if name == "impulse_noise":
        level = torch.rand(pixels.shape, generator=generator, device=device)
        return torch.where(level < amount / 2, 0.0, torch.where(level >= 1 - amount / 2, 255.0, pixels))
    if name == "shot_noise":
        return (torch.poisson(pixels / 255 * amount, generator) / amount * 255).clamp_max(255)
    if name == "occlusion":
        top, left = (pick(2 * torch.rand(len(pixels), squares, generator=generator, device=device) - 1,
                          size - amount + 1) for size in pixels.shape[2:])
        black = torch.full((1, 1, 1, amount, amount), -255.0, device=device)
        return paste(pixels, black.expand(len(pixels), squares, pixels.shape[1], -1, -1), top, left)
    if name == "distractors":
        noise = 2 * torch.rand(len(pixels), 5 * squares, generator=generator, device=device) - 1
        return add_fragments(pixels, own, noise, split, amount)
    blurs = []  # blur is a product with a matrix from either side, whose rows are Gaussians
    for side in pixels.shape[2:]:
        place = torch.arange(side, device=device)
        blurs.append((-0.5 * ((place - place[:, None]) / amount) ** 2).softmax(1))
    return blurs[0] @ pixels @ blurs[1].T


def mix_seed(*key):
    """A seed for any key, such as (seed, epoch, what for): a CPU generator heeds the low 32 bits of its seed alone."""
    return zlib.crc32(repr(key).encode())


def orthogonalize(matrices, steps=5):
    """Nearly U V' of every matrix U S V' in a list of stacks (B, m, n), by the Newton-Schulz iteration of Muon.

    A step makes (a + b A + c A^2) X of a matrix X, where A = X X'; of one taller than wide X (a + b A + c A^2), where
    A = X' X. These factors are polynomials of the first A, so A alone need be iterated, which is small, and those of
    equal size as one batch.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    result = list(matrices)
    for side in sorted({min(matrix.shape[1:]) for matrix in matrices}):
        members = [i for i, matrix in enumerate(matrices) if min(matrix.shape[1:]) == side]
        gram = torch.cat([x @ x.mT if x.shape[1] == side else x.mT @ x for x in (matrices[i] for i in members)])
        squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-14).view(-1, 1, 1)
        gram, product = gram / squared_norm, squared_norm.rsqrt()
        for _ in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor @ product if product.shape[1] > 1 else factor * product
            gram = factor @ gram @ factor
        for i, factor in zip(members, product.chunk(len(members))):
            result[i] = factor @ matrices[i] if matrices[i].shape[1] == side else matrices[i] @ factor
    return result


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of many seeds at once.

    The one parameter is (S, P): in each row a seed's weights, of the given shapes, one after the other. A convolution's
    (m, C, p, p) is a matrix (m, C p p).
    torch.optim.Muon does the same to single matrices, one by one and in bfloat16, and takes several times as long.
    """

    def __init__(self, params, shapes, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.shapes = [(rows, math.prod(columns)) for rows, *columns in shapes]
        self.sizes = [rows * columns for rows, columns in self.shapes]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (flat,) = group["params"]
            if "momentum_buffer" not in self.state[flat]:
                self.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
            average = self.state[flat]["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
            update = flat.grad.lerp(average, group["momentum"])  # Nesterov's
            matrices = [piece.unflatten(1, shape)
                        for piece, shape in zip(update.split(self.sizes, 1), self.shapes)]
            update = torch.cat([max(1, m / n) ** 0.5 * matrix.flatten(1)
                                for matrix, (m, n) in zip(orthogonalize(matrices), self.shapes)], dim=1)
            flat.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


# Models that differ in their seed alone, trained side by side; a single one is a stack of one. `flats` are what the
# optimizers train, each (S, P): a row a seed. `weights`, {name: (S, *shape)}, are views of them in the same order.
# `model` is the module, which has the weights of one seed at a time.
Stack = namedtuple("Stack", "model weights flats optimizers scaler")


def sort_parameters(model, optimizer):
    """The names of the parameters to train by how they are: {"muon": [...], "decayed": [...], "rest": [...]}."""
    matrices, parts = "muon" if optimizer == "muon" else "decayed", dict(muon=[], decayed=[], rest=[])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            single = parameter.ndim < 2 or name in ("cls_token", "pos_embed") or "lambda" in name
            parts["rest" if single else matrices].append(name)
    return {part: names for part, names in parts.items() if names}


def make_stack(settings, seeds, device):
    """The untrained models of these seeds as a Stack on the device."""
    models = [make_model(settings | dict(seed=seed)) for seed in seeds]
    parts, flats, weights = sort_parameters(models[0], settings["optimizer"]), {}, {}
    for part, names in parts.items():
        flats[part] = torch.stack([torch.cat([model.get_parameter(name).detach().flatten() for name in names])
                                   for model in models]).to(device)
        shapes = [models[0].get_parameter(name).shape for name in names]
        pieces = flats[part].split([shape.numel() for shape in shapes], 1)
        weights |= {name: piece.view(-1, *shape) for name, piece, shape in zip(names, pieces, shapes)}
    model = models[0].to(device)
    stack = Stack(model, weights, list(flats.values()), make_optimizers(flats, weights, parts, settings),
                  torch.amp.GradScaler(device.type, enabled=settings["amp"] == "float16"))
    show_seed(stack, 0)
    return stack


def make_optimizers(flats, weights, parts, settings):
    """AdamW, and Muon in front of it if so set; each group carries its peak rate as `peak_lr`.

    Learning rates are tensors: a CUDA graph would take a number for a constant.
    """
    device = flats["rest"].device
    lr, muon_lr, decay = settings["lr"], settings["muon_lr"], settings["weight_decay"]
    groups = [dict(params=[flats[part]], weight_decay=decay if part == "decayed" else 0.0, peak_lr=lr,
                   lr=torch.tensor(lr, device=device)) for part in ("decayed", "rest") if part in flats]
    adamw = torch.optim.AdamW(groups, fused=True, capturable=is_captured(settings, device))
    if "muon" not in flats:
        return [adamw]
    return [Muon([dict(params=[flats["muon"]], peak_lr=muon_lr)], [weights[name].shape[1:] for name in parts["muon"]],
                 torch.tensor(muon_lr, device=device), decay), adamw]


def show_seed(stack, row):
    """Let the stack's module have the weights of one of its seeds; they stay the stack's own."""
    for name, weight in stack.weights.items():
        stack.model.get_parameter(name).data = weight[row]


def map_model(model, weights, images):
    """The model with each seed's weights, {name: (S, *shape)}, on its own images: (S, B, C, H, W) -> logits (S, B,
    num_classes). Weights of a single seed come without the dimension S, and the model is not mapped."""
    def run(own, images):
        return functional_call(model, own, (images,))

    if len(images) == 1:
        return run(weights, images[0]).unsqueeze(0)
    return torch.vmap(run, randomness="different")(weights, images)


def training_pixels(split, index, noise, settings):
    """Images of the split, by index (B,), as a model is to see them, (B, C, H, W) from 0 to 255; noise (B, R)."""
    pixels = augment(split.images[index].float(), noise[:, :AUGMENTATION_NOISE], settings)
    return clutter(pixels, index, noise[:, AUGMENTATION_NOISE:], split, settings)


def make_step(stack, split, settings):
    """The training step, a function: indices (S, B) into the split and their noise (S, B, R) -> losses and correct
    answers (S,). Of several processes each takes its slice of the batch, and all take the same step by the sum of
    their gradients."""
    device, rank, processes = split.labels.device, process_rank(), process_count()
    amp = dict(device_type=device.type, dtype=getattr(torch, settings["amp"], None), enabled=settings["amp"] != "off")
    weights = [(weight[0] if len(weight) == 1 else weight).detach() for weight in stack.weights.values()]
    leaves = [weight.detach().requires_grad_() for weight in weights]  # the same memory, with gradients
    one = torch.ones((), device=device)

    def measure(weights, images, labels, share, scale):  # images (S, B, C, H, W), labels (S, B); each counts `share`
        with torch.autocast(**amp):
            logits = map_model(stack.model, dict(zip(stack.weights, weights)), images)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none",
                                     label_smoothing=settings["label_smoothing"]).view_as(labels).sum(1) * share
        return scale * losses.sum(), (losses, (logits.argmax(2) == labels).sum(1))

    def join(gradients):
        return torch.cat([gradient.reshape(len(stack.flats[0]), -1) for gradient in gradients], 1)  # (S, P)

    def differentiate(*batch):
        loss, (losses, correct) = measure(leaves, *batch)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return join(gradients), losses.detach(), correct

    def differentiate_at_once(*batch):  # forward and backward pass are one graph to the compiler, by autograd two
        gradients, (_, (losses, correct)) = grad_and_value(measure, has_aux=True)(weights, *batch)
        return join(gradients), losses, correct

    differentiate_whole = differentiate  # a whole batch; the last one of an epoch may be smaller, not worth compiling
    if settings["compile"]:
        # A copy of the code for each stack: torch.compile gives up after compiling the same code for 8 of them.
        differentiate_at_once.__code__ = differentiate_at_once.__code__.replace()
        # Its calls differ in the numbers alone, so that the guards, 6% of a step, need not be asked each time.
        differentiate_whole = torch.compile(differentiate_at_once, dynamic=False,
                                            options=dict(guard_filter_fn=lambda guards: [False] * len(guards)))

    def step(index, noise):
        batch = index.shape[1]
        index, noise = (part.tensor_split(processes, dim=1)[rank] for part in (index, noise))
        pixels = training_pixels(split, index.flatten(), noise.flatten(0, 1), settings)
        images, labels = normalize(pixels, settings["dataset"]).unflatten(0, index.shape), split.labels[index]
        gradient, losses, correct = (differentiate_whole if batch == settings["batch_size"] else differentiate)(
            images, labels, 1 / batch, stack.scaler.scale(one))
        if processes > 1:
            for tensor in (gradient, losses, correct):
                add_up(tensor)
        if settings["clip"]:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True) / stack.scaler.get_scale()  # one a seed
            gradient.mul_((settings["clip"] / (norms + 1e-6)).clamp_max(1.0))
        for flat, part in zip(stack.flats, gradient.split([flat.shape[1] for flat in stack.flats], 1)):
            flat.grad = part.contiguous()
        for optimizer in stack.optimizers:
            stack.scaler.step(optimizer)
        stack.scaler.update()
        return losses, correct

    return captured(step, settings["batch_size"]) if is_captured(settings, split.labels.device) else step


def is_captured(settings, device):
    """Whether the training step is a CUDA graph: not where it must wait for a GradScaler or for other processes."""
    return device.type == "cuda" and settings["compile"] and settings["amp"] != "float16" and process_count() == 1


def captured(step, batch_size):
    """The step as one CUDA graph, which is captured at the fourth whole batch.

    The first three run as they are, on a stream of their own, and so does any smaller batch: memory that is
    allocated or code that is compiled when first needed must be there before a graph is captured.
    """
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # in those three
    stream, graph, whole_batches, inputs, outputs = torch.cuda.Stream(), None, 0, None, None

    def run(*tensors):
        nonlocal graph, whole_batches, inputs, outputs
        if tensors[0].shape[1] != batch_size:
            return step(*tensors)
        whole_batches += 1
        if whole_batches <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = step(*tensors)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if graph is None:
            inputs, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs = step(*inputs)
        for own, new in zip(inputs, tensors):
            own.copy_(new)
        graph.replay()
        return outputs

    return run


def rate_factor(step, steps, warmup, decay):
    """The share of the peak rate at a step counted from 0: up over warmup * steps, flat, down over decay * steps."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


def set_rates(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(factor * group["peak_lr"])


def draw_epoch(seeds, epoch, split, settings):
    """Each seed's order of the images (S, N) and their noise (S, N, R), from -1 to 1, in an epoch counted from 1."""
    count, draws = len(split.labels), []
    width = AUGMENTATION_NOISE + (2 + 5 * settings["distractors"] if is_cluttered(settings) else 0)
    for seed in seeds:
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch, "order and augmentation"))
        draws.append((torch.randperm(count, generator=generator),
                      2 * torch.rand(count, width, generator=generator) - 1))
    return [torch.stack(part).to(split.labels.device) for part in zip(*draws)]


def train_epoch(stack, step, seeds, split, settings, epoch):
    """One pass over the training split by `step` of make_step; epoch counts from 1. Returns, on the CPU, the losses
    (S, steps), each batch's share of the split (steps,), the accuracies (S,) and the last factor of the rates."""
    device, count, batch_size = split.labels.device, len(split.labels), settings["batch_size"]
    order, noise = draw_epoch(seeds, epoch, split, settings)
    torch.manual_seed(mix_seed(*seeds, epoch, "dropout") + process_rank())
    steps = math.ceil(count / batch_size)
    losses, correct = torch.empty(len(seeds), steps, device=device), torch.zeros_like(order[:, 0])
    stack.model.train()
    with tqdm(total=count, desc=f"epoch {epoch}/{settings['epochs']}", unit=" images", leave=False,
              disable=None if process_rank() == 0 else True) as bar:  # None: no bar where the output is no terminal
        for number, batch in enumerate(zip(order.split(batch_size, 1), noise.split(batch_size, 1))):
            factor = rate_factor((epoch - 1) * steps + number, settings["epochs"] * steps, settings["warmup"],
                                 settings["decay"])
            set_rates(stack.optimizers, factor)
            losses[:, number], batch_correct = step(*batch)
            correct += batch_correct
            bar.update(batch[0].shape[1])
            if not bar.disable and number % 50 == 0:  # reading a loss waits for the device, so not at every step
                bar.set_postfix(loss=f"{losses[:, number].mean().item():.3f}",
                                accuracy=f"{correct.sum().item() / bar.n / len(seeds):.2%}")
    shares = torch.tensor([part.shape[1] / count for part in order.split(batch_size, 1)], dtype=torch.double)
    return losses.cpu().double(), shares, correct.cpu() / count, factor


def evaluation_pixels(split, settings):
    """A split in its own order: pairs of indices (B,) and pixels (B, C, H, W) from 0 to 255.

    The canvases of a cluttered data set are the same at every call, and those of more distractors have the same ones
    and more.
    """
    count, device = len(split.labels), split.labels.device
    generator = torch.Generator().manual_seed(mix_seed("canvases"))
    widths = [2, *[5] * settings["distractors"]] if is_cluttered(settings) else [0]
    noise = torch.cat([2 * torch.rand(count, width, generator=generator) - 1 for width in widths], 1).to(device)
    for index in torch.arange(count, device=device).split(EVALUATION_BATCH):
        yield index, clutter(split.images[index].float(), index, noise[index], split, settings)


def evaluation_batches(split, settings, corruption=None, severity=0):
    """A split in its own order: pairs of normalised images (B, C, H, W) and labels (B,)."""
    for index, pixels in evaluation_pixels(split, settings):
        images = normalize(corrupt(pixels, corruption, severity, index, split), settings["dataset"])
        yield from in_parts(images, split.labels[index])


def in_parts(*tensors):
    """Batches of what is to be evaluated, again in parts on a CPU: of those that fit its caches, canvases take half
    the time."""
    return zip(*(tensor.split(EVALUATION_BATCH // (8 if tensor.device.type == "cpu" else 1)) for tensor in tensors))


@torch.inference_mode()
def evaluate(model, split, settings, corruption=None, severity=0):
    """Loss and accuracy over all images of a split, in float32."""
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in evaluation_batches(split, settings, corruption, severity):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"], reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(split.labels), correct / len(split.labels)


@torch.inference_mode()
def measure_lambdas(model, split, settings):
    """The mean weight of the second branch over the images of a split: a float for each differential block."""
    model.eval()
    batches = [model.mean_lambdas(images) for images, _ in evaluation_batches(split, settings)]
    return [torch.stack(block).mean().item() for block in zip(*batches)]


def attention_conditions(settings):
    """What images the attention is measured on: {name: (settings, corruption, severity)}."""
    if is_cluttered(settings):
        counts = sorted({0, 4, 8, 16, settings["distractors"]})
        return ({f"{count}_distractors": (settings | dict(distractors=count), None, 0) for count in counts}
                | {"gaussian_noise_3": (settings, "gaussian_noise", 3)})
    return ({"clean": (settings, None, 0)}
            | {f"{name}_3": (settings, name, 3) for name in ("gaussian_noise", "distractors")})


def holds_ink(pixels, patch_size):
    """Which patches have any pixel that is not black: (B, C, H, W) -> (B, H W / patch_size^2)."""
    return F.max_pool2d(pixels.amax(1, keepdim=True), patch_size).flatten(1) > 0


def attention_figures(row, relevant, ink):
    """What the class token attends to, of each image and head: {figure: (B, H)}.

    row: its signed weights (B, H, 1 + P), the first that of itself. relevant, ink: patches with any of the object, and
    with anything at all, (B, P). Weight is absolute; shares of patches are of the weight on patches.
    """
    weight = F.normalize(row.abs(), p=1, dim=2)
    on_patches = F.normalize(weight[:, :, 1:], p=1, dim=2)
    return dict(
        irrelevant_share=(on_patches * ~relevant[:, None]).sum(2),
        uniform_share=(~relevant).float().mean(1, keepdim=True).expand(row.shape[:2]),
        ink_share=(on_patches * ink[:, None]).sum(2),
        entropy=-torch.xlogy(weight, weight).sum(2),
        negative_share=(weight * (row < 0)).sum(2),
        **{"lambda": 1 - row.sum(2)})


def signal_to_noise(irrelevant_share, uniform_share):
    """Weight a relevant patch over weight an irrelevant patch; 1 for uniform weight."""
    relevant, irrelevant = (1 - irrelevant_share) * uniform_share, irrelevant_share * (1 - uniform_share)
    return relevant / irrelevant if irrelevant else math.inf if relevant else math.nan


def attention_batches(split, settings, shown, corruption, severity):
    """A split in its own order, by settings `shown` of attention_conditions: normalised images (B, C, H, W), and which
    of their patches hold any of the object, and anything at all, (B, P)."""
    for (index, pixels), (_, alone) in zip(evaluation_pixels(split, shown),
                                           evaluation_pixels(split, shown | dict(distractors=0))):
        relevant, ink = (holds_ink(image, settings["patch_size"]) for image in (alone, pixels))
        images = normalize(corrupt(pixels, corruption, severity, index, split), settings["dataset"])
        yield from in_parts(images, relevant, ink)


@torch.inference_mode()
def measure_attention(model, split, settings):
    """The means of attention_figures over a split, in nats the entropy, and the signal_to_noise that follows from them:
    rows, one for a condition, block and head."""
    model.eval()
    rows = []
    for condition, shown in attention_conditions(settings).items():
        sums = [0.0] * settings["depth"]  # of (figures, H)
        for images, *masks in attention_batches(split, settings, *shown):
            for block, attention_map in enumerate(model.attention_maps(images)):
                figures = attention_figures(attention_map[:, :, 0], *masks)
                sums[block] += torch.stack([figure.sum(0) for figure in figures.values()]).cpu().double()
        for block, total in enumerate(sums):
            for head, means in enumerate((total / len(split.labels)).T.tolist()):
                row = dict(condition=condition, block=block, head=head, **dict(zip(figures, means)))
                row["lambda"] = round(row["lambda"], 6) + 0.0  # rounding errors of self-attention, and never -0
                row["signal_to_noise"] = signal_to_noise(row["irrelevant_share"], row["uniform_share"])
                rows.append(row)
    return rows


@torch.inference_mode()
def picture_attention(model, split, settings):
    """The first image of each of the first eight classes and its maps, as arrays: images (8, C, H, W) in bytes, labels
    (8,), and for each block map_0, map_1, ... (8, H, N, N) in float16."""
    model.eval()
    index, pixels = next(evaluation_pixels(split, settings))
    first = [(split.labels[index] == label).nonzero()[0].item() for label in range(8)]
    maps = model.attention_maps(normalize(pixels[first], settings["dataset"]))
    return dict(images=pixels[first].byte().cpu().numpy(), labels=split.labels[first].cpu().numpy(),
                **{f"map_{block}": attention_map.half().cpu().numpy() for block, attention_map in enumerate(maps)})


def analyse(folder, model, split, settings):
    """Write what corruption does to a trained model, noise.csv, and what it attends to, attention.csv and .npz."""
    rows = []
    for corruption, severity in itertools.product(CORRUPTIONS, range(1, 6)):
        loss, accuracy = evaluate(model, split, settings, corruption, severity)
        rows.append(dict(corruption=corruption, severity=severity, test_loss=loss, test_accuracy=accuracy))
    write_csv(folder / "noise.csv", rows)
    write_csv(folder / "attention.csv", measure_attention(model, split, settings))
    arrays = io.BytesIO()
    numpy.savez_compressed(arrays, **picture_attention(model, split, settings))
    write_whole(folder / "attention.npz", arrays.getvalue())


def pick_device(name):
    """The torch.device that --device names, or a UserError where this machine does not have it.

    Of processes that torchrun started, each takes a CUDA device of its own, and they are connected.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if started_by_torchrun() and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not there ({first_line(error)}): try --device auto") from None
    if device.type == "cuda":  # so that the same seed gives the same record
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if started_by_torchrun():
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"torchrun does not work on {device.type}: give --device cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        signal.signal(signal.SIGTERM, stop)
        with talking():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def pick_amp(name, device):
    """The precision that --amp names, with auto decided for the device."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"  # on a CPU half precision is slower than float32
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def resolve_settings(args, model, dataset, seed, device):
    """All that decides the outcome of a run, each flag by its name: what config.json and args.txt record."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(ViT).parameters.items()}
    defaults |= MODELS[model] | DATASETS[dataset]["defaults"]
    flags = {name: getattr(args, name) for name in SIZE_FLAGS + RECIPE_FLAGS}
    settings = {name: defaults[name] if value is None else value for name, value in flags.items()}
    return (dict(model=model, dataset=dataset, seed=seed) | settings
            | dict(device=device.type, amp=pick_amp(args.amp, device), compile=args.compile))


def make_model(settings):
    """The untrained model of a run, on the CPU, its weights drawn from the run's seed."""
    dataset = DATASETS[settings["dataset"]]
    torch.manual_seed(settings["seed"])
    return build_model(settings["model"], image_size=dataset["image_size"], in_channels=dataset["in_channels"],
                       num_classes=NUM_CLASSES, **{name: settings[name] for name in SIZE_FLAGS})


def empty_images(settings, *batch):
    """Images (*batch, C, H, W) of the run's data set, of no content."""
    dataset = DATASETS[settings["dataset"]]
    return torch.empty(*batch, dataset["in_channels"], dataset["image_size"], dataset["image_size"])


def measure_model(settings):
    """The model's parameters and the FLOPs of its forward pass for an image, without memory or arithmetic."""
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = make_model(settings)
            model(empty_images(settings, 1))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{settings['model']} on {settings['dataset']}: {first_line(error)}") from None
    return dict(parameters=sum(parameter.numel() for parameter in model.parameters()),
                flops_per_image=counter.get_total_flops())


def check_maps(settings):
    """Raise a UserError unless the attention of the model can be analysed."""
    with torch.device("meta"):
        for block in make_model(settings).blocks:
            if not hasattr(block.attn, "attention_map"):
                raise UserError(f"{settings['model']}: {type(block.attn).__name__} has no attention_map(x), which the "
                                "analysis after training needs: write it, or give --no-analysis")


def git_commit():
    """The commit of this code, with -dirty if a module differs from it; None outside a git checkout."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_together(contents):
    """Write files, {path: bytes}, each whole or not at all: a reader, or a run killed meanwhile, never sees a part.

    All are written under other names before the first gets its own, so that `read_checkpoints` can complete what a kill
    between the renames has left.
    """
    try:
        for path, content in contents.items():
            with open(partial_of(path), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(partial_of(path), path)
    except OSError as error:
        for path in contents:
            partial_of(path).unlink(missing_ok=True)
        error.filename = str(path)
        raise


def partial_of(path):
    return path.with_name(f".{path.name}.partial")


def write_whole(path, content):
    """Write bytes or text to a file, whole or not at all."""
    write_together({path: content.encode() if isinstance(content, str) else content})


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def using(path):
    """Where what a record holds is missing, damaged or foreign, the block fails: a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name the folder of a finished run that has it") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not of this run ({first_line(error)}): move it away, or give "
                        "--overwrite to train the run afresh") from None


@contextlib.contextmanager
def reading(path):
    """Yield what a record, .json or .pt, holds; an error of the block that uses it is an error of the file."""
    with using(path):
        if path.suffix == ".pt":
            yield torch.load(path, map_location="cpu", weights_only=True)
        else:
            yield json.loads(path.read_text())


def packed(content):
    """The bytes of a .pt file; kept in memory so that a full disk is an OSError, which torch.save makes another of."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_args(path, settings):
    """The flags that repeat a run, one a line, to be read again as @FILE."""
    def flag(name, value):
        name = name.replace("_", "-")
        return (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name} {value}"
    write_whole(path, "".join(flag(name, value) + "\n" for name, value in settings.items()))


def write_metrics(path, rows):
    """rows: a dict of numbers for each epoch; the file's columns are the keys."""
    write_csv(path, rows, lr="{:.8g}", seconds="{:.3f}", images_per_second="{:.0f}")


def write_csv(path, rows, number="{:.6f}", **formats):
    """rows: dicts, whose keys are the columns; formats: {column: format}, where it is not `number` for its floats."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: formats.get(name, number if isinstance(value, float) else "{}").format(value)
                         for name, value in row.items()})
    write_whole(path, table.getvalue())


@contextlib.contextmanager
def locked(folder):
    """Keep other processes off the folder of a run while it is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained by another process: wait for it, or give another "
                            "--runs-dir") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_finished(folder, settings):
    """Whether the run in the folder is finished; a UserError if what is there is not this run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: move it away or give another --runs-dir")
    if not (folder / "config.json").exists():
        strays = [name for name in RECORDS if (folder / name).exists()]
        if strays:
            raise UserError(f"{folder} has {strays[0]} but no config.json, so what made it is not known: "
                            "move it away or give --overwrite")
        return False
    with reading(folder / "config.json") as config:
        differing = [f"{name} is {config.get(name)} there and {value} here"
                     for name, value in settings.items() if config.get(name) != value]
    if differing:
        raise UserError(f"{folder} is of other settings ({'; '.join(differing)}): give those, another --runs-dir, "
                        "or --overwrite to lose it")
    return (folder / "summary.json").exists()


def read_checkpoints(folders):
    """What each seed of a stack goes on from: {seed: content of its last.pt, or no rows where it has not begun}."""
    checkpoints = {}
    for seed, folder in folders.items():
        checkpoints[seed] = dict(rows=[], best=dict(epoch=0, val_loss=math.inf))
        if (folder / "last.pt").exists():
            with reading(folder / "last.pt") as last:
                checkpoints[seed] = dict(last, rows=list(last["rows"]))
    furthest = max((len(last["rows"]) for last in checkpoints.values()), default=0)
    for seed, folder in folders.items():
        if len(checkpoints[seed]["rows"]) < furthest:
            with contextlib.suppress(Exception):  # no partial file, or no whole one: then this seed is just behind
                last = torch.load(partial_of(folder / "last.pt"), map_location="cpu", weights_only=True)
                if len(last["rows"]) == furthest:  # killed between the renames of write_together
                    os.replace(partial_of(folder / "last.pt"), folder / "last.pt")
                    checkpoints[seed] = last
    return checkpoints


def seed_state(optimizer, row):
    """A seed's row of all that an optimizer remembers: {number of the flat: {name: tensor}}."""
    return {number: {name: value[row].clone() if value.ndim else value for name, value in values.items()}
            for number, values in optimizer.state_dict()["state"].items()}


def load_stack(stack, checkpoints, folders):
    """Give a stack the state of these checkpoints, {seed: content of last.pt}, all of the same epoch."""
    for row, (seed, last) in enumerate(checkpoints.items()):
        with using(folders[seed] / "last.pt"):
            show_seed(stack, row)
            stack.model.load_state_dict(last["model"])
            stack.scaler.load_state_dict(last["scaler"])
    with using(folders[seed] / "last.pt"):
        for optimizer, *states in zip(stack.optimizers, *(last["optimizers"] for last in checkpoints.values()),
                                      strict=True):
            state = {number: {name: torch.stack([own[number][name] for own in states]) if value.ndim else value
                              for name, value in values.items()} for number, values in states[0].items()}
            optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))
    show_seed(stack, 0)


def train_stack(folders, settings, facts, checkpoints, splits, device, analysis):
    """Train runs that differ in their seed alone, {seed: folder}, from these checkpoints to their end; test them, and
    analyse them if so wanted."""
    seeds = list(checkpoints)
    rows, best = ({seed: last[key] for seed, last in checkpoints.items()} for key in ("rows", "best"))
    done = len(rows[seeds[0]])
    stack = make_stack(settings, seeds, device)
    step = make_step(stack, splits["train"], settings)
    if done:
        load_stack(stack, checkpoints, folders)
    for seed in seeds if process_rank() == 0 else []:
        if done:
            write_metrics(folders[seed] / "metrics.csv", rows[seed])
            print(f"{folders[seed]}: going on after epoch {done} of {settings['epochs']}", flush=True)
        else:
            own = settings | dict(seed=seed)
            write_json(folders[seed] / "config.json",
                       own | facts | dict(stack=len(seeds), processes=process_count()))
            write_args(folders[seed] / "args.txt", own)

    for epoch in range(done + 1, settings["epochs"] + 1):
        start = time.perf_counter()
        losses, shares, accuracies, factor = train_epoch(stack, step, seeds, splits["train"], settings, epoch)
        images_per_second = len(seeds) * len(splits["train"].labels) / (time.perf_counter() - start)
        if process_rank() > 0:
            continue
        for row, seed in enumerate(seeds):
            check_finite(folders[seed], epoch, losses[row])
            show_seed(stack, row)
            val_loss, val_accuracy = evaluate(stack.model, splits["val"], settings)
            check_finite(folders[seed], epoch, torch.tensor([val_loss]))
            lambdas = measure_lambdas(stack.model, splits["val"], settings)
            if val_loss < best[seed]["val_loss"]:
                best[seed] = dict(epoch=epoch, val_loss=val_loss, val_accuracy=val_accuracy)
                write_whole(folders[seed] / "best.pt", packed(seed_weights(stack, row)))
            rows[seed].append(dict(
                epoch=epoch, step=epoch * losses.shape[1], lr=factor * settings["lr"],
                train_loss=losses[row].dot(shares).item(), train_accuracy=accuracies[row].item(), val_loss=val_loss,
                val_accuracy=val_accuracy, seconds=math.nan, images_per_second=images_per_second,
                **{f"lambda_{block}": value for block, value in enumerate(lambdas)}))
        seconds = (time.perf_counter() - start) / len(seeds)
        for seed in seeds:
            rows[seed][-1]["seconds"] = seconds
        write_together({folders[seed] / "last.pt": packed(dict(
            model=seed_weights(stack, row), optimizers=[seed_state(optimizer, row) for optimizer in stack.optimizers],
            scaler=stack.scaler.state_dict(), rows=rows[seed], best=best[seed])) for row, seed in enumerate(seeds)})
        for seed in seeds:
            write_metrics(folders[seed] / "metrics.csv", rows[seed])
            print_epoch(folders[seed], settings, rows[seed][-1])

    for seed in seeds if process_rank() == 0 else []:
        test_run(folders[seed], stack.model, settings | dict(seed=seed), facts, rows[seed], best[seed], splits,
                 analysis)


def seed_weights(stack, row):
    """The state dict of one of a stack's models, in memory of its own."""
    show_seed(stack, row)
    return {name: weight.clone() for name, weight in stack.model.state_dict().items()}


def test_run(folder, model, settings, facts, rows, best, splits, analysis):
    """Test a run's best weights, analyse them if so wanted, and so finish the run."""
    with reading(folder / "best.pt") as weights:
        model.load_state_dict(weights)
    test_loss, test_accuracy = evaluate(model, splits["test"], settings)
    start = time.perf_counter()
    if analysis:
        analyse(folder, model, splits["test"], settings)
    analysis_seconds = time.perf_counter() - start
    epoch_seconds = [len(splits["train"].labels) / row["images_per_second"] for row in rows]
    steps = rows[-1]["step"] / len(rows)
    write_json(folder / "summary.json", dict(
        model=settings["model"], dataset=settings["dataset"], seed=settings["seed"], parameters=facts["parameters"],
        epochs=len(rows), best_epoch=best["epoch"], val_loss=best["val_loss"], val_accuracy=best["val_accuracy"],
        test_loss=test_loss, test_accuracy=test_accuracy, seconds=sum(row["seconds"] for row in rows),
        train_seconds=sum(epoch_seconds), analysis_seconds=analysis_seconds,
        milliseconds_per_step=1e3 * statistics.median(epoch_seconds) / steps,
        images_per_second=statistics.median(row["images_per_second"] for row in rows)))


def check_finite(folder, epoch, losses):
    """Stop the run if a loss is infinite or not a number; losses: those of the epoch's steps, or of validation."""
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        where = f"step {wrong[0] + 1} of {len(losses)}" if len(losses) > 1 else "validation"
        raise UserError(f"{folder}: the loss is {losses[wrong[0]].item()} at epoch {epoch}, {where}; the record and "
                        "checkpoints of the epochs before are kept: give a lower --lr or --muon-lr, and --overwrite")


def print_epoch(folder, settings, row):
    print(f"{folder.name}  epoch {row['epoch']:>{len(str(settings['epochs']))}}/{settings['epochs']}  "
          f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
          f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
          f"{row['images_per_second']:,.0f} images/s", flush=True)


def print_summary(folder):
    with reading(folder / "summary.json") as summary:
        figures = ("{parameters:,} parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f}  "
                   "test accuracy {test_accuracy:.2%}  {seconds:.0f} s").format(**summary)
    print(f"{figures}  {folder}", flush=True)


def name_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def why_alone(settings):
    """Why seeds of this model cannot be trained side by side, or None where they can."""
    if settings["amp"] == "float16":
        return "they would share the scale of their float16 gradients"
    with torch.device("meta"):
        model = make_model(settings)
        weights = {name: torch.empty(2, *parameter.shape) for name, parameter in model.named_parameters()}
        if list(model.buffers()) or not all(parameter.requires_grad for parameter in model.parameters()):
            return "they would share what is no trained parameter"
        try:
            map_model(model, weights, empty_images(settings, 2, 1))
        except RuntimeError as error:
            return f"the model cannot be mapped over them: {first_line(error)}"


def plan_stacks(args, device):
    """What is to be trained, checked as a whole: a list of (settings of the first seed, facts, {seed: folder})."""
    models = dict.fromkeys(name for given in args.model for name in (MODELS if given == "all" else [given]))
    for name in models:
        check_name("model", name, [*MODELS, "all"])
    plan, seeds = [], list(dict.fromkeys(args.seed))
    for dataset, model in itertools.product(dict.fromkeys(args.dataset), models):
        settings = resolve_settings(args, model, dataset, seeds[0], device)
        facts, size = measure_model(settings), args.stack or len(seeds)
        if args.analysis and not args.benchmark:
            check_maps(settings)
        reason = why_alone(settings) if min(size, len(seeds)) > 1 else None
        if reason:
            print(f"{model}: seeds are trained one after the other ({reason})", flush=True)
            size = 1
        plan += [(settings, facts, {seed: args.runs_dir / f"{dataset}-{model}-seed{seed}" for seed in part})
                 for part in (seeds[i:i + size] for i in range(0, len(seeds), size))]
    return plan


def unfinished(args, settings, folders):
    """Those of a stack's runs, {seed: folder}, that are still to be trained."""
    return {seed: folder for seed, folder in folders.items()
            if args.overwrite or not is_finished(folder, settings | dict(seed=seed))}


def begin_stack(args, settings, folders, locks):
    """Lock the folders and return what to train in them: a list of checkpoints, {seed: content of last.pt}, in which
    all are of the same epoch."""
    for folder in folders.values():
        locks.enter_context(locked(folder))
        for name in RECORDS if args.overwrite else []:
            (folder / name).unlink(missing_ok=True)
            partial_of(folder / name).unlink(missing_ok=True)
    parts = {}
    for seed, last in read_checkpoints(unfinished(args, settings, folders)).items():
        parts.setdefault(len(last["rows"]), {})[seed] = last
    return list(parts.values())


def train_all(args):
    """Train every combination of model, data set and seed; check all of them before the first starts."""
    device = pick_device(args.device)

    def prepare():
        plan = plan_stacks(args, device)
        names = {settings["dataset"] for settings, _, folders in plan if unfinished(args, settings, folders)}
        for name in names:
            splits[name] = load_splits(name, args.data_dir, device)
        return plan, names

    splits = {}
    plan, names = from_first(prepare)
    splits = splits or {name: load_splits(name, args.data_dir, device) for name in names}
    machine = dict(device_name=name_device(device), torch=torch.__version__, git_commit=git_commit())
    for settings, facts, folders in plan:
        with contextlib.ExitStack() as locks:
            for checkpoints in from_first(lambda: begin_stack(args, settings, folders, locks)):
                train_stack(folders, settings, facts | machine, checkpoints, splits[settings["dataset"]], device,
                            args.analysis)
        for folder in folders.values() if process_rank() == 0 else []:
            print_summary(folder)
    if process_count() > 1:
        distributed.destroy_process_group()


def evaluate_again(args):
    """Test the best weights of a finished run once more, set the figures next to those recorded, and analyse them."""
    folder, device = args.eval, pick_device(args.device)
    with reading(folder / "config.json") as config:
        check_name("model", config["model"], MODELS)
        check_name("data set", config["dataset"], DATASETS)
        settings = {name: config[name] for name in ["model", "dataset", "seed", *SIZE_FLAGS, *RECIPE_FLAGS]}
        model = make_model(settings).to(device)
    with reading(folder / "summary.json") as summary:
        recorded = summary["test_loss"], summary["test_accuracy"]
    with reading(folder / "best.pt") as weights:
        model.load_state_dict(weights)
    split = load_splits(settings["dataset"], args.data_dir, device)["test"]
    figures = evaluate(model, split, settings)
    for name, (loss, accuracy) in [("again", figures), ("recorded", recorded)]:
        print(f"{name:8}  test loss {loss:.6f}  test accuracy {accuracy:.2%}  {folder}")
    if args.analysis:
        with locked(folder):
            analyse(folder, model, split, settings)
        print(f"noise.csv, attention.csv and attention.npz are written into {folder}")


def make_contender(settings, seeds, splits, device):
    """A training step, and an evaluation of the validation split, as functions of nothing that can be timed."""
    stack = make_stack(settings, seeds, device)
    step = make_step(stack, splits["train"], settings)
    order, noise = draw_epoch(seeds, 1, splits["train"], settings)
    size = settings["batch_size"]
    batches = itertools.cycle([batch for batch in zip(order.split(size, 1), noise.split(size, 1))
                               if batch[0].shape[1] == size])

    def train():
        stack.model.train()
        set_rates(stack.optimizers, 1.0)
        step(*next(batches))

    return train, lambda: evaluate(stack.model, splits["val"], settings)


def seconds_of(function, device):
    """How long a call takes, what it started on the device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else int
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def time_in_turn(functions, device, rounds, calls):
    """Seconds of every call of each function. They take turns of several calls, so that all meet the same moods of the
    machine; the first call of a turn, which finds the caches full of another's data, is not counted."""
    times = [[] for _ in functions]
    for _ in tqdm(range(rounds), desc="timing", unit=" rounds", leave=False, disable=None):
        for own, function in zip(times, functions):
            own += [seconds_of(function, device) for _ in range(calls)][1:]
    return times


def measure_training_flops(settings):
    """FLOPs of the forward and backward pass of an image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make_model(settings)(empty_images(settings, 1)).sum().backward()
    return counter.get_total_flops()


class TensorMemory(TorchDispatchMode):
    """While it is entered, `peak` is the most bytes that new tensors have taken at a time."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.peak = {}, 0, 0  # bytes: {address of a storage: its size, 0 if it is not new}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self.count(result, is_new=True)
        return result

    def count(self, tensors, is_new):
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]:
            if storage._cdata not in self.bytes:
                self.bytes[storage._cdata] = storage.nbytes() * is_new
                self.now += self.bytes[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, address):
        self.now -= self.bytes.pop(address)


def peak_memory(function, device):
    """The most bytes that tensors take while the function runs, above what they took before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as memory:
        function()
    return memory.peak


def write_benchmark(args, device, name, rows, table):
    """Write the rows as CSV and the table as Markdown into --runs-dir, and print the table."""
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    machine = dict(device_name=name_device(device), threads=torch.get_num_threads(), torch=torch.__version__)
    write_csv(args.runs_dir / f"{name}.csv", [row | machine for row in rows], number="{:.6g}")
    write_whole(args.runs_dir / f"{name}.md", table)
    print(table, end="")


def markdown(header, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---", *["---:"] * (len(header) - 1)], *rows])


def benchmark_steps(args):
    """Time whole training steps, and evaluation, of every model and data set: of one seed and, where several are given,
    of their stack; as they are and, with --compile, compiled."""
    device, splits, rows, steps, evaluations = pick_device(args.device), {}, [], [], []
    for settings, facts, folders in plan_stacks(args, device):
        dataset = settings["dataset"]
        splits[dataset] = splits.get(dataset) or load_splits(dataset, args.data_dir, device)
        flops = measure_training_flops(settings)
        for seeds, compiled in itertools.product(dict.fromkeys([(settings["seed"],), tuple(folders)]),
                                                 dict.fromkeys([False, args.compile])):
            step, evaluation = make_contender(settings | dict(compile=compiled), seeds, splits[dataset], device)
            rows.append(dict(
                dataset=dataset, model=settings["model"], seeds=len(seeds), compiled=compiled,
                batch_size=settings["batch_size"], parameters=facts["parameters"], training_flops_per_image=flops,
                first_step_seconds=seconds_of(step, device)))
            steps.append(step)
            evaluations.append(evaluation)
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    *trainings, products = time_in_turn([*steps, lambda: matrix @ matrix], device, rounds=10, calls=16)
    peak, alone = 2 * side**3 / statistics.median(products), {}
    for row, training, evaluation in zip(rows, trainings, time_in_turn(evaluations, device, rounds=3, calls=3)):
        low, *_, high = statistics.quantiles(training, n=10)
        milliseconds = 1e3 * statistics.median(training)
        images_per_second = 1e3 * row["seeds"] * row["batch_size"] / milliseconds
        row.update(
            ms_per_step=milliseconds, ms_low=1e3 * low, ms_high=1e3 * high, ms_per_seed=milliseconds / row["seeds"],
            share_of_alone=milliseconds / row["seeds"] / alone.setdefault((row["dataset"], row["model"]), milliseconds),
            images_per_second=images_per_second,
            epoch_seconds=row["seeds"] * len(splits[row["dataset"]]["train"].labels) / images_per_second,
            evaluation_images_per_second=VALIDATION_SIZE / statistics.median(evaluation),
            peak_gflops=peak / 1e9, share_of_peak=images_per_second * row["training_flops_per_image"] / peak)
    write_benchmark(args, device, "benchmark", rows, markdown(
        ["model, data set", "seeds", "compiled", "ms a step (10% to 90%)", "ms a seed", "of one alone", "images/s",
         "s an epoch", "MFLOPs an image", "of the peak", "images/s evaluated", "s to the first step"],
        [[f"{row['model']}, {row['dataset']}", f"{row['seeds']}", "yes" if row["compiled"] else "no",
          f"{row['ms_per_step']:.1f} ({row['ms_low']:.1f} to {row['ms_high']:.1f})", f"{row['ms_per_seed']:.2f}",
          f"{row['share_of_alone']:.2f}", f"{row['images_per_second']:,.0f}", f"{row['epoch_seconds']:.1f}",
          f"{row['training_flops_per_image'] / 1e6:.2f}", f"{row['share_of_peak']:.1%}",
          f"{row['evaluation_images_per_second']:,.0f}", f"{row['first_step_seconds']:.1f}"] for row in rows]))


GROWTH = dict(dim=[32, 64, 128, 256], depth=[2, 4, 8], patch_size=[7, 6, 4, 2], batch_size=[32, 128, 512, 2048])


def benchmark_growth(args):
    """Time and weigh training steps of every model and data set while one size of theirs grows; MLP and head stay four
    times as wide as the tokens."""
    device, splits, rows, steps = pick_device(args.device), {}, [], []
    for settings, _, _ in plan_stacks(args, device):
        dataset = settings["dataset"]
        splits[dataset] = splits.get(dataset) or load_splits(dataset, args.data_dir, device)
        for size, values in GROWTH.items():
            for value in values:
                own = settings | {size: value}
                if size == "dim":
                    own |= dict(mlp_dim=4 * value, head_hidden_dim=4 * value)
                side = DATASETS[dataset]["image_size"]
                tokens = (side // own["patch_size"]) ** 2 + 1
                if side % own["patch_size"] or tokens > 257:
                    continue
                step, _ = make_contender(own, [own["seed"]], splits[dataset], device)
                step()
                rows.append(dict(dataset=dataset, model=own["model"], size="tokens" if size == "patch_size" else size,
                                 value=tokens if size == "patch_size" else value,
                                 peak_megabytes=peak_memory(step, device) / 2**20))
                steps.append(step)
    for row, times in zip(rows, time_in_turn(steps, device, rounds=4, calls=4)):
        row.update(ms_per_step=1e3 * statistics.median(times))

    lines = []
    for key, group in itertools.groupby(rows, key=lambda row: (row["size"], row["dataset"], row["model"])):
        group = list(group)
        values = [math.log(row["value"]) for row in group]
        exponents = [statistics.linear_regression(values, [math.log(row[figure]) for row in group]).slope
                     for figure in ("ms_per_step", "peak_megabytes")]
        lines.append([key[0], f"{key[2]}, {key[1]}", ", ".join(f"{row['value']}" for row in group),
                      ", ".join(f"{row['ms_per_step']:.1f}" for row in group), f"{exponents[0]:.2f}",
                      ", ".join(f"{row['peak_megabytes']:.0f}" for row in group), f"{exponents[1]:.2f}"])
    write_benchmark(args, device, "growth", rows, markdown(
        ["what grows", "model, data set", "from, to", "ms a step", "exponent", "peak MB", "exponent"],
        sorted(lines, key=lambda line: list(GROWTH).index(line[0].replace("tokens", "patch_size")))))


def keep_freed_memory():
    """Have glibc keep the memory of one step for the next: to give it back and take it again costs a stack up to
    a fifth of its step in page faults."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    args = parse_flags(argv)
    keep_freed_memory()
    try:
        if (args.eval or args.benchmark) and started_by_torchrun():
            raise UserError("--eval and --benchmark take one process: leave out torchrun")
        if args.eval:
            evaluate_again(args)
        elif args.benchmark:
            dict(steps=benchmark_steps, growth=benchmark_growth)[args.benchmark](args)
        else:
            train_all(args)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error}: nothing written before is lost; put it right and run the same command again to go on"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            problem = ("out of memory: choose a smaller --batch-size, --stack, --dim or --depth, or a larger "
                       "--patch-size")
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = (f"--compile does not work here ({first_line(error)}): it needs a C++ compiler such as g++, on "
                       "CUDA Triton; leave it out")
        else:
            raise
    except KeyboardInterrupt:
        print("train.py: interrupted: run the same command again to go on after the last whole epoch", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"train.py: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
