"""Claims about the pixels: archives, splits, augmentation, canvases, corruptions, on real MNIST and Fashion-MNIST."""

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
import time
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
import vit
from data import DATASETS, Split, load_splits
from records import UserError

HERE = Path(__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")
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


def test_archives_and_splits(tmp_path, no_network, monkeypatch):
    """Of two commands started together, and a third that finds a file half written, one extracts the archives, without
    a network; all draw the same splits of all images."""
    raw, results, extractions, download = link_archives(tmp_path), [], [], MNIST.download
    threads = [threading.Thread(target=lambda: results.append(data.load_splits("mnist", tmp_path, CPU)))
               for _ in range(3)]

    def extract(dataset):
        (raw / "train-images-idx3-ubyte").write_bytes(b"")
        threads[2].start()
        time.sleep(0.2)
        (raw / "train-images-idx3-ubyte").unlink()
        extractions.append(download(dataset))

    monkeypatch.setattr(MNIST, "download", extract)
    for thread in threads[:2]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(extractions) == 1
    assert {name: len(split.labels) for name, split in mnist().items()} == {
        "train": 55_000, "val": 5_000, "test": 10_000}
    first, second, third = results
    for splits, name in [(first, "train"), (second, "val"), (third, "test")]:
        assert splits[name].images.dtype == torch.uint8 and splits[name].images.shape[1:] == (1, 28, 28)
        assert all(map(torch.equal, splits[name], mnist()[name]))
    with gzip.open(raw / "train-images-idx3-ubyte.gz") as file:
        archive = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(60_000, 28, 28)
    weights = torch.randint(2**31, (784,))  # by which each image is another number
    drawn = torch.cat([first["train"].images, first["val"].images])
    assert torch.equal(*((images.flatten(1).long() @ weights).sort().values for images in (drawn, archive)))
    assert zlib.crc32(first["val"].labels.numpy()) == 982261507  # figures of one year compare with those of the next
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]  # no litter


@pytest.mark.parametrize("damage, file", [
    ("cut short", "train-images-idx3-ubyte"), ("foreign", "t10k-labels-idx1-ubyte"),
    ("alone", "train-images-idx3-ubyte"), ("cut short", "train-labels-idx1-ubyte.gz")])
def test_damaged_data(tmp_path, no_network, damage, file):
    """A file that is cut short or foreign, among others or alone extracted, is named, and nothing of the user's
    is changed."""
    mnist()  # so that the original is extracted
    raw = link_archives(tmp_path)
    for original in (HERE / "data/MNIST/raw").glob(file if damage == "alone" else "*-ubyte"):
        if not file.endswith(".gz"):
            (raw / original.name).symlink_to(original)
    content = (raw / file).read_bytes()
    bad = {"cut short": content[:-1], "foreign": bytes(len(content)), "alone": b"mine"}[damage]
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
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))  # root may do anything
    before = sorted(tmp_path.rglob("*"))
    error = refusal("mnist", tmp_path)
    assert f"{folder} cannot be written to" in error and "--data-dir" in error and "train-images-idx3-ubyte.gz" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk(tmp_path, monkeypatch):
    """Archives that are there and cannot be extracted are an error that says why."""
    link_archives(tmp_path)
    monkeypatch.setattr(MNIST, "download", lambda dataset: Path("/dev/full").write_text("more than fits"))
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
            "data": torch.randint(256, (1_020, 3072), generator=generator, dtype=torch.uint8).numpy(),
            "labels": torch.randint(10, (1_020,), generator=generator).tolist()}
        staging.joinpath(name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(staging.joinpath(name).read_bytes()).hexdigest()
    with tarfile.open(folder / CIFAR10.filename, "w:gz", compresslevel=1) as archive:
        archive.add(staging, "cifar-10-batches-py")
    *parts, test, meta = sums.items()
    facts = dict(tgz_md5=None, train_list=parts, test_list=[test], meta=CIFAR10.meta | {"md5": meta[1]})
    for name, value in facts.items():
        monkeypatch.setattr(CIFAR10, name, value)
    splits = data.load_splits("cifar10", folder, CPU)
    assert {name: tuple(split.images.shape) for name, split in splits.items()} == {
        "train": (100, 3, 32, 32), "val": (5_000, 3, 32, 32), "test": (1_020, 3, 32, 32)}
    expected = pickle.loads((staging / "test_batch").read_bytes())["data"]
    assert splits["test"].images.flatten(1).tolist() == expected.tolist()
    with open(folder / "cifar-10-batches-py/data_batch_3", "r+b") as file:
        file.truncate(100)
    assert "data_batch_3" in refusal("cifar10", folder)


# A data set of one's own.

PLUGIN = """
import numpy
import torch
from data import DATASETS
from vit import MODELS, SelfAttention

def load(folder):
    with numpy.load(folder / "mine.npz") as arrays:
        return [arrays[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels")]

class Uniform(SelfAttention):
    def attention_map(self, x):
        return torch.full_like(super().attention_map(x), 1 / x.shape[1])

DATASETS["mine"] = dict(load=load, defaults=dict(epochs=6, batch_size=20, lr=1e-2, patch_size=16))
MODELS["vituniform"] = dict(attention=Uniform)
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


def test_plugin_as_a_user_has_it(tmp_path, own_rows, monkeypatch, capsys):
    """As a user does it: a plugin makes a data set of an .npz file and adds an attention, which is trained on it and
    analysed, and analysed again with the plugin's copy alone, neither with a changed one nor beside another plugin."""
    monkeypatch.setattr(data, "EVALUATION_BATCH", 20)  # so that the third class is not in the first
    monkeypatch.setattr(data, "CORRUPTIONS", {
        name: data.CORRUPTIONS[name] for name in ("gaussian_noise", "distractors")})
    monkeypatch.setitem(vit.MODELS, "vituniform", None)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    numpy.savez(tmp_path / "mine.npz", **dict(zip(names, own_arrays(32))))
    plugin, run = tmp_path / "my_plugin.py", tmp_path / "runs/mine-vituniform-seed0"
    plugin.write_text(PLUGIN)
    flags = ["--device", "cpu", "--data-dir", str(tmp_path)]
    training = ["--plugin", str(plugin), "--dataset", "mine", "--model", "vituniform", "--runs-dir",
                str(tmp_path / "runs"), *flags]
    assert train.main(training) == 0
    assert capsys.readouterr().err == ""  # no bar where output is no terminal
    found = records.read_run(run)
    assert found.summary["test_accuracy"] > 0.7 and found.settings["epochs"] == 6 and found.settings["shift"] == 2.0
    assert found.maps[0].shape == (3, 3, 32, 32) and data.training_size("mine") == 108
    assert found.attention["clean"][0]["entropy"] == pytest.approx(math.log(5)) and found.response is None
    before = {path: path.read_bytes() for path in run.iterdir()}
    train.make_parser().format_help()  # whose defaults are not those of the row
    plugin.unlink()
    vit.MODELS["vituniform"] = None
    del own_rows["mine"]
    assert analysis.main([str(run), *flags]) == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    other = shutil.copytree(run, tmp_path / "other")
    records.write_config(other, found.settings | dict(plugin=None), {})
    assert analysis.main([str(run), str(other), *flags]) == 2
    assert "different plugins" in capsys.readouterr().err
    (kept,) = (tmp_path / "runs/plugins").iterdir()
    kept.write_text(PLUGIN + "\n")
    assert analysis.main([str(run), *flags]) == 2
    assert "no copy lies in" in capsys.readouterr().err


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
    ([0, 1], lambda array: array[-9:], "9 training images"), ([0], lambda images: [[1], [2, 3]], "inhom"),
    ([1], lambda labels: labels[:, None], "uint8 (120, 1), not integers (N,)"),
    ([3], lambda labels: labels / 1.0, "test labels are float64"), ([1], lambda labels: 0 * labels, "one class"),
    ([3], lambda labels: labels.astype(int) - 1, "label -1 is negative"),
    ([1], lambda labels: labels + 1, "class 0 has no training image"), ([3], lambda labels: labels + 1, "label 3 is")])
def test_bad_own_data(own_rows, places, change, words):
    """Arrays that are no data set are one line that says why."""
    arrays = list(own_arrays(8))
    for place in places:
        arrays[place] = change(arrays[place])
    own_rows["mine"] = dict(load=lambda folder: arrays)
    assert words in refusal("mine", None)


def test_bad_own_rows(tmp_path, own_rows):
    """A function that returns something else or cannot read its file, and a default of no flag, are one line."""
    numpy.savez(tmp_path / "whole.npz", numpy.zeros(999))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:500])
    for words, load, defaults in [("load does not return train_images, train_labels,", lambda folder: None, {}),
                                  ("mine.npz", lambda folder: open(folder / "mine.npz"), {}),
                                  ("zip", lambda folder: numpy.load(folder / "cut.npz"), {}),
                                  ("epochs?", lambda folder: None, dict(epoch=3))]:
        own_rows["mine"] = dict(load=load, defaults=defaults)
        assert words in refusal("mine", tmp_path)


@pytest.mark.parametrize("flag, value", [("epochs", 2.5), ("batch-size", 0), ("flip", "no")])
def test_bad_own_defaults(own_rows, flag, value):
    """A default that its flag would not take is refused as the flag would be."""
    own_rows["mine"] = dict(load=lambda folder: list(own_arrays(8)), defaults={flag.replace("-", "_"): value})
    with pytest.raises(records.UserError, match=f"defaults of data set mine: .*({flag}|{value})"):
        train.check_flags(train.parse_flags(["--dataset", "mine"]))


def test_corruptions_of_small_images(own_rows):
    """Images too small for any square to be cut out or pasted do not have the corruptions that do so."""
    for size in (8, 9, 10, 28):
        own_rows["mine"] = dict(image_size=size)
        left_out = set(data.CORRUPTIONS) - set(data.corruptions_of("mine"))
        assert left_out == {kind for kind in ("occlusion", "distractors") if not data.draw_corruption(
            kind, torch.zeros(1, 1, size, size), 0, dict(patch_size=1)).numel()}
        assert bool(left_out) == (size < 10)


# Augmentation.

def augmentation(**strengths):
    return dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False) | strengths


@pytest.mark.parametrize("strengths, origin", [
    (dict(rotation=30.0, shear=0.12), lambda x, y: (
        0.75**0.5 * (x + 0.12 * y) - y / 2, (x + 0.12 * y) / 2 + 0.75**0.5 * y)),
    (dict(scale=0.12), lambda x, y: (1.12 * x, 1.06 * y)), (dict(shift=3.0), lambda x, y: (x + 3, y + 1.5)),
    (dict(flip=True), lambda x, y: (-x, y))])
def test_each_strength(strengths, origin):
    """A pixel (x, y) from the centre is taken from where rotation, scale, shear, shift and flip say; strengths of zero,
    and draws of zero, change nothing."""
    y, x = torch.meshgrid(2 * [torch.arange(28.0) - 13.5], indexing="ij")
    pixels = 4 * torch.stack([x, y]).unsqueeze(1) + 120  # which say where they come from
    draws, inside = torch.tensor([[1, 1, 0.5, 1, 1, 0.5, -1]] * 2), (..., slice(6, 22), slice(6, 22))
    found = data.augment(pixels, draws, augmentation(**strengths))
    expected = 4 * torch.stack(origin(x, y)).unsqueeze(1) + 120
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=0.2)  # bicubic is off by 0.05 of a pixel
    assert torch.equal(data.augment(pixels, draws, augmentation()), pixels)
    still = data.augment(pixels, torch.zeros(2, 7), augmentation(**strengths))
    torch.testing.assert_close(still, pixels, rtol=0, atol=1e-3)


def test_augmentation_keeps_images_sharp():
    """After a shift by half a pixel the contrast of neighbours is 0.88 of what it was, where bilinear interpolation
    leaves 0.79, pixels stay in range, and what comes in is black."""
    pixels, draws = mnist()["train"].images[:32].float(), torch.ones(32, 7)
    shifted = data.augment(pixels, draws, augmentation(shift=0.5))
    assert shifted.min() == 0 and shifted.max() == 255
    before, after = (image.diff(dim=3).square().mean().sqrt() for image in (pixels, shifted))
    assert after > 0.83 * before
    assert data.augment(255 - pixels, draws, augmentation(shift=3.0))[..., -3:].max() < 0.01


# Training batches.

@pytest.mark.parametrize("dataset, stream", [("mnist", 2003239284), ("clutteredmnist", 1715183982)])
def test_epochs(dataset, stream):
    """Order and draws depend on seed and epoch alone, to the byte as ever; each epoch has every image once, and draws
    fill -1 to 1."""
    split, settings = cut(mnist()["train"], 300), settings_of(dataset)
    order, draws = data.draw_epoch([4294967295, 3], 2, split, settings)
    assert zlib.crc32(order[1].numpy().tobytes() + draws[1].numpy().tobytes()) == stream
    assert order.sort().values.tolist() == [list(range(300))] * 2
    for other in (order[0], data.draw_epoch([3], 1, split, settings)[0][0]):
        assert not torch.equal(order[1], other)
    assert -1 <= draws.min() < -0.99 and 0.99 < draws.max() < 1 and abs(draws.mean()) < 0.05


def test_training_brightness():
    """Each training image is made brighter by an amount of its own, from 0 to the strength; order and all other draws
    are what they are without."""
    split, plain = cut(mnist()["train"], 300), settings_of("clutteredmnist")
    bright = plain | dict(brightness=0.3)
    (order, draws), (same_order, more) = (data.draw_epoch([3], 2, split, settings) for settings in (plain, bright))
    assert torch.equal(order, same_order) and torch.equal(draws, more[:, :, :-1])
    before, after = (data.training_pixels(split, order[0], part[0], settings)
                     for part, settings in ((draws, plain), (more, bright)))
    amounts = (more[0, :, -1] + 1) / 2 * 0.3 * 255
    torch.testing.assert_close(after, (before + amounts.view(-1, 1, 1, 1)).clamp_max(255), rtol=0, atol=1e-3)
    assert len(amounts.unique()) == 300 and amounts.mean().item() == pytest.approx(0.15 * 255, rel=0.1)


def test_batches():
    """A batch has, for each seed, the images and labels that its index names, augmented by its draws and normalised."""
    split, settings = cut(mnist()["train"], 300), settings_of("mnist", flip=True)
    order, draws = data.draw_epoch([0, 1, 2], 1, split, settings)
    images, labels = data.get_batch(split, order[:, :50], draws[:, :50], settings)
    for seed, place in [(0, 0), (1, 7), (2, 49)]:
        number = order[seed, place].item()
        alone = data.augment(split.images[number:number + 1].float(), draws[seed, place:place + 1], settings)
        torch.testing.assert_close(images[seed, place], (alone[0] / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)
        assert labels[seed, place] == split.labels[number]


# Canvases.

def test_canvases():
    """A canvas has the object, and cuts of other images of the split, where their draws say; sums end at white."""
    split, index, overlaps = mnist()["val"], torch.arange(4_800, 5_000), 0
    draws = 2 * torch.rand(200, 2 + 5 * 4, generator=torch.Generator().manual_seed(0)) - 1
    draws[0], draws[1] = -1, torch.tensor(1.0).nextafter(torch.tensor(0.0))  # the ends of their range
    canvases = data.clutter(split.images[index].float(), index, draws, split, "clutteredmnist")
    for number, canvas, draw in zip(index.tolist(), canvases, (draws.double() + 1) / 2):
        top, left = (draw[:2] * 33).long().tolist()
        expected = torch.zeros(60, 60)
        expected[top:top + 28, left:left + 28] = split.images[number, 0]
        for fragment in draw[2:].split(5):
            other, *places = (fragment * torch.tensor([4_999, 21, 21, 53, 53])).long().tolist()
            top, left, new_top, new_left = places
            image = split.images[(number + 1 + other) % 5_000, 0]
            expected[new_top:new_top + 8, new_left:new_left + 8] += image[top:top + 8, left:left + 8]
        overlaps += expected.max() > 255
        assert torch.equal(canvas[0], expected.clamp_max(255))
    assert overlaps > 10


def test_evaluated_canvases():
    """Evaluated canvases are always the same, and those with more distractors have the same ones and more."""
    split = cut(mnist()["test"], 1_200)
    by_count = [torch.cat([pixels for _, pixels in data.evaluation_pixels(
        split, settings_of("clutteredmnist", distractors=count))]) for count in (0, 4, 8)]
    for fewer, more in zip(by_count, by_count[1:]):
        assert (more >= fewer).all() and (more.sum((1, 2, 3)) > fewer.sum((1, 2, 3))).float().mean() > 0.95
    assert zlib.crc32(by_count[1].byte().numpy()) == 2855204916  # figures of one year compare with those of the next


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "clutteredmnist", "clutteredfashionmnist"])
def test_normalization(name):
    """Images, or canvases, are normalised by the mean and deviation that they have."""
    split = cut(original(name.removeprefix("cluttered"))["train"], 5_000)
    images, _ = zip(*data.evaluation_batches(split, settings_of(name)))
    assert abs(torch.cat(images).mean().item()) < 0.02 and abs(torch.cat(images).std().item() - 1) < 0.02


# Corruptions.

def corrupt(pixels, name, severity, first=0, split=None):
    """Fragments are of images that are 1 everywhere, unless of a split."""
    split = split or Split(torch.ones(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6))
    return data.corrupt(pixels, name, severity, first, split, settings_of("mnist"))


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_corruptions_grow(name):
    """A corruption is the same at every call, of every image another one, and grows with severity from none at all."""
    split = cut(mnist()["test"], 200)
    pixels = split.images.float()
    results = torch.stack([corrupt(pixels, name, severity, split=split) for severity in range(6)])
    assert torch.equal(results[0], pixels) and torch.equal(pixels, split.images.float())
    assert torch.equal(results[3], corrupt(pixels, name, 3, split=split))
    distances = (results - pixels).abs().mean((1, 2, 3, 4)).tolist()
    assert 0 < distances[1] and distances == sorted(distances)
    if not name.endswith(("fluctuation", "unclipped", "offset")):
        assert results.min() >= 0 and results.max() <= 255
    if not name.endswith(("blur", "brightness", "contrast", "shift")):  # which are the same for all
        grey = torch.full((200, 1, 28, 28), 128.0)
        assert not torch.equal(corrupt(grey, name, 3, split=split), corrupt(grey, name, 3, first=200, split=split))
    with OnOneDevice():
        for dataset in ("mnist", "cifar10"):
            ((images, _),) = data.evaluation_batches(meta_split(dataset), settings_of(dataset), name, 3)
            assert images.is_meta


@pytest.mark.parametrize("severity", [1, 4])
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
    side = grey["occlusion"]
    hidden = on(255, "occlusion", channels=3)
    assert set(hidden.unique().tolist()) == {0, 255} and torch.equal(hidden[:, 0], hidden[:, 2])
    areas = (hidden[:, 0] == 0).sum((1, 2))
    assert areas.min() >= side**2 and areas.max() == 4 * side**2  # squares may cover each other
    assert (hidden[:, 0] == 0).any(0).float().mean() > 0.95  # and lie anywhere
    distracted = on(0, "distractors")[:, 0]
    assert (distracted > 0).any(0).float().mean() > 0.95 and (distracted.sum((1, 2)) == 4 * side**2).all()
    point = torch.zeros(1, 3, 61, 61)
    point[:, 1, 30, 30] = 255
    spread = corrupt(point, "gaussian_blur", severity)
    bell = (-0.5 * ((torch.arange(61.0) - 30) / colour["gaussian_blur"]) ** 2).exp()
    assert spread[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(spread[0, 1], 255 * bell.outer(bell) / bell.sum()**2, rtol=0, atol=1e-3)
    torch.testing.assert_close(on(77, "gaussian_blur"), torch.full((400, 1, 28, 28), 77.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name, severity, before, after", [
    ("brightness", 2, [[0], [100], [240]], [[51], [151], [255]]),
    ("brightness", 4, [[0, 0, 0], [102, 51, 0], [250, 25, 125]], [[51, 51, 51], [153, 76.5, 0], [255, 25.5, 127.5]]),
    ("contrast", 3, [[0], [100], [200]], [[80], [100], [120]]),
    ("contrast", 2, [[0, 8, 4], [100, 0, 4]], [[25, 6, 4], [75, 2, 4]])])
def test_brightness_and_contrast(name, severity, before, after):
    """Brightness is added to the value of HSV, so that a colour keeps its hue and saturation and black becomes grey;
    contrast is lost around the mean of each image and channel: by hand."""
    pixels, expected = (torch.tensor(colours).float().T[None, :, None] for colours in (before, after))
    torch.testing.assert_close(corrupt(pixels, name, severity), expected, rtol=0, atol=1e-3)


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


@pytest.mark.parametrize("noise, colour, severity", [*itertools.product(data.NOISES, (0, 1), (1, 5))])
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


def test_corruptions_together(monkeypatch):
    """All corruptions together are those one by one."""
    monkeypatch.setattr(data, "EVALUATION_BATCH", 100)
    split, settings = cut(mnist()["test"], 130), settings_of("mnist")
    together = {}
    for key, images, labels in data.corrupted_batches(split, settings):
        together.setdefault(key, []).append((images, labels))
    assert list(together) == [(name, severity) for severity in range(1, 6) for name in data.CORRUPTIONS]
    for key in [("distractors", 2), ("occlusion", 4), ("shot_noise_fluctuation", 5), ("patch_offset", 1)]:
        for batch, alone in zip(together[key], data.evaluation_batches(split, settings, *key), strict=True):
            assert all(map(torch.equal, batch, alone))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_has_the_pixels_of_the_cpu():
    """Canvases and corruptions on CUDA have the pixels that they have on the CPU."""
    split, settings = cut(mnist()["test"], 1_100), settings_of("clutteredmnist")
    there = Split(*(part.cuda() for part in split))
    for name, severity in [(None, 0), *((name, 3) for name in data.CORRUPTIONS)]:
        found, expected = (torch.cat([images for images, _ in data.evaluation_batches(part, settings, name, severity)])
                           for part in (there, split))
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)
