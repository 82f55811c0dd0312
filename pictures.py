"""Pictures that people have, as arrays: a folder of class folders, or an .npz file in MedMNIST's layout.

    arrays, classes = pictures.read(path, image_size)     as `load` of a row of DATASETS returns them; names of classes
    pixels = pictures.to_pixels(picture, side)            a PIL image as training sees it, uint8 (side, side, 3)

A picture is turned by its EXIF tag, laid on white where it is transparent, resized, its shorter side first, and cut at
the centre.
"""

import contextlib
import functools
import hashlib
import math
import os
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from command import UserError, check, first_line

PARTS = ["train", "test", "val"]
LITTER = ["thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"]  # of operating systems, and dot files
LARGEST, SMALLEST = 64, 2  # pixels a side: what is kept as it is, and what counts as a picture
DEFAULT_SIDE = 32
THREADED = 128**2  # pixels a picture, from which on several threads decode faster than one


def read(path, image_size=None):
    """The data set at a path: train_images, train_labels, test_images, test_labels and, if there are any, val_images
    and val_labels, a list; and the names of the classes, None where they have none.

    image_size: pixels a side; without it the pictures' own size where all are square, of one size and at most 64, else
        32. Images are uint8 (N, side, side, 3), or (N, side, side) if all are grey.

    Raises:
        UserError: if that cannot be read, with the file or the class at fault.
    """
    with warnings.catch_warnings():  # of PIL, whose lines name no file
        warnings.simplefilter("ignore")
        images, labels, classes = (read_archive if path.suffix == ".npz" else read_folder)(path, image_size)
    if all(part.shape[3:] == (3,) and (part == part[..., :1]).all() for part in images):
        images = [part[..., 0] for part in images]
    return [array for pair in zip(images, labels) for array in pair], classes


# A folder.

def read_folder(path, image_size):
    parts = find_parts(path)
    classes = sorted(parts["train"])
    check_classes(path, parts)
    files = [file for part in parts.values() for pictures in part.values() for file in pictures]
    sizes = run_through(map(read_size, files), len(files), "looking at pictures")
    side = choose_side(sizes, image_size)
    check_memory(path, len(files) * side * side * 3)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        run = pool.map if sum(map(math.prod, sizes)) > THREADED * len(files) else map
        found = run(functools.partial(read_pixels, side=side), files)
        pixels = iter(run_through(found, len(files), "reading pictures"))
    labels = [numpy.array([classes.index(name) for name, pictures in part.items() for _ in pictures])
              for part in parts.values()]
    return [numpy.stack([next(pixels) for _ in part]) for part in labels], labels, classes


def find_parts(path):
    """The pictures of a folder: {"train": {class: [file]}, "test": ..., "val": ...}, the last one if it is there."""
    folders = {part: path / part for part in PARTS if (path / part).is_dir()}
    if {"train", "test"} <= folders.keys():
        return {part: list_classes(folder) for part, folder in folders.items()}
    parts = dict(train={}, test={})
    for name, files in list_classes(path).items():
        if len(files) < 2:
            raise UserError(f"{path / name} has a single picture: at least one is for training and one for the test")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
        test, train = order.tensor_split([max(1, round(len(files) / 5))])
        parts["train"][name], parts["test"][name] = ([files[i] for i in sorted(half)] for half in (train, test))
    return parts


def list_classes(folder):
    """{class: its pictures}, of which each has a folder."""
    classes = {entry.name: list_pictures(entry) for entry in list_folder(folder) if entry.is_dir()}
    if not classes:
        raise UserError(f"{folder} has no pictures in class folders: make a folder for the pictures of each class, "
                        "there or in train/ and test/ there")
    return classes


def list_pictures(folder):
    files = list_folder(folder)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder where pictures of a class are expected: class folders lie in the "
                            "folder that you name, or in train/ and test/ (and val/) there")
    if not files:
        raise UserError(f"{folder} has no pictures: put those of the class there, or delete the folder")
    return files


def list_folder(folder):
    """What lies in a folder, sorted, but for the litter of operating systems."""
    try:
        return sorted(entry for entry in folder.iterdir()
                      if not entry.name.startswith(".") and entry.name.lower() not in LITTER)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name a folder of class folders, or an .npz file"
                        ) from None


def check_classes(path, parts):
    train, *others = parts
    if len(parts[train]) < 2:
        raise UserError(f"{path} has pictures of one class, {min(parts[train])}: a classifier needs two or more")
    for part in others:
        for name in sorted(parts[part].keys() - parts[train].keys()):
            raise UserError(f"{path / part / name}: the class {name} has no pictures in {path / train}")


# A picture.

@contextlib.contextmanager
def opened(path):
    """A block with the picture in a file; what is wrong with it is a UserError that names the file."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no picture: move it away") from None
    except Exception as error:  # whatever Pillow says of damaged bytes
        raise UserError(f"{path} cannot be read as a picture ({first_line(error)}): mend it or move it away") from None


def read_size(path):
    with opened(path) as picture:
        width, height = picture.size
        check(min(width, height) >= SMALLEST, f"it has {width} x {height} pixels")
        return width, height


def read_pixels(path, side):
    with opened(path) as picture:
        return to_pixels(picture, side)


def to_pixels(picture, side, mode="RGB"):
    """A PIL image as training sees it: uint8 (side, side, 3), or (side, side) if `mode` is L, grey."""
    picture.draft(None, (4 * side, 4 * side))  # has a large JPEG decoded at a fraction of its size
    picture = flatten(ImageOps.exif_transpose(picture))
    if picture.size != (side, side):
        width, height = (side * length // min(picture.size) for length in picture.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)  # averages where it makes smaller
        picture = picture.crop((left, top, left + side, top + side))
    return numpy.asarray(picture if picture.mode == mode else picture.convert(mode))


def flatten(picture):
    """A picture in 8 bits RGB, on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits, in 32 of some formats
        levels = numpy.asarray(picture)
        check(0 <= levels.min() and levels.max() < 2**16, "it has more than 16 bits a pixel")
        picture = Image.fromarray((levels / 257).round().astype(numpy.uint8))
    check(picture.mode != "F", "its pixels are fractions")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_batch(images, side, mode="RGB"):
    """A PIL image, or an array of one or several, uint8 (H, W), (H, W, C), (B, H, W) or (B, H, W, C), by to_pixels:
    (B, side, side, 3), or (B, side, side) if `mode` is L. C is 1, 3 or 4, with alpha."""
    if not isinstance(images, Image.Image):
        images = numpy.asarray(images)
        check(images.dtype == numpy.uint8 and images.ndim in (2, 3, 4),
              f"images are {images.dtype} {images.shape}, not uint8 (H, W), (H, W, C), (B, H, W) or (B, H, W, C)")
        is_single = images.ndim == 2 or images.ndim == 3 and images.shape[2] in (1, 3, 4)
        images = [Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
                  for image in (images[None] if is_single else images)]
    else:
        images = [images]
    return numpy.stack([to_pixels(image, side, mode) for image in images])


# An .npz file.

def read_archive(path, image_size):
    names = [f"{part}_{what}" for part in PARTS for what in ("images", "labels")]
    try:
        check(zipfile.is_zipfile(path) or not path.exists(), "it is no zip archive")
        with numpy.load(path, allow_pickle=False) as archive:
            wanted = names if any(name in archive for name in names[4:]) else names[:4]
            missing = [name for name in wanted if name not in archive]
            check(not missing, f"it has no {', '.join(missing)}, only {', '.join(archive) or 'nothing'}")
            check_memory(path, sum(archive.zip.getinfo(f"{name}.npy").file_size for name in wanted))
            arrays = [archive[name] for name in wanted]
    except UserError:
        raise
    except Exception as error:  # whatever numpy and zipfile say of damaged bytes
        raise UserError(f"{path} cannot be read as an .npz file of images and labels ({first_line(error)})") from None
    labels = [part.reshape(len(part)) if part.shape[1:] == (1,) else part for part in arrays[1::2]]
    images = arrays[::2]
    if all(part.dtype == numpy.uint8 and part.size and (part.ndim == 3 or part.shape[3:] in ((1,), (3,)))
           for part in images):  # what is not like that is refused as arrays of a plugin are
        side = choose_side([part.shape[2:0:-1] for part in images], image_size)
        check_memory(path, sum(map(len, images)) * side * side * 3)
        images = [resize(part, side) for part in images]
    return images, labels, None


def resize(images, side):
    """Images (N, H, W) or (N, H, W, C) as (N, side, side, 3)."""
    if images.shape[1:] == (side, side, 3):
        return images
    found = (to_batch(image, side)[0] for image in images)
    return numpy.stack(run_through(found, len(images), "resizing pictures"))


# Sizes.

def choose_side(sizes, image_size):
    """Pixels a side of all images, by the (width, height) of each picture."""
    (width, height), *others = set(sizes)
    is_kept = width == height <= LARGEST and not others
    return image_size or (width if is_kept else DEFAULT_SIDE)


def check_memory(path, bytes_of_pixels):
    """Raise a UserError unless there is room for so many bytes, which are copied on their way to the model."""
    needed, free = 4 * bytes_of_pixels / 2**30, free_memory() / 2**30
    if needed > free:
        raise UserError(f"{path} takes {needed:,.1f} GiB of memory to read, and {free:,.1f} GiB are free: give a "
                        "smaller --image-size, or fewer pictures")


def free_memory():
    """Bytes that are free, or all that the machine has where it does not say."""
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def run_through(found, count, what):
    """A list of what an iterator yields, with a bar if that takes more than two seconds."""
    return list(tqdm(found, desc=what, total=count, unit=" pictures", delay=2, leave=False, disable=None))


# What the arrays are.

def pixel_moments(images):
    """Mean and deviation of bytes (N, C, H, W), from 0 to 1: of each a list, one a channel."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    shares, levels = counts.double() / images[:, 0].numel(), torch.arange(256, dtype=torch.double) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return dict(mean=mean.tolist(), std=[value or 1.0 for value in std.tolist()])  # 1 for a channel of one value


def fingerprint(splits):
    """The first twelve digits of the SHA-256 of all arrays."""
    digest = hashlib.sha256()
    for part, split in splits.items():
        for tensor in split:
            digest.update(f"{part} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
