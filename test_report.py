"""Claims about stats.py, report.py, charts.py and plot.py, each against an independent computation: lines, statistics,
tables, charts, the page and the command. Most runs are made up in memory."""

import itertools
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from matplotlib.contour import ContourSet
from matplotlib.text import Text

import charts
import plot
import records
import report
import stats
from command import UserError
from test_records import write_run

EPSILONS = ["epsilon 0.01", "epsilon 0.04"]
PARTS = ["gaussian_noise", *stats.GAUSSIAN_PARTS, "patch_offset"]


# Made-up runs, and what becomes of them.

def make_run(model="vit", seed=0, folder="runs", loss=0.5, accuracy=0.98, parameters=33_034, errors={}, amount=0.1,
             **settings):
    """errors: {corruption: in percent at severities 1, 2, ...}, which are so many amounts."""
    plain = dict(dataset="mnist", plugin=None, dim=32, lr=0.006, distractors=0)
    return records.Run(**dict.fromkeys(records.Run._fields) | dict(
        folder=Path(folder, f"{model}-{len(settings)}-seed{seed}"),
        settings=dict(model=model, seed=seed) | plain | settings,
        facts={}, summary=dict(parameters=parameters, val_loss=loss, test_loss=loss - 0.01, test_accuracy=accuracy),
        noise={name: [1 - error / 100 for error in found] for name, found in errors.items()} or None,
        amounts={name: [amount * (i + 1) for i in range(len(found))] for name, found in errors.items()}))


def make_parts(model, errors, seeds=2, **options):
    """Runs with errors [under each of PARTS], one point more at each further severity, and two in seed 0 of all but
    `vit`."""
    return [make_run(model, seed, errors={
        name: [error + i + 2 * (seed == 0 and model != "vit") for i in range(5)] for name, error in zip(PARTS, errors)},
        **options) for seed in range(seeds)]


def measure(run, less=0.0):
    """The run with what was measured after offsets were removed and under attack, all accuracies less by so much."""
    def rows(text, *columns):
        return [dict(zip(columns, row.split(","))) | dict(test_accuracy=float(row.split(",")[-1]) - less)
                for row in text.split()]

    return run._replace(
        aligned=records.aligned_of(rows("""
            clean,0,0,.88 clean,0,10,.87 contrast,1,0,.8 contrast,1,10,.84 contrast,3,0,.6 contrast,3,10,.8
            contrast,5,0,.4 contrast,5,10,.46 contrast_random,3,10,.5 contrast_class_token,3,10,.7
            contrast_by_shot_noise,3,10,.4 contrast_pixels,3,10,.9""", "condition", "severity", "images")),
        attack=records.attack_of(rows("""
            pgd,0.01,.7 pgd,0.04,.3 fgsm,0.01,.8 fgsm,0.04,.6 sign_noise,0.01,.9 sign_noise,0.04,.88
            """, "attack", "epsilon")))


def analyse(run, losses=(0.9, 0.7, 0.6, 0.5), lambdas=(), share=0.2, negative=0.0, branches=(0.4, None, 0.4), blocks=2,
            uniform=0.4, more=()):
    """The run with a validation loss an epoch, a lambda a block, attention, response and maps."""
    images, maps = numpy.zeros((8, 1, 28, 28), numpy.uint8), numpy.full((8, 2, 4, 4), share)
    images[:, :, 4:10, 18:24] = 255
    maps[0, 0, 1, 2] = -3 * share
    return measure(run._replace(
        metrics=dict(epoch=range(1, len(losses) + 1), val_loss=losses, val_accuracy=[1 - loss / 10 for loss in losses])
        | {f"lambda_{block}": [lam] * len(losses) for block, lam in enumerate(lambdas)},
        attention={condition: {block: {"uniform_share": uniform, "irrelevant_share": share + 0.1 * block, "entropy": 2,
                                       "negative_share": negative, "lambda": 0.2, "signal_to_noise": 2.5}
                               for block in range(blocks)} for condition in ("clean", f"{blocks}_distractors", *more)},
        maps=(images, maps), response={f"{part}_3": {block: {name: branch and branch + block for name, branch in zip(
            charts.BRANCHES, branches)} for block in range(2)} for part in stats.GAUSSIAN_PARTS}))


def lines_of(own, reference=()):
    return {line.label: line for line in stats.arrange(own, reference)["mnist"]}


def tables_of(runs):
    return report.make_tables("mnist", stats.arrange(runs)["mnist"])


def rows_of(table):
    """The rows of each table in a Markdown text, its headings first: lists of lists of cells."""
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines() if "|---" not in row]
            for rows in re.findall(r"(?:^\|.*\n)+", table, re.MULTILINE)]


def test_folders():
    """Lines of several folders are told apart by them, whatever characters these have. The reference stands behind
    one's own runs; of a data set that these lack it stands in front."""
    def labels(*groups):
        lines = lines_of(*([make_run(folder=folder) for folder in folders] for folders in groups))
        return {label: line.front for label, line in lines.items()}

    assert labels(["a"]) == labels([], ["a"]) == {"vit": True}
    assert labels(["a"], ["a/reference"]) == {"vit": True, "vit (reference)": False}
    assert labels(["a", "b"], ["a/reference"]) == {"vit (a)": True, "vit (b)": True, "vit (a/reference)": False}
    assert labels(["c#", "c|"]) == {"vit (c%23)": True, "vit (c%7C)": True}  # in no chart and no Markdown table


def test_seeds_alone_share_a_line():
    """Runs of other settings are other lines, named after what differs between lines of a model; a setting that
    is missing where it is 0 or null elsewhere splits none. A run that is there twice is an error."""
    own = [make_run(seed=1), make_run(seed=0, flip=False, noise=0.0), make_run("vitbalanced", dim=48),
           make_run("vitdiff", 10), make_run("vitdiff", 2)]
    assert {label: [run.settings["seed"] for run in line.runs] for label, line in lines_of(own).items()} == {
        "vit": [0, 1], "vitbalanced": [0], "vitdiff": [2, 10]}
    assert list(lines_of([*own[2:], make_run("vitdiff", lr=0.1), make_run("vitbalanced", dim=64)])) == [
        "vitbalanced, dim 48, lr 0.006", "vitbalanced, dim 64, lr 0.006", "vitdiff, lr 0.006", "vitdiff, lr 0.1"]
    assert list(lines_of([make_run(lr=0.1)], [make_run(folder="ref")])) == ["vit, lr 0.1 (runs)", "vit (ref)"]
    with pytest.raises(UserError, match="runs/vit-1-seed0 and runs/vit-0-seed0 have the same settings and seed"):
        lines_of([make_run(distractors=0), make_run()])


def test_nearest_baseline():
    """`vit` of one's own folder serves before the reference's, seed by seed, but never one of another size beside it;
    the size most alike that makes two pairs serves. The reference is compared with itself."""
    own = [make_run("vitcosine", seed, dim=dim) for dim in (32, 48, 64) for seed in range(3)] + [
        make_run("vit", seed, dim=dim) for dim, seed in [(32, 0), (32, 1), (48, 0), (48, 1), (64, 0)]]
    lines = lines_of(own, [make_run(*run, "ref") for run in itertools.product(["vit", "vitwide"], (1, 2))]
                     + [make_run("vitwide", 0, "ref")])
    for name, dim, folders in [("vitcosine, dim 32", 32, "runs runs ref"), ("vitcosine, dim 48", 48, "runs runs"),
                               ("vitcosine, dim 64", 32, "runs runs ref"), ("vitwide", 32, "ref ref")]:
        pairs = stats.pair_with_baseline(lines[name], list(lines.values()))
        assert " ".join(other.folder.parts[0] for _, other in pairs) == folders
        assert all(other.settings == run.settings | dict(model="vit", dim=dim) for run, other in pairs)


def test_intervals():
    """Quantiles of t are those of the tables, and half an interval is a quantile of the mean's standard error."""
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}
    assert {freedom: round(stats.t_quantile(freedom), 4) for freedom in known} == known
    assert stats.half_interval([1, 2, 4, 9]) == pytest.approx(3.1824 * statistics.stdev([1, 2, 4, 9]) / 2, rel=1e-4)


def test_p_values():
    """p is the share of all choices of signs whose sum is as far from 0; of more than 40 values, of those drawn. Holm
    multiplies the smallest p by the number of tests, the next by one less, and none is less than one before."""
    assert stats.sign_flip_p([0.1] * 24) == 2 / 2**24 and 0 < stats.sign_flip_p([0.1] * 44) < 1e-9
    for values in ([0.1] * 5, [0.0, 0.0], [0.3, -0.9, 1.1, 0.2, 0.8, -0.4, 1.7]):
        signs = numpy.array([*itertools.product([-1, 1], repeat=len(values))])
        assert stats.sign_flip_p(values) == numpy.mean(abs(signs @ values) >= abs(sum(values)) - 1e-12)
    assert stats.holm(dict(a=0.01, b=0.04, c=0.03, d=0.005)) == pytest.approx(dict(a=0.03, b=0.06, c=0.06, d=0.02))


def test_names_of_corruptions():
    """A corruption is plain, or stands with its noise and the other parts of it, or beside them. Tables are made of
    what runs have met, be it parts of a noise without the noise, or an offset alone."""
    names = ["gaussian_noise_unclipped", *PARTS, "blur"]
    assert stats.plain_corruptions(names) == ["gaussian_noise", "blur"]
    assert stats.noise_parts(names) == [*PARTS[:3], "gaussian_noise_unclipped", "patch_offset"]
    for met, written in [(PARTS[1:3], ["shift-table"]), (["patch_offset"], []), (["blur"], ["noise-table"])]:
        assert list(tables_of([make_run(errors=dict.fromkeys(met, [30] * 5))]))[1:] == written


def test_result_table():
    """The table has means, 95% intervals, none for one seed, the best of a column bold, and what is published where
    model, data set and number of parameters are the same."""
    runs = [make_run("vit", seed, loss=0.5 + 0.02 * seed, accuracy=0.98 + 0.001 * seed) for seed in range(3)]
    runs += [make_run("vitbalanced"), make_run("vitdiff", loss=0.51, accuracy=0.981, parameters=37_290)]
    half = f"{4.303 * 0.02 / math.sqrt(3):.4f}"  # Student's t with 2 degrees of freedom; the deviation of the losses
    tables = tables_of(runs)
    assert list(tables) == ["table"]  # of a single pair nothing more can be said
    assert rows_of(tables["table"]) == [[
        ["model", "parameters", "seeds", "validation loss", "test loss", "test accuracy", "published"],
        ["vit", "33,034", "3", f"0.5200 ± {half}", f"0.5100 ± {half}", "**98.10%** ± 0.25%", "0.638, 0.626, 95.51%"],
        ["vitbalanced", "33,034", "1", "**0.5000**", "**0.4900**", "98.00%", ""],
        ["vitdiff", "37,290", "1", "0.5100", "0.5000", "**98.10%**", "0.624, 0.618, 95.75%"]]]


def test_comparison_with_vit():
    """A model is compared with `vit` of the same seed and recipe, whatever its size and precision, with Holm's p."""
    runs = [make_run("vitdiff", 3), make_run("vitbalanced")]  # no partner; one pair alone
    for seed, more in enumerate([0.001, 0.003, 0.004]):
        runs += [make_run("vit", seed), make_run("vitdiff", seed, accuracy=0.98 + more),
                 make_run("vitwide", seed, dim=48, amp="bfloat16"), make_run("vitfast", seed, lr=0.1)]
    mean, half = 0.8 / 3, 4.3027 * statistics.stdev([0.1, 0.3, 0.4]) / math.sqrt(3)
    tables = tables_of(runs)
    assert [row[:5] for row in rows_of(tables["paired-table"])[0]] == [
        ["model", "test accuracy, points (95% interval)", "better in", "p", "p (Holm)"],
        ["vitdiff, lr 0.006", f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", "3 of 3", "0.25", "0.5"],
        ["vitwide, lr 0.006", "+0.00 (+0.00 to +0.00)", "0 of 3", "1", "1"]]
    assert "+0.0000" in tables["paired-table"] and "| 3 of 3 | 0.5 |" in tables["table"]


def test_tables_of_noise():
    """Errors have intervals over seeds, and ratios to `vit` of the same seeds. What not all have met is left out."""
    runs = [make_run(seed=seed, errors=dict(blur=[10, 20, 30, 40, 50 + 15 * seed], fog=[40] * 5, snow=[1] * 5))
            for seed in range(3)]
    runs += [make_run("vitdiff", errors=dict(blur=[10, 10, 20, 20, 40], fog=[60] * 5)), make_run("vitdiffv2")]
    half = 4.3027 * 0.015 / math.sqrt(3)  # of the mean errors 0.35, 0.365 and 0.38
    assert rows_of(tables_of(runs)["noise-table"]) == [[
        ["model", "seeds", "blur", "fog", "mean"],
        ["vit", "3", "33.0% (1.00)", "40.0% (1.00)", f"36.5% ± {half:.1%} (1.00)"],
        ["vitdiff", "1", f"20.0% ({2 / 3:.2f})", "60.0% (1.50)", f"40.0% ({0.4 / 0.35:.2f})"]]]


@pytest.mark.parametrize("seeds, bold", [(7, False), (8, True)])
def test_tables_of_the_parts(seeds, bold):
    """Noise, its shift alone and its fluctuation alone have tables of errors and of differences, by severity, too. A
    cell is bold where p is below 0.05 by Holm for all. The errors are printed, in lines of at most 100 characters."""
    runs = make_parts("vit", [20, 10, 5, 6], seeds) + make_parts("vitdiff", [12, 4, 4.9, 9], seeds)
    errors, paired, each, severities, differences = rows_of(tables_of(runs)["shift-table"])
    assert errors[1] == ["vit", str(seeds), *(f"{value}.00% ± 0.00%" for value in (22, 12, 7, 8))]
    extra, half = 2 / seeds, stats.t_quantile(seeds - 1) * 2 / seeds  # of seed 0 alone, so that it is the mean's error
    cells = {shift: f"{shift + extra:+.2f} ({shift + extra - half:+.2f} to {shift + extra + half:+.2f})"
             for shift in (-8, -6, -0.1, 3)}
    assert paired[1][5:8] == [cells[-6], f"{seeds} of {seeds}", f"{2 / 2**seeds:.3g}"]
    assert each[1][1:] == [f"**{cell}**" if bold and shift != -0.1 else cell for shift, cell in cells.items()]
    assert severities[3] == ["gaussian noise shift", "vit", *(f"{10 + i}.00% ± 0.00%" for i in range(5))]
    assert differences[2] == ["gaussian noise shift", "vitdiff", *[cells[-6]] * 5]
    printed = plot.overview(stats.arrange([*runs, make_run(9 * "averylongname")]), Path("out"))
    assert re.search("shift  fluctuation\n(.*\n)*vit .* 12.0% +7.0%\n", printed) and "\nShift, fluctuation: " in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_attention():
    """The irrelevant share has its interval, its ratio and the seed-paired difference; a cell without a figure is
    empty. Where hardly a patch is black, as in photographs, there is no table."""
    runs = [analyse(make_run(model, seed), share=share) for model, shares in dict(
        vit=[0.21, 0.22, 0.23], vitdiff=[0.11, 0.14, 0.17]).items() for seed, share in enumerate(shares)]
    runs.append(analyse(make_run("vitnew"), share=0.3, blocks=3))
    shares, paired = rows_of(tables_of(runs)["attention-table"])
    assert shares[1:] == [
        ["vit", "3", *["32.0% ± 2.5% (2.50)"] * 2, ""], ["vitdiff", "3", *["24.0% ± 7.5% (2.50)"] * 2, ""],
        ["vitnew", "1", "50.0% (2.50)", "", "50.0% (2.50)"], ["uniform attention", "", *["40.0% (1.00)"] * 3]]
    half = 4.3027 * 2 / math.sqrt(3)  # the differences are -10, -8 and -6
    assert paired[1][:3] == ["vitdiff", f"-8.00 ({-8 - half:+.2f} to {-8 + half:+.2f})", "3 of 3"]
    tables = tables_of([analyse(make_run(), uniform=0.0004)])
    assert "attention-table" not in tables and "**" not in tables["table"]  # the only line is not the best


def test_response():
    """Each block has a table, of the models that have this block; self-attention has no figure of a second branch."""
    runs = [make_run(model)._replace(response=dict(blur_3={block: dict.fromkeys(records.RESPONSE_FIGURES) | dict(
        noise_to_signal=0.032, common_share=0.5, signal_cosine=-0.25)})) for model, block in (("vit", 0), ("deep", 1))]
    assert [rows[1:] for rows in rows_of(tables_of(runs)["response-table"])] == [
        [[model, "blur, severity 3", "", "", "0.032", "", "", "50.0%", "", "-0.25"]] for model in ("vit", "deep")]


def test_offsets_and_attacks():
    """Errors with the offset removed stand by the images it is estimated from, beside the controls and the difference
    from `vit`; those under attack by epsilon, in colour in 255ths. What was not measured so is absent."""
    runs = [measure(make_run(model, seed), 0.01 * seed - gain) for model, gain in [("vit", 0), ("vitdiff", 0.1)]
            for seed in range(3)] + [make_run("vitnew", seed) for seed in range(2)]
    assert not {"aligned-table", "attack-table"} & tables_of(runs[-2:]).keys()
    aligned, controls, compared = rows_of(tables_of(runs)["aligned-table"])
    cells = {error: f"{error}.0% ± 2.5%" for error in range(100)}  # 4.3027 / sqrt(3), of 0, 1 and 2 points less
    assert aligned == [["corruption", "model", "as it is", "10 images"],
                       ["contrast, severity 3", "vit", cells[41], cells[21]],
                       ["contrast, severity 3", "vitdiff", cells[31], cells[11]],
                       ["contrast, mean of 1, 3, 5", "vit", cells[41], cells[31]],
                       ["contrast, mean of 1, 3, 5", "vitdiff", cells[31], cells[21]],
                       ["clean", "vit", cells[13], cells[14]], ["clean", "vitdiff", cells[3], cells[4]]]
    assert controls[0][2:] == ["as it is", *stats.REMOVED]
    assert controls[1] == ["contrast", "vit", cells[41], cells[21], cells[51], cells[31], cells[61],
                           cells[11]]
    same = "-10.00 (-10.00 to -10.00)"
    assert compared == [["model", "contrast"], ["vitdiff", same]]
    errors, compared = rows_of(tables_of(runs)["attack-table"])
    assert errors[:2] == [["attack", "model", *EPSILONS], ["pgd", "vit", cells[31], cells[71]]]
    assert errors[3:6:2] == [["fgsm", "vit", cells[21], cells[41]], ["sign noise", "vit", cells[11], cells[13]]]
    assert compared == [["model", *EPSILONS], ["vitdiff", same, same]]
    colour = make_run()._replace(attack=dict(pgd={0.000980392: 1, 0.0156863: 1}))
    assert [*stats.attack_errors(colour)["pgd"]] == ["epsilon 0.25/255", "epsilon 4/255"]


def test_words_of_pages(monkeypatch):
    """The headings of a cell of a page say which figure it shows: of which runs, under what, and what was removed."""
    met = dict(gaussian_noise=[10, 20, 30, 40, 50], shot_noise=[0] * 5, impulse_noise=[30] * 5) | {
        name: [40] * 5 for name in report.REST} | dict(contrast=[10, 20, 50, 30, 40])
    runs, others = ([measure(make_run(model, seed, errors=met), less) for model, less in [("vit", 0), ("vitdiff", gain)]
                     for seed in range(2)] for gain in (-0.1, -0.05))
    monkeypatch.setattr(report, "runs_at", {"reference+controls": runs, "reference": runs, "controls": others}.get)

    def cell(headings):
        return report.write_column([report.meaning(f"MNIST, {headings}")], by_holm=False)[0]

    for error, found in {"": 30, " at severity 3": 50, " without offset": 20, " without random vector": 50,
                         " without offset of the class token": 30, " without offset of another corruption": 60}.items():
        assert cell(f"vit, error{error}, contrast") == f"{found}.0%"
    assert cell("vit, error, three noises") == "20.0%" and cell("vit, error, the rest") == "38.0%"
    assert [cell(f"vit, {attack} error, epsilon 0.04") for attack in ("robust", "fgsm", "sign noise")] == [
        "70.0%", "40.0%", "12.0%"]
    assert cell("vit, share of excess removed, contrast") == "62.5%"  # of the 48 points that contrast adds
    assert cell("vit - vitdiff, share of excess removed, contrast") == "-20.83"
    assert cell("vit - vitdiff, error of the first without offset, contrast") == "-30.00"  # 20 less 50
    assert report.write_column([report.meaning(f"MNIST, {model}, error without offset, contrast")
                                for model in ("vit", "vit - vitdiff")], by_holm=False) == ["20.0%", "+10.00"]
    assert cell("vitdiff / vit, error without offset, contrast") == "0.50"
    assert cell("vitdiff - vit, error without offset, contrast, reference / controls") == "2.00"
    with pytest.raises(UserError, match="too few runs of vit in reference.controls that have: robust error"):
        cell("vit, robust error")  # without an epsilon


def test_amounts_never_mix():
    """Figures under corruptions of other amounts than the first run's are left out; attention on clean images and on
    canvases as in training stays."""
    tables = tables_of([analyse(make_run(model, errors=dict(blur=[10] * 5), amount=amount), more=["blur_3"])
                        for model, amount in (("vit", 0.1), ("vitother", 0.2))])
    assert [row[0] for row in rows_of(tables["noise-table"])[0]] == ["model", "vit"]
    assert rows_of(tables["attention-table"])[0][2][2:] == ["30.0% (2.50)", "30.0% (2.50)", ""]


def test_compare():
    """Pairs of models are compared by seed in accuracy, then in the error under both parts of Gaussian noise, where
    there is noise on record, each p corrected by the number of rows of its table."""
    runs = [make_run(model, seed, dataset="kmnist") for model in ("vit", "vitdiff") for seed in range(2)]
    for model, errors in [("vit", [20, 12, 10]), ("vitdiff", [8, 9, 3]), ("vitdiffv2", [6, 12, 3])]:
        runs += make_parts(model, errors, seeds=7, accuracy=0.9 + 0.01 * len(model))
    pairs = [("vitdiff", "vit"), ("vitdiffv2", "vitdiff")]
    accuracy, error = rows_of(report.comparison_tables(stats.arrange(runs), pairs))
    assert [row[0] for row in accuracy[1:]] == ["KMNIST", "MNIST", "MNIST"]
    assert accuracy[2][1:] == ["vitdiff - vit", "+4.00 (+4.00 to +4.00)", "7 of 7", "0.0156", "0.0469"]  # 3 p
    assert [[row[2], row[3].split()[0], row[6]] for row in error[1:]] == [
        ["shift", f"{-3 + 2 / 7:.2f}", "0.0625"], ["fluctuation", f"{-7 + 2 / 7:.2f}", "0.0625"],  # 4 times 2 / 2^7
        ["shift", "+3.00", "0.0625"], ["fluctuation", "+0.00", "1"]]


@pytest.mark.parametrize("datasets, models", [(3, 14), (1, 60), (30, 2)])
def test_a_screen(datasets, models):
    """However many lines there are, 40 are printed at most, all of them where they fit; what is left out is said."""
    runs = [make_run(f"model{i}", dataset=f"data{j}") for i in range(models) for j in range(datasets)]
    text = plot.overview(stats.arrange(runs), Path("out")).splitlines()
    left = sum(int(line.split()[1]) for line in text if line.startswith("... "))
    assert len(text) + 1 <= 40 and sum(line.startswith("model") for line in text) + left == datasets * models
    assert (left > 0) == (datasets * (models + 2) + 3 > 40)


# Charts.

def draw(runs):
    """{name: figure} of all charts that have something to show."""
    lines = plot.style_lines(stats.arrange(runs)["mnist"], {run.settings["model"] for run in runs})
    with charts.house_style():
        return {name: figure for name, (make, *_) in plot.CHARTS.items() if (figure := make("mnist", lines))}


def marks(axes):
    """Of each error bar, in the order drawn: where its middle is, and its ends if it has an interval."""
    return [(bar.lines[0].get_xydata()[0], *(segments.get_segments()[0] for segments in bar.lines[2]))
            for bar in axes.containers]


def test_styles():
    """However many lines a chart has, and a reference behind them, muted, each has a style of its own, and a model of
    the project the same colour whatever it is shown with, which no other model has."""
    names = ["vit", "vitdiff", *(f"model{i}" for i in range(10))]
    own, reference = ([make_run(name, 0, folder, lr=rate) for name in names for rate in range(5)] for folder in "ab")
    lines = plot.style_lines(stats.arrange(own, reference)["mnist"], sorted(names))
    assert len(lines) == len({str(line.style) for line in lines}) == 120
    for line, color in ((line, line.style["color"]) for line in lines):
        assert (color in plot.COLORS.values()) == (color == plot.COLORS.get(line.model))
        assert (line.style["alpha"] == 1) == line.front


def test_curves():
    """A drawn line is the mean of the records after a quarter of its epochs, unless these are few, its band the 95%
    interval, and its end is named; panels share a scale. The mark of a model's accuracy has an interval over seeds."""
    runs = [analyse(make_run(seed=seed, accuracy=0.98 - 0.01 * seed), [5] * 2 + [0.85] * 5 + [0.5 + 0.1 * seed])
            for seed in range(3)] + [analyse(make_run("vitdiff"), (0.9, 0.7, 0.6), (0.2, 0.35))]
    figures, half = draw(runs), 4.3027 / math.sqrt(3)  # Student's t, 2 degrees of freedom, in standard deviations
    (axes,) = figures["val-loss"].axes
    (band,) = axes.collections
    assert [curve.get_xdata().tolist() for curve in axes.lines[:2]] == [[3, 4, 5, 6, 7, 8], [1, 2, 3]]
    assert axes.lines[0].get_ydata() == pytest.approx([0.85] * 5 + [0.6])
    assert band.get_datalim(axes.transData).extents == pytest.approx([3, 0.6 - 0.1 * half, 8, 0.85], abs=1e-5)
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        "vit (3 seeds) 0.600", "vitdiff (1 seed) 0.600"]
    for axes, lam in zip(figures["lambda"].axes, (0.2, 0.35), strict=True):
        assert axes.lines[0].get_ydata().tolist() == [lam] * 3
        assert axes.get_ylim() == pytest.approx((0.2 - 0.0075, 0.35 + 0.0075))
    (_, ends), one = marks(figures["parameters"].axes[0])
    assert ends[:, 1] == pytest.approx([0.97 - 0.01 * half, 0.97 + 0.01 * half], abs=1e-5) and len(one) == 1


def test_charts_of_shares():
    """Errors by severity and attention by block are means with intervals, from 0 to 100% at most, of three seeds or
    more, as a note says. Other corruptions, conditions and blocks stand side by side."""
    runs = [analyse(make_run(seed=seed, errors=dict(blur=[10, 20, 30, 40, 30 + 30 * seed])), share=0.3 + 0.1 * seed)
            for seed in range(3)] + [analyse(make_run("vitdiff", errors=dict(blur=[10] * 5)))]
    figures = draw(runs)
    (axes,) = figures["noise"].axes
    assert axes.lines[0].get_ydata() == pytest.approx([0.02, 0.1, 0.2, 0.3, 0.4, 0.6])  # 0: clean
    assert axes.collections[0].get_datalim(axes.transData).y1 == pytest.approx(1) == axes.get_ylim()[1]
    for block, axes in enumerate(figures["relevance"].axes):
        (middle, ends), _ = marks(axes)
        half = 0.1 * 4.3027 / math.sqrt(3)
        assert [middle[1], *ends[:, 1] - middle[1]] == pytest.approx([0.4 + 0.1 * block, -half, half], abs=1e-5)
    loss = draw(runs[:2])["val-loss"]
    assert not loss.axes[0].collections and loss.texts[1].get_text() == "mean of 2 seeds"
    figures = draw([*runs, analyse(make_run("vitother", errors=dict(fog=[1])), blocks=3)])
    assert "noise" not in figures and len(figures["blocks"].axes) == 9
    assert "relevance" not in draw([analyse(make_run(), uniform=0.0004)])  # as of photographs, which are hardly black


def test_maps():
    """Each head has a map, all on one scale, in the order of the patches, with the outline of the object; of other
    images, as of other canvases, there is none."""
    runs = [analyse(make_run()), analyse(make_run("vitdiff"), share=0.3), analyse(make_run("vitother"))]
    runs[2].maps[0][:] += 1
    (axes,) = draw(runs)["maps"].axes
    shown = [image for image in axes.images if image.get_cmap().name == "RdBu_r"]
    assert numpy.ptp([image.get_clim() for image in shown], 0).tolist() == [0, 0]
    assert [image.get_array()[0, 0] for image in shown] == [0.2] * 8 + [0.3] * 8  # lines, images, heads
    assert [numpy.argwhere(image.get_array() < 0).tolist() for image in shown] == 2 * [[[1, 2]], *[[]] * 7]
    left, _, _, top = shown[0].get_extent()
    squares = [path.vertices.mean(0) - (left, top) for found in axes.collections if isinstance(found, ContourSet)
               for path in found.get_paths()]
    assert len(squares) == 16 and squares[0] == pytest.approx([0.75, 0.25], abs=0.03)  # the image's, upper right


def test_rows():
    """Errors stand in rows from 0, below the family that the records show, the largest of a family first: a model whose
    maps have negative weights subtracts. The response of each branch stands above and below that of both, which
    self-attention has alone; both with intervals. No mark lies beyond the scale."""
    two = dict(branches=(0.6, 0.5, 0.1), lambdas=(0.5,))
    figures = draw([analyse(run, **options) for model, errors, options in [
        ("vit", [20, 50, 5], {}), ("vitcosine", [30, 9, 5], {}), ("vitdiff", [12, 4, 5], two | dict(negative=0.1)),
        ("vitsum", [19, 9, 5], two), ("vitcentered", [13, 4, 5], two | dict(negative=0.1))]
        for run in make_parts(model, errors, 3)])
    assert [label.get_text() for label in figures["shift"].axes[0].get_yticklabels()] == [
        "Self-attention", "vitcosine", "vit", "Subtracting", "vitcentered", "vitdiff", "Adding in place of subtracting",
        "vitsum"]
    half = 0.02 / 3 * 4.3027  # of two points more in seed 0 alone
    for axes, mean in zip(figures["shift"].axes, (0.14, 0.06, 0.07), strict=True):
        _, ends = marks(axes)[3]
        assert ends[:, 0] == pytest.approx([mean + 0.02 / 3 - half, mean + 0.02 / 3 + half], abs=1e-5)
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= axes.dataLim.x1
    found = {(round(height, 2), round(mean, 2)) for (mean, height), _ in marks(figures["response"].axes[1])}
    assert {(4.73, 1.6), (5.27, 1.5), (5, 1.1), (1, 1.4), (2, 1.4)} <= found and len(found) == 3 * 3 + 2


def test_texts_do_not_overlap():
    """No text of a chart stands on another or outside the figure, however many lines end within a hair's breadth."""
    figures = draw([analyse(run, [0.9 - 0.018 * j + 0.0001 * i for j in range(20)], (0.5, 0.6), branches=(4, 5, 1))
                    for i in range(15) for run in make_parts(f"vitofalongername{i}" * (i > 0) or "vit", [9, 9, 9], 1)])
    assert figures.keys() == plot.CHARTS.keys()
    for name, figure in figures.items():
        figure.draw_without_rendering()
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts()),
                 *(text for axes in figure.axes for text in (*axes.texts, axes.title))]
        boxes = [Text.get_window_extent(text) for text in texts if text.get_text()]
        boxes += [box for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
                  if axes.axison and (box := axis.get_tightbbox())]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), name
        edges = numpy.array([box.extents for box in boxes])
        assert edges.min() >= 0 and (edges[:, 2:] <= figure.bbox.size).all(), name


# The page and the command.

def test_page(tmp_path, monkeypatch):
    """index.html is well-formed, without scripts and network, and shows each chart with a caption of one sentence and
    each table with all its cells, below the question that it answers; what records say is text, never markup."""
    runs = [run._replace(facts=dict(device_name="<script>")) for model in ("vit", "vitdiff")
            for run in make_parts(model, [9] * 4)]
    monkeypatch.setattr(records, "find_runs", lambda *folders: (runs * len(folders), []))
    monkeypatch.setattr(plot, "write_charts", lambda *_: [("mnist", name) for name in plot.CHARTS])
    for file_format, times in [("png", 2), ("pdf", 1)]:
        assert plot.main([str(tmp_path), "--format", file_format, "--compare", "vitdiff", "vit"]) == 0
        page = ElementTree.fromstring((tmp_path / "report/index.html").read_text())
        texts = {tag: ["".join(element.itertext()) for element in page.iter(tag)] for tag in (
            "script", "style", "figcaption", "h3", "p", "table")}
        assert not texts["script"] and "url(" not in texts["style"][0]
        links = [element.get(name) for element in page.iter() for name in ("href", "src") if element.get(name)]
        assert links == ["#mnist", *(f"mnist-{name}.{file_format}" for name in plot.CHARTS for _ in range(times))]
    assert texts["figcaption"] == [caption for _, _, caption in plot.CHARTS.values()]
    assert all(caption.find(".") == len(caption) - 1 for caption in texts["figcaption"])
    assert texts["h3"] == plot.QUESTIONS and "<script>" in "".join(texts["p"])
    cells = {cell for path in tmp_path.rglob("*.md") for table in rows_of(path.read_text()) for row in table
             for cell in row}
    shown = "".join(texts["table"])
    assert len(cells) > 50 and all(re.sub("[*`]", "", cell) in shown for cell in cells)


def test_command(tmp_path, monkeypatch, capsys):
    """It names what it skips, but not its own report, needs neither torch nor data, and writes the same bytes whatever
    the user's matplotlibrc and MPLBACKEND say. The reference is drawn, too, and no deeper folder."""
    monkeypatch.chdir(tmp_path)
    for folder, model in [("", "vit"), ("reference", "vitwide"), ("other/deeper", "vitwide"), ("", "cut")]:
        write_run(Path("runs", folder), model, analysed=False)
    Path("runs/mnist-cut-seed0/metrics.csv").write_text("epoch,val_loss\n1,0.5\n")
    Path("matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\naxes.facecolor: black\nfont.size: 20\n")
    code = "import sys\nsys.modules.update(torch=None, torchvision=None)\nimport plot\nsys.exit(plot.main(['runs']))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(
        MPLBACKEND="inline", PYTHONPATH=str(Path(plot.__file__).parent)))
    hostile = {path.name: path.read_bytes() for path in Path("runs/report").iterdir()}
    assert plot.main(["runs"]) == 0 and capsys.readouterr() == (process.stdout, process.stderr)
    assert hostile == {path.name: path.read_bytes() for path in Path("runs/report").iterdir()} and len(hostile) == 6
    assert re.fullmatch("skipped .*cut-seed0/metrics.csv.*\n", process.stderr)
    assert process.stdout.endswith("\n3 charts and all tables: open runs/report/index.html\n")


def test_flags(tmp_path, monkeypatch, capsys):
    """--seed and --dataset show the runs named alone, of the reference too, and --no-reference none of these; what is
    left out and what cannot be compared is said."""
    monkeypatch.setattr(plot, "CHARTS", {})
    write_run(tmp_path, settings=dict(dataset="kmnist"), analysed=False)
    for seed, (folder, model) in itertools.product(range(2), [("", "vitdiff"), ("reference", "vit")]):
        write_run(tmp_path / folder, model, seed, analysed=False)
    for flags, rows in [(["--seed", "1"], [["vitdiff", "1"], ["vit", "1"]]), (["--no-reference"], [["vitdiff", "2"]]),
                        (["--dataset", "mnist"], [["vitdiff", "2"], ["vit", "2"]])]:
        assert plot.main([str(tmp_path), *flags]) == 0
        ((_, *found),) = rows_of((tmp_path / "report/mnist-table.md").read_text())
        assert [row[:3:2] for row in found] == rows
    assert capsys.readouterr().err == ""
    runs = [make_run(errors=dict(blur=[1])), make_run("vitdiff", errors=dict(blur=[1]), amount=0.2)]
    monkeypatch.setattr(records, "find_runs", lambda *folders: (runs * len(folders), []))
    assert plot.main([str(tmp_path), "--no-reference", "--compare", "vitdiff", "vit"]) == 0
    left_out, not_compared = capsys.readouterr().err.splitlines()
    assert "what 1 runs did under noise" in left_out and "vitdiff and vit, which share no two" in not_compared


def test_no_further_process(tmp_path, monkeypatch):
    """Where none can be started, or one is killed, the charts are drawn by this one."""
    def kill(dataset, lines, parent=os.getpid()):
        return charts.draw_validation("loss", str, dataset, lines) if os.getpid() == parent else os.kill(os.getpid(), 9)

    monkeypatch.setattr(plot, "CHARTS", {"killer": (kill, plot.TRAINED, "")})
    for name in ("killed", "alone"):
        lines = plot.style_lines(lines_of([analyse(make_run())]).values(), ["vit"])
        drawn = plot.write_charts(tmp_path, "svg", {name: lines})
        assert (name, "killer") in drawn and "</svg>" in (tmp_path / f"{name}-killer.svg").read_text()
        monkeypatch.setattr(plot, "ProcessPoolExecutor", lambda: open("/nowhere/shm"))


@pytest.mark.parametrize("flags, said", [
    (["empty"], "no finished run"), (["nowhere"], "nowhere"), (["file"], "file"),
    (["runs", "runs/mnist-vit-seed0"], "is a run"), (["runs", "--out", "table"], "mnist-table.md"),
    (["runs", "--compare", "vti", "vit"], "did you mean vit?"),
    (["runs", "--compare", "vit", "vit"], "--compare: vit vit"),
    (["runs", *["--compare", "vit", "vitdiff"] * 2], "compared twice"),
    (["runs", "--seed", "4"], "no finished run of these seeds"), (["runs", "--dataset", "cifar10"], "data sets")])
def test_errors_of_the_user(tmp_path, monkeypatch, capsys, flags, said):
    """What the user can put right is said in one line, and the exit status is 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "CHARTS", {})
    Path("empty").mkdir()
    Path("table/mnist-table.md").mkdir(parents=True)
    Path("file").touch()
    write_run("runs", analysed=False)
    assert plot.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot.py: error: ") and said in line


# Verdicts.

def test_labels_beside_the_reference():
    """What sets a line apart from any line that it stands beside is in its label, though one's own `vit` has it as
    well. The precision, a plugin and the sizes of models set models apart from no other."""
    reference = [make_run(model, folder="runs/reference", epochs=20, amp="off") for model in ("vit", "vitdiff")]
    own = [make_run(model, epochs=2, amp="bfloat16", plugin="mine.py 012", dim=48) for model in ("vit", "vitcosine")]
    assert list(lines_of(own[1:], reference)) == ["vitcosine, epochs 2", "vit", "vitdiff"]
    assert list(lines_of(own, reference)) == [
        "vit, plugin mine.py 012, dim 48, epochs 2, amp bfloat16", "vitcosine, epochs 2", "vit (reference)", "vitdiff"]
    assert list(lines_of([own[1], make_run("vitdeep", epochs=2, depth=4)], reference[:1])) == [
        "vitcosine, epochs 2, depth 0", "vitdeep, epochs 2, depth 4", "vit"]
    trained_by_plugin = make_run("vitboth", folder="runs/reference", plugin="plugin.py 012")
    assert list(lines_of([make_run("vitboth")], [trained_by_plugin])) == ["vitboth", "vitboth (reference)"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 6])
def test_verdicts_of_few_seeds(seeds):
    """Fewer than six seeds are said to decide nothing, by p they cannot, and two have no interval. A line that is not
    compared says why, and one of another recipe is not."""
    runs = [make_run("vit", seed) for seed in range(seeds)]
    runs += [make_run("vitdiff", seed, accuracy=0.981 + 0.001 * seed) for seed in range(seeds)]
    runs += [make_run("vitlate", seed + seeds - 1) for seed in range(2)]
    runs += [make_run("vitshort", seed, epochs=2) for seed in range(seeds)]
    (line_of, lines), = stats.arrange(runs).items()
    text = plot.overview({line_of: lines}, Path("out"))
    said = {row[0].split(",")[0]: row[5:] for row in (re.split("  +", line) for line in text.splitlines())}
    assert said["vitlate"] == ["no two seeds in common"] and said["vitshort"] == ["no vit of this recipe"]
    assert said["vit"] == [] and stats.sign_flip_p([1] * 5) > 0.05 > stats.sign_flip_p([1] * 6)
    assert ("\nFewer than six seeds decide nothing" in text) == (seeds < 6)
    mean = 0.1 + 0.05 * (seeds - 1)
    assert re.fullmatch(rf"\+{mean:.2f}" + r" \(\S+ to \S+\)" * (seeds > 2), *said["vitdiff"])
    compared = rows_of(report.comparison_tables({line_of: lines}, [("vitdiff", "vit")]))[0][1]
    assert compared[2] == said["vitdiff"][0] and compared[4] == f"{2 / 2**seeds:.3g}"
