"""Train the compact vision transformers of vit.py and leave a record of every epoch.

    python train.py --model vitdiff --dataset mnist
    python train.py --model all --dataset mnist fashionmnist --seed 0 1 2 3 4

A run is a folder, runs/mnist-vitdiff-seed0: args.txt, config.json, metrics.csv, summary.json, best.pt, last.pt.
The same command run again skips what is finished and goes on, exactly, with what was broken off.
"""

import argparse
import contextlib
import csv
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
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import zlib
from collections import namedtuple
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes off the same run
    fcntl = None

# What each data set is, and `defaults`, the flags whose default depends on it. Mean and deviation are those of the
# training archive's pixels, from 0 to 1. Augmentation keeps the class: a mirrored garment is one, a mirrored digit not.
DIGITS = dict(epochs=20, patch_size=7, rotation=12.0, scale=0.12, shear=0.12, shift=2.5, flip=False)
DATASETS = {
    "mnist": dict(
        source="MNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.1307], std=[0.3081],
        defaults=DIGITS),
    "fashionmnist": dict(
        source="FashionMNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.2860], std=[0.3530],
        defaults=dict(epochs=30, patch_size=7, rotation=3.0, scale=0.05, shear=0.05, shift=0.5, flip=True),
        system_folder="/usr/share/datasets/fashion-mnist"),  # of Debian's package dataset-fashion-mnist
    "kmnist": dict(
        source="KMNIST", image_size=28, in_channels=1, sizes=(60_000, 10_000), mean=[0.1918], std=[0.3483],
        defaults=DIGITS),
    "cifar10": dict(
        source="CIFAR10", image_size=32, in_channels=3, sizes=(50_000, 10_000),
        mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616],
        defaults=dict(epochs=30, patch_size=4, rotation=0.0, scale=0.0, shear=0.0, shift=4.0, flip=True)),
}
NUM_CLASSES = 10
VALIDATION_SIZE = 5_000
EVALUATION_BATCH = 1_000
NO_AUGMENTATION = dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False)
SIZE_FLAGS = ["patch_size", "dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "patch_norm", "qkv_bias",
              "dropout"]
RECIPE_FLAGS = ["epochs", "batch_size", "optimizer", "lr", "muon_lr", "weight_decay", "warmup", "decay", "clip",
                "label_smoothing", *NO_AUGMENTATION]
RECORDS = ["summary.json", "config.json", "args.txt", "metrics.csv", "best.pt", "last.pt"]


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
                       help="muon is Muon for the matrices of the blocks and AdamW for the rest (default: %(default)s)")
    group.add_argument("--lr", type=rate, default=3e-3, metavar="X", help="peak of AdamW (default: %(default)s)")
    group.add_argument("--muon-lr", type=rate, default=1e-2, metavar="X", help="peak of Muon (default: %(default)s)")
    group.add_argument("--weight-decay", type=rate, default=0.1, metavar="X",
                       help="decoupled; not on norms, biases, tokens, lambda (default: %(default)s)")
    group.add_argument("--warmup", type=share, default=0.05, metavar="X",
                       help="share of the steps in which the learning rate rises (default: %(default)s)")
    group.add_argument("--decay", type=share, default=0.7, metavar="X",
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
    group.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="default: %(default)s")
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    group.add_argument("--overwrite", action="store_true", help="start afresh where a run exists")
    group.add_argument("--eval", type=Path, metavar="RUN",
                       help="test a finished run's best.pt again (takes --device and --data-dir alone)")
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
        for flag, path in [("--data-dir", args.data_dir), ("--runs-dir", args.runs_dir)]:
            if path.exists() and not path.is_dir():
                raise UserError(f"argument {flag}: {path} is a file: name a folder")
        for name, value in vars(args).items():
            if args.eval and name not in ("eval", "device", "data_dir") and value != parser.get_default(name):
                raise UserError(f"--eval takes everything else from the run: leave out --{name.replace('_', '-')}")
    except UserError as error:
        parser.error(str(error))
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        parser.error(f"an @file does not hold flags ({error}): write one flag and its values a line")
    return args


if __name__ == "__main__":
    parse_flags()  # so that --help and a wrong flag are answered before the seconds that importing torch takes

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from vit import MODELS, ViT, build_model

Split = namedtuple("Split", "images labels")  # uint8 (N, C, H, W) and int64 (N,)


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
        side = DATASETS[name]["image_size"]
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
    """The data set's splits on the device: {"train": Split, "val": Split, "test": Split}.

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


def augment(pixels, noise, settings):
    """Mirror and map affinely, each image by its own draw: pixels (B, C, H, W), background 0; noise (B, 7), -1 to 1."""
    if settings["flip"]:
        pixels = torch.where(noise[:, 6, None, None, None] < 0, pixels.flip(3), pixels)
    if not any(settings[name] for name in ("rotation", "scale", "shear", "shift")):
        return pixels
    angle = math.radians(settings["rotation"]) * noise[:, 0]
    width, height = (1 + settings["scale"] * noise[:, 1:3]).unbind(1)
    slant = settings["shear"] * noise[:, 3]
    right, down = (2 * settings["shift"] / pixels.shape[-1] * noise[:, 4:6]).unbind(1)  # the image is 2 wide
    cos, sin = angle.cos(), angle.sin()
    # A point of the new image is looked up in the old one at rotate(slant(stretch(point))) + shift.
    theta = torch.stack([cos * width, (cos * slant - sin) * height, right,
                         sin * width, (sin * slant + cos) * height, down], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


@functools.cache
def pixel_statistics(dataset, device):
    """Mean and deviation (C, 1, 1) on the device, made once: at every step it would be a copy from the host."""
    return [torch.tensor(DATASETS[dataset][key], device=device).view(-1, 1, 1) for key in ("mean", "std")]


def normalize(pixels, dataset):
    """Pixels (B, C, H, W) from 0 to 255 -> mean 0 and deviation 1 over the training archive."""
    mean, std = pixel_statistics(dataset, pixels.device)
    return (pixels / 255 - mean) / std


def mix_seed(*key):
    """A seed for any key, such as (seed, epoch, what for): a CPU generator heeds the low 32 bits of its seed alone."""
    return zlib.crc32(repr(key).encode())


def make_optimizers(model, settings):
    """AdamW, and Muon in front of it if so set; each group carries its peak rate as `peak_lr`."""
    matrices, block_matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in ("cls_token", "pos_embed") or "lambda" in name:
            rest.append(parameter)
        elif name.startswith("blocks.") and parameter.ndim == 2 and settings["optimizer"] == "muon":
            block_matrices.append(parameter)
        else:
            matrices.append(parameter)
    lr, muon_lr, decay = settings["lr"], settings["muon_lr"], settings["weight_decay"]
    adamw = torch.optim.AdamW([dict(params=matrices, weight_decay=decay, peak_lr=lr),
                               dict(params=rest, weight_decay=0.0, peak_lr=lr)], lr=lr, fused=True)
    if not block_matrices:
        return [adamw]
    return [torch.optim.Muon([dict(params=block_matrices, peak_lr=muon_lr)], lr=muon_lr, weight_decay=decay), adamw]


def rate_factor(step, steps, warmup, decay):
    """The share of the peak rate at a step counted from 0: up over warmup * steps, flat, down over decay * steps."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


def train_epoch(model, optimizers, scaler, split, settings, epoch):
    """One pass over the training split; epoch counts from 1. Returns the losses (steps,) on the CPU, each batch's
    share of the split (steps,), the accuracy and the last factor of the learning rates."""
    device, count, batch_size = split.labels.device, len(split.labels), settings["batch_size"]
    draw = torch.Generator().manual_seed(mix_seed(settings["seed"], epoch, "order and augmentation"))
    order = torch.randperm(count, generator=draw).to(device)
    noise = (2 * torch.rand(count, 7, generator=draw) - 1).to(device)
    torch.manual_seed(mix_seed(settings["seed"], epoch, "dropout"))
    steps = math.ceil(count / batch_size)
    losses, correct = [], torch.zeros((), dtype=torch.long, device=device)
    model.train()
    with tqdm(total=count, desc=f"epoch {epoch}/{settings['epochs']}", unit=" images", leave=False,
              disable=None) as bar:  # None: no bar where the output is no terminal
        for step, (index, wobble) in enumerate(zip(order.split(batch_size), noise.split(batch_size))):
            factor = rate_factor((epoch - 1) * steps + step, settings["epochs"] * steps, settings["warmup"],
                                 settings["decay"])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * group["peak_lr"]

            images = normalize(augment(split.images[index].float(), wobble, settings), settings["dataset"])
            labels = split.labels[index]
            with torch.autocast(device.type, getattr(torch, settings["amp"], None), enabled=settings["amp"] != "off"):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if settings["clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

            losses.append(loss.detach())
            correct += (logits.argmax(1) == labels).sum()
            bar.update(len(index))
            if not bar.disable and step % 50 == 0:  # reading a loss waits for the device, so not at every step
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{correct.item() / bar.n:.2%}")
    shares = torch.tensor([len(index) / count for index in order.split(batch_size)], dtype=torch.double)
    return torch.stack(losses).cpu().double(), shares, correct.item() / count, factor


def evaluation_batches(split, settings):
    """A split in its own order: pairs of normalised images (B, C, H, W) and labels (B,)."""
    for images, labels in zip(split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH)):
        yield normalize(images.float(), settings["dataset"]), labels


@torch.inference_mode()
def evaluate(model, split, settings):
    """Loss and accuracy over all images of a split, in float32."""
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in evaluation_batches(split, settings):
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


def pick_device(name):
    """The torch.device that --device names, or a UserError where this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not there ({first_line(error)}): try --device auto") from None
    if device.type == "cuda":  # so that the same seed gives the same record
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
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
            | dict(device=device.type, amp=pick_amp(args.amp, device)))


def make_model(settings):
    """The untrained model of a run, on the CPU, its weights drawn from the run's seed."""
    dataset = DATASETS[settings["dataset"]]
    torch.manual_seed(settings["seed"])
    return build_model(settings["model"], image_size=dataset["image_size"], in_channels=dataset["in_channels"],
                       num_classes=NUM_CLASSES, **{name: settings[name] for name in SIZE_FLAGS})


def measure_model(settings):
    """The model's parameters and the FLOPs of its forward pass for an image, without memory or arithmetic."""
    dataset = DATASETS[settings["dataset"]]
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = make_model(settings)
            model(torch.empty(1, dataset["in_channels"], dataset["image_size"], dataset["image_size"]))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{settings['model']} on {settings['dataset']}: {first_line(error)}") from None
    return dict(parameters=sum(parameter.numel() for parameter in model.parameters()),
                flops_per_image=counter.get_total_flops())


def git_commit():
    """The commit of this code, with -dirty if a module differs from it; None outside a git checkout."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_whole(path, content):
    """Write bytes or text to a file whole or not at all: a reader, or a run killed meanwhile, never sees a part."""
    content = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def reading(path, device=None):
    """Yield what a record, .json or .pt, holds.

    Where it is missing, damaged or foreign, reading it or the block that uses it fails: that becomes a UserError that
    names the file.
    """
    try:
        if path.suffix == ".pt":
            yield torch.load(path, map_location=device, weights_only=True)
        else:
            yield json.loads(path.read_text())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name the folder of a finished run that has it") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not of this run ({first_line(error)}): move it away, or give "
                        "--overwrite to train the run afresh") from None


def save(path, content):
    buffer = io.BytesIO()  # so that a full disk is an OSError, which torch.save makes something else of
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def write_args(path, settings):
    """The flags that repeat a run, one a line, to be read again as @FILE."""
    def flag(name, value):
        name = name.replace("_", "-")
        return (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name} {value}"
    write_whole(path, "".join(flag(name, value) + "\n" for name, value in settings.items()))


def write_metrics(path, rows):
    """rows: a dict of numbers for each epoch; the file's columns are the keys."""
    formats = dict(lr="{:.8g}", seconds="{:.3f}", images_per_second="{:.0f}", epoch="{}", step="{}")
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: formats.get(name, "{:.6f}").format(value) for name, value in row.items()} for row in rows)
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


def train_run(folder, settings, facts, splits, device):
    """Train one run to its end, from its start or from last.pt, and test it."""
    model = make_model(settings).to(device)
    optimizers = make_optimizers(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "float16")
    rows, best = [], dict(epoch=0, val_loss=math.inf)
    if (folder / "last.pt").exists():
        with reading(folder / "last.pt", device) as last:
            model.load_state_dict(last["model"])
            for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            scaler.load_state_dict(last["scaler"])
            rows, best = last["rows"], last["best"]
        write_metrics(folder / "metrics.csv", rows)
        print(f"{folder}: going on after epoch {len(rows)} of {settings['epochs']}", flush=True)
    else:
        write_json(folder / "config.json", settings | facts)
        write_args(folder / "args.txt", settings)

    for epoch in range(len(rows) + 1, settings["epochs"] + 1):
        start = time.perf_counter()
        losses, shares, accuracy, factor = train_epoch(model, optimizers, scaler, splits["train"], settings, epoch)
        train_seconds = time.perf_counter() - start
        check_finite(folder, epoch, losses)
        val_loss, val_accuracy = evaluate(model, splits["val"], settings)
        check_finite(folder, epoch, torch.tensor([val_loss]))
        lambdas = measure_lambdas(model, splits["val"], settings)
        if val_loss < best["val_loss"]:
            best = dict(epoch=epoch, val_loss=val_loss, val_accuracy=val_accuracy)
            save(folder / "best.pt", model.state_dict())
        rows.append(dict(
            epoch=epoch, step=epoch * len(losses), lr=factor * settings["lr"], train_loss=losses.dot(shares).item(),
            train_accuracy=accuracy, val_loss=val_loss, val_accuracy=val_accuracy,
            seconds=time.perf_counter() - start, images_per_second=len(splits["train"].labels) / train_seconds,
            **{f"lambda_{block}": value for block, value in enumerate(lambdas)}))
        save(folder / "last.pt", dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                                      scaler=scaler.state_dict(), rows=rows, best=best))
        write_metrics(folder / "metrics.csv", rows)
        print_epoch(folder, settings, rows[-1])

    with reading(folder / "best.pt", device) as weights:
        model.load_state_dict(weights)
    test_loss, test_accuracy = evaluate(model, splits["test"], settings)
    epoch_seconds = [len(splits["train"].labels) / row["images_per_second"] for row in rows]
    steps = rows[-1]["step"] / len(rows)
    write_json(folder / "summary.json", dict(
        model=settings["model"], dataset=settings["dataset"], seed=settings["seed"], parameters=facts["parameters"],
        epochs=len(rows), best_epoch=best["epoch"], val_loss=best["val_loss"], val_accuracy=best["val_accuracy"],
        test_loss=test_loss, test_accuracy=test_accuracy, seconds=sum(row["seconds"] for row in rows),
        train_seconds=sum(epoch_seconds), milliseconds_per_step=1e3 * statistics.median(epoch_seconds) / steps,
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


def train_all(args):
    """Train every combination of model, data set and seed; check all of them before the first starts."""
    device = pick_device(args.device)
    models = [name for given in args.model for name in (MODELS if given == "all" else [given])]
    for name in models:
        check_name("model", name, [*MODELS, "all"])
    runs, facts = {}, {}
    for dataset, model, seed in itertools.product(args.dataset, models, args.seed):
        settings = resolve_settings(args, model, dataset, seed, device)
        if (dataset, model) not in facts:
            facts[dataset, model] = measure_model(settings)
        runs[args.runs_dir / f"{dataset}-{model}-seed{seed}"] = settings
    unfinished = {settings["dataset"] for folder, settings in runs.items()
                  if args.overwrite or not is_finished(folder, settings)}
    splits = {name: load_splits(name, args.data_dir, device) for name in unfinished}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = dict(device_name=device_name, torch=torch.__version__, git_commit=git_commit())
    for folder, settings in runs.items():
        dataset, model = settings["dataset"], settings["model"]
        with locked(folder):
            for name in RECORDS if args.overwrite else []:
                (folder / name).unlink(missing_ok=True)
            if not is_finished(folder, settings):
                train_run(folder, settings, facts[dataset, model] | machine, splits[dataset], device)
        print_summary(folder)


def evaluate_again(args):
    """Test the best weights of a finished run once more and set the figures next to those recorded."""
    folder, device = args.eval, pick_device(args.device)
    with reading(folder / "config.json") as config:
        check_name("model", config["model"], MODELS)
        model = make_model(config).to(device)
    with reading(folder / "summary.json") as summary:
        recorded = summary["test_loss"], summary["test_accuracy"]
    with reading(folder / "best.pt", device) as weights:
        model.load_state_dict(weights)
    figures = evaluate(model, load_splits(config["dataset"], args.data_dir, device)["test"], config)
    for name, (loss, accuracy) in [("again", figures), ("recorded", recorded)]:
        print(f"{name:8}  test loss {loss:.6f}  test accuracy {accuracy:.2%}  {folder}")


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    args = parse_flags(argv)
    try:
        evaluate_again(args) if args.eval else train_all(args)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error}: nothing written before is lost; put it right and run the same command again to go on"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        problem = "out of memory: choose a smaller --batch-size, --dim or --depth, or a larger --patch-size"
    except KeyboardInterrupt:
        print("train.py: interrupted: run the same command again to go on after the last whole epoch", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"train.py: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
