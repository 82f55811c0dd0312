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
SEEDS = dict(mnist=20, fashionmnist=15, clutteredmnist=3)  # of the reference
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


def commit_of(facts):
    """The commit that trained a run. Of some runs the record adds -dirty, as copies of a plugin lay beside the code."""
    return facts["git_commit"].removesuffix("-dirty")


def test_reference_runs():
    """The reference has all seeds of all models, those of canvases by one commit, all others by another."""
    configs = [records.read_config(folder) for folder in REFERENCE]
    found = sorted((settings["dataset"], settings["model"], settings["seed"]) for settings, _ in configs)
    assert found == sorted(
        (dataset, model, seed) for dataset, seeds in SEEDS.items()
        for model in MODELS if dataset != "clutteredmnist" or model != "vitbalanced" for seed in range(seeds))
    commits = {(settings["dataset"] == "clutteredmnist", commit_of(facts)) for settings, facts in configs}
    assert len(commits) == 2 and all(re.fullmatch("[0-9a-f]{40}", commit) for _, commit in commits)


def plugin_of(folder):
    """The setting `plugin` of the runs of a folder."""
    if not (folder / "plugin.py").exists():
        return None
    return f"plugin.py {hashlib.sha256((folder / 'plugin.py').read_bytes()).hexdigest()[:12]}"


@pytest.mark.parametrize("place, dataset, models, seeds, changed", [
    ("controls", "mnist", "vitheads vitmatched vitsum vitcentered vitheadnorm vitdiffnonorm", 10, {}),
    ("controls", "fashionmnist", "vitheads vitmatched", 10, {}),
    ("faults/activated", "mnist", "vit vitdiff", 10, {}),
    ("faults/attention", "mnist", "vitdifftokennorm vitdiffnovember", 10, {}),
    ("faults/ordered", "mnist", "vit vitdiff", 3, {}),
    ("trials/muon-0.008", "mnist", "vit vitdiff", 5, {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)}),
    ("recipes", "mnist", "vit vitdiff", 10, {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)})])
def test_one_change(place, dataset, models, seeds, changed):
    """Controls, faults and the other recipe have the settings and the commit of the reference, but for what is named:
    a plugin, a model, a setting; two folders are by an older commit."""
    runs, skipped = plot.find_runs(HERE / "runs" / place)
    runs = [run for run in runs if run.settings["dataset"] == dataset]
    assert not skipped
    assert sorted((run.settings["model"], run.settings["seed"]) for run in runs) == sorted(
        itertools.product(models.split(), range(seeds)))
    for run in runs:
        model, seed = run.settings["model"], run.settings["seed"]
        reference, facts = records.read_config(HERE / f"runs/reference/{dataset}-vit-seed{seed}")
        own = {"vitheads": dict(num_heads=4), "vitmatched": dict(mlp_dim=160)}.get(model, {})
        assert run.settings == (reference | dict(model=model, plugin=plugin_of(HERE / "runs" / place)) | own
                                | changed.get(model, {}))
        assert place in ("faults/ordered", "trials/muon-0.008") or commit_of(run.facts) == commit_of(facts)


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


@pytest.mark.parametrize("place, dataset, readme, shown", [
    ("controls", "mnist", "controls/README.md", ["comparisons", "partial-noise-table"]),
    ("controls", "fashionmnist", "controls/README.md", ["comparisons"]),
    ("faults/attention", "mnist", "faults/README.md", ["comparisons"])])
def test_tables_beside_the_reference(place, dataset, readme, shown):
    """The tables of runs that are compared with the reference are those of the records, and the README shows these."""
    folder, text = HERE / "runs" / place, (HERE / "runs" / readme).read_text()
    (command_line,) = re.findall(rf"python plot.py runs/{place} runs/reference (.*)", text)
    lines = lines_of(place, "reference")[dataset]
    tables = stats.make_tables(dataset, lines, re.findall(r"--compare (\w+) (\w+)", command_line))
    for name, written in tables.items():
        assert (folder / f"{dataset}-{name}.md").read_text() == written
    assert all(len(blocks_of(tables[name])) == 2 for name in shown)
    assert all(block in text for name in shown for block in blocks_of(tables[name]))
    assert (place, dataset) != ("controls", "mnist") or blocks_of(tables["comparisons"])[1] in README


def test_the_other_recipe():
    """The README of the recipe that lost has the tables of its records, and how they differ from the default's."""
    folder = HERE / "runs/recipes"
    text = (folder / "README.md").read_text()
    lines = plot.arrange(plot.find_runs(folder)[0])["mnist"]
    for name, written in stats.make_tables("mnist", lines).items():
        assert (folder / f"mnist-{name}.md").read_text() == written
        assert name not in ("table", "noise-table") or blocks_of(written)[:2][-1] in text
    default, other = runs_of("mnist"), runs_of("mnist", "recipes")
    for figure_of, sentence in [
            (accuracy, "by {here.mean:.2f} points here ({}) and by {there.mean:.2f} in the same ten seeds of the "
                       "default recipe ({}), a change of {change.mean:+.2f} ({})"),
            (noise_error, "by {0:.2f} points here and by {1:.2f} there, a change of {change.mean:+.2f} ({4})")]:
        here, there = (paired(runs, "vitdiff", "vit", figure_of, range(10)) for runs in (other, default))
        found = stats.compare(dict(here=here, there=there, change=[a - b for a, b in zip(here, there)]), True)
        intervals = map(ends, found.values())
        numbers = [] if figure_of is accuracy else [-found["here"].mean, -found["there"].mean]
        assert sentence.format(*numbers, *intervals, **found) in " ".join(text.split())
    for figure_of, more_is_better, sentence in [
            (accuracy, True, "by {mean:.2f} points ({}), p {p:.3g}"),
            (noise_error, False, "is lower by {0:.2f} points {1}, p {p:.3g}")]:
        better = [figure_of(default["vitdiff", seed]) - figure_of(other["vit", seed]) for seed in range(10)]
        (found,) = stats.compare(dict(better=better), more_is_better).values()
        numbers = [ends(found)] if more_is_better else [-found.mean, how_much_less(found)]
        assert sentence.format(*numbers, **found._asdict()) in " ".join(text.split())


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


OTHERS = ["vitbalanced", "vitdiff", "vitdiffpaper", "vitdiffv2"]
NEW_SEEDS = range(5, 20)  # which no choice has seen


def with_vit(dataset, figure_of, seeds=range(20)):
    """{model: Comparison} with `vit`; `better` counts the seeds in which the figure is less."""
    runs = runs_of(dataset)
    return stats.compare({model: paired(runs, model, "vit", figure_of, seeds) for model in OTHERS}, False)


def assert_says(*sentences):
    text = " ".join(README.split())
    for sentence in sentences:
        assert sentence in text


def test_the_verdict():
    """The figures of accuracy in the README's answer and verdict are those of the records."""
    found = with_vit("mnist", accuracy)
    assert_says(
        "has {:.2f} points more accuracy than `vit`, its self-attention baseline (95% interval {}; p {:.3f}, corrected "
        "for four models {:.3f})".format(
            found["vitdiff"].mean, ends(found["vitdiff"]), found["vitdiff"].p, found["vitdiff"].p_holm),
        "with as many parameters as `vit`, has {:.2f} points less ({})".format(
            -found["vitdiffpaper"].mean, ends(found["vitdiffpaper"])),
        "`vitdiffpaper` has {:.2f} less than `vit`, p {:.3f}".format(
            -found["vitdiffpaper"].mean, found["vitdiffpaper"].p_holm),
        "has the largest lead, {:.2f}, p {:.4f}, on MNIST".format(
            found["vitbalanced"].mean, found["vitbalanced"].p_holm))
    assert max(OTHERS, key=lambda model: found[model].mean) == "vitbalanced"
    loss = with_vit("mnist", lambda run: run.summary["test_loss"])["vitdiff"]
    assert_says("{:.2f} points more accuracy than `vit` on MNIST, p {:.3f} (uncorrected {:.3f}), and a test loss lower "
                "by {:.4f}, p {:.3f}".format(found["vitdiff"].mean, found["vitdiff"].p_holm, found["vitdiff"].p,
                                             -loss.mean, loss.p_holm))
    faulty = paired(runs_of("mnist", "reference", "faults/attention"), "vitdiffnovember", "vit", accuracy)
    (november,) = stats.compare(dict(november=faulty), True).values()
    assert_says(f"[{november.mean:+.2f}](runs/faults/README.md#the-attention) ({ends(november)})")
    new = with_vit("mnist", accuracy, NEW_SEEDS)
    assert_says("on MNIST " + ", ".join(f"`{model}` {new[model].mean:+.2f}"
                                        for model in ("vitdiff", "vitdiffpaper", "vitbalanced")))
    assert all(new[model].p_holm < 0.06 for model in ("vitdiff", "vitdiffpaper", "vitbalanced"))
    runs = runs_of("mnist", "reference", "controls")
    matched, heads = stats.compare({name: paired(runs, "vitdiff", name, accuracy)
                                    for name in ("vitmatched", "vitheads")}, True).values()
    assert_says(
        "with an MLP of 160 by {:+.2f} ({}) and from one with four heads by {:+.2f} ({})".format(
            matched.mean, ends(matched), heads.mean, ends(heads)),
        "a difference of {:.2f} is detectable by ten".format(max(matched.detectable, heads.detectable)))
    gains = [statistics.fmean(accuracy(run) for (model, _), run in runs_of(dataset).items() if model == "vit")
             - 100 * stats.PUBLISHED[dataset, "vit"].test_accuracy for dataset in ("mnist", "fashionmnist")]
    assert_says("`vit` itself gains {:.1f} and {:.1f} points".format(*gains))


def test_the_noise():
    """The figures of noise and attention in the README are those of the records."""
    found, new = with_vit("mnist", noise_error), with_vit("mnist", noise_error, NEW_SEEDS)
    means = sorted(-found[model].mean for model in OTHERS[1:])
    vit = [run for (model, _), run in runs_of("mnist").items() if model == "vit"]
    vitdiff = [run for (model, _), run in runs_of("mnist").items() if model == "vitdiff"]
    assert_says("make {:.1f} to {:.1f} points fewer errors than `vit`, which errs in {:.1f}%".format(
        means[0], means[-1], statistics.fmean(map(noise_error, vit))))
    figures = [figure for model in OTHERS[1:] for figure in (-found[model].mean, how_much_less(found[model]))]
    assert_says(
        "`vitdiff` makes {:.2f} points fewer errors than `vit` {}, `vitdiffpaper` {:.2f} {} and `vitdiffv2` {:.2f} {}, "
        "each p below 0.0001".format(*figures),
        "give {:.2f}, {:.2f} and {:.2f}".format(*(-new[model].mean for model in OTHERS[1:])))
    assert all(found[model].p_holm < 0.0001 for model in OTHERS[1:])
    errors = [statistics.fmean(partial_error(run, part) for run in runs)
              for part in ("irrelevant", "relevant") for runs in (vit, vitdiff)]
    assert_says("`vit` errs in {:.1f}% and `vitdiff` in {:.1f}%; with noise only on patches that hold some of it, in "
                "{:.1f}% and {:.1f}%".format(*errors))
    more = with_vit("mnist", lambda run: partial_error(run, "irrelevant") - partial_error(run, "relevant"))["vitdiff"]
    assert_says(f"more on the first, by {-more.mean:.2f} points {how_much_less(more)}, p {more.p_holm:.4f}")
    part = with_vit("mnist", irrelevant_part)["vitdiff"]
    assert_says("{:.0f}% in `vit` and {:.0f}% in `vitdiff`, {:.1f} points less ({:.1f} to {:.1f}), p {:.3f}".format(
        *(statistics.fmean(map(irrelevant_part, runs)) for runs in (vit, vitdiff)), -part.mean, -part.mean - part.half,
        -part.mean + part.half, part.p_holm))
    share = with_vit("mnist", stats.trained_irrelevant_share)["vitdiff"]
    assert_says("irrelevant patches {:.1f} points more of its (absolute) weight".format(share.mean))
    assert share.better == 0 and share.count == 20


def controls_compared(dataset, figure_of, more_is_better):
    """{"model - other": Comparison} of the pairs that the README of the controls compares."""
    compared = re.findall(r"--compare (\w+) (\w+)", (HERE / "runs/controls/README.md").read_text())
    return stats.compare_lines(lines_of("controls", "reference")[dataset], figure_of, more_is_better, compared)


def test_irrelevant_part():
    """Of all models and controls on MNIST, those whose irrelevant part is shown to be lower are the ones named."""
    found = stats.compare_lines(lines_of("controls", "reference")["mnist"], irrelevant_part, False)
    assert {model for model in found if found[model].p_holm < 0.05 and found[model].mean < 0} == {
        "vitdiff", "vitdiffpaper", "vitdiffv2"}
    assert ("shown to be lower than that of `vit` for `vitdiff`, `vitdiffpaper` and `vitdiffv2` alone (p below 0.05)"
            in " ".join((HERE / "runs/controls/README.md").read_text().split()))


def test_fashion():
    """The figures of Fashion-MNIST in the READMEs are those of the records."""
    assert_says(*fashion_sentences())
    points = controls_compared("fashionmnist", accuracy, True)
    faults = " ".join((FAULTS / "README.md").read_text().split())
    assert "on Fashion-MNIST by {0.mean:+.2f} ({1}) and by {2.mean:+.2f} ({3})".format(*(
        part for name in ("vitmatched", "vitheads")
        for part in (points[f"vitdiff - {name}"], ends(points[f"vitdiff - {name}"])))) in faults
    points, part, share = (with_vit("fashionmnist", figure) for figure in (
        accuracy, irrelevant_part, stats.trained_irrelevant_share))
    assert max(OTHERS, key=lambda model: points[model].mean) == "vitbalanced"
    assert all(part[model].p_holm > 0.05 for model in OTHERS[1:])
    shown = " and ".join(f"`{model}`" for model in OTHERS[1:] if share[model].p_holm < 0.05)
    reference = " ".join((HERE / "runs/reference/README.md").read_text().split())
    assert f"On Fashion-MNIST a difference is shown for {shown} alone, which gives less" in reference
    assert all(share[model].mean < 0 for model in OTHERS[1:] if share[model].p_holm < 0.05)


def fashion_sentences():
    """What the README says of Fashion-MNIST."""
    differential = OTHERS[1:]
    points, noise, less = (with_vit("fashionmnist", figure) for figure in (
        accuracy, noise_error, lambda run: partial_error(run, "irrelevant") - partial_error(run, "relevant")))
    loss = with_vit("fashionmnist", lambda run: run.summary["test_loss"])["vitdiff"]
    new, new_noise = (with_vit("fashionmnist", figure, NEW_SEEDS) for figure in (accuracy, noise_error))
    controls = controls_compared("fashionmnist", accuracy, True)
    matched, heads, more_heads = (controls[name] for name in (
        "vitdiff - vitmatched", "vitdiff - vitheads", "vitheads - vit"))
    controls = controls_compared("fashionmnist", noise_error, False)
    matched_noise, heads_noise = (controls[name] for name in ("vitdiff - vitmatched", "vitdiff - vitheads"))
    error = statistics.fmean(noise_error(run) for (model, _), run in runs_of("fashionmnist").items() if model == "vit")
    fewer = sorted(-noise[model].mean for model in differential)
    assert all(less[model].mean > 0 for model in differential) and more_heads.p_holm < 0.05
    return [
        "On Fashion-MNIST, with {0.count} seeds, `vitdiff` has {0.mean:.2f} points more accuracy ({1}; corrected p "
        "{0.p_holm:.2g}), no more than self-attention with as many maps, and `vitdiffpaper` {2:.2f} less ({3}); under "
        "that noise the three make {4:.1f} to {5:.1f} points fewer errors than `vit`, which errs in {6:.1f}%".format(
            points["vitdiff"], ends(points["vitdiff"]), -points["vitdiffpaper"].mean, ends(points["vitdiffpaper"]),
            fewer[0], fewer[-1], error),
        "**On Fashion-MNIST** `vitdiff` has {0.mean:.2f} more than `vit`, p {0.p_holm:.2g}, and a test loss lower by "
        "{1:.4f}, p {2.p_holm:.2g}; `vitdiffpaper` has {3:.2f} less, p {4.p_holm:.2g}. More maps alone do as much: a "
        "`vit` with four heads has {5.mean:.2f} more than `vit`, p {5.p_holm:.2g}, and `vitdiff` "
        "differs from it by {6.mean:+.2f} ({7}), from a `vit` with as many parameters by {8.mean:+.2f} ({9})".format(
            points["vitdiff"], -loss.mean, loss, -points["vitdiffpaper"].mean, points["vitdiffpaper"], more_heads,
            heads, ends(heads), matched, ends(matched)),
        "on MNIST, and {:.2f}, p {:.2g}, on Fashion-MNIST".format(
            points["vitbalanced"].mean, points["vitbalanced"].p_holm),
        "on Fashion-MNIST {:+.2f}, {:+.2f} and {:+.2f}".format(
            *(new[model].mean for model in ("vitdiff", "vitdiffpaper", "vitbalanced"))),
        "On Fashion-MNIST they make {:.2f} {}, {:.2f} {} and {:.2f} {} points fewer errors, p {:.2g}, {:.2g} and "
        "{:.2g}; seeds 5 and up alone give {:.2f}, {:.2f} and {:.2f}. There, too, `vitdiff` makes fewer errors than "
        "self-attention with as many maps, by {:.2f} {}, and with as many parameters, by {:.2f} {}, p {:.2g} and "
        "{:.2g}".format(
            *(part for model in differential for part in (-noise[model].mean, how_much_less(noise[model]))),
            *(noise[model].p_holm for model in differential), *(-new_noise[model].mean for model in differential),
            -heads_noise.mean, how_much_less(heads_noise), -matched_noise.mean, how_much_less(matched_noise),
            heads_noise.p_holm, matched_noise.p_holm),
        "On Fashion-MNIST it is the other way round: the three gain less on irrelevant patches than on relevant ones, "
        "by {:.2f} points ({}), {:.2f} ({}) and {:.2f} ({}), p {:.2g}, {:.2g} and {:.2g}, and in proportion no "
        "difference is shown".format(
            *(part for model in differential for part in (less[model].mean, ends(less[model]))),
            *(less[model].p_holm for model in differential))]


def test_why():
    """The figures of the section Why are those of its table, and what it calls a difference is one there."""
    text = README.split("## Why")[1].split("## ")[0]
    rows = {cells[0].strip("| "): cells[1:] for cells in (
        line.split(" | ") for line in text.splitlines() if line.startswith("| vit"))}
    figures = {name: float(cells[0].split()[0]) for name, cells in rows.items()}
    p_values = {name: float(cells[3]) for name, cells in rows.items()}
    said = {"the error is {:.1f} points higher": ["vitdiffv2 - vitsum"],
            "`vitdiff` makes {:.1f} points fewer errors than self-attention with as many maps (`vitheads`, {:.1f} "
            "below `vit`) and {:.1f} fewer than with as many parameters":
                ["vitdiff - vitheads", "vitheads - vit", "vitdiff - vitmatched"],
            "(`vitcentered`), brings {:.1f}; `vitdiffv2` makes {:.1f} fewer than that":
                ["vitcentered - vit", "vitdiffv2 - vitcentered"]}
    for sentence, names in said.items():
        assert_says(sentence.format(*(abs(figures[name]) for name in names)))
        assert all(figures[name] < 0 and p_values[name] < 0.05 for name in names)
    runs = runs_of("mnist", "reference", "controls")
    assert all(statistics.fmean(paired(runs, *name.split(" - "), noise_error, range(5, 10))) < 0
               for names in said.values() for name in names)
    assert p_values["vitsum - vit"] > 0.05 and p_values["vitdiff - vitdiffnonorm"] > 0.05
    low, high = re.search(r"\((\S+) to (\S+)\)", rows["vitdiff - vitdiffnonorm"][0]).groups()
    assert_says(f"changes the error by {max(-float(low), float(high)):.1f} points at most (95%)")
    assert len(text.strip().splitlines()) <= 24  # and the heading


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


def corruptions_of(dataset):
    """{model: the corruptions under which its error is in bold, below that of `vit`}, of the reference's table."""
    header, _, *rows = blocks_of((HERE / f"runs/reference/{dataset}-noise-table.md").read_text())[2].splitlines()
    _, *names = header.strip("| ").split(" | ")
    rows = [row.strip("| ").split(" | ") for row in rows]
    return {model: [name for name, cell in zip(names, cells) if cell.startswith("**-")] for model, *cells in rows}


def test_corruptions():
    """The corruptions that the READMEs name are those where a model makes fewer errors than `vit`, after correction."""
    assert all(corruptions_of("mnist")[model] == ["gaussian noise", "impulse noise", "distractors"]
               for model in OTHERS[1:])
    assert_says("With Holm's correction for all 24 differences", "under Gaussian noise, impulse noise and distractors; "
                "under shot noise, occlusion and blur no difference is shown")
    text = " ".join((HERE / "runs/reference/README.md").read_text().split())
    for model, names in corruptions_of("fashionmnist").items():
        assert not names or f"`{model}` under {', '.join(names)}" in text


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
    text = " ".join((FAULTS / "README.md").read_text().split())
    assert ("make {} pairs, with differences from {:+.2f} to {:+.2f} points: `vit` is ahead in {:.0%} of them, and "
            "`vitdiff` by the published {:.2f} or more in {:.1%}").format(
        len(differences), min(differences), max(differences),
        sum(difference < 0 for difference in differences) / len(differences), claim,
        sum(difference >= claim for difference in differences) / len(differences)) in text


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
