"""What the models see: data sets, splits, augmentation, cluttered canvases, corruptions, normalisation.

Pixels in, pixels out: a whole split lives on the device in bytes, and batches are cut, augmented and normalised there.
All random numbers are drawn on the CPU from seeds of their own, so that they are the same on every device.
A data set of one's own is a row of DATASETS with `load`, a function of the data folder: see complete_row.
"""

import functools
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections import namedtuple
from http.client import HTTPException
from pathlib import Path

import numpy
import torch
from torch.nn import functional as F

import records
from records import UserError

Split = namedtuple("Split", "images labels")  # uint8 (N, C, H, W) and int64 (N,)

# What each data set is, and `defaults`, the settings whose default depends on it. Mean and deviation are those of the
# training archive's pixels, from 0 to 1. Augmentation keeps the class: a mirrored garment is one, a mirrored digit not.
DIGITS = dict(epochs=20, batch_size=128, lr=6e-3, muon_lr=5e-3, weight_decay=0.1, patch_size=7, distractors=0,
              rotation=15.0, scale=0.15, shear=0.15, shift=1.0, flip=False, brightness=0.0)
# A cluttered data set: each image somewhere on a larger canvas, with fragments of others, as in Mnih et al. 2014
# (arXiv 1406.6247); `object_size` is the image's own size. What is augmented is the image, not the canvas: the canvases
# are new in every epoch, and without affine maps of the images on them `vit` learns faster.
CLUTTER = dict(epochs=20, batch_size=128, lr=3e-3, muon_lr=1e-2, weight_decay=0.03, patch_size=6, distractors=4,
               rotation=0.0, scale=0.0, shear=0.0, shift=0.0)
DATASETS = {
    "mnist": dict(
        source="MNIST", num_classes=10, image_size=28, in_channels=1, sizes=(60_000, 10_000),
        mean=[0.1307], std=[0.3081], defaults=DIGITS),
    "fashionmnist": dict(
        source="FashionMNIST", num_classes=10, image_size=28, in_channels=1, sizes=(60_000, 10_000),
        mean=[0.2860], std=[0.3530],
        defaults=dict(epochs=30, batch_size=256, lr=6e-3, muon_lr=8e-3, weight_decay=0.1, patch_size=7, distractors=0,
                      rotation=3.0, scale=0.05, shear=0.05, shift=0.5, flip=True, brightness=0.0)),
    "kmnist": dict(
        source="KMNIST", num_classes=10, image_size=28, in_channels=1, sizes=(60_000, 10_000),
        mean=[0.1918], std=[0.3483], defaults=DIGITS),
    "cifar10": dict(
        source="CIFAR10", num_classes=10, image_size=32, in_channels=3, sizes=(50_000, 10_000),
        mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616],
        defaults=dict(epochs=30, batch_size=64, lr=6e-3, muon_lr=1e-2, weight_decay=0.1, patch_size=4, distractors=0,
                      rotation=0.0, scale=0.0, shear=0.0, shift=2.0, flip=True, brightness=0.0)),
}
DATASETS |= {f"cluttered{name}": DATASETS[name] | dict(
    image_size=60, object_size=28, mean=[mean], std=[std], defaults=DATASETS[name]["defaults"] | CLUTTER)
    for name, mean, std in [("mnist", 0.0430, 0.1876), ("fashionmnist", 0.0879, 0.2391)]}
VALIDATION_SIZE = 5_000  # or a tenth of the training archive, where that is less
EVALUATION_BATCH = 1_000
FRAGMENT = 8  # pixels a side of a distractor on a canvas
AUGMENTATION_DRAWS = 7  # random numbers an image
# How test images are corrupted, at severities 1 to 5: {kind: (amounts for grey images, for colour images)}. The first
# six are of MNIST-C (Mu and Gilmer 2019, arXiv 1906.02337; all are in its program, shot noise, impulse noise and
# brightness also in its test set) and of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261). Unlike in their
# published images, pixels are not rounded to bytes; a blur is renormalised at the border, and has both directions.
CORRUPTIONS = {
    "gaussian_noise": ([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.1]),  # deviation, white being 1
    "shot_noise": ([60, 25, 12, 5, 3], [500, 250, 100, 75, 50]),  # photons that a white pixel has on average
    "impulse_noise": ([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),  # pixels turned black or white
    "gaussian_blur": ([1, 2, 3, 4, 6], [0.4, 0.6, 0.7, 0.8, 1]),  # deviation in pixels
    "brightness": ([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),  # added to the value of HSV, white being 1
    "contrast": ([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),  # what is left of it, around the mean
    # Our own.
    "occlusion": 2 * ([2, 4, 6, 8, 10],),  # pixels a side of black squares, 4 for each 28x28 pixels
    "distractors": 2 * ([2, 4, 6, 8, 10],),  # the same of fragments of other images of the split
    "image_offset": 2 * ([0.05, 0.1, 0.15, 0.2, 0.25],),  # deviation of what is added to all pixels of an image
    "patch_offset": 2 * ([0.05, 0.1, 0.15, 0.2, 0.25],),  # the same of a patch, each patch its own
}
# Noise that is clipped at black and white changes the mean of a pixel, too. Its shift alone is each pixel replaced by
# the mean of what the noise makes of it; its fluctuation alone is the noise less that. So, to rounding,
# noise - pixels = (shift - pixels) + (fluctuation - pixels).
NOISES = ["gaussian_noise", "shot_noise", "impulse_noise"]
CORRUPTIONS |= {f"{noise}_{part}": CORRUPTIONS[noise] for noise in NOISES for part in ("shift", "fluctuation")}
# Clipping at black also takes two thirds of the variance: of s^2 it leaves s^2 (1/2 - 1 / (2 pi)).
CORRUPTIONS["gaussian_noise_unclipped"] = CORRUPTIONS["gaussian_noise"]


def is_cluttered(dataset):
    return "object_size" in DATASETS[dataset]


def mix_seed(*key):
    """A seed for any key, such as (seed, epoch, purpose): a CPU generator uses only the low 32 bits of its seed."""
    return zlib.crc32(repr(key).encode())


# From archives to splits.

def load_splits(name, data_dir, device):
    """The data set's splits on the device: {"train": Split, "val": Split, "test": Split}. Of a cluttered data set
    these are the images that are put on canvases.

    The validation images are drawn from the training archive by a generator of fixed seed: the same for every model
    and seed.

    Raises:
        UserError: if the data are missing and cannot be downloaded, or a file is not the original; of a data set of
            one's own as complete_row.
    """
    complete_row(name, data_dir)
    load = DATASETS[name].get("load")
    archive, test = read_arrays(name, load, data_dir) if load else read_archives(name, data_dir)
    order = torch.randperm(len(archive.labels), generator=torch.Generator().manual_seed(0))
    val, train = order.tensor_split([validation_size(name)])
    splits = {"train": [part[train] for part in archive], "val": [part[val] for part in archive], "test": test}
    return {part: Split(*(tensor.to(device) for tensor in split)) for part, split in splits.items()}


def validation_size(name):
    """How many images of the training archive are the validation split: 5,000, or a tenth where that is less."""
    return min(VALIDATION_SIZE, DATASETS[name]["sizes"][0] // 10)


def training_size(name):
    return DATASETS[name]["sizes"][0] - validation_size(name)


def read_archives(name, data_dir):
    """The training and the test archive that torchvision has of a data set: two Splits."""
    import torchvision
    source, archives = getattr(torchvision.datasets, DATASETS[name]["source"]), []
    extract(name, source, data_dir)
    for train in (True, False):
        archive = source(data_dir, train=train)
        images = torch.as_tensor(archive.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)  # (N, C, H, W)
        archives.append(Split(images.contiguous(), torch.as_tensor(archive.targets)))
    return archives


def extract(name, source, data_dir):
    """Have torchvision's class `source` extract its archives, and download what is missing, unless that is done.
    What is there is never changed."""
    from torchvision.datasets.utils import check_integrity
    if hasattr(source, "resources"):
        folder, archives = data_dir / source.__name__ / "raw", dict(source.resources)
    else:
        folder, archives = data_dir, {source.filename: source.tgz_md5}
    try:
        if check_extracted(name, source, data_dir):
            return
    except UserError:  # or another command is writing that file, which ends before this one has the lock
        if not os.access(data_dir, os.W_OK):
            raise
    for place in (data_dir, folder):
        if place.exists() and not os.access(place, os.W_OK):
            raise UserError(f"{name} is to be extracted, and {place} cannot be written to: give a --data-dir that can, "
                            f"with {', '.join(archives)} in {Path('DIR', folder.relative_to(data_dir))}")
    with records.locked(data_dir, wait=True):  # of two commands started together, one extracts
        if check_extracted(name, source, data_dir):
            return
        missing = [archive for archive in archives if not (folder / archive).exists()]
        for archive in archives.keys() - missing:
            if not check_integrity(folder / archive, archives[archive]):
                raise UserError(f"{folder / archive} is cut short or not the original archive: move it away and put "
                                "the original in its place, or run again with a network to download it")
        try:
            source(data_dir, download=True)
        except (RuntimeError, OSError, HTTPException) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]  # the first names the file alone
            if not missing:
                raise UserError(f"{name} could not be extracted ({cause}): put that right, or give another --data-dir"
                                ) from None
            raise UserError(f"{name} is incomplete and could not be downloaded ({cause}): put {', '.join(missing)} "
                            f"into {folder}") from None
        check_extracted(name, source, data_dir)


def check_extracted(name, source, data_dir):
    """Whether all extracted files exist; a UserError that names the first of them that is not the original."""
    from torchvision.datasets.utils import check_integrity
    if hasattr(source, "resources"):
        side = DATASETS[name].get("object_size", DATASETS[name]["image_size"])
        shapes = [shape for size in DATASETS[name]["sizes"] for shape in [(size, side, side), (size,)]]
        paths = [data_dir / source.__name__ / "raw" / Path(archive).stem for archive, _ in source.resources]
        checks = [lambda path=path, shape=shape: is_idx(path, shape) for path, shape in zip(paths, shapes, strict=True)]
    else:
        members = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        paths = [data_dir / source.base_folder / member for member, _ in members]
        checks = [lambda path=path, md5=md5: check_integrity(path, md5) for path, (_, md5) in zip(paths, members)]
    found = [path.exists() for path in paths]
    for path, exists, is_original in zip(paths, found, checks):
        if exists and not is_original():
            raise UserError(f"{path} is cut short or not the original: move it away and run again, and it is extracted "
                            "from its archive")
    return all(found)


def is_idx(path, shape):
    """Whether the file is, by header and size, an array of bytes of this shape in the IDX format."""
    header = struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape)
    with open(path, "rb") as file:
        return file.read(len(header)) == header and path.stat().st_size == len(header) + math.prod(shape)


# A data set of one's own.

def complete_row(name, data_dir):
    """Fill in a row of DATASETS that has `load`, from its arrays; the others are complete.

        DATASETS["mydata"] = dict(load=load, defaults=dict(epochs=10, patch_size=8))

    load: a function of the data folder, a Path, that returns train_images, train_labels, test_images, test_labels:
        uint8 (N, H, W) or (N, H, W, C), square and of 1 or 3 channels, and integers (N,) that number the classes from
        0; numpy arrays, tensors or lists. At least 10 are for training, of which a tenth, at most 5,000, are the
        validation split.
    defaults: of the flags whose default is not that of CIFAR-10; may be left out.

    Raises:
        UserError: if the arrays or the defaults are not like that, or a file cannot be read.
    """
    row, common = DATASETS[name], DATASETS["cifar10"]["defaults"]
    if "load" not in row:
        return
    for flag in row.get("defaults", {}):
        records.check_name(f"default of data set {name}", flag, common)
    archive, test = read_arrays(name, row["load"], data_dir)
    mean, std = pixel_moments(archive.images)
    pixel_statistics.cache_clear()
    row |= dict(num_classes=archive.labels.max().item() + 1, image_size=archive.images.shape[-1],
                in_channels=archive.images.shape[1], sizes=(len(archive.labels), len(test.labels)), mean=mean, std=std,
                defaults=common | row.get("defaults", {}))


@functools.lru_cache(maxsize=1)  # a row is completed before the splits are made, and `load` may take minutes
def read_arrays(name, load, data_dir):
    """The training and the test archive of a data set of one's own: two Splits."""
    try:
        arrays = load(data_dir)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"data set {name} cannot be read: {records.first_line(error)}") from None
    try:
        records.check(isinstance(arrays, (tuple, list)) and len(arrays) == 4,
                      "load does not return train_images, train_labels, test_images, test_labels")
        archive, test = convert_arrays("training", *arrays[:2]), convert_arrays("test", *arrays[2:])
        check_archives(archive, test)
    except (TypeError, ValueError) as error:
        raise UserError(f"data set {name}: {records.first_line(error)}") from None
    return archive, test


def convert_arrays(part, images, labels):
    """Arrays of one's own as a Split; a ValueError or TypeError says what is wrong with them."""
    images, labels = numpy.asarray(images), numpy.asarray(labels)
    shape = images.shape
    records.check(images.dtype == numpy.uint8, f"{part} images are {images.dtype}, not uint8")
    records.check(len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3),
                  f"{part} images are {shape}, not (N, H, W), nor (N, H, W, C) of 1 or 3 channels")
    records.check(shape[1] == shape[2], f"{part} images are {shape[1]} high and {shape[2]} wide, not square")
    records.check(images.size, f"there are no {part} images")
    records.check(labels.dtype.kind in "iu" and labels.ndim == 1,
                  f"{part} labels are {labels.dtype} {labels.shape}, not integers (N,)")
    records.check(len(labels) == shape[0], f"there are {shape[0]} {part} images and {len(labels)} labels")
    images = images.reshape(*shape[:3], -1).transpose(0, 3, 1, 2)  # (N, C, H, W)
    return Split(*(torch.from_numpy(numpy.array(array, dtype, order="C"))
                   for array, dtype in [(images, numpy.uint8), (labels, numpy.int64)]))


def check_archives(archive, test):
    """Raise a ValueError unless these are two archives of the same classes and of images of one size."""
    shapes = [tuple(split.images.shape[1:]) for split in (archive, test)]
    records.check(shapes[0] == shapes[1],
                  "training images are {} and test images {} (C, H, W): all must be of one size".format(*shapes))
    records.check(len(archive.labels) >= 10, f"there are {len(archive.labels)} training images, fewer than 10")
    classes = set(archive.labels.tolist())
    for label in (min(classes), test.labels.min().item()):
        records.check(label >= 0, f"label {label} is negative")
    missing = next(label for label in itertools.count() if label not in classes)
    records.check(missing == len(classes), f"class {missing} has no training image: number the classes from 0")
    records.check(missing > 1, "all training images are of one class")
    label = test.labels.max().item()
    records.check(label < missing, f"test label {label} is that of no training image")


def pixel_moments(images):
    """Mean and deviation of bytes (N, C, H, W), from 0 to 1: a list for each, one a channel."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.double) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.tolist(), [value or 1.0 for value in std.tolist()]  # 1 for a channel of one value


# Training batches.

def draw_epoch(seeds, epoch, split, settings):
    """Each seed's order of the images (S, N) and their draws (S, N, R), from -1 to 1, in an epoch counted from 1."""
    count, parts = len(split.labels), []
    width = AUGMENTATION_DRAWS + (2 + 5 * settings["distractors"] if is_cluttered(settings["dataset"]) else 0)
    for seed in seeds:
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch, "order and augmentation"))
        order, draws = torch.randperm(count, generator=generator), torch.rand(count, width, generator=generator)
        if settings["brightness"]:  # drawn last, so that all else is as it is without
            draws = torch.cat([draws, torch.rand(count, 1, generator=generator)], 1)
        parts.append((order, 2 * draws - 1))
    return [torch.stack(part).to(split.labels.device) for part in zip(*parts)]


def get_batch(split, index, draws, settings):
    """Augmented, normalised images (S, B, C, H, W) and labels (S, B), by index (S, B) and draws (S, B, R)."""
    pixels = training_pixels(split, index.flatten(), draws.flatten(0, 1), settings)
    return normalize(pixels, settings["dataset"]).unflatten(0, index.shape), split.labels[index]


def training_pixels(split, index, draws, settings):
    """Images of the split, by index (B,), as a model is to see them, (B, C, H, W) from 0 to 255; draws (B, R)."""
    strength = settings["brightness"]
    draws, last = (draws[:, :-1], draws[:, -1]) if strength else (draws, None)
    pixels = augment(split.images[index].float(), draws[:, :AUGMENTATION_DRAWS], settings)
    pixels = clutter(pixels, index, draws[:, AUGMENTATION_DRAWS:], split, settings["dataset"])
    return brighten(pixels, strength * (last.view(-1, 1, 1, 1) + 1) / 2) if strength else pixels


def augment(pixels, draws, settings):
    """Flip and map affinely, each image by its own draws: pixels (B, C, H, W) from 0 to 255 on a background of 0; draws
    (B, 7), from -1 to 1."""
    if settings["flip"]:
        pixels = torch.where(draws[:, 6, None, None, None] < 0, pixels.flip(3), pixels)
    if not any(settings[name] for name in ("rotation", "scale", "shear", "shift")):
        return pixels
    if pixels.device.type == "mps":  # which has no bicubic interpolation
        return augment(pixels.cpu(), draws.cpu(), settings | dict(flip=False)).to(pixels.device)
    angle = math.radians(settings["rotation"]) * draws[:, 0]
    width_factor, height_factor = (1 + settings["scale"] * draws[:, 1:3]).unbind(1)
    shear = settings["shear"] * draws[:, 3]
    right, down = (2 * settings["shift"] / pixels.shape[-1] * draws[:, 4:6]).unbind(1)  # the image is 2 wide
    cos, sin = angle.cos(), angle.sin()
    # A point of the new image is looked up in the old one at rotate(shear(scale(point))) + shift.
    theta = torch.stack([cos * width_factor, (cos * shear - sin) * height_factor, right,
                         sin * width_factor, (sin * shear + cos) * height_factor, down], dim=1).unflatten(1, (2, 3))
    height, width = pixels.shape[2:]
    grid = theta.flatten(0, 1) @ pixel_centers(height, width, pixels.device)  # F.affine_grid takes five times as long
    grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
    # Bilinear interpolation would blur the images that a model learns from, and not those that it is tested on.
    return F.grid_sample(pixels, grid, mode="bicubic", align_corners=False).clamp(0, 255)


def brighten(pixels, amount):
    """Add `amount`, of the way from black to white, to the value of HSV, the brightest channel of a pixel: hue and
    saturation stay, and black becomes grey. Pixels (B, C, H, W) from 0 to 255; amount: a number or (B, 1, 1, 1)."""
    value = pixels.amax(1, keepdim=True)
    return (value + 255 * amount).clamp_max(255) * torch.where(value > 0, pixels / value, 1.0)


@functools.cache
def pixel_centers(height, width, device):
    """Rows x, y and 1 of all pixels (3, H W); the image reaches from -1 to 1. Made once, as pixel_statistics is."""
    x, y = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (width, height))
    return torch.stack([x.repeat(height), y.repeat_interleave(width), torch.ones(height * width, device=device)])


def normalize(pixels, dataset):
    """Pixels (B, C, H, W) from 0 to 255 -> mean 0 and deviation 1 over the training archive."""
    mean, std = pixel_statistics(dataset, pixels.device)
    return (pixels / 255 - mean) / std


@functools.cache
def pixel_statistics(dataset, device):
    """Mean and deviation (C, 1, 1) on the device, made once: at every step it would be a copy from the host."""
    return [torch.tensor(DATASETS[dataset][key], device=device).view(-1, 1, 1) for key in ("mean", "std")]


# Canvases.

def clutter(images, index, draws, split, dataset):
    """Images (B, C, h, w) each somewhere on a canvas (B, C, H, W), with fragments of other images of the split; or as
    they are, where the data set is not cluttered.

    index (B,): which images of the split these are. draws (B, 2 + 5 D), from -1 to 1: for the place and D fragments.
    """
    if not is_cluttered(dataset):
        return images
    size = DATASETS[dataset]["image_size"]
    top, left = pick(draws[:, :2, None], size - images.shape[-1] + 1).unbind(1)
    canvas = images.new_zeros(*images.shape[:2], size, size)
    return add_fragments(paste(canvas, images.unsqueeze(1), top, left), index, draws[:, 2:], split, FRAGMENT)


def add_fragments(pixels, index, draws, split, side):
    """Paste squares, cut anywhere from other images of the split, anywhere onto pixels (B, C, H, W).

    draws (B, 5 D), from -1 to 1: for each fragment its image, where it is cut and where it is pasted.
    """
    if not draws.shape[1]:
        return pixels
    other, *places = draws.unflatten(1, (-1, 5)).unbind(2)  # (B, D) each
    count, channels, height, width = split.images.shape
    other = (index[:, None] + 1 + pick(other, count - 1)) % count
    sizes = [height, width, *pixels.shape[2:]]
    top, left, new_top, new_left = (pick(place, size - side + 1) for place, size in zip(places, sizes))
    cut = torch.arange(side, device=pixels.device)
    fragments = split.images[
        other[:, :, None, None, None], torch.arange(channels, device=pixels.device)[:, None, None],
        (top[:, :, None] + cut)[:, :, None, :, None], (left[:, :, None] + cut)[:, :, None, None, :]]
    return paste(pixels, fragments.type_as(pixels), new_top, new_left)


def pick(draws, count):
    """A whole number from 0 to count - 1 for each draw from -1 to 1."""
    return ((draws + 1) / 2 * count).long().clamp_max(count - 1)


def paste(pixels, pieces, top, left):
    """Add pieces (B, D, C, h, w) to pixels (B, C, H, W) at rows `top` and columns `left` (B, D), within 0 to 255."""
    height, width = (torch.arange(side, device=pixels.device) for side in pieces.shape[3:])
    rows, columns = top[:, :, None, None] + height[:, None], left[:, :, None, None] + width
    index = (rows * pixels.shape[3] + columns).flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1)  # (B, C, D h w)
    total = pixels.flatten(2).scatter_add(2, index, pieces.transpose(1, 2).flatten(2))
    return total.clamp(0, 255).view_as(pixels)


# Evaluation batches.

def evaluation_pixels(split, settings):
    """A split in its own order: pairs of the number of the first image and pixels (B, C, H, W) from 0 to 255.

    The canvases of a cluttered data set are the same at every call, and those with more distractors have the same
    ones and more.
    """
    count, device = len(split.labels), split.labels.device
    generator = torch.Generator().manual_seed(mix_seed("canvases"))
    widths = [2, *[5] * settings["distractors"]] if is_cluttered(settings["dataset"]) else [0]
    draws = torch.cat([2 * torch.rand(count, width, generator=generator) - 1 for width in widths], 1).to(device)
    for first in range(0, count, EVALUATION_BATCH):
        index = torch.arange(first, min(first + EVALUATION_BATCH, count), device=device)
        yield first, clutter(split.images[index].float(), index, draws[index], split, settings["dataset"])


def object_pixels(split, settings):
    """The same images as evaluation_pixels, with the object alone: no distractors."""
    return (pixels for _, pixels in evaluation_pixels(split, settings | dict(distractors=0)))


def has_ink(pixels, patch_size):
    """Which patches have any pixel that is not black: (B, C, H, W) -> (B, H W / patch_size^2)."""
    return F.max_pool2d(pixels.amax(1, keepdim=True), patch_size).flatten(1) > 0


def evaluation_batches(split, settings, corruption=None, severity=0):
    """A split in its own order: pairs of normalised images (B, C, H, W) and labels (B,)."""
    for first, pixels in evaluation_pixels(split, settings):
        images = normalize(corrupt(pixels, corruption, severity, first, split, settings), settings["dataset"])
        yield from cache_sized(images, split.labels[first:first + len(images)])


def corrupted_batches(split, settings, names=None, severities=range(1, 6)):
    """A split in its own order under corruptions, all unless some are named: yields (name, severity), normalised images
    (B, C, H, W) and labels (B,). What is random is drawn once for all corruptions of a kind and all severities."""
    names = corruptions_of(settings["dataset"]) if names is None else names
    for first, pixels in evaluation_pixels(split, settings):
        kinds = dict.fromkeys(map(corruption_kind, names))
        draws = [draw_corruption(kind, pixels, first, settings) for kind in kinds]
        parts = cache_sized(pixels, split.labels[first:first + len(pixels)], *draws)
        for part, labels, *draws_of_part in parts:
            own = dict(zip(kinds, draws_of_part))
            for severity in severities:
                made = {}
                for name in names:
                    amount, draw = get_amount(name, severity, part.shape[1]), own[corruption_kind(name)]
                    made[name] = apply_corruption(part, name, amount, draw, first, split, made)
                    yield (name, severity), normalize(made[name], settings["dataset"]), labels
            first += len(part)


def cache_sized(images, *tensors):
    """A batch to be evaluated, on a CPU cut into parts of 200,000 numbers: they fit its caches, without which canvases
    take twice the time, and to start the operations takes little of it."""
    count = max(1, 200_000 // images[0].numel()) if images.device.type == "cpu" else EVALUATION_BATCH
    return zip(*(tensor.split(count) for tensor in (images, *tensors)))


# Corruptions.

def corrupt(pixels, name, severity, first, split, settings):
    """Corrupt pixels (B, C, H, W), whole numbers from 0 to 255, as CORRUPTIONS says; severity 0 is none.

    first: the number of the first of these images in the split; the others follow it. The random numbers depend on it
    and on the kind alone, so the result is the same at every call, a higher severity is more of the same, and a noise,
    its shift and its fluctuation belong together.
    """
    if severity == 0:
        return pixels
    draws = draw_corruption(corruption_kind(name), pixels, first, settings)
    return apply_corruption(pixels, name, get_amount(name, severity, pixels.shape[1]), draws, first, split)


def get_amount(name, severity, channels):
    return CORRUPTIONS[name][channels > 1][severity - 1]


def corruptions_of(dataset):
    """Those that its images can have: less than ten pixels a side have no room for squares."""
    small = DATASETS[dataset]["image_size"] < 10
    return [name for name in CORRUPTIONS if not (small and name in ("occlusion", "distractors"))]


def corruption_kind(name):
    """Which random numbers a corruption has: gaussian_noise, its shift, its fluctuation... share theirs."""
    return next((noise for noise in NOISES if name.startswith(noise)), name)


def draw_corruption(kind, pixels, first, settings):
    """The random numbers of a corruption of pixels (B, C, H, W), on their device: (B, ...), empty where it needs none.
    """
    count, channels, height, width = pixels.shape
    squares, side = round(4 * height * width / 28**2), settings["patch_size"]
    draw, shape = {
        "gaussian_noise": (torch.randn, pixels.shape),
        "shot_noise": (torch.rand, pixels.shape),
        "impulse_noise": (torch.rand, pixels.shape),
        "occlusion": (torch.rand, (count, 2 * squares)),
        "distractors": (torch.rand, (count, 5 * squares)),
        "image_offset": (torch.randn, (count, 1, 1, 1)),
        "patch_offset": (torch.randn, (count, 1, height // side, width // side)),
    }.get(kind, (torch.rand, (count, 0)))
    return draw(shape, generator=torch.Generator().manual_seed(mix_seed(kind, first))).to(pixels.device)


def apply_corruption(pixels, name, amount, draws, first, split, made={}):
    """made: what other corruptions of this severity have made of these pixels, {name: (B, C, H, W)}."""
    if corruption_kind(name) in NOISES:
        return apply_noise(pixels, name, amount, draws, made)
    if name == "occlusion":
        top, left = (pick(2 * draw - 1, size - amount + 1) for draw, size in zip(draws.chunk(2, 1), pixels.shape[2:]))
        black = torch.full((1, 1, 1, amount, amount), -255.0, device=pixels.device)
        return paste(pixels, black.expand(len(pixels), top.shape[1], pixels.shape[1], -1, -1), top, left)
    if name == "distractors":
        index = torch.arange(first, first + len(pixels), device=pixels.device)
        return add_fragments(pixels, index, 2 * draws - 1, split, amount)
    if name == "image_offset":
        return pixels + 255 * amount * draws
    if name == "patch_offset":
        side = pixels.shape[2] // draws.shape[2]
        return pixels + 255 * amount * draws.repeat_interleave(side, 2).repeat_interleave(side, 3)
    if name == "brightness":
        return brighten(pixels, amount)
    if name == "contrast":
        mean = pixels.mean((2, 3), keepdim=True)
        return mean + amount * (pixels - mean)
    return blur(pixels, amount)


def apply_noise(pixels, name, amount, draws, made={}):
    noise = corruption_kind(name)
    if name == f"{noise}_shift":  # index_select takes a fifth of the time of indexing
        return noise_means(noise, amount, pixels.device).index_select(0, pixels.flatten().int()).view_as(pixels)
    if name == f"{noise}_fluctuation":
        noisy, shifted = (made[part] if part in made else apply_noise(pixels, part, amount, draws)
                          for part in (noise, f"{noise}_shift"))
        return noisy - shifted + pixels
    if name == "shot_noise":
        return count_photons(pixels, amount, draws) * (255 / amount)
    if name == "impulse_noise":
        return torch.where(draws < amount / 2, 0.0, torch.where(draws >= 1 - amount / 2, 255.0, pixels))
    noisy = pixels + 255 * amount * draws
    return noisy if name == "gaussian_noise_unclipped" else noisy.clamp(0, 255)


def blur(pixels, deviation):
    """A product with a matrix from either side, whose rows are Gaussians."""
    matrices = []
    for side in pixels.shape[2:]:
        place = torch.arange(side, device=pixels.device)
        matrices.append((-0.5 * ((place - place[:, None]) / deviation) ** 2).softmax(1))
    return matrices[0] @ pixels @ matrices[1].T


def count_photons(pixels, white, draws):
    """Poisson counts of mean pixels / 255 * white, white at most: the quantiles at `draws`, from 0 to 1.

    A count is how many k < white have P(count <= k) <= draw: found in one sorted table of all pixel values, whose keys
    are whole numbers so that every device counts the same.
    """
    keys = pixels.long() * 2**24 + (draws * 2**24).long()  # torch.rand draws multiples of 2^-24
    return torch.searchsorted(photon_keys(white, pixels.device), keys, right=True) - white * pixels.long()


@functools.cache
def photon_keys(white, device):
    cdf = poisson_cdf(white)
    return (torch.arange(256)[:, None] * 2**24 + (cdf * 2**24).round().long()).flatten().to(device)


def poisson_cdf(white):
    """P(count <= k) of a pixel of each value, for k < white: (256, white) in float64."""
    rates = torch.arange(256, dtype=torch.double)[:, None] / 255 * white
    return torch.special.gammaincc(torch.arange(1, white + 1, dtype=torch.double), rates)


@functools.cache
def noise_means(noise, amount, device):
    """The mean of what a noise makes of a pixel of each value from 0 to 255: (256,), from 0 to 255."""
    x = torch.arange(256, dtype=torch.double)
    if noise == "impulse_noise":
        means = (1 - amount) * x + amount * 255 / 2
    elif noise == "shot_noise":  # the mean of min(count, white) is the sum of P(count > k) over k < white
        means = 255 / amount * (1 - poisson_cdf(amount)).sum(1)
    else:  # x + s z, which is 0 below z = a and 255 above z = b; P is the normal distribution function, p its density
        s = 255 * amount
        a, b = -x / s, (255 - x) / s
        P, p = torch.special.ndtr, lambda z: (-z**2 / 2).exp() / math.sqrt(2 * math.pi)
        means = x * (P(b) - P(a)) + s * (p(a) - p(b)) + 255 * (1 - P(b))
    return means.float().to(device)
