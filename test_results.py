"""The committed runs: what repeats them, and every number that README and report say of them."""

import functools
import itertools
import math
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

import plot
import records
import stats
import train
from test_data import HERE
from vit import MODELS

RUNS = HERE / "runs"
REFERENCE = sorted((RUNS / "reference").glob("*-seed0"))
BOTH = dict(mnist="MNIST", fashionmnist="Fashion-MNIST")
SEEDS = dict(mnist=20, fashionmnist=20, clutteredmnist=8)  # of the reference
CONTROLS, SUMS = ("controls", "reference"), ("controls/sums", "controls", "reference")  # folders compared together
READMES = [HERE / "README.md", *sorted(RUNS.glob("**/*.md"))]


@functools.cache
def runs_of(*places):
    """{(data set, model, seed): run} of folders in runs/, each of whose runs can be read."""
    runs, skipped = records.find_runs(*(RUNS / place for place in places))
    assert not [line for line in skipped if "not a run" not in line]
    return {tuple(run.settings[name] for name in ("dataset", "model", "seed")): run for run in runs}


@functools.cache
def lines_of(*places):
    return plot.arrange(list(runs_of(*places).values()))


def test_reference_settings():
    """A flag left out has the value of the reference runs, and args.txt of each repeats its settings."""
    for folder in REFERENCE:
        recorded, _ = records.read_config(folder)
        for argv in ([], [f"@{folder / 'args.txt'}"]):
            args = train.parse_flags(argv)
            model, dataset, seed = ([args.model[0], args.dataset[0], args.seed[0]] if argv else
                                    [recorded[name] for name in ("model", "dataset", "seed")])
            assert train.resolve_settings(args, model, dataset, seed, torch.device("cpu")) == recorded


def commit_of(run):
    """The commit that trained a run. Of some runs the record adds -dirty, as copies of a plugin lay beside the code."""
    return run.facts["git_commit"].removesuffix("-dirty")


def test_reference_runs():
    """The reference has all seeds of all models, by one commit of the code."""
    assert set(runs_of("reference")) == {
        (dataset, model, seed) for dataset, seeds in SEEDS.items()
        for model in MODELS if dataset != "clutteredmnist" or model != "vitbalanced" for seed in range(seeds)}
    (commit,) = set(map(commit_of, runs_of("reference").values()))
    assert re.fullmatch("[0-9a-f]{40}", commit)


OTHER_RECIPES = dict(mnist=dict(muon_lr=0.008), fashionmnist=dict(batch_size=128, muon_lr=0.005, lr=0.003))


@pytest.mark.parametrize("place, models, seeds, datasets", [
    ("controls", "vitheads vitmatched vitsum vitcentered vitheadnorm vitdiffnonorm", 10, BOTH),
    ("controls/sums", "vitsumscaled vitdiffabs vitdiffsum", 10, BOTH),
    ("faults/activated", "vit vitdiff", 10, ["mnist"]), ("faults/ordered", "vit vitdiff", 10, ["mnist"]),
    ("faults/attention", "vitdifftokennorm vitdiffnovember", 10, ["mnist"]),
    ("trials/recipes", "vit vitdiff", 10, BOTH), ("trials/muon-0.008", "vit vitdiff", 5, ["mnist"])])
def test_one_change(place, models, seeds, datasets):
    """Controls, faults and other recipes have the settings and the commit of the reference, but for a plugin that lies
    beside them, a model, a setting; the trials are by an older commit."""
    expected = set(itertools.product(datasets, models.split(), range(seeds)))
    if place == "controls/sums":  # which was trained on MNIST alone
        expected -= {("fashionmnist", "vitdiffsum", seed) for seed in range(10)}
    assert set(runs_of(place)) == expected
    for (dataset, model, seed), run in runs_of(place).items():
        reference = runs_of("reference")[dataset, "vit", seed]
        changed = {"vitheads": dict(num_heads=4), "vitmatched": dict(mlp_dim=160)}.get(model, {})
        if place.startswith("trials"):
            changed = OTHER_RECIPES[dataset]
        else:
            changed["plugin"] = run.settings["plugin"]
            assert records.find_run_plugin(run.folder, run.settings["plugin"]).parent == RUNS / place
        assert run.settings == reference.settings | dict(model=model) | changed
        assert place == "trials/muon-0.008" or commit_of(run) == commit_of(reference)


def words(text):
    return " ".join(text.split())


def assert_says(readme, sentence, *values):
    """That a README has a sentence with these values in the places of its format fields, wherever lines break."""
    assert words(sentence.format(*values)) in words((HERE / readme).read_text())


def assert_table(readme, rows):
    """That a README has these rows of a table, one below the other: lists of cells, the first a name."""
    text = "".join(f"| {' | '.join([re.sub(r'[a-z][a-z0-9]+', '`{}`'.format(chr(92) + 'g<0>'), name), *cells])} |\n"
                   for name, *cells in rows)
    assert text in (HERE / readme).read_text()


def accuracy(run):
    return 100 * run.summary["test_accuracy"]


def noise_error(run):
    return 100 * stats.noise_error(run, stats.PIXEL_NOISES, 5)


def mean_of(line, figure):
    return statistics.fmean(run.summary[figure] for run in line.runs)


def interval(found):  # a cell, empty where nothing was compared
    return found and f"{found.mean:+.2f} ({found.mean - found.half:+.2f} to {found.mean + found.half:+.2f})" or ""


def p_holm(found):
    return found and f"{found.p_holm:.2g}" or ""


def detectable(found):
    return found and f"{found.detectable:.2f}" or ""


def on_both(places, figure_of, more_is_better, beside, compared=()):
    """Rows of a table of differences: on each data set the interval, and the cell that `beside` makes."""
    found = [stats.compare_lines(lines_of(*places)[dataset], figure_of, more_is_better, compared) for dataset in BOTH]
    return [[name, *(cell(rows.get(name)) for rows in found for cell in (interval, beside))]
            for name in dict.fromkeys(itertools.chain(*found))]


def pairs_compared(*places):
    """The pairs of models that the command in the README of the controls, or of the faults, compares."""
    folders = " ".join(f"runs/{place}" for place in places)
    (flags,) = re.findall(f"python plot.py {folders} (--compare.*)",
                          (RUNS / places[0].split("/")[0] / "README.md").read_text())
    return re.findall(r"--compare (\w+) (\w+)", flags)


@pytest.mark.parametrize("dataset", BOTH)
def test_results_in_the_readme(dataset):
    """README's tables are the means over the reference seeds, beside what is published."""
    lines = {line.model: line for line in lines_of("reference")[dataset]}
    assert_table("README.md", [[
        model, f"{lines[model].runs[0].summary['parameters']:,}", f"{mean_of(lines[model], 'val_loss'):.4f}",
        f"{mean_of(lines[model], 'test_loss'):.4f}", f"{mean_of(lines[model], 'test_accuracy'):.2%}",
        f"{statistics.fmean(map(noise_error, lines[model].runs)):.1f}%"] for model in MODELS])
    published = [stats.PUBLISHED[dataset, model] for model in ("vit", "vitbalanced", "vitdiff")]
    columns = [[format(figures[i], form) for figures in published] for i, form in ((1, ","), (2, ".3f"), (3, ".3f"))]
    accuracies = [f"{100 * figures.test_accuracy:.2f}" for figures in published]
    assert_says("README.md", "| {} | {} | {} | {}% | |", *map(", ".join, [*columns, accuracies]))


def test_differences_in_the_report():
    """The report's tables of differences are those of the records."""
    equal = [("vitdiff", "vitmatched"), ("vitdiff", "vitheads"), ("vitdiffpaper", "vit"), ("vitheads", "vit")]
    for rows in [on_both(["reference"], accuracy, True, p_holm), on_both(CONTROLS, accuracy, True, detectable, equal),
                 on_both(CONTROLS, noise_error, False, p_holm, pairs_compared(*CONTROLS)),
                 on_both(SUMS, noise_error, False, p_holm, pairs_compared(*SUMS))]:
        assert_table("runs/README.md", rows)
    unseen = [run for (_, _, seed), run in runs_of("reference").items() if seed > 4]
    for dataset in BOTH:
        seen, unseen_ = (stats.compare_lines(lines[dataset], accuracy, True)
                         for lines in (lines_of("reference"), plot.arrange(unseen)))
        assert all(seen[name].mean * unseen_[name].mean > 0 for name in seen)


def test_parts_of_the_noise():
    """The report's table of shift and fluctuation has the figures of seed 0, and the README the first of them."""
    runs, rows = runs_of("trials/parts"), {}
    for dataset, part in itertools.product(BOTH, ("gaussian_noise_shift", "gaussian_noise_fluctuation")):
        for model in ["vit", "vitbalanced", "vitheads", "vitmatched", "vitcentered", "vitdiff", "vitdiffpaper",
                      "vitdiffv2", "vitdiffabs", "vitsumscaled"]:
            rows.setdefault(model, [model]).append(f"{stats.noise_error(runs[dataset, model, 0], [part], 5):.1%}")
    assert_table("runs/README.md", rows.values())
    assert_says("README.md", "`vit` and `vitdiff` err in {} and {} of the images; under the rest of the noise alone "
                "they err in {} and {}.", *(rows[model][part] for part in (1, 2) for model in ("vit", "vitdiff")))


def test_attention_and_canvases_in_the_report():
    """The report's tables of attention and of cluttered MNIST have the figures of the records."""
    rows = {}
    for lines in (lines_of("reference")[dataset] for dataset in BOTH):
        found = stats.compare_lines(lines, stats.trained_irrelevant_share, False)
        for line in lines:
            share = statistics.fmean(map(stats.trained_irrelevant_share, line.runs))
            rows.setdefault(line.model, [line.model]).extend([f"{share:.1f}%", interval(found.get(line.model))])
    assert_table("runs/README.md", rows.values())
    lines = lines_of("reference")["clutteredmnist"]
    found = stats.compare_lines(lines, accuracy, True)
    assert_table("runs/README.md", [[
        line.model, f"{line.runs[0].summary['parameters']:,}", f"{mean_of(line, 'test_loss'):.4f}",
        f"{mean_of(line, 'test_accuracy'):.2%}", interval(found.get(line.model)), p_holm(found.get(line.model))]
        for line in lines])


def test_numbers_in_the_prose():
    """The few numbers outside tables of README and report are those of the records."""
    found = stats.compare_lines(lines_of("reference")["fashionmnist"], accuracy, True)
    assert_says("README.md", "On Fashion-MNIST `vitdiff` is ahead by {:.2f} points", found["vitdiff"].mean)
    runs = [run for (dataset, _, _), run in runs_of("reference").items() if dataset in BOTH]
    assert_says("runs/reference/README.md", "{:.1f} hours of one core for MNIST and Fashion-MNIST", sum(
        run.summary["seconds"] + run.summary["analysis_seconds"] for run in runs) / 3600)
    assert_says("runs/README.md", "before correction: {:.4f} for ten", stats.sign_flip_p([1.0] * 10))
    assert_says("runs/README.md", "A step of `vitdiff` takes {} ms, compiled {}", *re.findall(
        r"\| vitdiff, mnist \| 1 \| (?:no|yes) \| ([\d.]+)", (RUNS / "reference/benchmark.md").read_text()))
    (three,), (thirty,) = (runs_of(f"trials/{name}-epochs").values() for name in ("three", "thirty"))
    assert accuracy(three) > 95.75
    assert_says("runs/trials/README.md", "of `vit` on cluttered MNIST err in {:.2f}%", 100 - accuracy(thirty))
    subtracted = [run.metrics[f"lambda_{block}"][-1] for (_, model, _), run in runs_of("controls/sums").items()
                  if model == "vitdiffsum" for block in (0, 1)]  # what is recorded is the weight that is subtracted
    assert_says("runs/controls/README.md", "lambda ended negative in {} of {} blocks",
                sum(value > 0 for value in subtracted), len(subtracted))


def leads_of(dataset, place, figure_of):
    """The lead of `vitdiff` over `vit` in ten seeds of a folder and of the reference, and its change: Comparisons."""
    here, there = ([figure_of(runs[dataset, "vitdiff", seed]) - figure_of(runs[dataset, "vit", seed])
                    for seed in range(10)] for runs in (runs_of(place), runs_of("reference")))
    return stats.compare(dict(here=here, there=there, change=[a - b for a, b in zip(here, there)]), True)


def test_recipes_that_lost():
    """How `vitdiff` compares with `vit` by the recipe that lost is as the README of the trials says."""
    found = [leads_of(dataset, "trials/recipes", figure_of)
             for dataset in BOTH for figure_of in (accuracy, noise_error)]
    names = [f"{name}, {what}" for name in BOTH.values()
             for what in ("accuracy", "error under Gaussian and impulse noise")]
    for name, (here, there, change) in zip(names, map(dict.values, found)):
        assert_says("runs/trials/README.md", "| {} | {} | {:.2g} | {} | {} |", name, interval(here), here.p,
                    interval(there), interval(change))


@pytest.mark.parametrize("dataset, folders, chosen", [
    ("mnist", ["default", "muon-0.008", "decay-0.7"], 0),
    ("fashionmnist", ["default", "batch-256-muon-0.008", "batch-256-muon-0.01"], 1)])
def test_trials(dataset, folders, chosen):
    """The table of trials is that of the records, and by the rule above it a recipe other than the default is chosen
    where its lead is more than a standard error."""
    rows = [row.split(" | ") for row in (RUNS / "trials/README.md").read_text().splitlines()
            if row.startswith(f"| {dataset} |")]
    losses = [[[runs_of(f"trials/{folder}")[dataset, model, seed].summary["val_loss"] for seed in range(5)]
               for model in ("vit", "vitdiff")] for folder in folders]
    leads = []
    for found, row in zip(losses, rows, strict=True):
        pairs = [before - after for model in (0, 1) for before, after in zip(losses[0][model], found[model])]
        leads.append((statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(10)))
        assert row[2:5] == [f"{statistics.fmean(part):.4f}" for part in [*found, found[0] + found[1]]]
        assert row[5].rstrip(" |") == ("" if found is losses[0] else "{:.4f} ± {:.4f}".format(*leads[-1]))
    lowest = max(range(3), key=lambda i: leads[i][0])
    assert chosen == (lowest if leads[lowest][0] > leads[lowest][1] else 0)


@pytest.mark.parametrize("fault", ["activated", "ordered"])
def test_faults(fault):
    """The effect of a fault that its README states is that of the records."""
    lead = leads_of("mnist", f"faults/{fault}", accuracy)
    found = lead["change"]
    assert found.p > 0.05 and found.mean + found.half < 0.24
    assert_says("runs/faults/README.md", "The fault changes the lead of `vitdiff`, seed by seed, by {:+.2f} points "
                "({}: no effect is shown, and one of 0.24 is excluded.", found.mean, interval(found).split("(")[1])
    assert_says("runs/faults/README.md", "| {} | {:.3g} |", interval(lead["here"]), lead["here"].p)


@pytest.mark.parametrize("places", [("reference",), CONTROLS, SUMS, ("faults/attention", "reference")])
def test_committed_tables(places):
    """Every table that a README links to is what its command writes today."""
    compared = pairs_compared(*places) if len(places) > 1 else []
    for dataset, lines in lines_of(*places).items():
        for name, written in stats.make_tables(dataset, lines, compared).items():
            path = RUNS / places[0] / f"{dataset}-{name}.md"
            assert not path.exists() or path.read_text() == written, path


def test_links():
    """Every link of a README leads to a committed file, and of charts and their tables no other is committed."""
    listed = subprocess.run(["git", "ls-files", "runs", "*.md"], cwd=HERE, capture_output=True, text=True)
    tracked = listed.stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    linked = set()
    for readme in READMES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text()):
            if not target.startswith("http"):
                path = (readme.parent / target).resolve()
                assert path.exists(), f"{readme}: {target}"
                linked.add(path)
    assert {HERE / name for name in tracked if re.search(r"mnist-[a-z-]+\.(png|md)$", name)} <= linked
    assert len(tracked) < 450 and {Path(name).parts[1] for name in tracked if name.startswith("runs/")} <= {
        "README.md", "reference", "controls", "faults", "trials"}
