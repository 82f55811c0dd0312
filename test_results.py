"""Claims about the committed runs: what repeats them, what their weights give today, what the READMEs say of them."""

import functools
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
SEEDS = dict(mnist=20, fashionmnist=20, clutteredmnist=8)  # of the reference
FAULTS = HERE / "runs/faults"
CONTROLS, SUMS = ["controls", "reference"], ["controls/sums", "controls", "reference"]  # folders compared together
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


def commit_of(facts):
    """The commit that trained a run. Of some runs the record adds -dirty, as copies of a plugin lay beside the code."""
    return facts["git_commit"].removesuffix("-dirty")


def test_reference_runs():
    """The reference has all seeds of all models, by one commit of the code."""
    configs = [records.read_config(folder) for folder in REFERENCE]
    found = sorted((settings["dataset"], settings["model"], settings["seed"]) for settings, _ in configs)
    assert found == sorted(
        (dataset, model, seed) for dataset, seeds in SEEDS.items()
        for model in MODELS if dataset != "clutteredmnist" or model != "vitbalanced" for seed in range(seeds))
    (commit,) = {commit_of(facts) for _, facts in configs}
    assert re.fullmatch("[0-9a-f]{40}", commit)


def plugin_of(path):
    """The setting `plugin` of the runs of a file; None if there is none."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path.exists() else None


KEPT = {"vitdiffabs": dict(plugin=plugin_of(HERE / "runs/controls/sums/kept.py"))}


@pytest.mark.parametrize("place, dataset, models, seeds, changed", [
    ("controls", "mnist", "vitheads vitmatched vitsum vitcentered vitheadnorm vitdiffnonorm", 10, {}),
    ("controls", "fashionmnist", "vitheads vitmatched vitsum vitcentered vitheadnorm vitdiffnonorm", 10, {}),
    ("controls/sums", "mnist", "vitdiffsum vitsumscaled vitdiffabs", 10, KEPT),
    ("controls/sums", "fashionmnist", "vitsumscaled vitdiffabs", 10, KEPT),
    ("faults/activated", "mnist", "vit vitdiff", 10, {}),
    ("faults/attention", "mnist", "vitdifftokennorm vitdiffnovember", 10, {}),
    ("faults/ordered", "mnist", "vit vitdiff", 10, {}),
    ("trials/muon-0.008", "mnist", "vit vitdiff", 5, {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)}),
    ("recipes", "mnist", "vit vitdiff", 10, {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)}),
    ("recipes", "fashionmnist", "vit vitdiff", 10, {name: dict(batch_size=128, muon_lr=0.005, lr=0.003)
                                                    for name in ("vit", "vitdiff")})])
def test_one_change(place, dataset, models, seeds, changed):
    """Controls, faults and the other recipe have the settings and the commit of the reference, but for what is named:
    a plugin, a model, a setting; the trials are by an older commit."""
    runs, skipped = plot.find_runs(HERE / "runs" / place)
    runs = [run for run in runs if run.settings["dataset"] == dataset]
    assert not skipped
    assert sorted((run.settings["model"], run.settings["seed"]) for run in runs) == sorted(
        itertools.product(models.split(), range(seeds)))
    for run in runs:
        model, seed = run.settings["model"], run.settings["seed"]
        reference, facts = records.read_config(HERE / f"runs/reference/{dataset}-vit-seed{seed}")
        own = {"vitheads": dict(num_heads=4), "vitmatched": dict(mlp_dim=160)}.get(model, {})
        plugin = plugin_of(HERE / "runs" / place / "plugin.py")
        assert run.settings == reference | dict(model=model, plugin=plugin) | own | changed.get(model, {})
        assert place == "trials/muon-0.008" or commit_of(run.facts) == commit_of(facts)


# The READMEs.

def blocks_of(text):
    """The tables in a text, without the words around them."""
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("folder", [HERE / "runs/reference", FAULTS / "activated", FAULTS / "ordered"],
                         ids=lambda folder: folder.name)
def test_tables(folder):
    """The tables in a folder are those of its records, and every table in a README is one of these."""
    readme = HERE / "runs/reference/README.md" if folder.name == "reference" else FAULTS / "README.md"
    texts = README + readme.read_text()
    for dataset, lines in plot.arrange(plot.find_runs(folder)[0]).items():
        for name, written in stats.make_tables(dataset, lines).items():
            assert (folder / f"{dataset}-{name}.md").read_text() == written
            if folder.name == "reference" or name == "table":
                assert all(block in texts for block in blocks_of(written)), f"{dataset}-{name}"


@functools.cache
def lines_of(*places):
    """{data set: lines} of the runs of folders in runs/."""
    return plot.arrange(plot.find_runs(*(HERE / "runs" / place for place in places))[0])


def pairs_compared(readme, *places):
    """The pairs of models that the command in a README compares, of the runs of folders in runs/."""
    folders = " ".join(f"runs/{place}" for place in places)
    (flags,) = re.findall(f"python plot.py {folders} (.*)", (HERE / "runs" / readme).read_text())
    return re.findall(r"--compare (\w+) (\w+)", flags)


@pytest.mark.parametrize("places, dataset, readme, shown", [
    (CONTROLS, "mnist", "controls/README.md", ["comparisons", "partial-noise-table"]),
    (CONTROLS, "fashionmnist", "controls/README.md", ["comparisons"]),
    (SUMS, "mnist", "controls/README.md", ["comparisons"]),
    (SUMS, "fashionmnist", "controls/README.md", ["comparisons"]),
    (["faults/attention", "reference"], "mnist", "faults/README.md", ["comparisons"])])
def test_tables_beside_the_reference(places, dataset, readme, shown):
    """The tables of runs that are compared with the reference are those of the records, and the README shows these."""
    folder, text = HERE / "runs" / places[0], (HERE / "runs" / readme).read_text()
    tables = stats.make_tables(dataset, lines_of(*places)[dataset], pairs_compared(readme, *places))
    for name, written in tables.items():
        assert (folder / f"{dataset}-{name}.md").read_text() == written
    assert all(len(blocks_of(tables[name])) == 2 for name in shown)
    assert all(block in text for name in shown for block in blocks_of(tables[name]))


@pytest.mark.parametrize("dataset", ["mnist", "fashionmnist"])
def test_the_other_recipe(dataset):
    """The README of the recipes that lost has the tables of their records, and how these differ from the default's."""
    folder = HERE / "runs/recipes"
    text = (folder / "README.md").read_text()
    for name, written in stats.make_tables(dataset, lines_of("recipes")[dataset]).items():
        assert (folder / f"{dataset}-{name}.md").read_text() == written
        assert name not in ("table", "noise-table") or blocks_of(written)[:2][-1] in text
    assert_says(*sentences_of_recipes(dataset), readme="runs/recipes/README.md")


def leads_of(dataset, place, figure_of):
    """The lead of `vitdiff` over `vit` in ten seeds of a folder (here) and of the reference (there), and its change."""
    here, there = (paired(runs, "vitdiff", "vit", figure_of, range(10))
                   for runs in (runs_of(dataset, place), runs_of(dataset)))
    assert len(here) == len(there) == 10
    return stats.compare(dict(here=here, there=there, change=[a - b for a, b in zip(here, there)]), True)


def sentences_of_recipes(dataset):
    """How `vitdiff` compares with `vit` by the recipe that lost, by the default and, on MNIST, each by its better."""
    sentences = []
    for figure_of, sentence in [
            (accuracy, "In accuracy `vitdiff` is ahead by {0:.2f} points here ({3}) and by {1:.2f} in the same ten "
                       "seeds of the default recipe ({4}), a change of {2:+.2f} ({5})."),
            (noise_error, "Under Gaussian and impulse noise its error is lower by {0:.2f} points here and by {1:.2f} "
                          "there, a change of {2:+.2f} ({5}).")]:
        found = leads_of(dataset, "recipes", figure_of)
        means = [abs(found[name].mean) for name in ("here", "there")]
        assert all((found[name].mean > 0) == (figure_of is accuracy) for name in ("here", "there"))
        sentences.append(sentence.format(*means, found["change"].mean, *map(ends, found.values())))
    if dataset == "mnist":
        default, other = runs_of(dataset), runs_of(dataset, "recipes")
        points, noise = stats.compare({figure_of: [
            figure_of(default["vitdiff", seed]) - figure_of(other["vit", seed]) for seed in range(10)]
            for figure_of in (accuracy, noise_error)}, True).values()
        sentences.append(
            f"each by its better recipe, by {points.mean:.2f} points ({ends(points)}), p {points.p:.3g}, and its error "
            f"under noise is lower by {-noise.mean:.2f} points {how_much_less(noise)}, p {noise.p:.3g}")
    return sentences


@functools.cache
def runs_of(dataset, *places):
    """{(model, seed): run} of folders in runs/, by default of the reference."""
    runs, _ = plot.find_runs(*(HERE / "runs" / place for place in places or ["reference"]))
    return {(run.settings["model"], run.settings["seed"]): run for run in runs if run.settings["dataset"] == dataset}


def paired(runs, model, other, figure_of, seeds=range(20)):
    return [figure_of(runs[model, seed]) - figure_of(runs[other, seed]) for seed in seeds
            if (model, seed) in runs and (other, seed) in runs]


def accuracy(run):
    return 100 * run.summary["test_accuracy"]


def noise_error(run, names=stats.PIXEL_NOISES):
    return 100 * statistics.fmean(1 - value for name in names for value in run.noise[name])


def mean_error(run):
    return noise_error(run, list(data.CORRUPTIONS))


def partial_error(run, part):
    return noise_error(run, [records.PARTIAL_NOISE[part]])


def irrelevant_part(run):
    """Of the errors that noise on relevant and on irrelevant patches adds, those on the irrelevant, in percent."""
    clean = 100 - accuracy(run)
    return 100 * (partial_error(run, "irrelevant") - clean) / (
        partial_error(run, "irrelevant") + partial_error(run, "relevant") - 2 * clean)


def ends(found):
    """A comparison's interval, as it is written."""
    return f"{found.mean - found.half:+.2f} to {found.mean + found.half:+.2f}"


def how_much_less(found):
    """A comparison's interval, as it is written of what is less."""
    return f"({-found.mean - found.half:.2f} to {-found.mean + found.half:.2f})"


DIFFERENTIAL = ["vitdiff", "vitdiffpaper", "vitdiffv2"]
OTHERS = ["vitbalanced", *DIFFERENTIAL]
NEW_SEEDS = range(5, 20)  # which no choice has seen


def with_vit(dataset, figure_of, seeds=range(20)):
    """{model: Comparison} with `vit`; `better` counts the seeds in which the figure is less."""
    runs = runs_of(dataset)
    models = [model for model in OTHERS if (model, 0) in runs]
    return stats.compare({model: paired(runs, model, "vit", figure_of, seeds) for model in models}, False)


def assert_says(*sentences, readme="README.md"):
    """A README has these sentences, wherever its lines break."""
    text = " ".join((HERE / readme).read_text().split())
    for sentence in sentences:
        assert sentence in text


# What the READMEs say: each function returns sentences with the figures of the records, and one test looks for them.

def are_shown(found):
    """The labels of the differences that are shown: p below 0.05, corrected."""
    return [label for label in found if found[label].p_holm < 0.05]


def controls_compared(dataset, figure_of, more_is_better, places=CONTROLS):
    """{"model - other": Comparison} of the pairs that a command in the README of the controls compares."""
    compared = pairs_compared("controls/README.md", *places)
    return stats.compare_lines(lines_of(*places)[dataset], figure_of, more_is_better, compared)


def controls_on_both(figure_of, more_is_better, places=CONTROLS):
    """The same on MNIST and on Fashion-MNIST."""
    return [controls_compared(dataset, figure_of, more_is_better, places) for dataset in ("mnist", "fashionmnist")]


def cells_of(path, block):
    """{label: cells} of one of the tables in a file."""
    _, _, *rows = blocks_of(path.read_text())[block].splitlines()
    rows = (row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows)
    return {label: cells for label, *cells in rows}


def both(figure_of, seeds=range(20)):
    """How the models differ from `vit` on MNIST and on Fashion-MNIST."""
    return [with_vit(dataset, figure_of, seeds) for dataset in ("mnist", "fashionmnist")]


def mean_of(dataset, model, figure_of):
    return statistics.fmean(figure_of(run) for (name, _), run in runs_of(dataset).items() if name == model)


def answer():
    mnist, fashion = both(accuracy)
    fewer = [sorted(-found[model].mean for model in DIFFERENTIAL) for found in both(noise_error)]
    errors = [mean_of(dataset, "vit", noise_error) for dataset in ("mnist", "fashionmnist")]
    return [
        "has {0.mean:.2f} points more accuracy on MNIST than `vit`, its self-attention baseline (95% interval {1}; p "
        "{0.p:.2g}, corrected for four models {0.p_holm:.2g}), and {2.mean:.2f} more on Fashion-MNIST ({3}; p "
        "{2.p:.2g}, corrected {2.p_holm:.2g})".format(
            mnist["vitdiff"], ends(mnist["vitdiff"]), fashion["vitdiff"], ends(fashion["vitdiff"])),
        "with as many parameters as `vit`, has {:.2f} points less ({}) and {:.2f} less ({})".format(*(
            part for found in (mnist, fashion) for part in (
                -found["vitdiffpaper"].mean, ends(found["vitdiffpaper"])))),
        "{:.1f} to {:.1f} points fewer errors than `vit` on MNIST, where it errs in {:.1f}%, and {:.1f} to {:.1f} "
        "fewer on Fashion-MNIST, where it errs in {:.1f}%".format(
            fewer[0][0], fewer[0][-1], errors[0], fewer[1][0], fewer[1][-1], errors[1])]


def verdict():
    points, losses = both(accuracy), [found["vitdiff"] for found in both(lambda run: run.summary["test_loss"])]
    new_points = both(accuracy, NEW_SEEDS)
    for found, new in zip(points, new_points):
        assert max(OTHERS, key=lambda model: found[model].mean) == "vitbalanced"
        assert all(found[model].p_holm < 0.01 for model in ("vitbalanced", "vitdiffpaper"))
        assert all(found[model].mean * new[model].mean > 0 for model in OTHERS)
    assert losses[1].p_holm > 0.05
    vitdiff, fashion = (found["vitdiff"] for found in points)
    controls = controls_on_both(accuracy, True)
    assert all(found[name].p > 0.05 for found in controls for name in ("vitdiff - vitmatched", "vitdiff - vitheads"))
    faulty = paired(runs_of("mnist", "reference", "faults/attention"), "vitdiffnovember", "vit", accuracy)
    (november,) = stats.compare(dict(november=faulty), True).values()
    gains = [mean_of(dataset, "vit", accuracy) - 100 * stats.PUBLISHED[dataset, "vit"].test_accuracy
             for dataset in ("mnist", "fashionmnist")]
    return [
        "is ahead by {0.mean:.2f} points on Fashion-MNIST, p {0.p_holm:.2g}; on MNIST a lead is not shown, "
        "{1.mean:+.2f}, p {1.p_holm:.2g}, but a test loss lower by {2:.4f}, p {3.p_holm:.2g}".format(
            fashion, vitdiff, -losses[0].mean, losses[0]),
        "detectable are {:.2f} points on MNIST and {:.2f} on Fashion-MNIST".format(*(
            max(found[f"vitdiff - {name}"].detectable for name in ("vitmatched", "vitheads")) for found in controls)),
        "with four heads is itself {0.mean:.2f} points ahead, p {0.p_holm:.2g}, and `vitcentered` ([below](#why)) "
        "{1.mean:.2f}, p {1.p_holm:.2g}".format(
            controls[1]["vitheads - vit"], controls[1]["vitcentered - vit"]),
        f"[{november.mean:+.2f}](runs/faults/README.md#the-attention) ({ends(november)})",
        "`vit` itself gains {:.1f} and {:.1f} points".format(*gains),
        "corrected p of `vitdiff` is {:.2g} and {:.2g}".format(*(
            found["vitdiff"].p_holm for found in new_points))]


def noise():
    found = both(mean_error)
    assert all(differences[model].p_holm < 0.0001 for differences in found for model in DIFFERENTIAL)
    return ["Over all six, `vitdiff`, `vitdiffpaper` and `vitdiffv2` make {:.2f}, {:.2f} and {:.2f} points fewer "
            "errors on MNIST and {:.2f}, {:.2f} and {:.2f} on Fashion-MNIST, each p below 0.0001.".format(*(
                -differences[model].mean for differences in found for model in DIFFERENTIAL))]


def noise_on_parts():
    less, fashion_less = both(lambda run: partial_error(run, "irrelevant") - partial_error(run, "relevant"))
    assert all(fashion_less[model].p_holm < 0.001 for model in DIFFERENTIAL)
    part, fashion_part = both(irrelevant_part)
    share, fashion_share = both(stats.trained_irrelevant_share)
    gains = sorted(fashion_less[model].mean for model in DIFFERENTIAL)
    assert share["vitdiff"].better == 0 and share["vitdiff"].count == 20
    assert all(fashion_share[model].p_holm > 0.05 for model in OTHERS)
    assert are_shown(fashion_part) == ["vitdiffpaper"]
    return [
        "`vit` errs in {:.1f}% and `vitdiff` in {:.1f}%; only on patches that hold some of it, in {:.1f}% and {:.1f}%"
        .format(*(mean_of("mnist", model, lambda run: partial_error(run, name))
                  for name in ("irrelevant", "relevant") for model in ("vit", "vitdiff"))),
        "gains {:.2f} points more on the first {}, p {:.2g}. In proportion, too: of the errors that noise on either "
        "kind of patch adds, {:.0f}% are from the first in `vit`, {:.0f}% in `vitdiff`, p {:.2g}, but also only "
        "{:.0f}% in `vitbalanced`, p {:.2g} (a figure chosen after all runs of MNIST)".format(
            -less["vitdiff"].mean, how_much_less(less["vitdiff"]), less["vitdiff"].p_holm,
            *(mean_of("mnist", model, irrelevant_part) for model in ("vit", "vitdiff")), part["vitdiff"].p_holm,
            mean_of("mnist", "vitbalanced", irrelevant_part), part["vitbalanced"].p_holm),
        "the three gain {:.2f} to {:.2f} points less on irrelevant patches than on relevant ones, each p below 0.001; "
        "in proportion no gain is shown, and `vitdiffpaper` gains less, p {:.2g}".format(
            gains[0], gains[-1], fashion_part["vitdiffpaper"].p_holm),
        "on clean MNIST the class token of `vitdiff` gives irrelevant patches {:.1f} points more of its (absolute) "
        "weight in the last block than that of `vit`, in 20 of 20 seeds".format(share["vitdiff"].mean)]


def why():
    mnist, fashion = (found["vitdiff - vitdiffnonorm"] for found in controls_on_both(noise_error, False))
    assert fashion.mean + fashion.half < 0
    sums = controls_on_both(noise_error, False, SUMS)
    more = [-found[name].mean for name in ("vitdiffv2 - vitsumscaled", "vitdiff - vitdiffabs") for found in sums]
    return ["(`vitsumscaled` by {:.2f} and {:.2f} points, `vitdiffabs` by {:.2f} and {:.2f})".format(*more),
            "{:.1f} points at most, 95%); on Fashion-MNIST, without it the error is {:.2f} to {:.2f} higher, p {:.2g}"
            .format(abs(mnist.mean) + mnist.half, -fashion.mean - fashion.half, -fashion.mean + fashion.half,
                    fashion.p_holm)]


def last_lambdas(dataset, model, place="controls/sums"):
    """What metrics.csv has of lambda in the last epoch, a value for each block of seeds 0 to 9: the weight that is
    subtracted, of `vitdiffsum` and `vitdiffabs` below 0 where the second map is added."""
    return [run.metrics[f"lambda_{block}"][-1] for (name, seed), run in runs_of(dataset, place).items()
            if name == model and seed < 10 for block in (0, 1)]


def without_subtraction():
    """In the README of the controls."""
    datasets = ("mnist", "fashionmnist")
    mnist, fashion = controls_on_both(noise_error, False, SUMS)
    clean, points = controls_on_both(accuracy, True, SUMS)
    kept, scaled = ([found[name] for found in (mnist, fashion)] for name in (
        "vitdiff - vitdiffabs", "vitdiffv2 - vitsumscaled"))
    free, left = mnist["vitdiff - vitdiffsum"], mnist["vitdiffabs - vit"]
    assert [name for name in mnist if name not in are_shown(mnist)] == ["vitdiff - vitdiffsum", "vitsumscaled - vit"]
    assert are_shown(fashion) == ["vitdiffv2 - vitsumscaled", "vitdiff - vitdiffabs"] and are_shown(clean) == []
    assert are_shown(points) == ["vitsumscaled - vit", "vitdiffabs - vit"]
    assert [found.p_holm for found in scaled] == [found.p_holm for found in kept]
    turned = last_lambdas("mnist", "vitdiffsum")
    switched_off = [[value > -0.005 for value in last_lambdas(dataset, "vitdiffabs")] for dataset in datasets]
    return [
        "lambda ends negative in {} of {} blocks, and from `vitdiff` no difference is shown: {:.2f} points more errors "
        "({:+.2f} to {:+.2f}), p {:.2g}.".format(
            sum(value > 0 for value in turned), len(turned), -free.mean, -free.mean - free.half,
            -free.mean + free.half, free.p_holm),
        "`vitdiffabs` {:.2f} points more than `vitdiff` on MNIST {} and {:.2f} on Fashion-MNIST {}, `vitsumscaled` "
        "{:.2f} more than `vitdiffv2` {} and {:.2f} {}; p is {:.2g} each on MNIST and {:.2g} on Fashion-MNIST. On "
        "MNIST `vitdiffabs` still has a lead over `vit` of {:.2f} points {}, p {:.2g}".format(
            *(part for found in (*kept, *scaled) for part in (-found.mean, how_much_less(found))),
            *(found.p_holm for found in kept), -left.mean, how_much_less(left), left.p_holm),
        "below 0.005 in {} of {} blocks on MNIST, and in {} of {} on Fashion-MNIST".format(*(
            number for blocks in switched_off for number in (sum(blocks), len(blocks)))),
        "In accuracy on Fashion-MNIST `vitdiffabs` and `vitsumscaled` are ahead of `vit` by {:.2f} and {:.2f} points, "
        "p {:.2g} and {:.2g}".format(*(getattr(points[f"{model} - vit"], figure) for figure in ("mean", "p_holm")
                                       for model in ("vitdiffabs", "vitsumscaled"))),
        "at {:.2f} and {:.2f} on average, that of `vitdiffv2` in these seeds at {:.2f} and {:.2f}".format(*(
            statistics.fmean(last_lambdas(dataset, *where)) for where in [("vitsumscaled",), ("vitdiffv2", "reference")]
            for dataset in datasets))]


def canvases():
    """Of cluttered MNIST, in the README of the reference."""
    seeds = SEEDS["clutteredmnist"]
    points, six, pair, relevant, irrelevant, part, share = (
        with_vit("clutteredmnist", figure_of) for figure_of in (
            accuracy, mean_error, noise_error, lambda run: partial_error(run, "relevant"),
            lambda run: partial_error(run, "irrelevant"), irrelevant_part, stats.trained_irrelevant_share))
    paper, fewer, more = points["vitdiffpaper"], ["vitdiff", "vitdiffv2"], ["vitdiff", "vitdiffpaper"]
    assert are_shown(points) == are_shown(relevant) == ["vitdiffpaper"] and are_shown(part) == ["vitdiffv2"]
    assert are_shown(six) == are_shown(irrelevant) == [] and are_shown(share) == more
    assert all(pair[model].p_holm == 1 for model in DIFFERENTIAL)
    single = blocks_of((HERE / "runs/reference/clutteredmnist-noise-table.md").read_text())[2]
    cells, least_p = len(points) * len(data.CORRUPTIONS), 2 / 2 ** seeds
    assert single.count(" to ") == cells and cells * least_p > 0.05
    noises = ["gaussian_noise", records.PARTIAL_NOISE["irrelevant"]]
    near_chance = [mean_of("clutteredmnist", model, lambda run: 100 - 100 * run.noise[name][severity - 1])
                   for model in ("vit", *DIFFERENTIAL) for name in noises for severity in range(2, 6)]
    return [
        f"With {seeds} seeds p cannot be below 2/{2 ** seeds} = {least_p:.2g}, corrected for three models "
        f"{len(points) * least_p:.2g}, and in the table of single corruptions, corrected for {cells} cells, "
        f"{cells * least_p:.2g}, so that nothing there can be bold",
        "`vitdiffpaper` is behind by {:.2f} points {}, in {} of {} seeds, p {:.2g}; for `vitdiff` and `vitdiffv2` no "
        "difference is shown: by the intervals they are at most {:.2f} and {:.2f} points behind, and at most {:.2f} "
        "and {:.2f} ahead.".format(
            -paper.mean, how_much_less(paper), paper.better, seeds, paper.p_holm,  # better: accuracy is less
            *(sign * points[model].mean + points[model].half for sign in (-1, 1) for model in fewer)),
        "over all six `vitdiff` and `vitdiffv2` make {:.2f} and {:.2f} points fewer errors, p {:.2g} and {:.2g} "
        "(detectable {:.2f} and {:.2f}), and `vitdiffpaper` {:.2f} more, p {:.2g} (detectable {:.2f}).".format(
            *(-six[model].mean for model in fewer), *(six[model].p_holm for model in fewer),
            *(six[model].detectable for model in fewer), six["vitdiffpaper"].mean, six["vitdiffpaper"].p_holm,
            six["vitdiffpaper"].detectable),
        f"at {min(near_chance):.0f}% to {max(near_chance):.0f}% from severity 2 on",
        "`vit` {:.1f}% and {:.1f}%".format(*(mean_of("clutteredmnist", "vit", figure_of) for figure_of in (
            lambda run: partial_error(run, "irrelevant"), lambda run: noise_error(run, ["gaussian_noise"])))),
        "On relevant patches `vitdiffpaper` makes {:.2f} points more errors, p {:.2g}. The irrelevant part, hard to "
        "read so near to chance, is higher for `vitdiffv2`, by {:.1f} points, p {:.2g}.".format(
            relevant["vitdiffpaper"].mean, relevant["vitdiffpaper"].p_holm, part["vitdiffv2"].mean,
            part["vitdiffv2"].p_holm),
        "with their 4 distractors of training, `vitdiff` and `vitdiffpaper` give it {:.1f} and {:.1f} points more, in "
        "{} and {} of {seeds} seeds, p {:.2g} and {:.2g}; for `vitdiffv2` no difference is shown.".format(
            *(share[model].mean for model in more), *(seeds - share[model].better for model in more),
            *(share[model].p_holm for model in more), seeds=seeds)]


@pytest.mark.parametrize("sentences, readme", [
    *((sentences, "README.md") for sentences in (answer, verdict, noise, noise_on_parts, why)),
    (canvases, "runs/reference/README.md"), (without_subtraction, "runs/controls/README.md")])
def test_what_the_readmes_say(sentences, readme):
    """The figures in the prose of the READMEs are those of the records."""
    assert_says(*sentences(), readme=readme)


def rows_of_comparisons(block, *columns):
    """Rows that have columns of the comparisons of MNIST and of Fashion-MNIST, of accuracy (0) or of noise (1)."""
    mnist, fashion = (cells_of(HERE / f"runs/controls/{dataset}-comparisons.md", block)
                      for dataset in ("mnist", "fashionmnist"))
    return [" | ".join([label, *(cells[label][column] for cells in (mnist, fashion) for column in columns)]) + " |"
            for label in mnist]


def test_joined_tables():
    """The README's tables of both data sets have the cells of the tables of each: in the verdict intervals and
    detectable differences of accuracy, in the section Why every comparison of the error under noise."""
    verdict_rows, why_rows = rows_of_comparisons(0, 0, 4), rows_of_comparisons(1, 0, 3)
    shown = re.findall(r"^\| .*?(vit\w* - vit.*)$", README, re.MULTILINE)
    assert set(shown) <= {*verdict_rows, *why_rows} and set(why_rows) <= set(shown)
    assert len(shown) == 5 + len(why_rows)


def test_why():
    """What the section Why calls a difference is one after correction, what it does not is none, and seeds 5 to 9 alone
    agree in sign with every difference whose interval excludes 0."""
    for dataset, more in [("mnist", ["vitheads - vit", "vitdiffv2 - vitcentered"]), ("fashionmnist", [])]:
        rows, runs = controls_compared(dataset, noise_error, False), runs_of(dataset, "reference", "controls")
        assert sorted(are_shown(rows)) == sorted([
            "vitdiff - vit", "vitdiffpaper - vit", "vitdiffv2 - vit", "vitdiff - vitmatched", "vitdiff - vitheads",
            "vitdiffv2 - vitsum", "vitcentered - vit", *more])
        for name, found in rows.items():
            if abs(found.mean) > found.half:
                assert found.mean < 0 > statistics.fmean(paired(runs, *name.split(" - "), noise_error, range(5, 10)))
    assert len(README.split("## Why")[1].split("## ")[0].strip().splitlines()) <= 24  # and the heading


def test_irrelevant_part():
    """Of all models and controls, those whose irrelevant part is shown to be lower are the ones named."""
    for dataset, names in [("mnist", set(DIFFERENTIAL)), ("fashionmnist", set())]:
        found = stats.compare_lines(lines_of("controls", "reference")[dataset], irrelevant_part, False)
        assert {model for model in are_shown(found) if found[model].mean < 0} == names
    assert_says("shown to be lower than that of `vit` for `vitdiff`, `vitdiffpaper` and `vitdiffv2` alone (p below "
                "0.05), on Fashion-MNIST for none", readme="runs/controls/README.md")


@pytest.mark.parametrize("name", ["reference", "controls"])
def test_unseen_seeds(name):
    """The tables of the seeds that no choice had seen are those of their records."""
    folder, text = HERE / "runs/unseen" / name, (HERE / "runs/unseen/README.md").read_text()
    ((folders, flags),) = re.findall(rf"python plot.py (.*) --out runs/unseen/{name}(.*)", text)
    seeds, *compared = re.findall(r"--(?:seed|compare)([\w ]+)", flags)
    runs, _ = plot.find_runs(*(HERE / place for place in folders.split()))
    unseen = [run for run in runs if run.settings["seed"] in map(int, seeds.split())]
    own = {run.settings["dataset"] for run in unseen if run.folder.parent == HERE / folders.split()[0]}
    for dataset, lines in plot.arrange(unseen).items():
        tables = stats.make_tables(dataset, lines, [pair.split() for pair in compared]) if dataset in own else {}
        for table_name, written in tables.items():
            assert (folder / f"{dataset}-{table_name}.md").read_text() == written


@pytest.mark.parametrize("dataset, names, sentence", [
    ("mnist", ["gaussian noise", "impulse noise", "distractors"],
     "under Gaussian noise, impulse noise and distractors; under shot noise, occlusion and blur no difference is "
     "shown"),
    ("fashionmnist", ["gaussian noise", "impulse noise", "shot noise", "blur"],
     "under Gaussian noise, impulse noise, shot noise and blur; under occlusion and distractors none is shown")])
def test_corruptions(dataset, names, sentence):
    """The corruptions that the README names are those where each differential model makes fewer errors than `vit`:
    those in bold, below 0, in the third table of noise."""
    path = HERE / f"runs/reference/{dataset}-noise-table.md"
    _, *columns = blocks_of(path.read_text())[2].splitlines()[0].strip("| ").split(" | ")
    cells = cells_of(path, 2)
    for model in DIFFERENTIAL:
        assert [name for name, cell in zip(columns, cells[model]) if "**" in cell] == names
        assert all(cell.startswith("**-") for cell in cells[model] if "**" in cell)
    assert_says("With Holm's correction for all 24 differences", sentence)


def test_corruptions_of_width():
    """What the README of the reference says of `vitbalanced` on Fashion-MNIST is what is in bold there."""
    cells = cells_of(HERE / "runs/reference/fashionmnist-noise-table.md", 2)["vitbalanced"]
    assert [cell[2:3] if "**" in cell else "" for cell in cells] == ["", "", "+", "", "-", ""]
    assert_says("`vitbalanced` makes fewer under distractors and more under shot noise",
                readme="runs/reference/README.md")


@pytest.mark.parametrize("dataset, chosen", [("mnist", 0), ("fashionmnist", 1)])
def test_trials(dataset, chosen):
    """The table of trials is that of the records, and by the rule above it a recipe other than the default is chosen
    where its lead is more than a standard error."""
    text, trials = (HERE / "runs/trials/README.md").read_text(), HERE / "runs/trials"
    folders = [trials / name for name in ("default", *dict(
        mnist=["muon-0.008", "decay-0.7"],
        fashionmnist=["batch-256-muon-0.008", "batch-256-muon-0.01"])[dataset])]
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


def test_table_of_models():
    """The parameters and the FLOPs of an image's forward pass in the README's table are those of the records."""
    for model in MODELS:
        _, facts = records.read_config(HERE / f"runs/reference/mnist-{model}-seed0")
        row = rf"^\| `{model}` \|.* {facts['parameters']:,} \| {facts['flops_per_image'] / 1e6:.2f} \|"
        assert re.search(row, README, re.MULTILINE)


def test_hours():
    """The time that the README gives for the reference runs is that of their records."""
    runs = [run for dataset in ("mnist", "fashionmnist") for run in runs_of(dataset).values()]
    hours = sum(run.summary["seconds"] + run.summary["analysis_seconds"] for run in runs) / 3600
    assert_says(f"({hours:.1f} hours of one core, analysis included.)")


def test_what_training_prints():
    """The lines that the README shows are those of the reference run of seed 0."""
    run = records.read_run(HERE / "runs/reference/mnist-vitdiff-seed0")
    for i in (0, -1):
        epoch = "epoch {:>2.0f}/20  train loss {:.4f} accuracy {:.2%}  val loss {:.4f} accuracy {:.2%}".format(*(
            run.metrics[name][i] for name in ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")))
        assert epoch in README
    figures = "parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f}  test accuracy {test_accuracy:.2%}"
    assert figures.format(**run.summary) in README


@pytest.mark.parametrize("dataset", ["mnist", "fashionmnist"])
def test_one_seed(dataset):
    """What a pair of single runs can show, in the README of the faults, is what the pairs of reference runs show."""
    vit, vitdiff = ([accuracy(run) for (name, _), run in runs_of(dataset).items() if name == model]
                    for model in ("vit", "vitdiff"))
    differences = [round(b - a, 2) for a, b in itertools.product(vit, vitdiff)]
    published = {name: 100 * stats.PUBLISHED[dataset, name].test_accuracy for name in ("vit", "vitdiff")}
    claim = round(published["vitdiff"] - published["vit"], 2)
    assert_says(
        "make {} pairs, with differences from {:+.2f} to {:+.2f} points: `vit` is ahead in {:.0%} of them, and "
        "`vitdiff` by the published {:.2f} or more in {:.1%}".format(
            len(differences), min(differences), max(differences),
            sum(difference < 0 for difference in differences) / len(differences), claim,
            sum(difference >= claim for difference in differences) / len(differences)),
        readme="runs/faults/README.md")


def effect_of(fault):
    """What the README of the faults says of one: by how much it changes the lead of `vitdiff`, seed by seed."""
    found = leads_of("mnist", f"faults/{fault}", accuracy)["change"]
    assert found.p > 0.05 and found.mean + found.half < 0.24
    return (f"The fault changes the lead of `vitdiff`, seed by seed, by {found.mean:+.2f} points ({ends(found)}): no "
            "effect is shown, and one of 0.24 is excluded.")


@pytest.mark.parametrize("fault", ["activated", "ordered"])
def test_faults(fault):
    """The effect of a fault that the README states is that of the records."""
    assert_says(effect_of(fault), readme="runs/faults/README.md")


def test_equal_parameters_and_maps():
    """What the README of the faults says of `vitdiff` beside the controls with as many parameters or maps."""
    found = [compared[f"vitdiff - {control}"] for compared in controls_on_both(accuracy, True)
             for control in ("vitmatched", "vitheads")]
    assert_says(
        "with ten seeds, the accuracy of `vitdiff` differs from theirs by {0.mean:+.2f} points ({4}) and by "
        "{1.mean:+.2f} ({5}), where the published lead is 0.24; on Fashion-MNIST by {2.mean:+.2f} ({6}) and by "
        "{3.mean:+.2f} ({7}), where it is 1.40".format(*found, *map(ends, found)), readme="runs/faults/README.md")


def test_three_epochs():
    """Three epochs of vitdiff on MNIST pass the best published accuracy."""
    summary = records.read_summary(HERE / "runs/three-epochs/mnist-vitdiff-seed0")
    assert summary["epochs"] == 3 and summary["test_accuracy"] > 0.9575


def test_thirty_epochs():
    """Thirty epochs of vit on canvases have about the test error of the recurrent model of Mnih et al. 2014, 4.04%."""
    summary = records.read_summary(HERE / "runs/thirty-epochs/clutteredmnist-vit-seed0")
    error = 1 - summary["test_accuracy"]
    assert summary["epochs"] == 30 and 0.0404 - 0.0005 < error < 0.0404
    assert_says(f"has a test error of {error:.2%}", readme="runs/reference/README.md")


def test_tuning_effort():
    """The numbers of training runs that the recipe was chosen by are those of the tables of trials."""
    before, rest = (HERE / "runs/reference/README.md").read_text().split("All of these trials sampled")
    before = before.split("## How the recipe was chosen")[1]
    after, rest = rest.split("Earlier trials, of one seed")
    counts = []
    for part in (before, after, *rest.split("Cluttered MNIST, one seed")):
        cells = [line.split("|")[2:4] for line in part.splitlines() if line.startswith("|")]
        for column in zip(*cells):
            runs = [re.search(r"\((\d+)\)", cell) for cell in column if re.search(r"\d", cell)]
            counts.append(sum(int(found[1]) if found else 1 for found in runs))
    *counts, vit, vitdiff = counts
    assert_says("hold {} runs of `vit` and {} of `vitdiff` before bicubic interpolation, {} and {} after it, and {} "
                "and {} in".format(*counts), f"by trials of `vit`, {vit} of {vit + vitdiff} runs",
                readme="runs/reference/README.md")


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
