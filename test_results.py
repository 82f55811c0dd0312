"""Claims about the committed runs: what repeats them, what their weights give today, what the READMEs say of them."""

import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import torch

import analysis
import data
import plot
import records
import stats
import train
from test_data import HERE
from test_train import TINY, command, table
from vit import MODELS

REFERENCE = sorted(path.parent for path in (HERE / "runs/reference").glob("*/config.json"))
FAULTS = HERE / "runs/faults"
README = (HERE / "README.md").read_text()


@pytest.mark.parametrize("folder", REFERENCE, ids=lambda folder: folder.name)
def test_reference_settings(folder):
    """A flag left out has the value of the reference runs, and args.txt of each repeats its settings."""
    recorded, _ = records.read_config(folder)
    for argv in ([], [f"@{folder / 'args.txt'}"]):
        args = train.parse_flags(argv)
        model, dataset, seed = ([recorded[name] for name in ("model", "dataset", "seed")] if not argv
                                else [args.model[0], args.dataset[0], args.seed[0]])
        assert train.resolve_settings(args, model, dataset, seed, torch.device("cpu")) == recorded


def test_reference_weights(tmp_path, monkeypatch, capsys):
    """The weights of a reference run give its test figures, attention.csv and, of two corruptions, noise.csv again."""
    corruptions = {name: data.CORRUPTIONS[name] for name in ("gaussian_noise", "distractors")}
    monkeypatch.setattr(data, "CORRUPTIONS", corruptions)
    recorded, folder = HERE / "runs/reference/mnist-vitdiff-seed0", tmp_path / "mnist-vitdiff-seed0"
    shutil.copytree(recorded, folder)
    assert command(folder, "--device", "cpu", "--data-dir", HERE / "data", main=analysis.main) == 0
    again, before = ([float(word.rstrip("%")) for word in line.split() if word[0].isdigit()]
                     for line in capsys.readouterr().out.splitlines() if "test loss" in line)
    assert again == [pytest.approx(before[0], abs=1e-4), pytest.approx(before[1], abs=0.02)]
    for name in ("noise.csv", "attention.csv"):
        found, expected_rows = (
            [row for row in table(place / name) if row.get("corruption", "distractors") in corruptions]
            for place in (folder, recorded))
        for row, expected in zip(found, expected_rows, strict=True):
            for column, text in expected.items():
                if column != "signal_to_noise":  # a ratio of two of the others
                    assert row[column] == text or float(row[column]) == pytest.approx(float(text), abs=1e-3)


def test_reference_runs():
    """The reference has all seeds of all models, by one commit."""
    configs = [records.read_config(folder) for folder in REFERENCE]
    assert sorted((settings["dataset"], settings["model"], settings["seed"]) for settings, _ in configs) == sorted([
        *itertools.product(["mnist", "fashionmnist"], MODELS, range(5)),
        *itertools.product(["clutteredmnist"], ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"], range(3))])
    (commit,) = {facts["git_commit"] for _, facts in configs}
    assert re.fullmatch("[0-9a-f]{40}", commit)


@pytest.mark.parametrize("fault, seeds, changed", [
    ("activated", 3, {}), ("ordered", 3, {}), ("matched", 3, {"vit": dict(mlp_dim=160)}),
    ("rate", 5, {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)})])
def test_faults(fault, seeds, changed):
    """The runs of a fault have the settings of the reference but for the fault, which is a setting or a plugin."""
    folder = FAULTS / fault
    plugin = None
    if (folder / "plugin.py").exists():
        plugin = f"plugin.py {hashlib.sha256((folder / 'plugin.py').read_bytes()).hexdigest()[:12]}"
    runs, skipped = plot.find_runs(folder)
    assert not skipped and {run.settings["model"] for run in runs} == {"vit", "vitdiff"}
    for run in runs:
        assert run.settings["seed"] < seeds
        reference, _ = records.read_config(HERE / "runs/reference" / run.folder.name)
        assert run.settings == reference | dict(plugin=plugin) | changed.get(run.settings["model"], {})


# The READMEs.

def blocks_of(text):
    """The tables in a text, without the words around them."""
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("folder", [HERE / "runs/reference", *(FAULTS / name for name in (
    "activated", "ordered", "matched", "rate"))], ids=lambda folder: folder.name)
def test_tables(folder):
    """The tables in a folder are those of its records, and every table in a README is one of these."""
    readme = HERE / "runs/reference/README.md" if folder.name == "reference" else FAULTS / "README.md"
    texts = README + readme.read_text()
    for dataset, lines in plot.arrange(plot.find_runs(folder)[0]).items():
        for name, written in plot.make_tables(dataset, lines).items():
            assert (folder / f"{dataset}-{name}.md").read_text() == written
            if folder.name == "reference" or name == "table":
                assert all(block in texts for block in blocks_of(written)), f"{dataset}-{name}"


def paired(dataset, model, figure_of):
    runs = {(run.settings["model"], run.settings["seed"]): run
            for run in map(records.read_run, REFERENCE) if run.settings["dataset"] == dataset}
    return [figure_of(runs[model, seed]) - figure_of(runs["vit", seed]) for seed in range(5)]


def accuracy(run):
    return 100 * run.summary["test_accuracy"]


def noise_error(run):
    return 100 * statistics.fmean(1 - value for name in plot.PIXEL_NOISES for value in run.noise[name])


def test_the_answer():
    """The figures of the README's first paragraph are those of the records."""
    answer = " ".join(README.split("![")[0].split())
    for dataset, digits in [("mnist", "by 0.05 points on MNIST"), ("fashionmnist", "by 0.35 on Fashion-MNIST")]:
        differences = paired(dataset, "vitdiff", accuracy)
        mean, half = statistics.fmean(differences), stats.half_interval(differences)
        assert f"by {mean:.2f} " in digits and digits in answer
        assert f"{mean - half:+.2f} to {mean + half:+.2f})" in answer
    behind = [-statistics.fmean(paired(dataset, "vitdiffpaper", accuracy)) for dataset in ("mnist", "fashionmnist")]
    assert "behind by {:.2f} and {:.2f}".format(*behind) in answer
    noise = {model: paired("mnist", model, noise_error) for model in ("vitdiff", "vitdiffpaper", "vitdiffv2")}
    assert all(difference < 0 for differences in noise.values() for difference in differences)
    means = sorted(-statistics.fmean(differences) for differences in noise.values())
    assert f"by {means[0]:.1f} to {means[-1]:.1f} points" in answer
    noise = [paired("fashionmnist", model, noise_error) for model in ("vitdiff", "vitdiffpaper")]
    assert all(difference < 0 for differences in noise for difference in differences)
    assert "by {:.1f} and {:.1f}.".format(*(-statistics.fmean(differences) for differences in noise)) in answer


@pytest.mark.parametrize("dataset, chosen", [("mnist", 0), ("fashionmnist", 1)])
def test_trials(dataset, chosen):
    """The table of trials is that of the records, and by the rule above it a recipe other than the default is chosen
    where its lead is more than a standard error."""
    text, trials = (HERE / "runs/trials/README.md").read_text(), HERE / "runs/trials"
    folders = [HERE / "runs/reference", *dict(
        mnist=[HERE / "runs/faults/rate", trials / "decay-0.7"],
        fashionmnist=[trials / "batch-256-muon-0.008", trials / "batch-256-muon-0.01"])[dataset]]
    losses = [[[records.read_summary(folder / f"{dataset}-{model}-seed{seed}")["val_loss"] for seed in range(5)]
               for model in ("vit", "vitdiff")] for folder in folders]
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith(f"| {dataset} |")]
    leads = []
    for found, row in zip(losses, rows, strict=True):
        pairs = [before - after for model in (0, 1) for before, after in zip(losses[0][model], found[model])]
        leads.append((statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(10)))
        means = [*map(statistics.fmean, found), statistics.fmean(found[0] + found[1])]
        assert row[2:5] == [f"{mean:.4f}" for mean in means]
        assert row[5].rstrip(" |") == ("" if found is losses[0] else "{:.4f} ± {:.4f}".format(*leads[-1]))
    lowest = max(range(3), key=lambda i: leads[i][0])
    assert chosen == (lowest if leads[lowest][0] > leads[lowest][1] else 0)


def test_what_training_prints():
    """The lines that the README shows are those of the reference run of seed 0."""
    run = records.read_run(HERE / "runs/reference/mnist-vitdiff-seed0")
    for i in (0, -1):
        epoch = "epoch {:>2.0f}/20  train loss {:.4f} accuracy {:.2%}  val loss {:.4f} accuracy {:.2%}".format(*(
            run.metrics[name][i] for name in ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")))
        assert epoch in README
    figures = "parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f}  test accuracy {test_accuracy:.2%}"
    assert figures.format(**run.summary) in README


def test_three_epochs():
    """Three epochs of vitdiff on MNIST pass the best published accuracy."""
    summary = records.read_summary(HERE / "runs/three-epochs/mnist-vitdiff-seed0")
    assert summary["epochs"] == 3 and summary["test_accuracy"] > 0.9575


def test_thirty_epochs():
    """Thirty epochs of vit on canvases have a lower test error than the recurrent model of Mnih et al. 2014."""
    summary = records.read_summary(HERE / "runs/thirty-epochs/clutteredmnist-vit-seed0")
    error = 1 - summary["test_accuracy"]
    assert summary["epochs"] == 30 and error < 0.0404
    assert f"has a test error of {error:.2%}" in (HERE / "runs/reference/README.md").read_text()


def test_tuning_effort():
    """The numbers of training runs that the recipe was chosen by are those of the tables of trials."""
    text = (HERE / "runs/reference/README.md").read_text().split("## How the recipe was chosen")[1]
    before, rest = text.split("All of these trials sampled")
    after, rest = rest.split("Earlier trials, of one seed")
    counts = []
    for part in (before, after, rest.split("Cluttered MNIST, one seed")[0]):
        cells = [line.split("|")[2:4] for line in part.splitlines() if line.startswith("|")]
        for column in zip(*cells):
            runs = [re.search(r"\((\d+)\)", cell) for cell in column if re.search(r"\d", cell)]
            counts.append(sum(int(found[1]) if found else 1 for found in runs))
    sentence = ("hold {} runs of `vit` and {} of `vitdiff` before bicubic interpolation, {} and {} after it, and {} "
                "and {} in")
    assert sentence.format(*counts) in " ".join(text.split())


def test_an_attention_of_ones_own(tmp_path):
    """The README's own lines, in a file of their own, train a new model and draw it in front of the reference."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "attention.py" in README and len(code.strip().splitlines()) <= 12
    (tmp_path / "my_attention.py").write_text(code)
    runs = tmp_path / "runs"
    shutil.copytree(HERE / "runs/reference", runs / "reference", ignore=shutil.ignore_patterns("*.png", "cluttered*"))

    def run(*arguments):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True,
                              check=True)

    run("train.py", "--plugin", tmp_path / "my_attention.py", "--model", "vitcosine", "--seed", "0", "1", *TINY,
        "--epochs", "1", "--runs-dir", runs)
    config = json.loads((runs / "mnist-vitcosine-seed1/config.json").read_text())
    assert config["settings"]["plugin"].startswith("my_attention.py ")
    assert (runs / "mnist-vitcosine-seed1/my_attention.py").read_text() == code
    printed = run("plot.py", runs, "--out", tmp_path / "charts").stdout
    (row,) = re.findall(r"^\| vitcosine.*\|$", printed.split("## mnist\n")[1].split("\n## ")[0], re.MULTILINE)
    summaries = [records.read_summary(runs / f"mnist-vitcosine-seed{seed}") for seed in (0, 1)]
    assert f"{statistics.fmean(summary['test_accuracy'] for summary in summaries):.2%}" in row
    assert (tmp_path / "charts/mnist-val-loss.png").read_bytes().startswith(b"\x89PNG")
