"""The committed runs and the pages about them: what repeats the runs, and that pages say what the runs say."""

import functools
import itertools
import operator
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

import command
import plot
import records
import report
import stats
import train
from test_data import HERE
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
            assert stats.settings_beside(resolved, set()) == stats.settings_beside(recorded, set())


H100, CPU, OLD = ("7a4e73b", "NVIDIA H100 80GB HBM3"), ("7a4e73b", "x86_64"), ("6eff288", "x86_64")  # commit, device
H200, LATER_CPU = ("f7dba71", "NVIDIA H200"), ("1f67906", "x86_64")
TEN = range(10)
PLACES = [
    ("reference", MODELS, range(20), BOTH, H100),
    ("reference", ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"], range(8), ["clutteredmnist"], OLD),
    ("reference", ["vit", "vitdiff"], range(3), ["cifar10"], ("3b3c9cc", "x86_64")),
    ("reference", ["vit", "vitdiff"], range(3, 10), ["cifar10"], LATER_CPU),
    ("reference", ["vitdiffv2"], TEN, ["cifar10"], LATER_CPU),
    ("reference", ["vit", "vitdiff"], range(10, 20), ["cifar10"], H200),
    ("reference", ["vitbalanced", "vitdiffpaper"], TEN, ["cifar10"], H200),
    ("controls", ["vitboth"], range(20), ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched"], TEN, ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched", "vitboth", "vitsumscaled", "vitcentered"], TEN, BOTH, H100),
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
            assert RUNS / place in command.find_run_plugin(run.folder, run.settings["plugin"]).parents


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
