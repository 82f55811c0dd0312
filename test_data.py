"""Claims about the pixels: archives, splits, augmentation, canvases, corruptions, on real MNIST and Fashion-MNIST."""

import errno
import functools
import gzip
import hashlib
import itertools
import math
import os
import pickle
import shutil
import tarfile
import threading
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.datasets import CIFAR10, MNIST

import analysis
import data
import records
import train
from data import DATASETS, Split, load_splits
from records import UserError

HERE = Path(__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")
CANVASES = 2855204916  # CRC-32 of the canvases of the first 1,200 test images
torch.set_num_threads(1)  # tiny sizes gain nothing by more, and figures of other processes are compared to the last bit


@functools.cache
def original(name):
    return load_splits(name, HERE / "data", CPU)


def mnist():
    return original("mnist")


def cut(split, count):
    return Split(*(part[:count] for part in split))


def meta_split(dataset):
    """Five images of a data set, on meta, where a tensor has a shape and no values."""
    row = DATASETS[dataset]
    side = row.get("object_size", row["image_size"])
    return Split(torch.zeros(5, row["in_channels"], side, side, dtype=torch.uint8, device=META),
                 torch.zeros(5, dtype=torch.long, device=META))


class OnOneDevice(TorchDispatchMode):
    """No operation but a copy has tensors of meta and of the CPU, which meta itself lets pass in places."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "copy" not in function.__name__:
            tensors = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, torch.Tensor) and leaf.ndim]
            assert len({tensor.device for tensor in tensors}) <= 1, f"{function} of tensors on different devices"
        return function(*args, **(kwargs or {}))


def settings_of(dataset, **overrides):
    """The settings that the pixels depend on."""
    return DATASETS[dataset]["defaults"] | dict(dataset=dataset) | overrides


# From archives to splits.

def link_archives(folder):
    """A data folder of its own with links to MNIST's archives and nothing extracted; returns where they lie."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for archive in (HERE / "data/MNIST/raw").glob("*.gz"):
        (raw / archive.name).symlink_to(archive)
    return raw


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network in tests")
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def refusal(name, folder):
    """What load_splits refuses with: one line."""
    with pytest.raises(UserError) as error:
        data.load_splits(name, folder, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def sorted_images(images):
    pixels = images.numpy().tobytes()
    return sorted(pixels[i:i + 784] for i in range(0, len(pixels), 784))


def test_archives_and_splits(tmp_path, no_network, monkeypatch):
    """Of two commands started together one extracts the archives, without a network; both draw the same splits of all
    images."""
    raw, results, extractions, download = link_archives(tmp_path), [], [], MNIST.download
    monkeypatch.setattr(MNIST, "download", lambda dataset: extractions.append(download(dataset)))
    threads = [threading.Thread(target=lambda: results.append(data.load_splits("mnist", tmp_path, CPU)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(extractions) == 1
    assert {name: len(split.labels) for name, split in mnist().items()} == {
        "train": 55_000, "val": 5_000, "test": 10_000}
    first, second = results
    for splits, name in [(first, "train"), (second, "val"), (second, "test")]:
        assert splits[name].images.dtype == torch.uint8 and splits[name].images.shape[1:] == (1, 28, 28)
        assert torch.equal(splits[name].images, mnist()[name].images)
        assert torch.equal(splits[name].labels, mnist()[name].labels)
    with gzip.open(raw / "train-images-idx3-ubyte.gz") as file:
        archive = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(60_000, 28, 28)
    assert sorted_images(torch.cat([first["train"].images, first["val"].images])) == sorted_images(archive)
    assert first["val"].labels.bincount().min() > 400  # all ten classes, not the archive's end
    assert zlib.crc32(first["val"].labels.numpy()) == 982261507  # figures of one year compare with those of the next
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]  # no litter


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_normalization(name):
    """Images are normalised by the mean and deviation of the training archive."""
    counts = sum(original(name)[part].images.flatten().bincount(minlength=256) for part in ("train", "val"))
    shares, levels = counts / counts.sum(), data.normalize(torch.arange(256.0).view(256, 1, 1, 1), name).flatten()
    assert abs(levels @ shares) < 1e-3 and abs(levels.square() @ shares - 1) < 2e-3


@pytest.mark.parametrize("damage", ["cut short", "empty", "foreign", "alone"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"])
def test_damaged_data(tmp_path, no_network, damage, file):
    """A file that is cut short, empty or foreign, among others or alone extracted, is named, and nothing of the user's
    is changed."""
    mnist()  # so that the original is extracted
    raw = link_archives(tmp_path)
    for original in (HERE / "data/MNIST/raw").glob(file if damage == "alone" else "*-ubyte"):
        if not file.endswith(".gz"):
            (raw / original.name).symlink_to(original)
    content = (raw / file).read_bytes()
    bad = {"cut short": content[:-1], "empty": b"", "foreign": bytes(len(content)), "alone": b"mine"}[damage]
    (raw / file).unlink()
    (raw / file).write_bytes(bad)
    before = sorted(raw.iterdir())
    assert str(raw / file) in refusal("mnist", tmp_path)
    assert sorted(raw.iterdir()) == before and (raw / file).read_bytes() == bad


@pytest.mark.parametrize("dataset, archive, folder", [
    ("kmnist", "t10k-labels-idx1-ubyte.gz", "KMNIST/raw"), ("cifar10", "cifar-10-python.tar.gz", "")])
def test_missing_data(tmp_path, no_network, dataset, archive, folder):
    """Archives that are missing and cannot be downloaded are named, with the cause and the folder where they belong."""
    error = refusal(dataset, tmp_path)
    assert archive in error and str(tmp_path / folder) in error and "no network in tests" in error


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_read_only_archives(tmp_path, monkeypatch, place):
    """Archives alone in a folder that cannot be written to are an error that asks for one that can."""
    link_archives(tmp_path)
    folder, access = tmp_path / place, os.access
    folder.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))  # root may do anything
    before = sorted(tmp_path.rglob("*"))
    error = refusal("mnist", tmp_path)
    assert f"{folder} cannot be written to" in error and "--data-dir" in error and "train-images-idx3-ubyte.gz" in error
    assert sorted(tmp_path.rglob("*")) == before
    folder.chmod(0o755)


def test_full_disk(tmp_path, monkeypatch):
    """Archives that are there and cannot be extracted are an error that says why."""
    def fill_up(dataset):
        raise OSError(errno.ENOSPC, "No space left on device")

    link_archives(tmp_path)
    monkeypatch.setattr(MNIST, "download", fill_up)
    assert "could not be extracted ([Errno 28] No space left on device)" in refusal("mnist", tmp_path)


def test_cifar10(tmp_path, no_network, monkeypatch):
    """CIFAR-10 is extracted and split, and a damaged part is named: random images in its layout, with torchvision's
    checksums set to theirs."""
    sums, generator = {}, torch.Generator().manual_seed(0)
    staging, folder = tmp_path / "cifar-10-batches-py", tmp_path / "data"
    staging.mkdir()
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content = {"label_names": list("0123456789")} if name == "batches.meta" else {
            "data": torch.randint(256, (1_200, 3072), generator=generator, dtype=torch.uint8).numpy(),
            "labels": torch.randint(10, (1_200,), generator=generator).tolist()}
        staging.joinpath(name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(staging.joinpath(name).read_bytes()).hexdigest()
    with tarfile.open(folder / CIFAR10.filename, "w:gz", compresslevel=1) as archive:
        archive.add(staging, "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    splits = data.load_splits("cifar10", folder, CPU)
    assert {name: tuple(split.images.shape) for name, split in splits.items()} == {
        "train": (1_000, 3, 32, 32), "val": (5_000, 3, 32, 32), "test": (1_200, 3, 32, 32)}
    first = torch.from_numpy(pickle.loads((staging / "test_batch").read_bytes())["data"][0]).view(3, 32, 32)
    assert torch.equal(splits["test"].images[0], first)
    with open(folder / "cifar-10-batches-py/data_batch_3", "r+b") as file:
        file.truncate(100)
    assert "data_batch_3" in refusal("cifar10", folder)
    shutil.rmtree(folder / "cifar-10-batches-py")
    with open(folder / CIFAR10.filename, "r+b") as file:
        file.truncate(100)
    assert CIFAR10.filename in refusal("cifar10", folder)


# A data set of one's own.

PLUGIN = """
import numpy
from data import DATASETS

def load(folder):
    with numpy.load(folder / "mine.npz") as arrays:
        return [arrays[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels")]

DATASETS["mine"] = dict(load=load, defaults=dict(epochs=6, batch_size=20, lr=1e-2, patch_size=16))
"""


def own_arrays(size, channels=(3,)):
    """Images as bright as their class, of three, sorted by class as a folder for each class has them."""
    for count in (120, 30):
        labels = numpy.arange(count) * 3 // count
        noise = numpy.random.default_rng(count).integers(60, size=(count, size, size, *channels))
        yield (noise + 63 * labels.reshape(-1, *[1] * (noise.ndim - 1))).astype(numpy.uint8)
        yield labels.astype(numpy.uint8)


@pytest.fixture
def own_rows(monkeypatch):
    """DATASETS, to which a test may add rows."""
    monkeypatch.setattr(data, "DATASETS", dict(DATASETS))
    return data.DATASETS


def test_own_data_as_a_user_has_them(tmp_path, own_rows, monkeypatch, capsys):
    """As a user does it: a plugin of ten lines makes a data set of an .npz file, on which a model is trained and
    analysed, and analysed again with the plugin's copy alone."""
    monkeypatch.setattr(data, "EVALUATION_BATCH", 20)  # so that the third class is not in the first
    names = ["train_images", "train_labels", "test_images", "test_labels"]
    numpy.savez(tmp_path / "mine.npz", **dict(zip(names, own_arrays(32))))
    plugin, run = tmp_path / "my_data.py", tmp_path / "runs/mine-vitdiff-seed0"
    plugin.write_text(PLUGIN)
    flags = ["--device", "cpu", "--data-dir", str(tmp_path)]
    training = ["--plugin", str(plugin), "--dataset", "mine", "--runs-dir", str(tmp_path / "runs"), *flags]
    assert train.main(training) == 0
    found = records.read_run(run)
    assert found.summary["test_accuracy"] > 0.7 and found.settings["epochs"] == 6 and found.settings["shift"] == 4.0
    assert found.maps[0].shape == (3, 3, 32, 32) and data.training_size("mine") == 108
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert train.main([*training, "--patch-size", "5", "--overwrite"]) == 2
    assert "patch size 5 does not divide image size 32: choose one of [1, 2, 4, 8," in capsys.readouterr().err
    train.make_parser().format_help()  # whose defaults are not those of the row
    plugin.unlink()
    del own_rows["mine"]
    assert analysis.main([str(run), *flags]) == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("channels, convert", [
    ((), numpy.asarray), ((1,), torch.as_tensor), ((3,), lambda array: array[::-1])])
def test_own_data(own_rows, channels, convert):
    """Arrays or tensors of grey or colour images, with a list of labels, are split, counted and normalised."""
    arrays = [convert(array) if array.ndim > 1 else convert(array).tolist() for array in own_arrays(8, channels)]
    own_rows["own"] = row = dict(load=lambda folder: arrays)
    splits, shape = load_splits("own", None, CPU), (*(channels or (1,)), 8, 8)
    assert {part: tuple(split.images.shape) for part, split in splits.items()} == {
        "train": (108, *shape), "val": (12, *shape), "test": (30, *shape)}
    assert (row["num_classes"], row["in_channels"], row["image_size"]) == (3, shape[0], 8)
    assert row["defaults"] == DATASETS["cifar10"]["defaults"]
    for images, labels in splits.values():
        assert torch.equal((images.double().mean((1, 2, 3)) / 63 - 0.47).round().long(), labels)
    pixels = data.normalize(torch.cat([splits[part].images for part in ("train", "val")]).double(), "own")
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-6 and (pixels.square().mean((0, 2, 3)) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("places, change, words", [
    ([0], lambda images: images / 255, "training images are float64, not uint8"),
    ([2], lambda images: images.transpose(0, 3, 1, 2), "test images are (30, 3, 8, 8), not (N, H, W)"),
    ([0], lambda images: images[:, :7], "7 high and 8 wide"), ([2], lambda images: images[:, :7, :7], "(3, 7, 7)"),
    ([2], lambda images: images[:0], "no test images"), ([0], lambda images: images[1:], "119 training images and 120"),
    ([0, 1], lambda array: array[-9:], "9 training images"), ([0], lambda images: [[1], [2, 3]], "mine: "),
    ([1], lambda labels: labels[:, None], "uint8 (120, 1), not integers (N,)"), ([3], lambda labels: labels / 1., "f"),
    ([3], lambda labels: labels.astype(int) - 1, "label -1 is negative"), ([1], lambda labels: 0 * labels, "one class"),
    ([1], lambda labels: labels + 1, "class 0 has no training image"), ([3], lambda labels: labels + 1, "label 3 is")])
def test_bad_own_data(own_rows, places, change, words):
    """Arrays that are no data set are one line that says why."""
    arrays = list(own_arrays(8))
    for place in places:
        arrays[place] = change(arrays[place])
    own_rows["mine"] = dict(load=lambda folder: arrays)
    assert words in refusal("mine", None)


@pytest.mark.parametrize("row, words", [
    (dict(load=lambda folder: None), "load does not return train_images, train_labels, test_images, test_labels"),
    (dict(load=lambda folder: open(folder / "mine.npz")), "mine.npz"),
    (dict(load=lambda folder: None, defaults=dict(epoch=3)), "epochs?")])
def test_bad_own_rows(tmp_path, own_rows, row, words):
    """A function that returns something else or cannot read its file, and a default of no flag, are one line."""
    own_rows["mine"] = row
    assert words in refusal("mine", tmp_path)


# Augmentation.

def augmentation(**strengths):
    return dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False) | strengths


def test_each_strength():
    """Rotation turns, shift moves, flip mirrors, scale widens and shear slants by as much as they say; strengths of
    zero, and draws of zero, change nothing."""
    pixels = mnist()["train"].images[:3].float()
    assert torch.equal(data.augment(pixels, torch.ones(3, 7), augmentation()), pixels)
    still = data.augment(pixels, torch.zeros(3, 7), augmentation(rotation=12.0, scale=0.12, shear=0.12, shift=2.5))
    torch.testing.assert_close(still, pixels, rtol=0, atol=1e-3)
    extreme = {name: torch.zeros(3, 7) for name in ("rotation", "shift", "flip", "scale", "shear")}
    extreme["rotation"][:, 0] = extreme["shift"][:, 4] = extreme["scale"][:, 1] = extreme["shear"][:, 3] = 1
    extreme["flip"][:, 6] = torch.tensor([-0.5, 0.5, -0.1])

    def augmented(name, strength):
        return data.augment(pixels, extreme[name], augmentation(**{name: strength}))

    torch.testing.assert_close(augmented("rotation", 90.0), pixels.rot90(1, (2, 3)), rtol=0, atol=1e-2)
    torch.testing.assert_close(augmented("shift", 3.0)[..., :-3], pixels[..., 3:], rtol=0, atol=1e-2)
    assert augmented("shift", 3.0)[..., -3:].abs().max() == 0
    flipped = augmented("flip", True)
    assert torch.equal(flipped[0], pixels[0].flip(2)) and torch.equal(flipped[1], pixels[1])
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    ramp = (4 * x + 60).expand(3, 1, 28, 28)  # where a pixel came from; bicubic is off by 0.05 of a pixel, 0.2
    inside = (slice(None), slice(None), slice(6, 22), slice(6, 22))
    wide = data.augment(ramp, extreme["scale"], augmentation(scale=0.12))
    torch.testing.assert_close(wide[inside], (ramp + 0.12 * 4 * (x - 13.5))[inside], rtol=0, atol=0.2)
    slanted = data.augment(ramp, extreme["shear"], augmentation(shear=0.12))
    torch.testing.assert_close(slanted[inside], (ramp + 0.12 * 4 * (y - 13.5))[inside], rtol=0, atol=0.2)
    tall = data.augment((4 * y + 60).expand(3, 1, 28, 28), extreme["scale"].roll(1, 1), augmentation(scale=0.12))
    torch.testing.assert_close(tall[inside], (4 * y + 60 + 0.12 * 4 * (y - 13.5)).expand_as(tall)[inside], rtol=0,
                               atol=0.2)
    lowered = data.augment(pixels, extreme["shift"].roll(1, 1), augmentation(shift=3.0))
    torch.testing.assert_close(lowered[:, :, :-3], pixels[:, :, 3:], rtol=0, atol=1e-2)


def test_augmentation_keeps_images_sharp():
    """After a shift by half a pixel the contrast of neighbours is 0.88 of what it was, where bilinear interpolation
    leaves 0.79, and pixels stay in range."""
    pixels, draws = mnist()["train"].images[:32].float(), torch.ones(32, 7)
    shifted = data.augment(pixels, draws, augmentation(shift=0.5))
    assert shifted.min() == 0 and shifted.max() == 255
    before, after = (image.diff(dim=3).square().mean().sqrt() for image in (pixels, shifted))
    assert after > 0.83 * before


# Training batches.

@pytest.mark.parametrize("dataset, width", [("mnist", 7), ("clutteredmnist", 7 + 2 + 5 * 4)])
def test_epochs(dataset, width):
    """Order and draws, and so images and canvases, depend on seed and epoch alone, each epoch has every image once,
    and draws fill -1 to 1."""
    split, settings = cut(mnist()["train"], 300), settings_of(dataset)
    order, draws = data.draw_epoch([3, 4294967295], 2, split, settings)
    assert order.shape == (2, 300) and draws.shape == (2, 300, width)
    assert order.sort().values.tolist() == [list(range(300))] * 2
    torch.rand(5)  # the global generator plays no part
    again_order, again_draws = data.draw_epoch([4294967295], 2, split, settings)
    assert torch.equal(order[1], again_order[0]) and torch.equal(draws[1], again_draws[0])
    for other_order, other_draws in [(order[0], draws[0]),
                                     [part[0] for part in data.draw_epoch([4294967295], 1, split, settings)]]:
        assert not torch.equal(order[1], other_order) and not torch.equal(draws[1], other_draws)
    assert draws.min() >= -1 and draws.max() < 1 and abs(draws.mean()) < 0.05
    assert draws.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.03)


def test_batches():
    """A batch has, for each seed, the images and labels that its index names, augmented by its draws and normalised."""
    split, settings = cut(mnist()["train"], 300), settings_of("mnist", flip=True)
    order, draws = data.draw_epoch([0, 1, 2], 1, split, settings)
    images, labels = data.get_batch(split, order[:, :50], draws[:, :50], settings)
    assert images.shape == (3, 50, 1, 28, 28) and labels.shape == (3, 50)
    for seed, place in [(0, 0), (1, 7), (2, 49)]:
        number = order[seed, place].item()
        alone = data.augment(split.images[number:number + 1].float(), draws[seed, place:place + 1], settings)
        torch.testing.assert_close(images[seed, place], (alone[0] / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)
        assert labels[seed, place] == split.labels[number]
    settings = settings_of("clutteredmnist")
    epochs = [data.draw_epoch([0], epoch, split, settings) for epoch in (1, 1, 2)]
    canvases = [data.get_batch(split, *epoch, settings)[0] for epoch in epochs]
    assert canvases[0].shape == (1, 300, 1, 60, 60)
    assert torch.equal(canvases[0], canvases[1]) and not torch.equal(canvases[0], canvases[2])


# Canvases.

def coded_split():
    """Six images of one value each, so that a canvas says what it was made of."""
    values = 2 ** torch.arange(6)  # 1, 2, 4, 8, 16, 32
    return Split(values.byte().view(6, 1, 1, 1).expand(-1, 1, 28, 28), torch.arange(6))


def rectangle(mask):
    """Row, column, height and width of what is True, which must be a whole rectangle."""
    rows, columns = (mask.any(1 - axis).nonzero().flatten() for axis in (0, 1))
    assert mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
    return [rows[0].item(), columns[0].item(), len(rows), len(columns)]


def test_canvases():
    """A canvas has the object whole, anywhere, and fragments of other images of the split, anywhere."""
    split, index = coded_split(), torch.arange(6).repeat(100)
    draws = 2 * torch.rand(600, 2 + 5 * 4, generator=torch.Generator().manual_seed(0)) - 1
    objects, places, sources, spots = split.images[index].float(), set(), set(), set()
    alone, one, four = (data.clutter(objects, index, draws[:, :width], split, "clutteredmnist")
                        for width in (2, 7, 22))
    assert alone.shape == (600, 1, 60, 60)
    for number, canvas, more in zip(index.tolist(), alone[:, 0], (one - alone)[:, 0]):
        assert canvas.unique().tolist() == [0, 2**number]
        row, column, *size = rectangle(canvas > 0)
        assert size == [28, 28]
        places |= {("row", row), ("column", column)}
        (value,) = set(more.unique().tolist()) - {0}
        row, column, *size = rectangle(more > 0)
        assert size == [8, 8] and value != 2**number  # never of the image itself
        sources.add((2**number, value))
        spots |= {("row", row), ("column", column)}
    assert len(sources) == 6 * 5  # of every other image
    assert places == {(axis, place) for axis in ("row", "column") for place in range(33)}
    assert {0, 52} <= {spot for _, spot in spots} and max(spot for _, spot in spots) == 52
    added = (four - alone).sum((1, 2, 3)) / 64  # of four values, each a power of 2 up to 32, not the image's own
    assert ((added >= 4) & (added <= 4 * 32) & (added % 1 == 0)).all()
    white = Split(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), torch.zeros(2))
    full = data.clutter(white.images.float(), torch.arange(2), draws[:2], white, "clutteredmnist")
    assert full.max() == 255  # where two lie one on the other


def test_a_fragment_is_a_cut_of_its_image():
    """A fragment is cut where its draws say from the image that they name, and pasted where they say."""
    split, index = mnist()["val"], torch.arange(20)
    draws = 2 * torch.rand(20, 7, generator=torch.Generator().manual_seed(1)) - 1
    black = torch.zeros(20, 1, 60, 60)
    for number, pasted, draw in zip(index.tolist(), data.add_fragments(black, index, draws[:, 2:], split, 8), draws):
        other, *places = ((draw[2:] + 1) / 2 * torch.tensor([len(split.labels) - 1, 21, 21, 53, 53])).long().tolist()
        top, left, new_top, new_left = places
        image = split.images[(number + 1 + other) % len(split.labels), 0]
        expected = torch.zeros(60, 60)
        expected[new_top:new_top + 8, new_left:new_left + 8] = image[top:top + 8, left:left + 8]
        assert torch.equal(pasted[0], expected)


@pytest.mark.parametrize("count", [1, 2, 33, 9_999, 54_999])
def test_pick(count):
    """Draws from -1 to 1 pick every number below count, and none beyond."""
    ends = torch.tensor([-1.0, 2 * torch.tensor(1.0).nextafter(torch.tensor(0.0)).item() - 1, 1.0])
    assert data.pick(ends, count).tolist() == [0, count - 1, count - 1]
    middles = 2 * (torch.arange(count, dtype=torch.double) + 0.5) / count - 1
    assert torch.equal(data.pick(middles, count), torch.arange(count))


def test_evaluated_canvases():
    """Evaluated canvases are the same at every call, and those with more distractors have the same ones and more."""
    split = cut(mnist()["test"], 1_200)

    def canvases(count):
        firsts, pixels = zip(*data.evaluation_pixels(split, settings_of("clutteredmnist", distractors=count)))
        assert firsts == (0, 1_000)
        return torch.cat(pixels)

    assert torch.equal(canvases(4), canvases(4))
    by_count = [canvases(count) for count in (0, 4, 8, 16)]
    for fewer, more in zip(by_count, by_count[1:]):
        assert (more >= fewer).all() and (more.sum((1, 2, 3)) > fewer.sum((1, 2, 3))).float().mean() > 0.95
    assert zlib.crc32(by_count[1].byte().numpy()) == CANVASES  # figures of one year compare with those of the next


def test_evaluation_batches():
    """Evaluation goes through all images of a split once, in order, normalised, and not augmented."""
    split = cut(mnist()["test"], 2_300)
    images, labels = zip(*data.evaluation_batches(split, settings_of("mnist")))
    assert torch.equal(torch.cat(labels), split.labels)
    torch.testing.assert_close(torch.cat(images), (split.images.float() / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_normalization_of_canvases(name):
    """Canvases are normalised by their own mean and deviation."""
    split, name = original(name)["train"], f"cluttered{name}"
    settings, index = settings_of(name), torch.arange(0, 55_000, 22)
    draws = 2 * torch.rand(2_500, 29, generator=torch.Generator().manual_seed(0)) - 1
    pixels = data.normalize(data.training_pixels(split, index, draws, settings), name)
    assert abs(pixels.mean().item()) < 0.02 and abs(pixels.std().item() - 1) < 0.02


# Corruptions.

def corrupt(pixels, name, severity, first=0, split=None):
    return data.corrupt(pixels, name, severity, first, split or coded_split(), settings_of("mnist"))


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_corruptions_grow(name):
    """A corruption is the same at every call, of every image another one, and grows with severity from none at all."""
    split = mnist()["test"]
    pixels = split.images[:200].float()
    assert torch.equal(corrupt(pixels, name, 0), pixels)
    before, distances = pixels.clone(), []
    for severity in range(1, 6):
        result = corrupt(pixels, name, severity, split=split)
        assert result.shape == pixels.shape
        if not name.endswith(("fluctuation", "unclipped", "offset")):
            assert result.min() >= 0 and result.max() <= 255
        torch.rand(3)  # the global generator plays no part
        assert torch.equal(result, corrupt(pixels, name, severity, split=split))
        distances.append((result - pixels).abs().mean().item())
    assert 0 < distances[0] and distances == sorted(distances)
    assert torch.equal(pixels, before)
    if not name.endswith(("blur", "brightness", "contrast", "shift")):  # which are the same for all
        grey = torch.full((200, 1, 28, 28), 128.0)
        assert not torch.equal(corrupt(grey, name, 3), corrupt(grey, name, 3, first=200))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_corruptions_are_their_table(severity):
    """Each corruption does what CORRUPTIONS says, by as much."""
    grey, colour = ({name: amounts[i][severity - 1] for name, amounts in data.CORRUPTIONS.items()} for i in (0, 1))

    def on(level, name, channels=1):
        return corrupt(torch.full((400, channels, 28, 28), float(level)), name, severity)

    noisy = on(128, "gaussian_noise_unclipped") - 128
    assert noisy.std().item() == pytest.approx(255 * grey["gaussian_noise"], rel=0.03) and abs(noisy.mean()) < 1
    assert torch.equal(on(128, "gaussian_noise"), (128 + noisy).clamp(0, 255))
    flipped = on(128, "impulse_noise", channels=3)
    for level in (0, 255):
        assert (flipped == level).float().mean().item() == pytest.approx(colour["impulse_noise"] / 2, rel=0.05)
    assert set(flipped.unique().tolist()) == {0, 128, 255}
    photons, white = on(51, "shot_noise") / 255 * grey["shot_noise"], grey["shot_noise"]  # of 0.2 of white
    counts = photons.round().long().flatten().bincount()
    assert (photons - photons.round()).abs().max() < 1e-4 and len(counts) <= white + 1
    for count, share in enumerate((counts / counts.sum()).tolist()[:white]):  # the rest is cut off at white
        rate = 0.2 * white
        assert share == pytest.approx(math.exp(-rate) * rate**count / math.factorial(count), abs=0.005)
    assert on(0, "shot_noise").max() == 0
    side = grey["occlusion"]
    hidden = on(255, "occlusion", channels=3)
    assert set(hidden.unique().tolist()) == {0, 255} and torch.equal(hidden[:, 0], hidden[:, 2])
    areas = (hidden[:, 0] == 0).sum((1, 2))
    assert areas.min() >= side**2 and areas.max() == 4 * side**2  # squares may cover each other
    assert (hidden[:, 0] == 0).any(0).float().mean() > 0.95  # and lie anywhere
    distracted = on(0, "distractors")[:, 0]
    assert ((distracted > 0).sum((1, 2)) <= 4 * side**2).all()
    assert (distracted > 0).any(0).float().mean() > 0.95
    assert (distracted.sum((1, 2)) % side**2 == 0).all() and (distracted.sum((1, 2)) >= 4 * side**2).all()
    point = torch.zeros(1, 3, 61, 61)
    point[:, 1, 30, 30] = 255
    spread = corrupt(point, "gaussian_blur", severity)
    bell = (-0.5 * ((torch.arange(61.0) - 30) / colour["gaussian_blur"]) ** 2).exp()
    assert spread[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(spread[0, 1], 255 * bell.outer(bell) / bell.sum()**2, rtol=0, atol=1e-3)
    torch.testing.assert_close(on(77, "gaussian_blur"), torch.full((400, 1, 28, 28), 77.0), rtol=0, atol=1e-3)


def test_brightness_and_contrast():
    """Brightness is added to the value of HSV, so that a colour keeps its hue and saturation and black becomes grey;
    contrast is lost around the mean of each image and channel: by hand."""
    def pixels(*colours):
        return torch.tensor(colours, dtype=torch.float).T.view(1, -1, 1, len(colours))

    def assert_becomes(name, severity, before, after):
        torch.testing.assert_close(corrupt(pixels(*before), name, severity), pixels(*after), rtol=0, atol=1e-3)

    assert_becomes("brightness", 2, [[0], [100], [240]], [[51], [151], [255]])
    assert_becomes("brightness", 4, [[0, 0, 0], [102, 51, 0], [250, 25, 125]],
                   [[51, 51, 51], [153, 76.5, 0], [255, 25.5, 127.5]])
    assert_becomes("contrast", 3, [[0], [100], [200]], [[80], [100], [120]])
    assert_becomes("contrast", 2, [[0, 8, 4], [100, 0, 4]], [[25, 6, 4], [75, 2, 4]])


def test_offsets():
    """An offset is one constant an image, or one a patch; both have the deviation of the table, and are not cut off."""
    images = torch.full((2_000, 3, 28, 28), 250.0)
    whole, patches = (corrupt(images, name, 5) - images for name in ("image_offset", "patch_offset"))
    assert torch.equal(whole, whole[:, :1, :1, :1].expand_as(whole))
    corners = patches[:, :1, ::7, ::7]
    assert torch.equal(patches, corners.repeat_interleave(7, 2).repeat_interleave(7, 3).expand_as(patches))
    for offset, count in [(whole[:, 0, 0, 0], 2_000), (corners.flatten(), 32_000)]:
        assert len(offset.unique()) > 0.99 * count and abs(offset.mean()) < 5 and offset.max() > 100
        assert offset.std().item() == pytest.approx(0.25 * 255, rel=0.05)


@pytest.mark.parametrize("noise, colour, severity", [*itertools.product(data.NOISES, (0, 1), range(1, 6))])
def test_shift_and_fluctuation(noise, colour, severity):
    """The shift of each of the 256 pixel values is the mean of a simulation of the noise; what shift and fluctuation
    add is together what the noise adds, of which the fluctuation adds nothing on average."""
    levels, amount = torch.arange(256.0), data.CORRUPTIONS[noise][colour][severity - 1]
    generator, many = torch.Generator().manual_seed(severity), levels.expand(2_000, 256)
    simulated = {
        "gaussian_noise": lambda: (many + 255 * amount * torch.randn(many.shape, generator=generator)).clamp(0, 255),
        "shot_noise": lambda: (torch.poisson(many / 255 * amount, generator) / amount * 255).clamp_max(255),
        "impulse_noise": lambda: torch.where(torch.rand(many.shape, generator=generator) < amount, torch.randint(
            2, many.shape, generator=generator) * 255, many)}[noise]()
    pixels = levels.view(256, 1, 1, 1).expand(-1, 1 + 2 * colour, 28, 28)
    shifted = corrupt(pixels, f"{noise}_shift", severity)
    assert (shifted == shifted[:, :1, :1, :1]).all()
    off, error = simulated.mean(0) - shifted[:, 0, 0, 0], simulated.std(0) / math.sqrt(2_000)
    assert (off.abs() <= 5 * error + 1e-3).all() and abs(off.mean()) < 4 * error.mean() / math.sqrt(256)
    noisy, fluctuation = (corrupt(pixels, name, severity) - pixels for name in (noise, f"{noise}_fluctuation"))
    torch.testing.assert_close(shifted - pixels + fluctuation, noisy, rtol=0, atol=1e-4)
    assert abs(fluctuation.mean()) < 4 * fluctuation.std() / math.sqrt(fluctuation.numel())


@pytest.mark.parametrize("dataset", ["mnist", "clutteredmnist", "cifar10"])
def test_corruptions_on_any_device(dataset):
    """Corruptions run on meta, which has no generator of its own: their random numbers are those of the CPU."""
    with OnOneDevice():
        for name in data.CORRUPTIONS:
            ((images, labels),) = data.evaluation_batches(meta_split(dataset), settings_of(dataset), name, 3)
            assert images.is_meta and labels.is_meta and images.shape[0] == len(labels) == 5


def test_corruptions_together():
    """All corruptions together are those one by one."""
    split, settings = cut(mnist()["test"], 1_100), settings_of("mnist")
    together = {}
    for key, images, labels in data.corrupted_batches(split, settings):
        together.setdefault(key, []).append((images, labels))
    assert list(together) == [(name, severity) for name in data.CORRUPTIONS for severity in range(1, 6)]
    for key in [("distractors", 2), ("occlusion", 4), ("shot_noise_fluctuation", 5), ("patch_offset", 1)]:
        for batch, alone in zip(together[key], data.evaluation_batches(split, settings, *key), strict=True):
            assert all(map(torch.equal, batch, alone))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_has_the_pixels_of_the_cpu():
    """Training batches, canvases and corruptions on CUDA have the pixels that they have on the CPU."""
    split = cut(mnist()["test"], 1_100)
    there = Split(*(part.cuda() for part in split))
    settings = settings_of("clutteredmnist")
    for (first, canvases), (_, expected) in zip(data.evaluation_pixels(there, settings),
                                                data.evaluation_pixels(split, settings), strict=True):
        assert canvases.is_cuda and torch.equal(canvases.cpu(), expected)
        for name in data.CORRUPTIONS:
            corrupted = data.corrupt(canvases, name, 3, first, there, settings)
            assert corrupted.is_cuda and not torch.equal(corrupted, canvases)
            on_cpu = data.corrupt(expected, name, 3, first, split, settings)
            torch.testing.assert_close(corrupted.cpu(), on_cpu, rtol=0, atol=0.05)
    for settings in (settings_of("mnist", flip=True), settings):
        batches = [data.get_batch(part, *data.draw_epoch([0, 1], 1, part, settings), settings)
                   for part in (there, split)]
        assert batches[0][0].is_cuda and torch.equal(batches[0][1].cpu(), batches[1][1])
        torch.testing.assert_close(batches[0][0].cpu(), batches[1][0], rtol=0, atol=2e-3)


# Brightness of training images.

@pytest.mark.parametrize("dataset, stream", [("mnist", 2003239284), ("clutteredmnist", 1715183982)])
def test_training_brightness(dataset, stream):
    """Each training image is made brighter by an amount of its own, from 0 to the strength; order and all other draws
    are, to the byte, what they are without, and what they were before there was such a strength."""
    split, plain = cut(mnist()["train"], 300), settings_of(dataset)
    bright = plain | dict(brightness=0.3)
    (order, draws), (same_order, more) = (data.draw_epoch([3], 2, split, settings) for settings in (plain, bright))
    assert zlib.crc32(order.numpy().tobytes() + draws.numpy().tobytes()) == stream
    assert torch.equal(order, same_order) and torch.equal(draws, more[:, :, :-1])
    before, after = (data.training_pixels(split, order[0], part[0], settings)
                     for part, settings in ((draws, plain), (more, bright)))
    amounts = (more[0, :, -1] + 1) / 2 * 0.3 * 255
    torch.testing.assert_close(after, (before + amounts.view(-1, 1, 1, 1)).clamp_max(255), rtol=0, atol=1e-3)
    assert amounts.min() >= 0 and amounts.max() <= 0.3 * 255 and len(amounts.unique()) == 300
    assert amounts.mean().item() == pytest.approx(0.15 * 255, rel=0.1)
