"""The committed runs and the pages about them: what repeats the runs, and that pages say what the runs say. What people
bring: data of their own, of the room pictures.py, a trained model in use, and plugins, of the room plugins.py."""

import functools
import hashlib
import io
import itertools
import operator
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
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
from command import UserError
from diff_attention import SizeError
from test_data import HERE, load_splits, mnist
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
    ("brightness", ["vit", "vitboth", "vitdiff", "vitdiffv2"], TEN, BOTH, CPU),
    ("brightness", ["vitheads"], range(5), BOTH, CPU),
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
    changed = {("brightness", "mnist"): dict(brightness=0.2), ("brightness", "fashionmnist"): dict(brightness=0.2),
               ("trials/recipes", "mnist"): dict(muon_lr=0.008),
               ("trials/recipes", "fashionmnist"): dict(batch_size=128, muon_lr=0.005, lr=0.003)}
    for (dataset, _, seed), run in runs_of(place).items():
        reference = runs_of("reference")[dataset, "vit", seed]
        settings = reference.settings | changed.get((place, dataset), {})
        assert stats.recipe_of(run) == stats.recipe_of(reference._replace(settings=settings))
        if run.settings["plugin"]:
            assert RUNS / place in plugins.keep_plugins(run.folder.parent, run.settings["plugin"])[0].parents


def leads_over_the_default(dataset, default, folders, seeds):
    """{folder: how much lower its validation losses are than those of the default, paired by model and seed}: of each
    the mean and its standard error."""
    losses = {folder: [runs_of(folder)[dataset, model, seed].summary["val_loss"]
                       for model in ("vit", "vitdiff") for seed in range(seeds)] for folder in [default, *folders]}
    pairs = {folder: list(map(operator.sub, losses[default], losses[folder])) for folder in folders}
    return {folder: (statistics.fmean(leads), statistics.stdev(leads) / len(leads) ** 0.5)
            for folder, leads in pairs.items()}


@pytest.mark.parametrize("dataset, chosen", [("mnist", "trials/default"), ("fashionmnist", "trials/candidate-1")])
def test_trials(dataset, chosen):
    """By the rule a recipe other than the default is chosen where its lead is more than a standard error."""
    leads = leads_over_the_default(dataset, "trials/default", ["trials/candidate-1", "trials/candidate-2"], 5)
    best, (lead, error) = max(leads.items(), key=operator.itemgetter(1))
    assert chosen == (best if lead > error else "trials/default")


def test_trials_on_cifar10():
    """Each change is made by itself; those that lead by more than a standard error are made together, and what leads by
    most is the recipe of the reference."""
    changes = {"rates": dict(lr=0.006, muon_lr=0.01), "shift-2": dict(shift=2.0),
               "weight-decay-0.03": dict(weight_decay=0.03), "batch-64": dict(batch_size=64)}
    changes = {f"trials/cifar10/{name}": change for name, change in changes.items()}
    default = "trials/cifar10/default"
    leads = leads_over_the_default("cifar10", default, [*changes, "reference"], 3)
    better = [folder for folder in changes if operator.gt(*leads[folder])]
    changes["reference"] = functools.reduce(operator.or_, (changes[folder] for folder in better))
    for folder, change in changes.items():
        for key, run in runs_of(default).items():
            assert runs_of(folder)[key].settings == run.settings | change
    assert max(leads, key=leads.get) == "reference" and len(better) > 1


def test_outputs_without_the_shared_part():
    """The errors beside those without what all images share are those on record, by a CPU in place of a GPU."""
    _, rows = command.parse_csv((RUNS / "trials/checks/common.csv").read_text())
    for row in rows:
        run = runs_of("reference", "controls")["cifar10", row["model"], int(row["seed"])]
        recorded = 100 * (1 - run.noise["gaussian_noise_fluctuation"][2])
        assert float(row["left"]) == pytest.approx(recorded, abs=0.1)


# The pages.

def name_of(page):
    return str(page.relative_to(HERE))


def without_numbers(table):
    """A table that was found in a page, with its headings alone."""
    headings, ruler, *rows = table[0].splitlines()
    return "\n".join([headings, ruler, *(f"|{row.split('|')[1]}|" for row in rows), ""])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_of_pages(page, tmp_path):
    """Running report.py changes no page: what it writes into tables that have lost their numbers is what stands there,
    and nothing else is changed."""
    copy, text = tmp_path / "README.md", page.read_text()
    for content in (text, re.sub(r"(?<=-->\n)\|[^<]*", without_numbers, text)):
        copy.write_text(content)
        assert report.main([str(copy)]) == 0 and copy.read_text() == text


@pytest.mark.parametrize("mark, column, row, end, complaint", [
    ("accuracy", "MNIST, nonsense", "vit", "end of table", "unknown word 'nonsense'"),
    ("accuracy", "brightness", "vit", "end of table", "does not say which dataset"),
    ("accuracy", "MNIST", "vit9 - vit", "end of table", "too few runs of vit9 - vit"),
    ("accuracy", "MNIST", "vit", "end of the table", "<!-- end of table -->")])
def test_wrong_tables(mark, column, row, end, complaint, tmp_path, capsys):
    """What is wrong in a page is one line that names the page, which stays as it is."""
    page = tmp_path / "page.md"
    page.write_text(text := f"<!-- table: {mark} -->\n| | {column} |\n|---|---:|\n| `{row}` | 1 |\n<!-- {end} -->\n")
    assert report.main([str(page)]) == 2 and page.read_text() == text
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report.py: error: {page}: ") and complaint in line


# A measured figure: a number with a decimal point and a unit, or with an interval in brackets. What is configured or
# rounded in words ("20% brighter", "75% of the images") is whole.
FIGURE = re.compile(r"(\d[\d,]*\.\d+)(?:%|\s(?:points?|seconds?|milliseconds?|ms)\b|\s\([^()]* to [^()]*\))")


def figures_in_sentences(text):
    """The figures of a page outside of tables, code, flags and links."""
    text = re.sub(r"^```.*?^```|^(?:    |\|).*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)))


def test_figures_in_sentences():
    """What is a figure in a sentence and what is not."""
    assert figures_in_sentences("9.12% and -3.45\npoints, 1.20 (0.30 to 2.10), 7.5 ms, 20% of 2.47 (its share), "
                                "`6.78%`\n| 5.55% |\n    4.44%\n") == {"9.12", "3.45", "1.20", "7.5"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_of_pages(page):
    """A figure in a sentence stands in a table of the same page."""
    text = page.read_text()
    tables = "".join(re.findall(r"^\|.*\n", text, re.MULTILINE))
    assert figures_in_sentences(text) <= set(re.findall(r"\d[\d,]*\.\d+", tables))


def tracked_files(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=HERE, capture_output=True, text=True)
    return listed.stdout.split() or pytest.skip("not a git checkout")


def tables_of(command):
    """{name of the file: table} that a command of a page, `python plot.py ...`, writes."""
    args = plot.parse_flags(shlex.split(command)[2:])
    runs = [run for folder in args.folders for run in runs_of(folder.relative_to("runs")).values()
            if run.settings["seed"] in (args.seed or [run.settings["seed"]])
            and run.settings["dataset"] in (args.dataset or [run.settings["dataset"]])]
    lines_of = stats.arrange(runs)
    tables = {f"{dataset}-{name}": table for dataset, lines in lines_of.items()
              for name, table in report.make_tables(dataset, lines).items()}
    tables["comparisons"] = report.comparison_tables(lines_of, args.compare)
    return {f"{args.out}/{name}.md": table for name, table in tables.items()}


def test_committed_tables():
    """Every committed table of runs is what a command of a page writes today."""
    commands = {command.strip("` ") for page in PAGES for command in page.read_text().splitlines()
                if re.match("[` ]*python plot.py runs/.* --out runs/", command)}
    written = {name: table for command in commands for name, table in tables_of(command).items()}
    for name in tracked_files("runs/*table.md", "runs/*comparisons.md"):
        assert (HERE / name).read_text() == written[name], name


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
    assert len(tracked) < 420 and {Path(name).parts[1] for name in tracked if name.startswith("runs/")} <= {
        "README.md", "reference", "controls", "brightness", "faults", "trials"}


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
    assert data.validation_size(path.stem) == len(splits["val"].labels) and data.training_size(path.stem) == len(
        splits["train"].labels)
    return row["identity"]["data"]


def test_archives_of_pictures(flowers, arrays):
    """An .npz file has a validation split of its own. Other arrays have another fingerprint."""
    path = flowers.with_suffix(".npz")
    numpy.savez(path, **arrays)
    before = check_archive(path)
    arrays["test_images"][0, 0, 0] ^= 1
    numpy.savez(path, **arrays)
    assert check_archive(path) != before


@pytest.mark.skipif(not CASES.exists(), reason="not beside the project")
def test_shared_cases(flowers):
    splits, row = own_splits(CASES / "pictures")
    assert check_archive(CASES / "tissue.npz") and row["class_names"] == ["circle", "stripe"]
    assert [tuple(split.images.shape) for split in splits.values()] == [(n, 3, 32, 32) for n in (22, 2, 12)]


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
    "9.ppm cannot": lambda folder: (folder / "9.ppm").write_bytes(b"P6 40000 40000 255 "),
    "no value above 1": dict(train_images=numpy.ones((12, 28, 28), numpy.uint8)),
    "Object arrays": dict(train_labels=numpy.array([{}])), "no val_labels": dict(val_labels=None),
    "are float64": dict(test_images=numpy.ones((6, 9, 9))), "test label 7": dict(test_labels=numpy.full(6, 7)),
    "(12, 14)": dict(train_labels=numpy.zeros((12, 14), int))}


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
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "free_memory", lambda: 0)
        assert train_own(flowers) == 2 and "takes 0.0 GiB of memory" in capsys.readouterr().err
    assert train_own(flowers.rename(flowers.with_name("mnist"))) == 2 and "rename" in capsys.readouterr().err


def test_a_run_on_own_data(flowers, capsys):
    """A run on one's own data is repeated, analysed, used where the data are gone, and gathered; of changed data it is
    refused."""
    folder = flowers.parent / "runs/flowers-vit-seed0"
    assert train_own(flowers) == 0
    settings, facts = records.read_config(folder)
    row = data.DATASETS.pop("flowers")
    assert settings == settings | dict(dataset="flowers", image_size=32, data=row["identity"]["data"])
    assert facts == facts | {name: row[name] for name in (
        "image_size", "in_channels", "num_classes", "class_names", "mean", "std", "data_path")}
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


def test_committed_runs_in_use():
    """A committed run, whose facts do not say what a model needs, is used as any other."""
    test = mnist()["test"]
    model, prepare, classes = analysis.load_run(RUNS / "reference/mnist-vit-seed0")
    answers = model(prepare(test.images[:1_000, 0].numpy())).argmax(1)
    assert (answers == test.labels[:1_000]).float().mean() > 0.95 and classes == [*"0123456789"]
    assert not model.training and prepare(Image.new("RGB", (90, 60))).shape == (1, 1, 28, 28)


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
    and part of its digits, nothing else; the program's own modules keep their names."""
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
    assert plugins.plugin_setting(alone) == f"mine.py {hashlib.sha256(PARTED.encode()).hexdigest()[:12]}"
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
    figures = records.read_run(folder).metrics["val_loss"]
    assert train.main([f"@{folder / 'args.txt'}", *where, "--overwrite"]) == 0
    assert records.read_run(folder).metrics["val_loss"] == figures
    assert analysis.main([str(folder), "--device", "cpu"]) == 0
    gather.gather(tmp_path / "runs")
    (row,) = records.read_rows(folder.parent).values()
    assert row.settings["plugin"] == settings["plugin"] and f"--plugin {shlex.join(map(str, kept))} " in row.args


def test_a_wrong_attention(tmp_path, capsys):
    """What the attention of each block is called with is said where it does not take that; bugs keep their traceback.
    An unknown model is looked for in the project's own plugins."""
    for attention, wrong in [(torch.nn.MultiheadAttention, "'depth'"), (lambda dim, heads, depth: None, "'qkv_bias'")]:
        with pytest.raises(SizeError, match=f"attention.dim, num_heads, depth=.*{wrong}"):
            vit.ViT(attention=attention)
    source = write_files(tmp_path, {"mine.py": "import scale", "scale.py": "1 +"})
    with pytest.raises(SyntaxError, match="invalid syntax"):
        plugins.execute_plugins([source])
    assert train.main(["--model", "vitheads", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "--plugin runs/controls/plugin.py" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_seeds_in_use(tmp_path, small, capsys):
    """Seeds that another process trains are left to it; where none is left to train that is an error. The folder of a
    start that was refused does not stay."""
    flags = [*TINY, "--epochs", "1", "--runs-dir", str(tmp_path), "--seed"]
    with command.locked(tmp_path / "mnist-vitdiff-seed1"):
        assert train.main([*flags, "0", "1", "2"]) == 0
        out, err = capsys.readouterr()
        assert err.count("seed1 is in use") == 1 and "left to other processes: mnist-vitdiff-seed1\n" in out
        assert train.main([*flags, "1"]) == 2 and "nothing was trained" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnist-vitdiff-seed0", "mnist-vitdiff-seed2"]
    assert records.read_config(tmp_path / "mnist-vitdiff-seed2")[1]["stack"] == [0, 2]
    assert train.main([*flags, "0", "1", "2"]) == 0 and records.read_summary(tmp_path / "mnist-vitdiff-seed1")


def test_unwritable_cache(monkeypatch, capsys):
    """A TORCHINDUCTOR_CACHE_DIR that cannot be made keeps nobody from training, and one that cannot be written to is
    one line where something is compiled."""
    code = "import stack, torch; torch.optim.AdamW([torch.ones(1)]); print(stack.CACHE_PROBLEM)"
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                           env=os.environ | dict(TORCHINDUCTOR_CACHE_DIR=os.devnull + "/x"))
    assert found.stdout == f"{os.devnull}/x cannot be made (Not a directory)\n", found.stderr
    monkeypatch.setattr(torch, "compile", lambda *_, **__: mock.Mock(side_effect=PermissionError(13, "denied")))
    for required in (False, True):
        arguments = None, mock.MagicMock(), torch.zeros(1, 2, 1, 8, 8), dict(amp="off", label_smoothing=0), required
        with pytest.raises(UserError, match="denied.*TORCHINDUCTOR_CACHE_DIR.*") if required else nullcontext():
            assert stack.compile_forward(*arguments) is None
        assert capsys.readouterr().out.count("TORCHINDUCTOR_CACHE_DIR") == (not required)


# Attentions that people bring.

class Tied(vit.SelfAttention):
    def __init__(self, dim, num_heads, depth=0, **more):
        super().__init__(dim, num_heads, depth, **more)
        if depth == 0:
            Tied.shared = self.qkv.weight
        self.qkv.weight = Tied.shared


class Drawn(vit.SelfAttention):
    """A plain tensor that each seed draws for itself."""

    def __init__(self, dim, num_heads, **more):
        super().__init__(dim, num_heads, **more)
        self.features = torch.randn(dim // num_heads, dim // num_heads)

    def project(self, x):
        q, k, v = super().project(x)
        return q @ self.features, k, v


class Counting(vit.SelfAttention):
    """Logits that sharpen with a plain counter of training steps."""
    steps = 0

    def project(self, x):
        q, k, v = super().project(x)
        self.steps += self.training
        return (self.steps + 1) * q, k, v


class Running(vit.SelfAttention):
    """A running mean; persistent or not."""

    def __init__(self, dim, num_heads, persistent=False, **more):
        super().__init__(dim, num_heads, **more)
        self.register_buffer("mean", torch.zeros(dim), persistent=persistent)

    def project(self, x):
        if self.training:
            self.mean = (self.mean + x.detach().mean((0, 1))) / 2
        return super().project(x - 50 * self.mean)


class Doubled(vit.SelfAttention):
    """A float64 parameter, as of a number from numpy."""

    def __init__(self, dim, num_heads, **more):
        super().__init__(dim, num_heads, **more)
        self.scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.double))


class Hooked(vit.SelfAttention):
    def __init__(self, dim, num_heads, **more):
        super().__init__(dim, num_heads, **more)
        self.qkv.weight.register_hook(lambda gradient: 2 * gradient)


class Branching(vit.SelfAttention):
    """What meta tensors cannot do."""

    def forward(self, x, keep=None):
        return super().forward(x, keep) if not torch.isnan(x).any() else x[:, :keep]


class Nan(vit.SelfAttention):
    def attention_map(self, x):
        return super().attention_map(x) / torch.zeros(())


class Mixed(vit.SelfAttention):
    """A row depends on the other rows, so that a token alone gets something else."""

    def forward(self, x, keep=None):
        heads = super().forward(x, keep)
        return heads + heads.mean(1, keepdim=True)


class Negated(vit.SelfAttention):
    """Another forward pass than that of the map and branches that it inherits."""

    def forward(self, x):
        return self.proj(-x)


@pytest.mark.parametrize("attention, flags, status, words", [
    (Tied, [], 0, ""), (functools.partial(Running, persistent=True), [], 0, "they would share buffers"),
    (Drawn, [], 0, "would share blocks.0.attn.features"), (Counting, [], 2, "blocks.0.attn.steps"),
    (Running, [], 2, "blocks.0.attn.mean"), (Doubled, [], 2, "blocks.0.attn.scale is torch.float64"),
    (Hooked, [], 2, "hook on the parameter blocks.0.attn.qkv.weight"), (Branching, [], 0, ""),
    (Nan, [], 0, ""), (Nan, ["--analysis"], 2, "attention_map(x) is (2, 2, 5, 5) with nan or inf"),
    (Mixed, [], 2, "leave keep out"), (Negated, ["--analysis"], 0, "Negated changes forward(x)")])
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
        assert "flops_per_image" in run.facts or attention is Branching
        assert (run.attention is None) == (not flags or attention is Negated)


def test_a_failed_analysis(tmp_path, monkeypatch, small, capsys):
    """An analysis that fails after the training keeps the test figures, and a line says how to analyse again."""
    monkeypatch.setitem(analysis.ANALYSES, "noise.csv", analysis.Analysis(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main([*TINY, "--epochs", "1", "--analysis", "--runs-dir", str(tmp_path)])
    assert f"to analyse: python analysis.py {tmp_path}" in capsys.readouterr().out
    ((run,), _) = records.find_runs(tmp_path)
    assert 0 < run.summary["test_accuracy"] < 1 and run.noise is None
