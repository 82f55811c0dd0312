"""The committed runs: what repeats them, and every number that README and report say of them."""

import functools
import itertools
import math
import operator
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
BOTH = dict(mnist="MNIST", fashionmnist="Fashion-MNIST")
ALL = [*BOTH, "cifar10"]
CONTROLS = ("controls", "reference")  # folders compared together
PARTS, accuracy = stats.GAUSSIAN_PARTS, stats.test_accuracy


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
    for folder in (RUNS / "reference").glob("*-seed0"):
        recorded, _ = records.read_config(folder)
        for argv in ([], [f"@{folder / 'args.txt'}"]):
            args = train.parse_flags(argv)
            model, dataset, seed = ([args.model[0], args.dataset[0], args.seed[0]] if argv else
                                    [recorded[name] for name in ("model", "dataset", "seed")])
            assert train.resolve_settings(args, model, dataset, seed, torch.device("cpu")) == recorded


H100, CPU, OLD = ("7a4e73b", "NVIDIA H100 80GB HBM3"), ("7a4e73b", "x86_64"), ("6eff288", "x86_64")  # commit, device
H200 = ("f7dba71", "NVIDIA H200")
TEN = range(10)
PLACES = [("reference", MODELS, range(20), BOTH, H100),
    ("reference", ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"], range(8), ["clutteredmnist"], OLD),
    ("reference", ["vit", "vitdiff"], range(3), ["cifar10"], ("3b3c9cc", "x86_64")),
    ("reference", ["vit", "vitdiff"], range(3, 10), ["cifar10"], ("1f67906", "x86_64")),
    ("reference", ["vitdiffv2"], TEN, ["cifar10"], ("1f67906", "x86_64")),
    ("reference", ["vit", "vitdiff"], range(10, 20), ["cifar10"], H200),
    ("reference", ["vitbalanced", "vitdiffpaper"], TEN, ["cifar10"], H200),
    ("controls", ["vitboth"], range(20), ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched"], TEN, ["cifar10"], H200),
    ("trials/sizes", [f"{name}{depth}" for depth in (1, 2, 4, 8) for name in ("vitdepth", "vitdiffdepth")], range(5),
     ["mnist"], ("1f67906", "x86_64")),
    ("trials/sizes", ["vitlarge", "vitdifflarge", "vitdiffpaperlarge"], range(3), ["cifar10"], H200),
    ("controls", ["vitheads", "vitmatched", "vitboth", "vitsumscaled", "vitcentered"], TEN, BOTH, H100),
    ("controls", ["vitsum"], TEN, ["fashionmnist"], H100), ("controls", ["vitsum"], TEN, ["mnist"], CPU),
    ("controls", ["vitdiffabs", "vitdiffnonorm", "vitheadnorm"], TEN, BOTH, CPU),
    ("brightness", ["vit", "vitboth", "vitdiff", "vitdiffv2"], TEN, BOTH, CPU),
    ("brightness", ["vitheads"], range(5), BOTH, CPU),
    *((place, ["vit", "vitdiff"], TEN, datasets, OLD) for place, datasets in [
        ("faults/activated", ["mnist"]), ("faults/ordered", ["mnist"]), ("trials/recipes", BOTH)]),
    ("faults/attention", ["vitdifftokennorm", "vitdiffnovember"], TEN, ["mnist"], OLD)]


@pytest.mark.parametrize("place", dict.fromkeys(place for place, *_ in PLACES))
def test_runs(place):
    """A folder has all seeds of its models, by the commit and on the device named (some records say -dirty, as copies
    of a plugin lay beside the code), with the plugin beside them, by the recipe of the reference but for a setting."""
    found = {key: (run.facts["git_commit"].removesuffix("-dirty")[:7], run.facts["device_name"])
             for key, run in runs_of(place).items()}
    assert found == {key: facts for name, models, seeds, datasets, facts in PLACES if name == place
                     for key in itertools.product(datasets, models, seeds)}
    for (dataset, _, seed), run in runs_of(place).items():
        changed = {("trials/recipes", "mnist"): dict(muon_lr=0.008), ("trials/recipes", "fashionmnist"): dict(
            batch_size=128, muon_lr=0.005, lr=0.003)}.get((place, dataset), {})
        changed |= dict(brightness=0.2) if place == "brightness" else {}
        assert stats.recipe_of(run) == stats.recipe_of(runs_of("reference")[dataset, "vit", seed]) | changed
        if run.settings["plugin"]:
            assert RUNS / place in records.find_run_plugin(run.folder, run.settings["plugin"]).parents


def assert_says(readme, sentence, *values, **named):
    """That a README has a sentence with these values in the places of its format fields, wherever lines break."""
    assert sentence.format(*values, **named) in " ".join((HERE / readme).read_text().split())


def assert_table(readme, rows):
    """That a README has these rows of a table, one below the other: lists of cells, the first a name."""
    text = "".join(f"| {' | '.join([re.sub(r'[a-z][a-z0-9]+', '`{}`'.format(chr(92) + 'g<0>'), name), *cells])} |\n"
                   for name, *cells in rows)
    assert text in (HERE / readme).read_text()


def error_under(corruption):
    return lambda run: 100 * stats.noise_error(run, [corruption], 5)


def mean(line, figure_of):  # a function of a run, or a figure of its summary
    return statistics.fmean(figure_of(run) if callable(figure_of) else run.summary[figure_of] for run in line.runs)


def interval(found):  # a cell, empty where nothing was compared
    return found and f"{found.mean:+.2f} ({found.mean - found.half:+.2f} to {found.mean + found.half:+.2f})" or ""


def p_holm(found):
    return found and f"{found.p_holm:.2g}" or ""


def side_by_side(found, *cells):
    """Rows of a table of differences: a name, and of each of `found`, {name: Comparison}, what `cells` make."""
    return [[name, *(cell(rows.get(name)) for rows in found for cell in cells)]
            for name in dict.fromkeys(itertools.chain(*found))]


def compared_controls():
    """{folder: (lines by data set, pairs of models)} of each command of the README of the controls that compares."""
    text = (RUNS / "controls/README.md").read_text()
    return {(re.findall(r"--out (\S+)", command) or command.split())[0]: (
        {name: lines for name, lines in lines_of(*CONTROLS).items()
         if name in re.search(r"--dataset ([\w ]+)", command)[1].split()},
        re.findall(r"--compare (\w+) (\w+)", command))
        for command in re.findall("python plot.py (runs/controls .*--compare.*)", text)}


def by_dataset(comparisons, *parts):
    """[{models: Comparison}] of what stats.compare_models found: of each data set, and part of the noise if any."""
    return [{key[1]: found for key, found in comparisons.items() if key[0] == name and key[2:] == part}
            for name in BOTH.values() for part in ([(part,) for part in parts] or [()])]


def test_results_in_the_readme():
    """README's table has the means over the seeds, beside what is published."""
    lines = {(dataset, line.model): line for dataset in ALL for line in lines_of(*CONTROLS).get(dataset, [])}
    assert_table("README.md", [[
        model, f"{lines['mnist', model].runs[0].summary['parameters']:,}", *(
            "{:.2%}; {:.1f}%, {:.1f}%".format(*(mean(lines[dataset, model], figure_of) for figure_of in (
                "test_accuracy", *map(error_under, PARTS)))) if (dataset, model) in lines else "" for dataset in ALL)]
        for model in ["vit", "vitbalanced", "vitboth", "vitdiff", "vitdiffpaper", "vitdiffv2"]])
    for name, model in zip(["ViT", "ViTBalanced", "ViTDiff"], ["vit", "vitbalanced", "vitdiff"]):
        figures = [stats.PUBLISHED[dataset, model] for dataset in BOTH]
        assert_says("README.md", "| published {} | {:,} | {:.2%} | {:.2%} | |", name, figures[0].parameters,
                    *(each.test_accuracy for each in figures))


def test_primary_comparisons():
    """The eight comparisons that were written down beforehand are those of the records."""
    runs = [run for (dataset, _, seed), run in runs_of("reference").items() if seed and dataset in BOTH]
    _, found = stats.compare_models(plot.arrange(runs), [("vitdiff", "vit"), ("vitdiffv2", "vit")])
    assert len(found) == 8 and {comparison.count for comparison in found.values()} == {19}
    assert_table("runs/README.md", [[f"{name.split()[0]}, {part}", *cells] for part in ("shift", "fluctuation")
                                    for name, *cells in side_by_side(by_dataset(found, part), interval, p_holm)])
    assert all(comparison.p_holm < 0.05 and comparison.mean < 0 for comparison in found.values())


def test_differences_in_the_report():
    """The report's tables of differences are those of the records."""
    assert_table("runs/README.md", side_by_side([
        stats.compare_lines(lines_of("reference")[dataset], accuracy, True) for dataset in BOTH], interval, p_holm))
    both = stats.compare({(dataset, name): differences for dataset in BOTH for name, differences in (
        stats.paired_differences(lines_of("reference")[dataset], accuracy).items())}, True)
    assert_says("runs/README.md", "corrected for the eight rows of both data sets, p is {:.3f}",
                both["fashionmnist", "vitdiff"].p_holm)
    compared = compared_controls()
    (lines, first), (_, second) = (compared[f"runs/controls{folder}"] for folder in ("", "/sign-and-norm"))
    first, second = ([pair for pair in pairs if "vitsumscaled" not in pair] for pairs in (first, second))
    accuracies, _ = stats.compare_models(lines, first)
    _, errors = stats.compare_models(lines, first + second)
    for found in (by_dataset(accuracies), by_dataset(errors, "shift", "fluctuation")):
        assert_table("runs/README.md", side_by_side(found, interval))
    unseen = plot.arrange([run for (_, _, seed), run in runs_of("reference").items() if seed > 4])
    for dataset in BOTH:
        seen, found = (stats.compare_lines(lines[dataset], accuracy, True) for lines in (lines_of("reference"), unseen))
        assert all(seen[name].mean * found[name].mean > 0 for name in seen)
    found = stats.compare_lines(unseen["fashionmnist"], accuracy, True)["vitdiff"]
    assert_says("runs/README.md", "the lead of `vitdiff` on Fashion-MNIST is {} points", interval(found))
    assert_says("README.md", "on seeds that no choice had seen by {:.2f} ({:.2f} to {:.2f})", found.mean,
                found.mean - found.half, found.mean + found.half)


def response_with_error(lines, part):
    """How the logarithm of noise to signal in the last block correlates with the error at severity 3, over models."""
    return statistics.correlation(*zip(*(
        (mean(line, lambda run: math.log(stats.response_of(run, f"{part}_3", 1, "noise_to_signal"))),
         mean(line, lambda run: 1 - run.noise[part][2])) for line in lines)))


def test_errors_in_the_report():
    """The report's tables of errors and of the response of the branches have the figures of the records."""
    errors, response, correlations = {}, {}, []
    figures = ["noise_to_signal_1", "noise_to_signal_2", "noise_to_signal", "noise_cosine", "signal_cosine"]
    for lines in (lines_of(*CONTROLS)[dataset] for dataset in BOTH):
        for line in lines:
            errors.setdefault(line.model, [line.model]).extend(f"{mean(line, error_under(name)):.1f}%" for name in [
                *PARTS, "gaussian_noise_unclipped", "image_offset", "patch_offset"])
        shown = [line for line in lines if line.model in MODELS and line.model != "vitbalanced"]
        for part, line in itertools.product(PARTS, shown):
            name = f"{part.split('_')[-1]}, {line.model}"
            found = [mean(line, lambda run: stats.response_of(run, f"{part}_3", 1, figure)) for figure in figures]
            response.setdefault(name, [name]).extend("" if math.isnan(value) else f"{value:.2f}" for value in found)
        correlations += [response_with_error(lines, part) for part in PARTS]
    assert_table("runs/README.md", errors.values())
    assert_table("runs/README.md", response.values())
    assert_says("runs/README.md", "by {:.2f} (shift) and {:.2f} (fluctuation) on MNIST and by {:.2f} and {:.2f} on "
                "Fashion-MNIST", *correlations)


def test_natural_images_in_the_report():
    """What README and report say of CIFAR-10 is of the records: figures of each model, and their differences."""
    def compare(figure_of, pairs, seeds=range(20)):
        chosen = stats.keep_runs(lines, lambda run: run.settings["seed"] in seeds)
        return stats.compare(stats.paired_differences(chosen, figure_of, pairs), False)

    def difference(model, other, figure_of, seeds=range(20)):
        return compare(figure_of, [(model, other)], seeds)[f"{model} - {other}"]

    def say(sentence, *values):
        assert_says("runs/README.md", sentence, *values)

    lines, fluctuation = lines_of(*CONTROLS)["cifar10"], error_under(PARTS[1])
    names = ["gaussian_noise", *PARTS, "gaussian_noise_unclipped", "image_offset", "patch_offset"]
    assert_table("runs/README.md", [[
        line.model, f"{line.runs[0].summary['parameters']:,}", f"{mean(line, 'test_loss'):.4f}",
        f"{mean(line, 'test_accuracy'):.2%}", *(f"{mean(line, error_under(name)):.1f}%" for name in names)]
        for line in lines])
    controls, pairs = compared_controls()["runs/controls/cifar10"]
    shown = [*((model, "vit") for model in ("vitdiff", "vitdiffv2", "vitdiffpaper", "vitbalanced")), *pairs]
    assert_table("runs/README.md", side_by_side([compare(figure_of, shown) for figure_of in (
        accuracy, *map(error_under, [*PARTS, "contrast", "distractors"]))], interval))
    primary = compare(fluctuation, [(model, "vit") for model in ("vitdiff", "vitdiffv2")], range(3, 10))
    say("over seeds 3 to 9 `vitdiff` minus `vit` is {} points under the fluctuation, p = {:.2g} by Holm's method, "
        "`vitdiffv2` minus `vit` {}, p = {:.2g}", *(
            figure for row in primary.values() for figure in (interval(row), row.p_holm)))
    say("on another device, `vitdiff` errs less again, as was expected: {}.",
        interval(difference("vitdiff", "vit", fluctuation, range(10, 20))))
    say("all on one device, by {}.",
        interval(difference("vitboth", "vitdiff", accuracy, range(10, 20))).removeprefix("+"))
    accuracies, errors = stats.compare_models(controls, pairs)
    assert accuracies["CIFAR-10", "vitdiff - vitboth"].better == 0
    say("is not shown (p = {:.2f} [by Holm]", errors["CIFAR-10", "vitdiff - vitmatched", "fluctuation"].p_holm)
    assert errors["CIFAR-10", "vitmatched - vit", "fluctuation"].p_holm > 0.05
    say("`vitmatched` gains {:.2f} of the {:.2f} points that `vitdiff` gains over `vit`", *(
        difference("vit", model, fluctuation, range(10)).mean for model in ("vitmatched", "vitdiff")))
    lead = difference("vitboth", "vitdiff", accuracy)
    say("and ahead of it by {:.2f} points", difference("vitheads", "vit", accuracy).mean)
    say("and is ahead of `vitdiff` by {:.2f} points, in all 20 seeds", lead.mean)
    assert_says("README.md", "on photographs better by {:.1f} points", lead.mean)
    say("it is worth {:.2f} points", difference("vitmatched", "vit", accuracy).mean)
    say("it has one, of {:.2f} points (p = {:.3f} by Holm)", -accuracies["CIFAR-10", "vitdiff - vitmatched"].mean,
        accuracies["CIFAR-10", "vitdiff - vitmatched"].p_holm)
    say("is behind it by {:.2f} points", difference("vit", "vitdiffpaper", accuracy).mean)
    say("errs more than `vit`, and more than `vitdiff` (expected) by {:.2f} points",
        difference("vitboth", "vitdiff", fluctuation).mean)
    for sentence, folders, model, other in [
            ("On MNIST and Fashion-MNIST that lead was {:.2f} and {:.2f} points", CONTROLS, "vitboth", "vitdiff"),
            ("on MNIST and Fashion-MNIST it was behind by {:.2f} and {:.2f}.", ["reference"], "vit", "vitdiffpaper")]:
        say(sentence, *(statistics.fmean(stats.paired_differences(
            lines_of(*folders)[dataset], accuracy, [(model, other)])[f"{model} - {other}"]) for dataset in BOTH))
    models = {line.model: line for line in lines}
    say("`vitheads` and `vitboth` have {:.2f}% and {:.2f}% by the recipe", *(
        mean(models[model], accuracy) for model in ("vitheads", "vitboth")))
    say("the seeds of `vitdiffpaper` have {:.2f}% to {:.2f}%, those of `vitdiff` {:.2f}% to {:.2f}%, of `vit` {:.2f}% "
        "to {:.2f}%.", *(end(map(accuracy, models[model].runs)) for model in ("vitdiffpaper", "vitdiff", "vit")
                      for end in (min, max)))
    within = sorted(statistics.correlation(*([figure(run) for run in line.runs] for figure in (accuracy, fluctuation)))
                    for line in lines)
    say("correlate by {:+.2f}, without `vitdiffpaper` by {:+.2f}; over the seeds of a model by {:+.2f} to {:+.2f}", *(
        statistics.correlation(*([mean(line, figure) for line in chosen] for figure in (accuracy, fluctuation)))
        for chosen in (lines, [line for line in lines if line.model != "vitdiffpaper"])), within[0], within[-1])

    def response(line, figure="noise_to_signal", part=PARTS[1], block=1):
        return mean(line, lambda run: stats.response_of(run, f"{part}_3", block, figure))

    say("the output has {:.2f} of noise to signal in `vitdiff`, its first branch {:.2f}, the heads of `vit` {:.2f}, of "
        "`vitboth` {:.2f}, of `vitmatched` {:.2f} (", response(models["vitdiff"]),
        response(models["vitdiff"], "noise_to_signal_1"),
        *(response(models[model]) for model in ("vit", "vitboth", "vitmatched")))
    say("over the eight models, by {:.2f}.", response_with_error(lines, PARTS[1]))
    for line in lines:
        for run in line.runs:  # expected: under the shift within half a point of clean images; found: less
            assert abs(error_under(PARTS[0])(run) - (100 - accuracy(run))) < 0.2
        for block, figure in itertools.product((0, 1), ("noise_to_signal_1", "noise_to_signal_2", "noise_to_signal")):
            assert not response(line, figure, PARTS[0], block) >= 0.001

    def everywhere(run):
        return 100 * stats.noise_error(run, stats.plain_corruptions(run.noise), 5)

    say("no difference from `vit` ({}) or `vitboth` ({}) is to be seen, and `vitmatched` errs least: `vitdiff` minus "
        "it is {} (", *(interval(difference("vitdiff", other, everywhere))
                        for other in ("vit", "vitboth", "vitmatched")))
    assert min(models.values(), key=lambda line: mean(line, everywhere)).model == "vitmatched"
    for dataset in BOTH:
        row = stats.compare_lines(lines_of("reference")[dataset], error_under("contrast"), False)["vitdiff"]
        assert row.mean + row.half < 0
    for sentence, row in [
            ("On photographs (CIFAR-10) `vitboth` is ahead of it by {} points ({} to {})", lead),
            ("errs less there, too, by {} points ({} to {}) in seeds 3 to 9, as",
             difference("vit", "vitdiff", fluctuation, range(3, 10))),
            ("written down before, by {} in all 20 ({} to {})", difference("vit", "vitdiff", fluctuation)),
            ("gains on MNIST, costs it {} points ({} to {}).", difference("vitdiff", "vit", error_under("contrast")))]:
        assert_says("README.md", sentence, *(
            f"{value:.2f}" for value in (row.mean, row.mean - row.half, row.mean + row.half)))


@functools.cache
def shared_and_own(ending=""):
    """How much noise changes alike in all images, and how much in each: {(data set, model, condition): noise to signal
    of both, a pair a run} in the last block, means over heads, of the output or, ending "_1", of the first branch."""
    heads, found = {}, {}
    for path in itertools.chain(*([RUNS / place / "response.csv", *(RUNS / place).glob("*-seed0/response.csv")]
                                  for place in CONTROLS)):
        for row in records.parse_csv(path.read_text()):
            if row["block"] == 1 and f"common_share{ending}" in row:
                change, share = row[f"noise_to_signal{ending}"], row[f"common_share{ending}"]
                heads.setdefault((row.get("run", path.parent.name), row["condition"]), []).append(
                    (change * share, change * (1 - share)))
    for (run, condition), values in heads.items():
        found.setdefault((*run.split("-")[:2], condition), []).append(list(map(statistics.fmean, zip(*values))))
    return found


def test_shared_changes_in_the_report():
    """What README and report say of changes that all images share is of the records, and of the table without them."""
    def cells(model, dataset, part, ending=""):
        found = shared_and_own(ending)[dataset, model, f"{part}_3"]
        assert len(found) == sum(key[:2] == (dataset, model) for key in runs_of(*CONTROLS))
        return [f"{statistics.fmean(values):.2f}" for values in zip(*found)]

    def difference(other, name):
        return stats.compare({"": [row[name] - errors[other, seed][name] for (model, seed), row in errors.items()
                                   if model == "vitdiff"]}, False)[""]

    photographs = ("cifar10", PARTS[1])
    rows = {model: [cell for place in [*itertools.product(BOTH, PARTS), photographs] for cell in cells(model, *place)]
            for model in ["vit", "vitheads", "vitmatched", "vitboth", "vitdiff", "vitdiffpaper", "vitdiffv2"]}
    assert_table("runs/README.md", [[model, *found] for model, found in rows.items()])
    own = sorted(found[-1] for found in rows.values())
    assert_says("runs/README.md", "On photographs the own part is {} to {} in all seven models", own[0], own[-1])
    first, last = cells("vitdiff", *photographs, "_1"), cells("vitdiff", *photographs)
    assert_says("runs/README.md", "the shared part goes on photographs from {} to {}, the own part from {} up to {}.",
                first[0], last[0], first[1], last[1])
    errors = {(row["model"], row["seed"]): row for row in checks("common")}
    for (model, seed), row in errors.items():
        recorded = runs_of(*CONTROLS)["cifar10", model, seed].noise[PARTS[1]][2]
        assert row["left"] == pytest.approx(100 * (1 - recorded), abs=0.1)  # a CPU's against those of the GPU
    means = {model: [statistics.fmean(row[name] for (which, _), row in errors.items() if which == model)
                     for name in ("clean", "left", "own", "common")] for model, _ in errors}
    assert_table("runs/README.md", [[model, *(f"{error:.1f}%" for error in found)] for model, found in means.items()])
    assert_says("runs/README.md", "`vitdiff` minus `vitboth` is {} points of error, without the shared part {}, on "
                "clean images {}; `vitdiff` minus `vit` is {}, without it {}.", *(
                    interval(difference(other, name)) for other, names in [
                        ("vitboth", ("left", "own", "clean")), ("vit", ("left", "own"))] for name in names))
    assert_says("README.md", "against the signal by {0} in `vit` and {5} in `vitdiff` under the shift on MNIST and, "
                "under the fluctuation, by {3} and {8} on Fashion-MNIST, {4} and {9} on photographs. There, at "
                "severity 3, it errs less than `vitboth` by {10:.1f} points, without that part not.", *rows["vit"][::2],
                *rows["vitdiff"][::2], -difference("vitboth", "left").mean)
    assert difference("vitboth", "own").mean > 0


def test_depth_in_the_report():
    """What the report says of depth is of the records: figures of `vit`, differences of `vitdiff`, and their change."""
    lines, measures = lines_of("trials/sizes")["mnist"], [accuracy, *map(error_under, PARTS)]
    models, rows, found = {line.model: line for line in lines}, [], {}
    for depth in (1, 2, 4, 8):
        vit, vitdiff = (models[f"{name}depth{depth}"] for name in ("vit", "vitdiff"))
        found[depth] = [stats.paired_differences(lines, figure_of, [(vitdiff.model, vit.model)])[
            f"{vitdiff.model} - {vit.model}"] for figure_of in measures]
        rows.append([str(depth), *(f"{line.runs[0].summary['parameters']:,}" for line in (vit, vitdiff)),
                     f"{mean(vit, accuracy):.2f}%", *(f"{mean(vit, figure_of):.1f}%" for figure_of in measures[1:]),
                     *(interval(stats.compare({depth: values}, True)[depth]) for values in found[depth])])
    assert_table("runs/README.md", rows)
    changes = [stats.compare({"": [after - before for before, after in zip(*values)]}, True)[""]
               for values in zip(found[1], found[8])]
    devices = [[measures[1](runs_of("trials/sizes")["mnist", f"{model}depth2", seed]) - measures[1](
        runs_of("reference")["mnist", model, seed]) for seed in range(5)] for model in ("vit", "vitdiff")]
    assert_says("runs/README.md", "they err by {} points (`vit`) and {} (`vitdiff`) more than the same seeds on the "
                "H100", *(interval(stats.compare({"": values}, False)[""]) for values in devices))
    ratios = [mean(models[f"vitdiffdepth{depth}"], measures[1]) / mean(models[f"vitdepth{depth}"], measures[1])
              for depth in found]
    assert_says("runs/README.md", "`vitdiff` makes between {:.2f} and {:.2f} times as many", min(ratios), max(ratios))
    assert_says("README.md", "under the shift shrinks from {:.1f} points with one block to {:.1f}", *(
        -statistics.fmean(found[depth][1]) for depth in (1, 8)))
    assert_says("runs/README.md", "From depth 1 to depth 8 the difference in accuracy changes by {} points, that under "
                "the shift by {}, that under the fluctuation by {}", *map(interval, changes))


def test_larger_size_in_the_report():
    """What README and report say of the larger size is of the records."""
    lines = {line.model: line for line in lines_of("trials/sizes")["cifar10"]}
    models = ["vitlarge", "vitdifflarge", "vitdiffpaperlarge"]
    found = stats.compare(stats.paired_differences(list(lines.values()), accuracy, [
        (model, "vitlarge") for model in models[1:]]), True)
    assert_table("runs/README.md", [[
        model, f"{lines[model].runs[0].summary['parameters']:,}", f"{mean(lines[model], 'test_loss'):.4f}",
        f"{mean(lines[model], 'test_accuracy'):.2%}", interval(found.get(f"{model} - vitlarge"))] for model in models])
    leads = [-found[f"{model} - vitlarge"].mean for model in models[1:]]
    assert_says("runs/README.md", "and twice the maps, by {:.2f} points, and over `vitdiffpaperlarge`, which has as "
                "many of both, by {:.2f}.", *leads)
    assert_says("README.md", "with six, on photographs, `vit` leads by {:.1f} points of accuracy", leads[0])
    assert {run.summary["best_epoch"] for line in lines.values() for run in line.runs} == {30}


def test_brightness_in_the_report():
    """What README and report say of training with brighter images are means over the seeds without and with it."""
    figures, rows = [lambda run: 100 - accuracy(run), *map(error_under, ["gaussian_noise", *PARTS])], {}
    for (dataset, model, seed), run in runs_of("brightness").items():
        plain = runs_of(*CONTROLS)[dataset, model, seed]
        rows.setdefault((model, dataset), []).append([figure(of) for figure in figures for of in (plain, run)])
    means = {key: list(map(statistics.fmean, zip(*found))) for key, found in rows.items()}
    assert_table("runs/README.md", [[model, *("{:.1f}% to {:.1f}%".format(*means[model, dataset][i:i + 2])
                                              for dataset in BOTH for i in range(0, 8, 2))]
                                    for model in sorted({model for model, _ in rows})])
    assert_says("README.md", "`vit` errs in {:.1f}% and {:.1f}% under the shift", *(
        means["vit", dataset][5] for dataset in BOTH))
    cost = stats.compare({model: [clean[1] - clean[0] for clean in rows[model, "fashionmnist"]]
                          for model, _ in rows}, False)
    assert_says("runs/README.md", "all err more, `vit` by {} points", interval(cost["vit"]))
    assert_says("README.md", "clean images of Fashion-MNIST cost it {:.2f} points", cost["vit"].mean)
    assert all(found.mean > found.half for found in cost.values())
    (_, _, without, *_), (_, _, _, trained, *_) = means["vitdiff", "fashionmnist"], means["vit", "fashionmnist"]
    assert without < trained and means["vitdiff", "mnist"][2] > means["vit", "mnist"][3]  # under the whole noise
    _, found = stats.compare_models(lines_of("brightness"), [("vitdiff", "vit")])
    assert_says("runs/README.md", "with the augmentation `vitdiff` minus `vit` is {} points on MNIST and {} on", *(
        interval(found[name, "vitdiff - vit", "fluctuation"]) for name in BOTH.values()))


def test_attention_and_canvases_in_the_report():
    """The report's tables of attention and of cluttered MNIST have the figures of the records."""
    rows, share = {}, stats.trained_irrelevant_share
    for lines in (lines_of("reference")[dataset] for dataset in BOTH):
        found = stats.compare_lines(lines, share, False)
        for line in lines:
            rows.setdefault(line.model, [line.model]).extend(
                [f"{mean(line, share):.1f}%", interval(found.get(line.model))])
    assert_table("runs/README.md", rows.values())
    lines = lines_of("reference")["clutteredmnist"]
    found = stats.compare_lines(lines, accuracy, True)
    assert_table("runs/README.md", [[
        line.model, f"{line.runs[0].summary['parameters']:,}", f"{mean(line, 'test_loss'):.4f}",
        f"{mean(line, 'test_accuracy'):.2%}", interval(found.get(line.model)), p_holm(found.get(line.model))]
        for line in lines])


def test_numbers_in_the_prose():
    """The few numbers outside tables of README and report are those of the records."""
    found = stats.compare_lines(lines_of("reference")["fashionmnist"], accuracy, True)["vitdiff"]
    assert_says("README.md", "On Fashion-MNIST `vitdiff` is ahead by {:.2f} points of accuracy (95% interval {:.2f} to "
                "{:.2f})", found.mean, found.mean - found.half, found.mean + found.half)
    assert_says("runs/README.md", "before correction: {:.4f} for ten", stats.sign_flip_p([1.0] * 10))
    lines = {(dataset, line.model): line for dataset in BOTH for line in lines_of("controls")[dataset]}
    weights = {model: [abs(mean(lines[dataset, model], lambda run: stats.attention_of(run, "clean", -1, "lambda")))
                       for dataset in BOTH] for model in ("vitsum", "vitdiffabs", "vitsumscaled")}
    added = sorted(weights["vitsum"] + weights["vitdiffabs"])
    assert_says("runs/README.md", "for the class token they weigh {:.2f} to {:.2f} on average, that of `vitsumscaled` "
                "{:.2f} and {:.2f}", added[0], added[-1], *weights["vitsumscaled"])
    text = "".join((RUNS / f"reference/benchmark{which}.md").read_text() for which in ("", "-h100"))
    costs = [cost for model in ("vitdiff", "vit")
             for cost in re.findall(rf"\| {model}, mnist \| 1 \| \w+ \| ([\d.]+)", text)]
    assert_says("runs/README.md", "takes {} ms, compiled {}, on the CPU, {} ms, captured {}, on the GPU; one of `vit` "
                "{}, {}, {}, {}.", *costs)
    three, thirty = (runs_of("trials/single-runs")[key] for key in [
        ("mnist", "vitdiff", 0), ("clutteredmnist", "vit", 0)])
    assert [run.settings["epochs"] for run in (three, thirty)] == [3, 30]
    assert accuracy(three) > 95.75
    assert_says("runs/trials/README.md", "of `vit` on cluttered MNIST err in {:.2f}%", 100 - accuracy(thirty))
    longer = runs_of("trials/cifar10/hundred-epochs")
    assert_says("runs/trials/README.md", "test accuracies of {:.2f}%, {:.2f}% and {:.2f}%", *(
        accuracy(longer["cifar10", model, seed]) for model, seed in [("vit", 0), ("vit", 1), ("vitdiff", 0)]))
    assert {run.summary["best_epoch"] for run in longer.values()} == {run.settings["epochs"] for run in longer.values()}


def checks(name):
    return list(records.parse_csv((RUNS / f"trials/checks/{name}.csv").read_text()))


def test_checks():
    """What the report says of the test set's own error, of exchanged outputs, and of 1 - lambda, is in their tables."""
    errors = [row["error"] for row in checks("outcomes")]
    assert_says("runs/README.md", "by a further standard error of {:.2f} to {:.2f} points", min(errors), max(errors))
    found = {(row["part"], row["dataset"], row["model"]): row for row in checks("intervention")}
    for part, (exchange, name) in itertools.product(("shift", "fluctuation"), dict(
            left="as they are", undone="the first branch alone changed").items()):
        cells = [f"{found[part, dataset, model][exchange]:.1f}%" for dataset in BOTH
                 for model in ("vit", "vitdiff", "vitdiffv2")]
        assert_says("runs/README.md", f"| {part}, {name} | {' | '.join(cells)} |")
    assert_says("README.md", "errs in {undone:.1f}% of MNIST's images under the shift of severity 3, not in "
                "{left:.1f}%.", **found["shift", "mnist", "vitdiff"])
    for block, models, sentence in [
            (0, [], "the shift is left at {:.1f} to {:.1f} times 1 - lambda"),
            (1, ["vitsum", "vitdiffabs", "vitcentered"],
             "In the last block of the differential models {:.1f} to {:.0f} times")]:
        ratios = sorted(row["shift"] / row["one_minus_lambda"] for row in checks("algebra")
                        if row["block"] == block and row["model"] not in models)
        assert_says("runs/README.md", sentence, ratios[0], ratios[-1])


def leads_of(dataset, place):
    """The lead of `vitdiff` over `vit` in ten seeds of a folder and of the reference, and its change: Comparisons."""
    here, there = ([accuracy(runs[dataset, "vitdiff", seed]) - accuracy(runs[dataset, "vit", seed])
                    for seed in range(10)] for runs in (runs_of(place), runs_of("reference")))
    return stats.compare(dict(here=here, there=there, change=[a - b for a, b in zip(here, there)]), True)


def leads_over_the_default(dataset, folders, seeds):
    """How much lower the validation losses in folders are than those in the first, paired by model and seed: of each
    its mean and standard error. The table of trials says so, beside the losses."""
    rows = [row.strip("| ").split(" | ")[2:] for row in (RUNS / "trials/README.md").read_text().splitlines()
            if row.startswith(f"| {dataset} |")]
    losses = [[[runs_of(folder)[dataset, model, seed].summary["val_loss"] for seed in range(seeds)]
               for model in ("vit", "vitdiff")] for folder in folders]
    leads = []
    for found, row in zip(losses, rows, strict=True):
        pairs = [before - after for model in (0, 1) for before, after in zip(losses[0][model], found[model])]
        leads.append((statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))))
        assert row[:3] == [f"{statistics.fmean(part):.4f}" for part in [*found, found[0] + found[1]]]
        assert row[3:] == ([] if found is losses[0] else ["{:.4f} ± {:.4f}".format(*leads[-1])])
    return leads


@pytest.mark.parametrize("dataset, chosen", [("mnist", 0), ("fashionmnist", 1)])
def test_trials(dataset, chosen):
    """By the rule a recipe other than the default is chosen where its lead is more than a standard error."""
    leads = leads_over_the_default(dataset, [f"trials/{name}" for name in ("default", "candidate-1", "candidate-2")], 5)
    lowest = max(range(3), key=lambda i: leads[i][0])
    assert chosen == (lowest if leads[lowest][0] > leads[lowest][1] else 0)


def test_trials_on_cifar10():
    """Each change is made by itself; those that lead by more than a standard error are made together, and what leads by
    most is the recipe of the reference."""
    changes = {"rates": dict(lr=0.006, muon_lr=0.01), "shift-2": dict(shift=2.0),
               "weight-decay-0.03": dict(weight_decay=0.03), "batch-64": dict(batch_size=64)}
    folders = [f"trials/cifar10/{name}" for name in ("default", *changes)] + ["reference"]
    leads = leads_over_the_default("cifar10", folders, 3)
    better = [change for change, (lead, error) in zip(changes.values(), leads[1:]) if lead > error]
    changes = [{}, *changes.values(), functools.reduce(operator.or_, better)]
    for folder, change in zip(folders, changes):
        for key, run in runs_of(folders[0]).items():
            assert runs_of(folder)[key].settings == run.settings | change
    assert max(leads) == leads[-1] and len(better) > 1
    losses = [{key: run.summary["val_loss"] for key, run in runs_of(folder).items()} for folder in folders]
    apart = [[found["cifar10", "vitdiff", seed] - found["cifar10", "vit", seed] for seed in range(3)]
             for found in losses]
    assert max(apart[0]) < 0 < min(apart[-1])
    *cells, change = (stats.difference_cell(statistics.fmean(values), stats.half_interval(values), 4)
                      for values in [*apart, [after - before for before, after in zip(apart[0], apart[-1])]])
    text = (RUNS / "trials/README.md").read_text().split("| change | `vitdiff` minus `vit` (95% interval) |")[1]
    assert re.findall(r"^\| .* \| ([^|]*) \|$", text, re.MULTILINE)[:len(cells)] == cells
    assert_says("runs/trials/README.md", "minus that of `vit` changes by {}, an interval over three seeds", change)


def test_other_recipes_and_faults():
    """How `vitdiff` compares with `vit` by the recipe that lost, and with faults put back, is as their READMEs say."""
    for dataset, name in BOTH.items():
        here, there, change = leads_of(dataset, "trials/recipes").values()
        assert_says("runs/trials/README.md", "| {}, accuracy | {} | {:.2g} | {} | {} |", name, interval(here), here.p,
                    interval(there), interval(change))
    for fault in ("activated", "ordered"):
        here, _, found = leads_of("mnist", f"faults/{fault}").values()
        assert found.p > 0.05 and found.mean + found.half < 0.24
        assert_says("runs/faults/README.md", "The fault changes the lead of `vitdiff`, seed by seed, by {:+.2f} points "
                    "({}: no effect is shown, and one of 0.24 is excluded.", found.mean, interval(found).split("(")[1])
        assert_says("runs/faults/README.md", "| {} | {:.3g} |", interval(here), here.p)


def tracked_files(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=HERE, capture_output=True, text=True)
    return listed.stdout.split() or pytest.skip("not a git checkout")


def test_committed_tables():
    """Every committed table of runs is what its command writes today."""
    written = {}
    for places in [("reference",), CONTROLS, ("brightness",)]:
        for dataset, lines in lines_of(*places).items():
            written |= {f"runs/{places[0]}/{dataset}-{name}.md": text
                        for name, text in stats.make_tables(dataset, lines).items()}
    for folder, (lines, pairs) in compared_controls().items():
        written[f"{folder}/comparisons.md"] = stats.comparison_tables(lines, pairs)
        written |= {f"{folder}/{dataset}-{name}.md": text for dataset in lines
                    for name, text in stats.make_tables(dataset, lines[dataset]).items()}
    runs = [run for (dataset, _, seed), run in runs_of("reference").items() if seed and dataset in BOTH]
    written["runs/trials/primary/comparisons.md"] = stats.comparison_tables(
        plot.arrange(runs), [("vitdiff", "vit"), ("vitdiffv2", "vit")])
    for name in tracked_files("runs/*table.md", "runs/*comparisons.md"):
        assert (HERE / name).read_text() == written[name], name


def test_links():
    """Every link of a README leads to a committed file, and of charts and their tables no other is committed."""
    tracked = tracked_files("runs", "*.md")
    linked = set()
    for readme in [HERE / "README.md", *RUNS.glob("**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text()):
            if not target.startswith("http"):
                path = (readme.parent / target).resolve()
                assert path.exists(), f"{readme}: {target}"
                linked.add(path)
    assert {HERE / name for name in tracked if re.search(r"(mnist|cifar10)-[a-z-]+\.(png|md)$", name)} <= linked
    assert len(tracked) < 420 and {Path(name).parts[1] for name in tracked if name.startswith("runs/")} <= {
        "README.md", "reference", "controls", "brightness", "faults", "trials"}
