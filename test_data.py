"""Claims about the rooms data.py and corruptions.py, on real MNIST and Fashion-MNIST: from archives to pixels."""

import csv
import functools
import gzip
import hashlib
import itertools
import math
import os
import pickle
import re
import shutil
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.datasets import CIFAR10, MNIST

import analysis
import command
import corruptions
import data
import stats
from command import UserError
from corruptions import CORRUPTIONS
from data import AUGMENTATIONS, DATASETS, Augmentation, Split, load_splits

HERE = Path(__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")
torch.set_num_threads(1)  # tiny sizes gain nothing by more, and figures of other processes are compared to the last bit


@functools.cache
def original(name):
    return load_splits(name, HERE / "data", CPU)


mnist = functools.partial(original, "mnist")


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
    """The settings that the pixels depend on, those that are off left out as in an old record."""
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
        load_splits(name, folder, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_archives_and_splits(tmp_path, no_network, monkeypatch):
    """Of commands started together one extracts the archives, without a network, and none reads a file half written;
    all draw the same splits of all images."""
    raw, extractions, download = link_archives(tmp_path), [], MNIST.download

    def extract(dataset):
        (raw / "train-images-idx3-ubyte").write_bytes(b"")
        time.sleep(0.2)
        (raw / "train-images-idx3-ubyte").unlink()
        extractions.append(download(dataset))

    monkeypatch.setattr(MNIST, "download", extract)
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(load_splits, 3 * ["mnist"], 3 * [tmp_path], 3 * [CPU])]
    assert len(extractions) == 1
    content = gzip.decompress((raw / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    archive = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(60_000, 1, 28, 28)
    shuffled = archive[torch.randperm(60_000, generator=torch.Generator().manual_seed(0))]
    for splits in results:
        assert torch.equal(torch.cat([splits["val"].images, splits["train"].images]), shuffled)
        assert [len(split.labels) for split in splits.values()] == [55_000, 5_000, 10_000]
        assert zlib.crc32(splits["val"].labels.numpy()) == 982261507  # so figures of one year are those of the next
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


@pytest.mark.parametrize("dataset, archive", [
    ("kmnist", "KMNIST/raw/t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")])
def test_missing_data(tmp_path, no_network, dataset, archive):
    """Archives that are missing and cannot be downloaded are named, with the cause and the place where they belong."""
    error = refusal(dataset, tmp_path)
    assert str(tmp_path / archive) in error and "no network in tests" in error and "--data-dir" in error


def test_read_only_data(tmp_path, monkeypatch):
    """Archives that are there and cannot be extracted are an error that says why; extracted ones are read."""
    raw, expected = link_archives(tmp_path), mnist()
    monkeypatch.setattr(MNIST, "download", lambda dataset: Path("/dev/full").write_text("more than fits"))
    assert "could not be downloaded or extracted ([Errno 28] No space left on device)" in refusal("mnist", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may do anything
    assert re.search(f"{tmp_path} cannot be written to.*{raw}/train-images-idx3-ubyte.gz", refusal("mnist", tmp_path))
    assert load_splits("mnist", HERE / "data", CPU).keys() == expected.keys()


def test_cifar10(tmp_path, no_network, monkeypatch):
    """CIFAR-10 is extracted and split, and a damaged part is named: random images in its layout, with torchvision's
    checksums set to theirs."""
    folder, sums = tmp_path / "cifar-10-batches-py", []
    folder.mkdir()
    images = torch.randint(256, (7, 1_020, 3_072), dtype=torch.uint8).numpy()
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"], images):
        content = pickle.dumps(dict(data=part, labels=[*range(10)] * 102, label_names=[]))
        (folder / name).write_bytes(content)
        sums.append((name, hashlib.md5(content).hexdigest()))
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz", compresslevel=1) as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    facts = dict(tgz_md5=None, train_list=sums[:5], test_list=sums[5:6], meta=CIFAR10.meta | dict(md5=sums[6][1]))
    for name, value in facts.items():
        monkeypatch.setattr(CIFAR10, name, value)
    splits = load_splits("cifar10", tmp_path, CPU)
    assert [len(split.labels) for split in splits.values()] == [100, 5_000, 1_020]
    assert (splits["test"].images.numpy() == images[5].reshape(-1, 3, 32, 32)).all()
    (folder / "data_batch_3").write_bytes(b"")
    assert "data_batch_3" in refusal("cifar10", tmp_path)


# A data set of one's own.

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


@pytest.mark.parametrize("channels, convert", [((), numpy.asarray), ((1,), torch.as_tensor), ((3,), numpy.flip)])
def test_own_data(own_rows, channels, convert):
    """Arrays or tensors of grey or colour images, with a list of labels, are split, counted and normalised. Defaults
    that it does not name are those of CIFAR-10, and what no row names is off, in the type of its flag."""
    arrays = [convert(array) if array.ndim > 1 else convert(array).tolist() for array in own_arrays(8, channels)]
    own_rows["own"] = row = dict(load=lambda folder: arrays, defaults=dict(shear=0.1, epochs=5))
    splits, shape = load_splits("own", None, CPU), (*(channels or (1,)), 8, 8)
    assert [tuple(split.images.shape) for split in splits.values()] == [(108, *shape), (12, *shape), (30, *shape)]
    assert row | dict(num_classes=3, in_channels=shape[0], image_size=8) == row
    defaults = [data.defaults_of("own")[name] for name in ["epochs", "batch_size", *AUGMENTATIONS]]
    assert str(defaults) == "[5, 64, 0.0, 0.0, 0.1, 2.0, True, 0.0, 0.0]" and data.defaults_of("mnist")["flip"] is False
    for images, labels in splits.values():
        assert torch.equal((images.double().mean((1, 2, 3)) / 63 - 0.47).round().long(), labels)
    pixels = data.normalize(torch.cat([splits["train"].images, splits["val"].images]).double(), "own")
    for channel in pixels.unbind(1):
        assert abs(channel.mean()) < 1e-6 and abs(channel.std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("places, change, words", [
    ([0], lambda images: images / 255, "training images are float64, not uint8"),
    ([2], lambda images: images.transpose(0, 3, 1, 2), "test images are (30, 3, 8, 8), not (N, H, W)"),
    ([0], lambda images: images[:, :7], "7 high and 8 wide"), ([2], lambda images: images[:, :7, :7], "(3, 7, 7)"),
    ([2], lambda images: images[:0], "no test images"), ([0], lambda images: images[1:], "119 training images and 120"),
    ([0, 1], lambda array: array[-9:], "9 training images"), ([1], lambda labels: labels[:, None], "not integers (N,)"),
    ([0], lambda images: [[1], [2, 3]], "inhom"), ([1], lambda labels: 0 * labels, "one class"),
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
    """A function that returns something else or cannot read its file, and a default of no flag, are one line; a bug of
    the function is not."""
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4")
    for words, load in [("load does not return train_images, train_labels,", lambda folder: None),
                        ("mine.npz", lambda folder: open(folder / "mine.npz")),
                        ("zip", lambda folder: numpy.load(folder / "cut.npz")), ("bug", lambda folder: {}["bug"])]:
        own_rows["mine"] = dict(load=load)
        assert words in refusal("mine", tmp_path)
    own_rows["mine"]["defaults"] = dict(epoch=3)
    assert "epochs?" in refusal("mine", tmp_path)
    own_rows["mine"] = dict(load=lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_splits("mine", tmp_path, CPU)


def test_committed_runs_in_use():
    """A committed run, whose facts do not say what a model needs, is used as any other."""
    test = mnist()["test"]
    model, prepare, classes = analysis.load_run(HERE / "runs/reference/mnist-vit-seed0")
    answers = model(prepare(test.images[:1_000, 0].numpy())).argmax(1)
    assert (answers == test.labels[:1_000]).float().mean() > 0.95 and classes == [*"0123456789"]
    assert not model.training and prepare(numpy.zeros((60, 90, 3), numpy.uint8)).shape == (1, 1, 28, 28)


# Augmentation.

@pytest.mark.parametrize("strengths, origin", [
    (dict(rotation=30.0, shear=0.12), lambda x, y: (
        0.75**0.5 * (x + 0.12 * y) - y / 2, (x + 0.12 * y) / 2 + 0.75**0.5 * y)),
    (dict(scale=0.12), lambda x, y: (1.12 * x, 1.06 * y)), (dict(shift=3.0), lambda x, y: (x + 3, y + 1.5)),
    (dict(flip=True), lambda x, y: (-x, y))])
def test_each_strength(strengths, origin):
    """A pixel (x, y) from the centre is taken from where rotation, scale, shear, shift and flip say; strengths of zero,
    and draws in the middle, change nothing."""
    y, x = torch.meshgrid(2 * [torch.arange(28.0) - 13.5], indexing="ij")
    pixels, expected = (4 * torch.stack(places).unsqueeze(1) + 120 for places in ((x, y), origin(x, y)))
    draws = torch.tensor([[1, 1, 0.75, 1, 1, 0.75, 0]] * 2)
    off = (data.move(pixels, draws, strengths) - expected)[..., 6:22, 6:22]
    assert off.abs().max() < 0.2  # bicubic is off by 0.05 of a pixel
    assert torch.equal(data.move(pixels, draws, data.no_augmentation()), pixels)
    assert (data.move(pixels, torch.full((2, 7), 0.5), strengths) - pixels).abs().max() < 1e-3


def test_augmentation_keeps_images_sharp():
    """After a shift by half a pixel the contrast of neighbours is 0.88 of what it was, where bilinear interpolation
    leaves 0.79, pixels stay in range, and what comes in is black."""
    pixels, draws = mnist()["train"].images[:32].float(), torch.ones(32, 7)
    shifted = data.move(pixels, draws, dict(shift=0.5))
    assert shifted.aminmax() == (0, 255) and shifted.diff(dim=3).norm() > 0.83 * pixels.diff(dim=3).norm()
    assert data.move(255 - pixels, draws, dict(shift=3.0))[..., -3:].max() < 0.01


# Training batches.

@pytest.mark.parametrize("dataset, stream", [("mnist", 2587538379), ("clutteredmnist", 1128773955)])
def test_epochs(dataset, stream):
    """Order and draws depend on seed and epoch alone, to the byte as ever; each epoch has every image once."""
    split, settings = cut(mnist()["train"], 300), settings_of(dataset, brightness=0.1)
    order, (draws, generators) = data.draw_epoch([4294967295, 3], 2, split, settings)
    parts = order[1], 2 * draws[1] - 1, torch.rand(300, generator=generators["brightness"][1])
    assert zlib.crc32(b"".join(part.numpy().tobytes() for part in parts)) == stream
    assert order.sort().values.tolist() == [list(range(300))] * 2 and not torch.equal(*order)


def test_batches():
    """A batch has, for each seed, the images and labels that its index names, augmented by its draws and normalised."""
    split, settings = cut(mnist()["train"], 50), settings_of("mnist", flip=True, batch_size=50)
    ((index, numbers),) = data.epoch_batches(split, [0, 1, 2], 1, settings)
    images, labels = data.get_batch(split, index, numbers, settings)
    assert torch.equal(labels, split.labels[index])
    for place in [(0, 0), (1, 7), (2, 49)]:
        alone = data.move(split.images[index[place], None].float(), numbers["move"][place][None], settings)
        torch.testing.assert_close(images[place], (alone[0] / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)


CHANGES = {"brightness": lambda pixels, strength, draws: (pixels + 255 * strength * draws).clamp_max(255),
           "noise": lambda pixels, strength, numbers: (pixels + 255 * strength * numbers).clamp(0, 255)}


@pytest.mark.parametrize("name", CHANGES)
def test_augmentations_are_rows(monkeypatch, name):
    """Brightness, and noise, of which this row is all, change each image by numbers of its own. These depend on seed
    and epoch alone, all others are what they are without, and a strength of 0 draws nothing."""
    monkeypatch.setitem(AUGMENTATIONS, "noise", Augmentation(command.RATE, "deviation", torch.randn, CHANGES["noise"]))

    def second_batch(seeds, **strengths):
        split, settings = cut(mnist()["train"], 300), settings_of("clutteredmnist", batch_size=200, **strengths)
        _, (index, numbers) = data.epoch_batches(split, seeds, 2, settings)
        images, _ = data.get_batch(split, index, numbers, settings)
        move, *others = [index[-1], numbers.pop("move")[-1]], *(part[-1] for part in numbers.values())
        return move, 255 * (images[-1] * 0.1876 + 0.0430), others

    move, before, _ = second_batch([4, 3])
    for seeds, strength in [([4, 3], 0), ([3], 0.2), ([4, 3], 0.2)]:
        same, after, drawn = second_batch(seeds, **{name: strength})
        assert all(map(torch.equal, same, move)) and len(drawn) == bool(strength)
        expected = CHANGES[name](before, strength, *drawn) if drawn else before
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)
    generator = data.generator_of(3, 2, "noise")
    torch.randn(200, 1, 60, 60, generator=generator)
    assert name != "noise" or torch.equal(drawn[0], torch.randn(100, 1, 60, 60, generator=generator))


# Canvases.

def test_canvases():
    """A canvas has the object, and cuts of other images of the split, where their draws say; sums end at white."""
    split, index, overlaps, draws = mnist()["val"], torch.arange(4_800, 5_000), 0, torch.rand(200, 2 + 5 * 4)
    draws[0], draws[1] = 0, 1 - 2**-24  # the ends of their range
    canvases = data.clutter(split.images[index].float(), index, draws, split, "clutteredmnist")
    for image, canvas, draw in zip(index.tolist(), canvases, draws.double()):
        top, left = (draw[:2] * 33).long().tolist()
        expected = torch.zeros(60, 60)
        expected[top:top + 28, left:left + 28] = split.images[image, 0]
        for fragment in draw[2:].split(5):
            other, top, left, new_top, new_left = (fragment * torch.tensor([4_999, 21, 21, 53, 53])).long().tolist()
            cut_from = split.images[(image + 1 + other) % 5_000, 0]
            expected[new_top:new_top + 8, new_left:new_left + 8] += cut_from[top:top + 8, left:left + 8]
        overlaps += expected.max() > 255
        assert torch.equal(canvas[0], expected.clamp_max(255))
    assert overlaps > 10


def test_evaluated_canvases():
    """Evaluated canvases are always the same, and those with more distractors have the same ones and more."""
    fewer, more = (torch.cat([pixels for _, pixels in data.evaluation_pixels(
        cut(mnist()["test"], 1_200), settings_of("clutteredmnist", distractors=count))]) for count in (4, 8))
    assert (more >= fewer).all() and (more > fewer).any(3).any(2).float().mean() > 0.95
    assert zlib.crc32(fewer.byte().numpy()) == 2855204916  # so figures of one year are those of the next


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
    return corruptions.corrupt(pixels, name, severity, first, split, settings_of("mnist"))


@pytest.mark.parametrize("dataset, channels", [("mnist", 1), ("cifar10", 3)])
def test_names_and_amounts(dataset, channels):
    """Names, their order and amounts are those of the committed runs, and stats.py takes the names apart alike."""
    with open(HERE / "runs/reference/noise.csv", newline="") as file:
        table = [(row["corruption"], int(row["severity"]), float(row["amount"]))
                 for row in csv.DictReader(file) if row["run"] == f"{dataset}-vit-seed1"]
    assert table == [(name, severity, corruptions.amount_of(name, severity, channels))
                     for name in CORRUPTIONS for severity in range(1, 6)]
    noises = [name for name in CORRUPTIONS if stats.part_of(name)[0] in corruptions.NOISES]
    assert noises == [*filter(corruptions.is_noise, CORRUPTIONS)]


@pytest.mark.parametrize("size", [8, 9, 10])
def test_corruptions_of_small_images(own_rows, size):
    """Images too small for any square to be cut out or pasted do not have the corruptions that do so."""
    own_rows["mine"] = dict(image_size=size)
    without = set(CORRUPTIONS) - set(corruptions.corruptions_of("mine"))
    assert without == ({"occlusion", "distractors"} if size < 10 else set())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow(name):
    """A corruption is the same at every call, of every image another one, and grows with severity from none at all."""
    split, grey = cut(mnist()["test"], 200), torch.full((200, 1, 28, 28), 128.0)
    pixels = split.images.float()
    results = torch.stack([corrupt(pixels, name, severity, split=split) for severity in range(6)])
    assert torch.equal(results[0], split.images) and torch.equal(results[3], corrupt(pixels, name, 3, split=split))
    distances = (results - pixels).abs().mean((1, 2, 3, 4))
    assert (distances.diff() >= 0).all() and distances[1] > 0
    if not name.endswith(("fluctuation", "unclipped", "offset")):
        assert results.min() >= 0 and results.max() <= 255
    if not name.endswith(("blur", "brightness", "contrast", "shift")):  # which are the same for all
        assert not torch.equal(*(corrupt(grey, name, 3, first, split) for first in (0, 200)))
    with OnOneDevice():
        assert [*corruptions.corrupted_batches(meta_split("cifar10"), settings_of("cifar10"), [name], [3])]


@pytest.mark.parametrize("severity", [1, 4])
def test_squares_and_blur(severity):
    """Squares are as many and as large as CORRUPTIONS says, anywhere, and may cover each other; a blur is Gaussian."""
    side, deviation = CORRUPTIONS["occlusion"].grey[severity - 1], CORRUPTIONS["gaussian_blur"].colour[severity - 1]
    hidden = 1 - corrupt(torch.full((400, 3, 28, 28), 255.0), "occlusion", severity) / 255
    fragments = corrupt(torch.zeros(400, 1, 28, 28), "distractors", severity)
    assert set(hidden.unique().tolist()) == {0, 1} and torch.equal(hidden[:, 0], hidden[:, 2])
    areas = hidden[:, 0].sum((1, 2))
    assert areas.min() >= side**2 and areas.max() == 4 * side**2 and (fragments.sum((1, 2, 3)) == 4 * side**2).all()
    assert min(squares[:, 0].any(0).float().mean() for squares in (hidden, fragments)) > 0.95
    pixels, expected = torch.full((2, 1, 3, 61, 61), 77.0)
    bell = (-0.5 * ((torch.arange(61.0) - 30) / deviation) ** 2).exp()
    pixels[:, 1], pixels[:, 1, 30, 30], expected[:, 1] = 0, 255, 255 * bell.outer(bell) / bell.sum()**2
    torch.testing.assert_close(corrupt(pixels, "gaussian_blur", severity), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name, severity, before, after", [
    ("brightness", 4, [[0, 0, 0], [102, 51, 0], [250, 25, 125]], [[51, 51, 51], [153, 76.5, 0], [255, 25.5, 127.5]]),
    ("contrast", 2, [[0, 8, 4], [100, 0, 4]], [[25, 6, 4], [75, 2, 4]])])
def test_brightness_and_contrast(name, severity, before, after):
    """Brightness is added to the value of HSV, so that a colour keeps its hue and saturation and black becomes grey;
    contrast is lost around the mean of each image and channel: by hand."""
    pixels, expected = (torch.tensor(colours).float().T[None, :, None] for colours in (before, after))
    torch.testing.assert_close(corrupt(pixels, name, severity), expected, rtol=0, atol=1e-3)


def test_offsets():
    """An offset is one constant an image, or one a patch; both have the deviation of the table, and are not cut off."""
    images = torch.full((2_000, 3, 28, 28), 250.0)
    for name, side in [("image_offset", 28), ("patch_offset", 7)]:
        change = corrupt(images, name, 5) - images
        offsets = change[:, :1, ::side, ::side]
        assert torch.equal(change, offsets.kron(torch.ones(3, side, side)))
        assert len(offsets.unique()) > 0.99 * offsets.numel() and offsets.max() > 100
        assert offsets.std().item() == pytest.approx(0.25 * 255, rel=0.05)


SIMULATED = {
    "gaussian_noise": lambda x, amount: (x + 255 * amount * torch.randn(x.shape)).clamp(0, 255),
    "shot_noise": lambda x, photons: (torch.poisson(x / 255 * photons) / photons * 255).clamp_max(255),
    "impulse_noise": lambda x, amount: torch.where(torch.rand(x.shape) < amount, torch.randint(2, x.shape) * 255, x)}


@pytest.mark.parametrize("noise, colour, severity", [*itertools.product(SIMULATED, (0, 1), (1, 5))])
def test_noise_and_its_parts(noise, colour, severity):
    """A noise is as large as a simulation of it. Its shift of each of the 256 pixel values is the mean of that; what
    shift and fluctuation add is together what the noise adds, of which the fluctuation adds nothing on average."""
    torch.manual_seed(severity)
    levels, amount = torch.arange(256.0), CORRUPTIONS[noise][colour][severity - 1]
    simulated = SIMULATED[noise](levels.expand(2_000, 256), amount)
    pixels = levels.view(256, 1, 1, 1).expand(-1, 1 + 2 * colour, 28, 28)
    noisy, shift, fluctuation = (corrupt(pixels, noise + part, severity) - pixels
                                 for part in ("", "_shift", "_fluctuation"))
    assert noisy.square().mean().item() == pytest.approx((simulated - levels).square().mean().item(), rel=0.03)
    assert (shift == shift[:, :1, :1, :1]).all()
    off, error = simulated.mean(0) - levels - shift[:, 0, 0, 0], simulated.std(0) / math.sqrt(2_000)
    assert (off.abs() <= 5 * error + 1e-3).all() and abs(off.mean()) < 4 * error.mean() / 16
    torch.testing.assert_close(shift + fluctuation, noisy, rtol=0, atol=1e-4)
    assert abs(fluctuation.mean()) < 4 * fluctuation.std() / math.sqrt(fluctuation.numel())
    if noise == "gaussian_noise":
        whole = corrupt(pixels, "gaussian_noise_unclipped", severity)
        assert torch.equal(whole.clamp(0, 255), noisy + pixels)
        assert (whole - pixels).std() / 255 == pytest.approx(amount, rel=0.01)


def test_corruptions_together(monkeypatch):
    """All corruptions together are those one by one, and a noise and its parts have their random numbers drawn once."""
    drawn, together, split, settings = [], {}, cut(mnist()["test"], 300), settings_of("mnist")
    monkeypatch.setattr(data, "EVALUATION_BATCH", 280)  # of which cache_sized makes two parts
    monkeypatch.setattr(data, "generator_of", lambda *key, make=data.generator_of: drawn.append(key) or make(*key))
    for key, images, labels in corruptions.corrupted_batches(split, settings):
        together.setdefault(key, []).append(images)
    assert list(together) == [(name, severity) for severity in range(1, 6) for name in CORRUPTIONS]
    assert torch.equal(labels, split.labels[280:]) and len(drawn) == len(set(drawn)) == 1 + 2 * 10
    for key in [("distractors", 2), ("occlusion", 4), ("shot_noise_fluctuation", 5), ("patch_offset", 1)]:
        alone = [corruptions.corrupt(pixels, *key, first, split, settings)
                 for first, pixels in data.evaluation_pixels(split, settings)]
        assert torch.equal(torch.cat(together[key]), data.normalize(torch.cat(alone), "mnist"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_has_the_pixels_of_the_cpu():
    """Canvases, augmented or corrupted, on CUDA have the pixels that they have on the CPU."""
    settings = settings_of("clutteredmnist", batch_size=100, rotation=9.0, brightness=0.2)

    def images_on(device):  # of as many images as are evaluated together on either
        split = Split(*(part.to(device) for part in cut(mnist()["test"], 50)))
        (batch,) = data.epoch_batches(split, [0, 1], 1, settings)
        yield data.get_batch(split, *batch, settings)[0]
        yield from (images for _, images, _ in corruptions.corrupted_batches(split, settings))

    for found, expected in zip(images_on("cuda"), images_on("cpu"), strict=True):
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)
