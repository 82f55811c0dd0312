"""What the models see: data sets and their splits, augmentation, batches. corruptions.py spoils test images.

A split lies on the device as a whole, in bytes, and batches are cut, augmented and normalised there. Images are
square. Random numbers are drawn on the CPU, so that they are the same on every device; `draws` are from 0 to 1.
A data set is a row of DATASETS, an augmentation a row of AUGMENTATIONS.
"""

import contextlib
import functools
import math
import os
import zipfile
import zlib
from collections import namedtuple
from http.client import HTTPException
from pathlib import Path

import numpy
import torch
from torch.nn import functional as F

import command
import pictures
from command import UserError
from records import check, locked

Split = namedtuple("Split", "images labels")  # uint8 (N, C, H, W) and int64 (N,)

# What each data set is. `source` is torchvision's class; `mean` and `std` are those of the training archive's pixels,
# from 0 to 1; `class_names` may be left out, where classes are digits; `defaults` has the settings whose default
# depends on the data set: see defaults_of. Augmentation keeps the class: a mirrored garment is a garment, a mirrored
# digit is no digit.
GREY = dict(num_classes=10, image_size=28, in_channels=1, sizes=(60_000, 10_000))  # sizes: images for training and test
DIGITS = dict(epochs=20, batch_size=128, lr=6e-3, muon_lr=5e-3, weight_decay=0.1, patch_size=7,
              rotation=15.0, scale=0.15, shear=0.15, shift=1.0)
DATASETS = {
    "mnist": GREY | dict(source="MNIST", mean=[0.1307], std=[0.3081], defaults=DIGITS),
    "fashionmnist": GREY | dict(
        source="FashionMNIST", mean=[0.2860], std=[0.3530],
        class_names="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        defaults=dict(epochs=30, batch_size=256, lr=6e-3, muon_lr=8e-3, weight_decay=0.1, patch_size=7,
                      rotation=3.0, scale=0.05, shear=0.05, shift=0.5, flip=True)),
    "kmnist": GREY | dict(source="KMNIST", mean=[0.1918], std=[0.3483], defaults=DIGITS,
                          class_names="o ki su tsu na ha ma ya re wo".split()),
    "cifar10": dict(
        source="CIFAR10", num_classes=10, image_size=32, in_channels=3, sizes=(50_000, 10_000),
        mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616],
        class_names="airplane automobile bird cat deer dog frog horse ship truck".split(),
        defaults=dict(epochs=30, batch_size=64, lr=6e-3, muon_lr=1e-2, weight_decay=0.1, patch_size=4,
                      shift=2.0, flip=True)),
}
VALIDATION_SIZE = 5_000  # or a tenth of the training archive, where that is less
EVALUATION_BATCH = 1_000


def defaults_of(dataset):
    """{setting: the data set's default of its flag}. An augmentation that its row does not name is off."""
    return no_augmentation() | DATASETS[dataset]["defaults"]


def facts_of(dataset):
    """What a trained model of the data set needs to be used, and where the data were: the facts of its runs."""
    row = dict(class_names=[str(label) for label in range(DATASETS[dataset]["num_classes"])]) | DATASETS[dataset]
    names = ["image_size", "in_channels", "num_classes", "class_names", "mean", "std", "data_path"]
    return {name: row[name] for name in names if name in row}


def mix_seed(*key):
    """A seed for any key, such as (seed, epoch, purpose): a CPU generator uses only the low 32 bits of its seed."""
    return zlib.crc32(repr(key).encode())


def generator_of(*key):
    return torch.Generator().manual_seed(mix_seed(*key))


# From archives to splits.

def load_splits(name, data_dir, device):
    """The data set's splits on the device: {"train": Split, "val": Split, "test": Split}.

    The validation images, unless the data set has some, are drawn from the training archive by a generator of fixed
    seed: the same for every model and seed.

    Raises:
        UserError: if the data are missing and cannot be downloaded, or a file is not the original; of a data set of
            one's own as complete_row.
    """
    complete_row(name, data_dir)
    load = DATASETS[name].get("load")
    archives = read_arrays(name, load, data_dir) if load else read_archives(name, data_dir)
    if "val" not in archives:
        archive = archives["train"]
        order = torch.randperm(len(archive.labels), generator=torch.Generator().manual_seed(0))
        val, train = order.tensor_split([validation_size(name)])
        archives = dict(train=Split(*(tensor[train] for tensor in archive)),
                        val=Split(*(tensor[val] for tensor in archive)), test=archives["test"])
    return {part: Split(*(tensor.to(device) for tensor in split)) for part, split in archives.items()}


def validation_size(name):
    """How many images are the validation split: the data set's own, or 5,000 of the training archive, or a tenth where
    that is less."""
    row = DATASETS[name]
    return row.get("validation_size") or min(VALIDATION_SIZE, row["sizes"][0] // 10)


def training_size(name):
    return DATASETS[name]["sizes"][0] - validation_size(name)


def read_archives(name, data_dir):
    """The training and the test archive that torchvision has of a data set: {"train": Split, "test": Split}."""
    import torchvision
    source = getattr(torchvision.datasets, DATASETS[name]["source"])
    extract(name, source, data_dir)
    archives = dict(train=source(data_dir, train=True), test=source(data_dir, train=False))
    return {part: to_split(name, archive.data, archive.targets) for part, archive in archives.items()}


def extract(name, source, data_dir):
    """Have torchvision's class `source` extract its archives, and download what is missing, unless that is done.
    What is there is never changed."""
    archives, files = list_files(name, source, data_dir)
    closed = data_dir.exists() and not os.access(data_dir, os.W_OK)
    with contextlib.nullcontext() if closed else locked(data_dir, wait=True):  # of commands started together, one does
        if are_there(files):
            return
        are_there(archives)
        try:
            if closed:
                raise PermissionError(f"{data_dir} cannot be written to")
            source(data_dir, download=True)
        except (RuntimeError, OSError, HTTPException) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]  # the first names the file alone
            raise UserError(f"{name} could not be downloaded or extracted ({cause}): put that right, or put the "
                            f"archives {', '.join(map(str, archives))} in place, or give another --data-dir") from None


def list_files(name, source, data_dir):
    """Where torchvision's class has its archives, and the files extracted from them: two dicts, of each path the MD5
    or, of a file in the IDX format, the header: 0x800 + dimensions, and the size in each."""
    if hasattr(source, "resources"):  # MNIST and its like
        archives = {data_dir / source.__name__ / "raw" / archive: md5 for archive, md5 in source.resources}
        headers = [header for size in DATASETS[name]["sizes"] for header in ([0x803, size, 28, 28], [0x801, size])]
        return archives, dict(zip([path.with_suffix("") for path in archives], headers, strict=True))
    members = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return ({data_dir / source.filename: source.tgz_md5},
            {data_dir / source.base_folder / member: md5 for member, md5 in members})


def are_there(files):
    """Whether all of list_files exist; a UserError that names the first that is not the original."""
    found = [path for path in files if path.exists()]
    for path in found:
        if not is_original(path, files[path]):
            raise UserError(f"{path} is cut short or not the original: move it away, and put the original in its place "
                            "or run again: it is extracted from its archive, or downloaded")
    return len(found) == len(files)


def is_original(path, mark):
    from torchvision.datasets.utils import check_integrity
    if not isinstance(mark, list):
        return check_integrity(path, mark)
    is_long_enough = path.stat().st_size == 4 * len(mark) + math.prod(mark[1:])
    return is_long_enough and numpy.fromfile(path, ">i4", len(mark)).tolist() == mark


# A data set of one's own.

WORDS = dict(train="training", test="test", val="validation")  # of the parts, in the order of the arrays


def names_of(given, image_size=None):
    """The names of data sets that are given by name or path. A path, that of a folder of pictures or of an .npz file,
    gets a row of DATASETS, with images of image_size pixels a side.

    Raises:
        UserError: if there is another data set of this name, or as pictures.read.
    """
    names = [add_path(text, image_size) if is_path(text) else text for text in dict.fromkeys(given)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two data sets are called {name}: rename a folder or file, which names its data set")
        if image_size and "data_path" not in DATASETS.get(name, {"data_path": None}):
            raise UserError(f"argument --image-size: {name} is of one size: leave it out")
    return names


def is_path(text):
    is_name = text in DATASETS and "data_path" not in DATASETS[text]  # not of an earlier command in this process
    return os.path.basename(text) != text or text.endswith(".npz") or not is_name and os.path.exists(text)


def add_path(text, image_size, name=None):
    """Make a row of DATASETS of what lies at a path, under this name or that of the path; returns the name."""
    path = Path(os.path.abspath(os.path.expanduser(text)))
    name = name or path.name.removesuffix(".npz")
    if "data_path" not in DATASETS.get(name, {"data_path": None}):
        raise UserError(f"{path}: {name} is another data set: rename the folder or file, which names its data set")
    arrays, class_names = pictures.read(path, image_size)
    DATASETS[name] = dict(load=lambda data_dir: arrays, data_path=str(path))
    DATASETS[name] |= dict(class_names=class_names) if class_names else {}
    return name


def complete_row(name, data_dir):
    """Fill in a row of DATASETS that has `load`, from its arrays; the others are complete.

        DATASETS["mydata"] = dict(load=load, defaults=dict(epochs=10, patch_size=8))

    load: a function of the data folder, a Path, that returns train_images, train_labels, test_images, test_labels:
        uint8 (N, H, W) or (N, H, W, C), square and of 1 or 3 channels, and integers (N,) that number the classes from
        0; numpy arrays, tensors or lists. At least 10 are for training, of which a tenth, at most 5,000, are the
        validation split, unless val_images and val_labels follow.
    defaults: of the flags whose default is not that of CIFAR-10; may be left out.

    Raises:
        UserError: if the arrays or the defaults are not like that, or a file cannot be read.
    """
    row, common = DATASETS[name], DATASETS["cifar10"]["defaults"]
    if "load" not in row:
        return
    for flag in row.get("defaults", {}):
        command.check_name(f"default of data set {name}", flag, defaults_of("cifar10"))
    splits = read_arrays(name, row["load"], data_dir)
    (count, channels, side, _), own = splits["train"].images.shape, len(splits["val"].labels) if "val" in splits else 0
    row |= dict(num_classes=len(splits["train"].labels.unique()), image_size=side, in_channels=channels,
                sizes=(count + own, len(splits["test"].labels)), validation_size=own,
                defaults=common | row.get("defaults", {}), identity=dict(data=pictures.fingerprint(splits)),
                **pictures.pixel_moments(splits["train"].images))
    if "data_path" in row:
        patches = [size for size in range(side, 0, -1) if side % size == 0]
        row["defaults"] |= dict(patch_size=min(patches, key=lambda size: abs(size - side / 8)),
                                batch_size=min(common["batch_size"], training_size(name)))
        row["identity"]["image_size"] = side
    pixel_statistics.cache_clear()


@functools.lru_cache(maxsize=1)  # a row is completed before the splits are made, and `load` may take minutes
def read_arrays(name, load, data_dir):
    """The archives of a data set of one's own: {"train": Split, "test": Split} and, if it has one, "val"."""
    try:
        arrays = load(data_dir)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"data set {name} cannot be read: {error.__class__.__name__}: {command.first_line(error)}"
                        ) from None
    try:
        check(isinstance(arrays, (tuple, list)) and len(arrays) in (4, 6),
              "load does not return train_images, train_labels, test_images, test_labels")
        splits = {part: to_split(WORDS[part], *pair) for part, pair in zip(WORDS, zip(arrays[::2], arrays[1::2]))}
        check_archives(splits)
    except (TypeError, ValueError) as error:
        raise UserError(f"data set {name}: {command.first_line(error)}") from None
    return splits


def to_split(part, images, labels):
    """Arrays as a Split; a ValueError or TypeError says what is wrong with them."""
    images, labels = numpy.asarray(images), numpy.asarray(labels)
    shape = images.shape
    check(images.dtype == numpy.uint8, f"{part} images are {images.dtype}, not uint8")
    check(len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3),
          f"{part} images are {shape}, not (N, H, W), nor (N, H, W, C) of 1 or 3 channels")
    check(shape[1] == shape[2], f"{part} images are {shape[1]} high and {shape[2]} wide, not square")
    check(images.size, f"there are no {part} images")
    check(images.max() > 1, f"{part} images have no value above 1: they are not from 0 to 255")
    check(labels.dtype.kind in "iu" and labels.ndim == 1,
          f"{part} labels are {labels.dtype} {labels.shape}, not integers (N,)")
    check(len(labels) == len(images), f"there are {len(images)} {part} images and {len(labels)} labels")
    images = images.reshape(*shape[:3], -1).transpose(0, 3, 1, 2)  # (N, C, H, W)
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(numpy.int64)))


def check_archives(splits):
    """Raise a ValueError unless these are archives of the same classes and of images of one size."""
    archive = splits["train"]
    labels, shape = archive.labels.unique().tolist(), tuple(archive.images.shape[1:])
    check(len(archive.labels) >= 10, f"there are {len(archive.labels)} training images, fewer than 10")
    missing = min({*range(len(labels) + 1)}.difference(labels))
    for part, (images, own_labels) in splits.items():
        check(images.shape[1:] == shape, f"training images are {shape} and {WORDS[part]} images "
              f"{tuple(images.shape[1:])} (C, H, W): all must be of one size")
        check(own_labels.min() >= 0, f"label {own_labels.min()} is negative")
    check(missing == len(labels), f"class {missing} has no training image: number the classes from 0")
    check(missing > 1, "all training images are of one class")
    for part, (_, own_labels) in splits.items():
        check(own_labels.max() < missing, f"{WORDS[part]} label {own_labels.max()} is that of no training image")


# Augmentation.

MOVE_DRAWS = 7


def move(pixels, draws, settings):
    """Flip, then map affinely, each image by its own numbers: pixels (B, C, H, W) from 0 to 255 on a background of 0;
    draws (B, 7): for rotation, for scale in width and height, for shear, for shift to the right and down, for flip."""
    draws = 2 * draws - 1
    if settings.get("flip"):
        pixels = torch.where(draws[:, 6, None, None, None] < 0, pixels.flip(3), pixels)
    strengths = [settings.get(name) or 0 for name in ("rotation", "scale", "shear", "shift")]
    return map_affinely(pixels, draws, *strengths) if any(strengths) else pixels


def map_affinely(pixels, draws, rotation, scale, shear, shift):
    if pixels.device.type == "mps":  # which has no bicubic interpolation
        return map_affinely(pixels.cpu(), draws.cpu(), rotation, scale, shear, shift).to(pixels.device)
    side = pixels.shape[-1]
    angle, slope = math.radians(rotation) * draws[:, 0], shear * draws[:, 3]
    width_factor, height_factor = (1 + scale * draws[:, 1:3]).unbind(1)
    right, down = (2 * shift / side * draws[:, 4:6]).unbind(1)  # the image is 2 wide
    cos, sin = angle.cos(), angle.sin()
    # A point of the new image is looked up in the old one at rotate(shear(scale(point))) + shift.
    theta = torch.stack([cos * width_factor, (cos * slope - sin) * height_factor, right,
                         sin * width_factor, (sin * slope + cos) * height_factor, down], dim=1).unflatten(1, (2, 3))
    grid = theta.flatten(0, 1) @ pixel_centers(side, pixels.device)  # F.affine_grid takes five times as long
    grid = grid.view(-1, 2, side, side).permute(0, 2, 3, 1)
    # Bilinear interpolation would blur the images that a model learns from, and not those that it is tested on.
    return F.grid_sample(pixels, grid, mode="bicubic", align_corners=False).clamp_(0, 255)


@functools.cache
def pixel_centers(side, device):
    """Rows x, y and 1 of all pixels (3, H W); the image reaches from -1 to 1. Made once, as pixel_statistics is."""
    centers = (2 * torch.arange(side, device=device) + 1) / side - 1
    x, y = centers.repeat(side), centers.repeat_interleave(side)
    return torch.stack([x, y, torch.ones_like(x)])


def brighten(pixels, amount):
    """Add `amount`, of the way from black to white, to the value of HSV, the brightest channel of a pixel: hue and
    saturation stay, and black becomes grey. Pixels (B, C, H, W) from 0 to 255; amount: a number or (B, 1, 1, 1)."""
    value = pixels.amax(1, keepdim=True)
    return (value + 255 * amount).clamp_max(255) * torch.where(value > 0, pixels / value, 1.0)


def add_noise(pixels, deviation, draws):
    """Add Gaussian noise, clipped at black and white: pixels (B, C, H, W) from 0 to 255; deviation (B, 1), white being
    1; draws (B, C H W) of a normal distribution."""
    return (pixels + 255 * (deviation * draws).view_as(pixels)).clamp(0, 255)


# An augmentation of training images is a setting, its strength, of which 0 is none. `flag` and `help` are what train.py
# makes a flag of. draw(shape, generator=generator), such as torch.randn, draws the numbers (B, ...) for pixels of shape
# (B, C, H, W); apply(pixels, strength, numbers) augments pixels from 0 to 255 by them. Rows without functions are what
# `move` does, all at once and first.
Augmentation = namedtuple("Augmentation", "flag help draw apply", defaults=(None, None))
AUGMENTATIONS = {
    "rotation": Augmentation(command.RATE, "maximum angle in degrees"),
    "scale": Augmentation(command.PROBABILITY, "width and height are divided by up to 1 +- this"),
    "shear": Augmentation(command.PROBABILITY, "maximum shear"),
    "shift": Augmentation(command.RATE, "maximum pixels each way"),
    "flip": Augmentation(command.SWITCH, "flip horizontally with probability 0.5"),
    "brightness": Augmentation(
        command.SHARE, "maximum that is added, of the way from black to white",
        lambda shape, generator: torch.rand(shape[0], 1, 1, 1, generator=generator),
        lambda pixels, strength, draws: brighten(pixels, strength * draws)),
    "noise": Augmentation(
        command.SHARE, "maximum deviation of Gaussian noise, of the way from black to white; each image has its own",
        lambda shape, generator: torch.cat([torch.rand(shape[0], 1, generator=generator),
                                            torch.randn(shape[0], math.prod(shape[1:]), generator=generator)], 1),
        lambda pixels, strength, draws: add_noise(pixels, strength * draws[:, :1], draws[:, 1:])),
}


def no_augmentation():
    """{setting: the value that turns it off}."""
    return {name: False if row.flag is command.SWITCH else 0.0 for name, row in AUGMENTATIONS.items()}


# Pasting.

def add_fragments(pixels, index, draws, split, side):
    """Paste squares, cut anywhere from other images of the split, anywhere onto pixels (B, C, H, W).

    index (B,): which images of the split these are. draws (B, 5 D): for each fragment its image, where it is cut and
    where it is pasted.
    """
    other, top, left, new_top, new_left = draws.unflatten(1, (draws.shape[1] // 5, 5)).unbind(2)  # (B, D) each
    windows = split.images.unfold(2, side, 1).unfold(3, side, 1)  # (N, C, room, room, side, side), a view
    count, room, new_room = len(windows), windows.shape[2], pixels.shape[3] - side + 1
    other = (index[:, None] + 1 + pick(other, count - 1)) % count
    pieces = windows[other, :, pick(top, room), pick(left, room)].type_as(pixels)
    return paste(pixels, pieces, pick(new_top, new_room), pick(new_left, new_room))


def pick(draws, count):
    """A whole number from 0 to count - 1 for each draw."""
    return (draws * count).long().clamp_max(count - 1)


def paste(pixels, pieces, top, left):
    """Add pieces (B, D, C, h, h) to pixels (B, C, H, H) at rows `top` and columns `left` (B, D), within 0 to 255."""
    side, piece_side = pixels.shape[-1], pieces.shape[-1]
    places = torch.arange(side**2, device=pixels.device).view(side, side)[:piece_side, :piece_side].flatten()
    index = ((top * side + left)[:, :, None] + places).flatten(1).unsqueeze(1)
    pieces = pieces.transpose(1, 2).flatten(2)  # (B, C, D h h)
    return pixels.flatten(2).scatter_add(2, index.expand_as(pieces), pieces).clamp(0, 255).view_as(pixels)


# Canvases: cluttered data sets have each image somewhere on a larger canvas, with fragments of others (`distractors` of
# them), as in Mnih et al. 2014 (arXiv 1406.6247); `object_size` is the image's own size. Their splits are the images:
# what is moved is the image, which is then put on a canvas. Canvases are new in every training epoch, and the same
# whenever a split is evaluated, where those with more distractors have the same ones and more. Without affine maps of
# the images on them `vit` learns faster.

FRAGMENT = 8  # pixels a side of a distractor
CANVAS = dict(image_size=60, object_size=28, defaults=dict(
    epochs=20, batch_size=128, lr=3e-3, muon_lr=1e-2, weight_decay=0.03, patch_size=6, distractors=4))
DATASETS["clutteredmnist"] = DATASETS["mnist"] | CANVAS | dict(mean=[0.0430], std=[0.1876])
DATASETS["clutteredfashionmnist"] = DATASETS["fashionmnist"] | CANVAS | dict(
    mean=[0.0879], std=[0.2391], defaults=CANVAS["defaults"] | dict(flip=True))


def is_cluttered(dataset):
    return "object_size" in DATASETS[dataset]


def canvas_draws(settings):
    """How many random numbers an image takes for its place on a canvas, and for each fragment: none without one."""
    return [2, *[5] * settings["distractors"]] if is_cluttered(settings["dataset"]) else [0]


def clutter(images, index, draws, split, dataset):
    """Images (B, C, h, w) each somewhere on a canvas (B, C, H, W), with fragments of other images of the split; or as
    they are, where the data set is not cluttered. index (B,): which of the split they are; draws (B, 2 + 5 D)."""
    if not is_cluttered(dataset):
        return images
    size = DATASETS[dataset]["image_size"]
    top, left = pick(draws[:, :2, None], size - images.shape[-1] + 1).unbind(1)
    canvas = images.new_zeros(*images.shape[:2], size, size)
    return add_fragments(paste(canvas, images.unsqueeze(1), top, left), index, draws[:, 2:], split, FRAGMENT)


# Training batches.

def epoch_batches(split, seeds, epoch, settings):
    """The batches of an epoch, counted from 1, as get_batch takes them: yields index (S, B), which images of the split
    each seed learns from, and the random numbers that augment them, {name: (S, B, ...)}."""
    size, side = settings["batch_size"], DATASETS[settings["dataset"]]["image_size"]
    order, (draws, generators) = draw_epoch(seeds, epoch, split, settings)
    for index, move_draws in zip(order.split(size, 1), draws.split(size, 1)):
        shape = index.shape[1], split.images.shape[1], side, side
        numbers = {name: draw_for_seeds(AUGMENTATIONS[name].draw, shape, of_seeds).to(index.device)
                   for name, of_seeds in generators.items()}  # batch by batch: these may be many an image
        yield index, numbers | dict(move=move_draws)


def draw_epoch(seeds, epoch, split, settings):
    """Each seed's order of the images (S, N); the numbers of what is done first (S, N, R), and generators of those of
    the other augmentations that are on, {name: one for each seed}."""
    count, device = len(split.labels), split.labels.device
    first = [generator_of(seed, epoch, "order and augmentation") for seed in seeds]
    order = draw_for_seeds(torch.randperm, count, first)
    draws = draw_for_seeds(torch.rand, (count, MOVE_DRAWS + sum(canvas_draws(settings))), first)
    generators = {name: [generator_of(seed, epoch, name) for seed in seeds] for name in chosen(settings)}
    if "brightness" in generators:  # whose numbers follow those of `move`, in all records
        generators["brightness"] = first
    return order.to(device), (draws.to(device), generators)


def draw_for_seeds(draw, shape, generators):
    return torch.stack([draw(shape, generator=generator) for generator in generators])


def chosen(settings):
    """The augmentations that are on, but for what `move` does."""
    return [name for name, row in AUGMENTATIONS.items() if row.apply and settings.get(name)]


def get_batch(split, index, numbers, settings):
    """Augmented, normalised images (S, B, C, H, W) and labels (S, B), by what epoch_batches yields."""
    numbers, images = {name: tensor.flatten(0, 1) for name, tensor in numbers.items()}, index.flatten()
    pixels = move(split.images[images].float(), numbers["move"], settings)
    pixels = clutter(pixels, images, numbers["move"][:, MOVE_DRAWS:], split, settings["dataset"])
    for name in chosen(settings):
        pixels = AUGMENTATIONS[name].apply(pixels, settings[name], numbers[name])
    return normalize(pixels, settings["dataset"]).unflatten(0, index.shape), split.labels[index]


def normalize(pixels, dataset):
    """Pixels (B, C, H, W) from 0 to 255 -> mean 0 and deviation 1 over the training archive."""
    mean, std = pixel_statistics(dataset, pixels.device)
    return (pixels / 255).sub_(mean).div_(std)


@functools.cache
def pixel_statistics(dataset, device):
    """Mean and deviation (C, 1, 1) on the device, made once: at every step it would be a copy from the host."""
    return [torch.tensor(DATASETS[dataset][key], device=device).view(-1, 1, 1) for key in ("mean", "std")]


# Evaluation batches.

def evaluation_pixels(split, settings):
    """A split in its own order: pairs of the number of the first image and pixels (B, C, H, W) from 0 to 255."""
    count, device, generator = len(split.labels), split.labels.device, generator_of("canvases")
    draws = [torch.rand(count, width, generator=generator) for width in canvas_draws(settings)]
    draws = torch.cat(draws, 1).to(device)
    for first in range(0, count, EVALUATION_BATCH):
        index = torch.arange(count, device=device)[first:first + EVALUATION_BATCH]
        yield first, clutter(split.images[index].float(), index, draws[index], split, settings["dataset"])


def evaluation_batches(split, settings):
    """A split in its own order: pairs of normalised images (B, C, H, W) and labels (B,)."""
    for first, pixels in evaluation_pixels(split, settings):
        images = normalize(pixels, settings["dataset"])
        yield from cache_sized(images, split.labels[first:first + len(images)])


def cache_sized(images, *tensors):
    """A batch to be evaluated, on a CPU cut into parts of 200,000 numbers: they fit its caches, without which larger
    images take twice the time, and to start the operations takes little of it."""
    count = max(1, 200_000 // images[0].numel()) if images.device.type == "cpu" else EVALUATION_BATCH
    return zip(*(tensor.split(count) for tensor in (images, *tensors)))


def has_ink(pixels, patch_size):
    """Which patches have any pixel that is not black: (B, C, H, W) -> (B, H W / patch_size^2)."""
    return F.max_pool2d(pixels.amax(1, keepdim=True), patch_size).flatten(1) > 0
