"""The committed runs and the pages about them: what repeats the runs, and that pages say what the runs say. What people
bring: data of their own, of the room pictures.py, a trained model in use, and plugins, of the room plugins.py."""

import functools
import hashlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

import analysis
import command
import data
import gather
import pictures
import plot
import plugins
import records
import report
import stack
import stats
import train
import vit
from diff_attention import SizeError
from test_data import HERE, load_splits
from test_train import TINY, small
from vit import MODELS

RUNS = HERE / "runs"
PAGES = [HERE / "README.md", *sorted(RUNS.glob("**/README.md"))]
BOTH = ["mnist", "fashionmnist"]


@functools.cache
def runs_of(*places):
    """{(data set, model, seed): run} of folders in runs/, each of whose runs can be read."""
    runs, left_out = records.find_runs(*(RUNS / place for place in places))
    assert not [line for line in left_out if "not a run" not in line]
    return {tuple(run.settings[name] for name in ("dataset", "model", "seed")): run for run in runs}


# The runs.

def test_reference_settings():
    """A flag left out has the value of the reference runs, and args.txt of each repeats its settings."""
    for folder in (RUNS / "reference").glob("*-seed0"):
        recorded, _ = records.read_config(folder)
        for argv in ([], [f"@{folder / 'args.txt'}"]):
            args = train.parse_flags(argv)
            model, dataset, seed = ([args.model[0], args.dataset[0], args.seed[0]] if argv else
                                    [recorded[name] for name in ("model", "dataset", "seed")])
            resolved = train.resolve_settings(args, model, dataset, seed, torch.device("cpu"))
            assert stats.settings_beside(resolved, {"plugin"}) == stats.settings_beside(recorded, {"plugin"})


H100, CPU, OLD = ("7a4e73b", "NVIDIA H100 80GB HBM3"), ("7a4e73b", "x86_64"), ("6eff288", "x86_64")  # commit, device
H200, LATER_CPU = ("f7dba71", "NVIDIA H200"), ("1f67906", "x86_64")
TEN, FIVE = range(10), ["vit", "vitbalanced", "vitdiff", "vitdiffpaper", "vitdiffv2"]
PLACES = [
    ("reference", FIVE, range(20), BOTH, H100),
    ("reference", ["vitboth"], TEN, BOTH, H100),
    ("reference", ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"], range(8), ["clutteredmnist"], OLD),
    ("reference", ["vit", "vitdiff"], range(3), ["cifar10"], ("3b3c9cc", "x86_64")),
    ("reference", ["vit", "vitdiff"], range(3, 10), ["cifar10"], LATER_CPU),
    ("reference", ["vitdiffv2"], TEN, ["cifar10"], LATER_CPU),
    ("reference", ["vit", "vitdiff"], range(10, 20), ["cifar10"], H200),
    ("reference", ["vitbalanced", "vitdiffpaper"], TEN, ["cifar10"], H200),
    ("reference", ["vitboth"], range(20), ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched"], TEN, ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched", "vitsumscaled", "vitcentered"], TEN, BOTH, H100),
    ("controls", ["vitsum"], TEN, ["fashionmnist"], H100),
    ("controls", ["vitsum"], TEN, ["mnist"], CPU),
    ("controls", ["vitdiffabs", "vitdiffnonorm", "vitheadnorm"], TEN, BOTH, CPU),
    ("trials/sizes", [f"{name}{depth}" for depth in (1, 2, 4, 8) for name in ("vitdepth", "vitdiffdepth")], range(5),
     ["mnist"], LATER_CPU),
    ("trials/sizes", ["vitlarge", "vitdifflarge", "vitdiffpaperlarge"], range(3), ["cifar10"], H200),
    ("augmentation/brightness", ["vit", "vitboth", "vitdiff", "vitdiffv2"], TEN, BOTH, CPU),
    ("augmentation/brightness", ["vitheads"], range(5), BOTH, CPU),
    ("faults/activated", ["vit", "vitdiff"], TEN, ["mnist"], OLD),
    ("faults/ordered", ["vit", "vitdiff"], TEN, ["mnist"], OLD),
    ("faults/attention", ["vitdifftokennorm", "vitdiffnovember"], TEN, ["mnist"], OLD),
    ("trials/recipes", ["vit", "vitdiff"], TEN, BOTH, OLD)]


@pytest.mark.parametrize("place", dict.fromkeys(place for place, *_ in PLACES))
def test_runs(place):
    """A folder has all seeds of its models, by the commit and on the device named (some records say -dirty, as copies
    of a plugin lay beside the code), with the plugin beside them, by the recipe of the reference but for a setting."""
    found = {key: (run.facts["git_commit"].removesuffix("-dirty")[:7], run.facts["device_name"])
             for key, run in runs_of(place).items()}
    assert found == {key: facts for name, models, seeds, datasets, facts in PLACES if name == place
                     for key in itertools.product(datasets, models, seeds)}
    changed = {("augmentation/brightness", "mnist"): dict(brightness=0.2),
               ("augmentation/brightness", "fashionmnist"): dict(brightness=0.2),
               ("trials/recipes", "mnist"): dict(muon_lr=0.008),
               ("trials/recipes", "fashionmnist"): dict(batch_size=128, muon_lr=0.005, lr=0.003)}
    for (dataset, _, seed), run in runs_of(place).items():
        reference = runs_of("reference")[dataset, "vit", seed]
        settings = reference.settings | changed.get((place, dataset), {})
        assert stats.recipe_of(run) == stats.recipe_of(reference._replace(settings=settings))
        if run.settings["plugin"]:
            assert RUNS / place in plugins.keep_plugins(run.folder.parent, run.settings["plugin"])[0].parents


# The pages.

def without_numbers(table):
    """A table that was found in a page, with its headings alone."""
    headings, ruler, *rows = table[0].splitlines()
    return "\n".join([headings, ruler, *(f"|{row.split('|')[1]}|" for row in rows), ""])


# A measured figure has a decimal point and a unit, or an interval in brackets. What is configured or rounded is whole.
FIGURE = re.compile(r"(\d[\d,]*\.\d+)(?:%|\s(?:points?|seconds?|milliseconds?|ms)\b|\s\([^()]* to [^()]*\))")


def figures_in_sentences(text):
    """The figures of a page outside of tables, code, flags and links."""
    text = re.sub(r"^```.*?^```|^(?:    |\|).*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_pages(page, tmp_path):
    """Running report.py changes no page: what it writes into tables that have lost their numbers is what stands there,
    and nothing else is changed. A figure in a sentence stands in a table of the same page."""
    copy, text = tmp_path / "README.md", page.read_text()
    for content in (text, re.sub(r"(?<=-->\n)\|[^<]*", without_numbers, text)):
        copy.write_text(content)
        assert report.main([str(copy)]) == 0 and copy.read_text() == text
    tables = "".join(re.findall(r"^\|.*\n", text, re.MULTILINE))
    assert figures_in_sentences(text) <= set(re.findall(r"\d[\d,]*\.\d+", tables))


def tracked_files(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=HERE, capture_output=True, text=True)
    return listed.stdout.split() or pytest.skip("not a git checkout")


def test_committed_tables(tmp_path, monkeypatch):
    """Every committed table of runs is what a command of a page writes today."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(plot, "CHARTS", {})
    commands = {command.strip("` ") for page in PAGES for command in page.read_text().splitlines()
                if re.match("[` ]*python plot.py runs/.* --out runs/", command)}
    for command in commands:
        assert plot.main(shlex.split(command.replace("--out ", f"--out {tmp_path}/"))[2:]) == 0
    for name in tracked_files("runs/*table.md", "runs/*comparisons.md"):
        assert Path(name).read_text() == (tmp_path / name).read_text(), name


def test_links():
    """Every link of a page leads to a committed file, and of charts and their tables no other is committed."""
    tracked, linked = tracked_files("runs", "*.md"), set()
    for page in [HERE / "README.md", *RUNS.glob("**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                path = (page.parent / target).resolve()
                assert path.exists(), f"{page}: {target}"
                linked.add(path)
    assert {HERE / name for name in tracked if re.search(r"(mnist|cifar10)-[a-z-]+\.(png|md)$", name)} <= linked
    assert len(tracked) < 450 and {Path(name).parts[1] for name in tracked if name.startswith("runs/")} <= {
        "README.md", "reference", "controls", "augmentation", "faults", "trials"}


# Data of one's own.

CASES, RED, GREY = HERE.parent / "shared/cases", (200, 30, 60), (100, 100, 100)


def own_splits(path, image_size=None):
    name, = data.names_of([str(path)], image_size)
    return load_splits(name, None, torch.device("cpu")), data.DATASETS[name]


def train_own(path):
    return train.main(["--dataset", str(path), "--runs-dir", str(path.parent / "runs"), *(
        "--model vit --patch-size 8 --dim 8 --depth 1 --epochs 1 --threads 1 --no-analysis --device cpu").split()])


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """A folder of train/ and test/, of two classes: red and grey pictures of 40 x 32 pixels."""
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    monkeypatch.setattr(data, "load_splits", load_splits)  # not that of `small`
    for part, name, i in itertools.product(("train", "test"), ("rose", "stone"), range(6)):
        path = tmp_path / "flowers" / part / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), RED if name == "rose" else GREY).save(path)
    return tmp_path / "flowers"


@pytest.fixture
def arrays():
    """{name: array} of an .npz file of three classes, with a validation split."""
    images = numpy.random.default_rng(0).integers(256, size=(12, 28, 28, 3)).astype(numpy.uint8)
    labels = numpy.arange(12)[:, None] % 3
    return {f"{part}_{what}": array[:count] for part, count in [("train", 12), ("val", 4), ("test", 6)]
            for what, array in [("images", images), ("labels", labels)]}


def test_pictures_become_pixels():
    """A picture is turned by its tag, on white where it is transparent, 16 bits as 8, and cut at the centre; resized as
    by torchvision."""
    noise = numpy.random.default_rng(0).integers(256, size=(30, 50, 3)).astype(numpy.uint8)
    picture, both = Image.fromarray(noise), transforms.Compose([transforms.Resize(24), transforms.CenterCrop(24)])
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(file, "png", exif=exif)
    assert (pictures.to_pixels(picture, 24) == numpy.asarray(both(picture))).all()
    assert (pictures.to_pixels(Image.open(file), 30) == numpy.rot90(noise, -1)[10:40]).all()
    clear, deep = Image.new("RGBA", (8, 8), (*RED, 0)), Image.fromarray(numpy.full((8, 8), 257 * 77, numpy.uint16))
    clear.paste((*RED, 255), (0, 0, 4, 8))
    for case, left, right in [(clear, RED, 255), (clear.convert("PA"), RED, 255), (deep, 77, 77),
                              (Image.new("1", (8, 8), 1), 255, 255)]:
        pixels = pictures.to_pixels(case, 8)
        assert numpy.allclose(pixels[0, 0], left, atol=1) and numpy.allclose(pixels[0, 7], right, atol=1), case.mode
    assert (pictures.to_batch(noise[None, :, :30], 30) == noise[:, :30]).all()


def test_folders(flowers):
    """Classes are folders; side, channels and patch follow from the pictures. Of class folders alone a fifth of each
    class is the test split. Litter is passed over."""
    for litter in (".DS_Store", "train/Thumbs.db", "train/rose/desktop.ini", "train/rose/._0.png"):
        (flowers / litter).write_text("litter")
    if CASES.exists():
        assert own_splits(CASES / "pictures")[1]["class_names"] == ["circle", "stripe"]
    splits, row = own_splits(flowers)
    assert [len(split.labels) for split in splits.values()] == [11, 1, 12]
    assert row == row | dict(num_classes=2, class_names=["rose", "stone"], image_size=32, in_channels=3)
    assert row["defaults"] == data.DATASETS["cifar10"]["defaults"] | dict(patch_size=4, batch_size=11)
    assert (splits["test"].images[:, :, 0, 0] == torch.tensor(6 * [RED] + 6 * [GREY])).all()
    for path in flowers.glob("*/*/[0-9].png"):
        Image.new("L", (9, 9), 50 if path.parent.name == "rose" else 90).save(path)
    for image_size, side in [(None, 9), (28, 28)]:
        splits, _ = own_splits(flowers / "train", image_size)
        test = splits["test"]
        assert [len(split.labels) for split in splits.values()] == [9, 1, 2] and test.labels.tolist() == [0, 1]
        assert test.images.shape == (2, 1, side, side) and test.images.unique().tolist() == [50, 90]


def check_archive(path):
    """The arrays are those of the file, and the validation split is its own; returns the data set's fingerprint."""
    splits, row = own_splits(path)
    with numpy.load(path) as expected:
        for part, (images, labels) in splits.items():
            assert (images.permute(0, 2, 3, 1).numpy() == expected[f"{part}_images"]).all()
            assert (labels.numpy() == expected[f"{part}_labels"][:, 0]).all()
    assert data.validation_size(path.stem) == len(splits["val"].labels)
    return row["identity"]["data"]


def test_archives_of_pictures(flowers, arrays):
    """An .npz file has a validation split of its own. Other arrays have another fingerprint."""
    found, path = set(), flowers.with_suffix(".npz")
    for value in (0, 1):
        arrays["test_images"][0, 0, 0] = value
        numpy.savez(path, **arrays)
        found.add(check_archive(path))
    assert len(found) == 2 and (not CASES.exists() or check_archive(CASES / "tissue.npz"))


WRONG = {  # what the line says, and what is done to test/stone or, in the second half, to the arrays
    "flowers cannot be read (No such file": lambda folder: shutil.rmtree(folder.parents[1]),
    "flowers has no pictures": lambda folder: [shutil.rmtree(part) for part in folder.parents[1].iterdir()],
    "one class, rose": lambda folder: shutil.rmtree(folder.parents[1] / "train/stone"),
    "test/tree: the class tree": lambda folder: folder.rename(folder.with_name("tree")),
    "test/stone has no pictures": lambda folder: [path.unlink() for path in folder.iterdir()],
    "stone/more is a folder": lambda folder: shutil.copytree(folder, folder / "more"),
    "9.txt is no picture": lambda folder: (folder / "9.txt").write_text("text"),
    "9.jpg cannot": lambda folder: (Image.effect_noise((400, 400), 99).save(folder / "9.jpg"),
                                    os.truncate(folder / "9.jpg", 9_000)),
    "9.png cannot be read as a picture (it has 1 x 1": lambda folder: Image.new("L", (1, 1)).save(folder / "9.png"),
    "no value above 1": dict(train_images=numpy.ones((12, 28, 28), numpy.uint8)),
    "Object arrays": dict(train_labels=numpy.array([{}])), "no val_labels": dict(val_labels=None)}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_data(flowers, arrays, capsys, words):
    """Each way in which data can be wrong is one line that names the file or the class, before anything is written."""
    path = flowers
    if callable(WRONG[words]):
        WRONG[words](flowers / "test/stone")
    else:
        path = flowers.with_suffix(".npz")
        numpy.savez(path, **{name: array for name, array in (arrays | WRONG[words]).items() if array is not None})
    assert train_own(path) == 2 and not (flowers.parent / "runs").exists()
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and words in line and "flowers" in line


def test_data_that_do_not_fit(flowers, monkeypatch, capsys):
    """Too little memory, which is said with the figure, and a name that is taken are one line."""
    monkeypatch.setattr(pictures, "free_memory", lambda: 0)
    for path, words in [(flowers, "takes 0.0 GiB of memory"), (flowers.parent / "mnist", "rename")]:
        assert train_own(flowers.rename(path)) == 2 and words in capsys.readouterr().err


def test_a_run_on_own_data(flowers, capsys):
    """A run on one's own data is repeated, analysed, used where the data are gone, and gathered; of changed data it is
    refused."""
    folder = flowers.parent / "runs/flowers-vit-seed0"
    assert train_own(flowers) == 0
    settings, _ = records.read_config(folder)
    row = data.DATASETS.pop("flowers")
    assert settings == settings | dict(dataset="flowers", image_size=32, data=row["identity"]["data"])
    assert train.main([f"@{folder / 'args.txt'}", "--runs-dir", str(folder.parent)]) == 0
    assert "finished before this command: 1 of 1" in capsys.readouterr().out

    moved = flowers.rename(flowers.with_name("moved"))
    model, prepare, classes = analysis.load_run(folder)
    images = prepare(Image.open(moved / "test/rose/0.png"))
    assert images[0, :, 0, 0].tolist() == pytest.approx([
        (value / 255 - mean) / std for value, mean, std in zip(RED, row["mean"], row["std"])], abs=1e-5)
    (best, name), (other, next_name) = sorted(zip(model(images).softmax(1)[0].tolist(), classes), reverse=True)
    assert analysis.main([str(folder), "--predict", f"{moved}/test/rose/0.png"]) == 0
    assert capsys.readouterr().out == f"{moved}/test/rose/0.png  {name}  {best:.1%}  (or {next_name}  {other:.1%})\n"

    where = [str(folder), "--dataset", str(moved)]
    assert analysis.main(where) == 0
    again, recorded = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[:2])
    assert again == recorded
    Image.new("RGB", (40, 32)).save(moved / "train/rose/0.png")
    for flags, words in [(where, "other data"), (where[:1], "flowers cannot be read"),
                         ([*where, "--predict", __file__], "no picture")]:
        assert analysis.main(flags) == 2 and words in capsys.readouterr().err
    assert train_own(moved.rename(flowers)) == 2 and "has other settings (data is " in capsys.readouterr().err

    before = records.read_run(folder)
    shutil.copytree(RUNS / "reference/mnist-vit-seed0", folder.parent / "mnist-vit-seed0")
    gather.gather(folder.parent)
    after = {run.settings["dataset"]: run for run in records.find_runs(folder.parent)[0]}
    records.check_same(before, after["flowers"])
    assert "image_size" not in after["mnist"].settings


PARTED = """
from pathlib import Path
from parts import half
import scale
def later():
    import late
    return late.VALUE
FIGURES = [scale.SCALE, half.HALF, (Path(__file__).parent / "tables" / "bias.txt").read_text()]
"""
FILES = {"mine.py": PARTED, "scale.py": "from deep import SCALE\n", "deep.py": "SCALE = 2\n", "late.py": "VALUE = 9\n",
         "parts/__init__.py": "", "parts/half.py": "HALF = 1\n", "tables/bias.txt": "b", "data.py": "1 / 0\n",
         "other.py": "import mine\n", "tables/other.txt": "o", "plugin": "p"}
NAMED = [*FILES][:7]


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "mine.py"


def executed(*paths):
    """The setting of plugins, and of each the module that it was executed as."""
    setting = plugins.execute_plugins(paths)
    return setting, *(sys.modules[f"plugin_{part.split()[-1]}"] for part in setting.split(" / "))


def test_a_plugin_is_its_folder(tmp_path):
    """What a plugin imports of its folder, at once, later or by a sibling, and data named beside `__file__`, are kept
    and part of its digits, nothing else; the program's own modules keep their names. It is kept once, unless it lies
    beside the runs, and found by its content, not by its name."""
    source, runs = write_files(tmp_path / "a b", FILES), tmp_path / "runs"
    setting, module = executed(source)
    assert module.FIGURES == [2, 1, "b"] and sys.modules["data"].__file__ == str(HERE / "data.py")
    (kept,) = plugins.keep_plugins(runs, setting, [source])
    assert {path.relative_to(kept.parent).as_posix() for path in kept.parent.rglob("*.*")} == {*NAMED}
    for name, text in FILES.items():
        (source.parent / name).write_text(text.replace("= 2", "= 3") + "\n# edited\n")
        assert (plugins.plugin_setting(source) == setting) == (name not in NAMED)
        if name == "deep.py":
            assert executed(source)[1].FIGURES == [3, 1, "b"]
        (source.parent / name).write_text(text)
    shutil.rmtree(source.parent)
    again, module = executed(kept)
    assert again == setting and module.FIGURES == [2, 1, "b"] and module.later() == 9
    alone = write_files(tmp_path / "alone", {"mine.py": PARTED.replace("\n", "\r\n"), "data.py": ""})
    setting = f"mine.py {hashlib.sha256(PARTED.encode()).hexdigest()[:12]}"
    assert plugins.plugin_setting(alone) == setting and plugins.keep_plugins(alone.parent, setting) == [alone]
    (kept,) = plugins.keep_plugins(runs, setting, [alone])
    renamed = kept.rename(kept.with_name("renamed.py"))
    assert plugins.keep_plugins(runs, setting, [alone]) == [renamed]
    assert {name for name in tracked_files("*.py") if re.fullmatch("(?!test_)[^/]+", name)} <= {*plugins.PROGRAM}


WIDER = """
import scale, vit
vit.MODELS["wide"] = vit.MODELS.get("wide", vit.MODELS["vit"]) | scale.SIZES
"""


@mock.patch.dict(MODELS)
def test_several_plugins(tmp_path, monkeypatch, small, capsys):
    """Plugins of one file name, each with a sibling of one name, are executed in order, each once, and kept. What both
    make is trained, refused where one was edited, with the path that continues it, and repeated from any folder."""
    first, second = (write_files(tmp_path / folder, {"mine.py": WIDER, "scale.py": f"SIZES = dict({sizes})\n"})
                     for folder, sizes in [("1 +", "dim=12, depth=3"), ("2", "dim=8")])
    where = [*TINY[-3:], "--runs-dir", str(tmp_path / "runs")]
    flags = [*where, "--epochs", "1", "--model", "wide", "--plugin", str(first), str(second)]
    assert train.main([*flags, "--plugin", str(first)]) == 0
    folder = tmp_path / "runs/mnist-wide-seed0"
    settings, _ = records.read_config(folder)
    kept = plugins.keep_plugins(folder.parent, settings["plugin"])
    assert [settings["dim"], settings["depth"]] == [8, 3] and len({*kept}) == 2
    second.with_name("scale.py").write_text("SIZES = dict(dim=4)\n")
    assert train.main([*flags[:-2], flags[-1]]) == 2
    assert f"the kept copy: --plugin {shlex.join(map(str, kept))})" in capsys.readouterr().err
    for path in (first, second):
        shutil.rmtree(path.parent)
    monkeypatch.chdir(tmp_path / "runs")
    assert train.main([f"@{folder / 'args.txt'}", *where, "--overwrite"]) == 0


def test_a_wrong_attention(tmp_path, capsys):
    """What the attention of each block is called with is said where it does not take that. An unknown
    model is looked for in the project's own plugins."""
    for attention, wrong in [(torch.nn.MultiheadAttention, "'depth'"), (lambda dim, heads, depth: None, "'qkv_bias'")]:
        with pytest.raises(SizeError, match=f"attention.dim, num_heads, depth=.*{wrong}"):
            vit.ViT(attention=attention)
    assert train.main(["--model", "vitheads", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "--plugin runs/controls/plugin.py" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# Attentions that people bring.

def brought(change=lambda attn, depth: None, query=lambda attn, q: q, **methods):
    """Self-attention that is changed where it is made, in its queries (B, heads, N, 4) and in these methods."""
    class Brought(vit.SelfAttention):
        def __init__(self, dim, num_heads, depth, **more):
            super().__init__(dim, num_heads, depth, **more)
            change(self, depth)

        def project(self, x):
            q, k, v = super().project(x)
            return query(self, q), k, v

    return type("Brought", (Brought,), methods)


def tie(attn, depth, shared=[]):
    shared[:] = [attn.qkv.weight] if depth == 0 else shared
    attn.qkv.weight = shared[0]


def draw(attn, depth):
    attn.features = torch.randn(4, 4)  # a plain tensor that each seed draws for itself


def count(attn, q):
    attn.steps = getattr(attn, "steps", 0) + attn.training  # a plain number, in no state dict
    return (attn.steps + 1) * q


def track(attn, q):
    if attn.training:
        attn.mean = (attn.mean + q.detach().mean((0, 1, 2))) / 2
    return q - 50 * attn.mean


def branch(attn, q):
    return -q if torch.isnan(q).any() else q  # which meta tensors cannot do


def mix(attn, x, keep=None):
    heads = vit.SelfAttention.forward(attn, x, keep)
    return heads + heads.mean(1, keepdim=True)  # so that a token alone gets something else


BRANCHING = brought(query=branch)
KEPT, LOST = (brought(lambda attn, _, kept=kept: attn.register_buffer("mean", torch.zeros(4), kept), track)
              for kept in (True, False))  # a running mean that is in the state dict, or not
DOUBLED = brought(lambda attn, _: attn.register_parameter("scale", torch.nn.Parameter(torch.ones(1).double())))
HOOKED = brought(lambda attn, _: attn.qkv.weight.register_hook(lambda gradient: 2 * gradient))
NAN = brought(attention_map=lambda attn, x: vit.SelfAttention.attention_map(attn, x) / torch.zeros(()))
NEGATED = brought(forward=lambda attn, x: attn.proj(-x))  # not what the map and branches that it inherits are of


@pytest.mark.parametrize("attention, flags, status, words", [
    (brought(tie), [], 0, ""), (KEPT, [], 0, "they would share buffers"), (LOST, [], 2, "blocks.0.attn.mean"),
    (brought(draw, lambda attn, q: q @ attn.features), [], 0, "would share blocks.0.attn.features"),
    (brought(query=count), [], 2, "blocks.0.attn.steps"), (DOUBLED, [], 2, "blocks.0.attn.scale is torch.float64"),
    (HOOKED, [], 2, "hook on the parameter blocks.0.attn.qkv.weight"), (BRANCHING, [], 0, ""),
    (NAN, [], 0, ""), (NAN, ["--analysis"], 2, "attention_map(x) is (2, 2, 5, 5) with nan or inf"),
    (brought(forward=mix), [], 2, "leave keep out"), (NEGATED, ["--analysis"], 0, "Brought changes forward(x)")])
def test_attentions_that_people_bring(tmp_path, monkeypatch, small, capsys, attention, flags, status, words):
    """Two seeds of an attention are trained and tested as the model that was trained, side by side or one by one, or
    one line says what is wrong, and nothing that was trained is lost."""
    monkeypatch.setitem(MODELS, "mine", dict(attention=attention))
    command.say_once.cache_clear()
    assert train.main([*TINY, *"--depth 2 --epochs 2 --seed 0 1 --model mine --runs-dir".split(), str(tmp_path), *flags]
                      ) == status
    printed = capsys.readouterr()
    assert words in printed.out + printed.err and "Traceback" not in printed.err
    found, _ = records.find_runs(tmp_path)
    assert len(found) == (2 if status == 0 else 0)
    for run in found:
        loaded = stack.StackedModel([stack.load_model(run.folder, run.settings)])
        splits = data.load_splits("mnist", Path("data"), torch.device("cpu"))
        for part in ("val", "test"):
            ((loss, accuracy),) = stack.evaluate(loaded, splits[part], run.settings)
            assert loss == pytest.approx(run.summary[f"{part}_loss"], rel=1e-5)
        assert "flops_per_image" in run.facts or attention is BRANCHING
        assert (run.attention is None) == (not flags or attention is NEGATED)
