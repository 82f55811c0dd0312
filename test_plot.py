"""Claims about charts, tables and statistics, each against an independent computation from the records.

    python -m pytest test_plot.py
"""

import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy
import pytest
from matplotlib.contour import ContourSet
from matplotlib.image import AxesImage
from matplotlib.text import Text

import plot
import records
import stats

HERE = Path(__file__).parent
PLAIN = dict(model="vit", dataset="mnist", seed=0, plugin=None, dim=32, depth=2, epochs=20, lr=0.006, distractors=0)
SUMMARY_FIGURES = ["parameters", "epochs", "best_epoch", "val_loss", "val_accuracy", "test_loss", "test_accuracy"]
PARTS = ["gaussian_noise", *stats.GAUSSIAN_PARTS, "patch_offset"]


# Made-up runs.

def record(root, model="vit", seed=0, epochs=20, values=None, lambdas=(), accuracy=0.98, parameters=33_034, folder=None,
           **settings):
    """A finished run in a folder below root, without checksums."""
    settings = PLAIN | dict(model=model, seed=seed, epochs=epochs) | settings
    folder = root / (folder or f"{settings['dataset']}-{model}-seed{seed}")
    folder.mkdir(parents=True)
    values = values or [0.5 + math.exp(-epoch) + 0.01 * seed for epoch in range(1, epochs + 1)]
    records.write_json(folder / "config.json", dict(settings=settings, facts=dict(device="cpu", compiled=False)))
    records.write_metrics(folder, [dict(epoch=epoch, val_loss=value, val_accuracy=1 - value / 10)
        | {f"lambda_{block}": lam for block, lam in enumerate(lambdas)} for epoch, value in enumerate(values, 1)])
    records.write_json(folder / "summary.json", dict(
        parameters=parameters, val_loss=values[-1], test_loss=values[-1] - 0.01, test_accuracy=accuracy))
    return folder


def analyse(folder, accuracies, share=0.2, negative=0.0, weight=0.1, blocks=2, amount=0.1, uniform=0.4,
            conditions=("clean", "gaussian_noise_3")):
    """Made-up analyses: accuracies {corruption: five}, figures of two heads in each block, and maps."""
    records.write_csv(folder / "noise.csv", [
        dict(corruption=name, severity=severity, amount=amount * severity, test_loss=1.0, test_accuracy=accuracy)
        for name, values in accuracies.items() for severity, accuracy in enumerate(values, 1)])
    records.write_csv(folder / "attention.csv", [
        {"condition": condition, "block": block, "head": head, "uniform_share": uniform, "ink_share": 0.6,
         "irrelevant_share": share + 0.1 * block + 0.02 * head + 0.05 * i, "entropy": 2.0,
         "negative_share": negative, "lambda": 0.2 + 0.3 * block, "signal_to_noise": 2.0 + head}
        for i, condition in enumerate(conditions) for block in range(blocks) for head in range(2)])
    maps = numpy.zeros((8, 2, 17, 17), dtype=numpy.float16)
    maps[:, :, 0, 1:] = weight
    maps[0, 0, 0, 6] = -3 * weight  # of the second row's second patch
    images = numpy.zeros((8, 1, 28, 28), numpy.uint8)
    images[:, :, 4:10, 18:24] = 255
    records.write_arrays(folder / "attention.npz", dict(images=images, map_0=numpy.ones_like(maps), map_1=maps))
    return folder


def record_parts(root, model, errors, branches=(), seeds=2, **options):
    """Runs with test errors in percent, [under each of PARTS], one point more at each further severity, and two in seed
    0 of all but `vit`; with noise to signal of two branches and of both together."""
    for seed in range(seeds):
        more = 2 * (seed == 0 and model != "vit")
        folder = analyse(record(root, model, seed, **options), {
            name: [1 - (error + more + i) / 100 for i in range(5)] for name, error in zip(PARTS, errors)},
            negative=0.1 * (model in ("vitdiff", "vitcentered")))
        if branches:
            records.write_csv(folder / "response.csv", [
                dict(condition=f"{name}_3", block=block, head=head) | dict.fromkeys(records.RESPONSE_FIGURES, "") | {
                    figure: value and value + block + 0.1 * head + 0.01 * seed for figure, value in zip(
                        plot.BRANCHES, branches)}
                for name in stats.GAUSSIAN_PARTS for block in range(2) for head in range(2)])


def lines_in(*folders):
    """{data set: {label: line}} as the command would draw the folders."""
    own, _ = records.find_runs(*folders)
    reference, _ = records.find_runs(*plot.find_references(folders))
    return {dataset: {line.label: line for line in lines} for dataset, lines in plot.arrange(own, reference).items()}


def charts(*folders, dataset="mnist"):
    lines = list(lines_in(*folders)[dataset].values())
    with plot.house_style():
        return {name: figure for name, draw in plot.CHARTS.items() if (figure := draw(dataset, lines))}


def tables(*folders, dataset="mnist"):
    return stats.make_tables(dataset, list(lines_in(*folders)[dataset].values()))


def rows_of(table):
    """The rows of the first table in a Markdown text, its heading first: lists of cells."""
    rows = re.search(r"(?:^\|.*\n)+", table, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("|---")]


def cells_of(table):
    """{first cell: {heading: cell}}."""
    columns, *rows = rows_of(table)
    return {row[0]: dict(zip(columns, row)) for row in rows}


def drawn(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def interval(marks):
    """The mean and the ends of the one interval of an error bar, as x or y, whichever it is along."""
    (segment,), mean = marks.lines[2][0].get_segments(), marks.lines[0].get_xydata()[0]
    axis = 0 if segment[0, 0] != segment[1, 0] else 1
    return [mean[axis], *segment[:, axis]]


# Which runs are drawn, and as which lines.

def test_folders_named(tmp_path):
    """Each folder named is drawn with its reference, muted and none twice, and no other folder is looked into; lines of
    several folders are told apart by them. Of a data set without a run of one's own the reference is drawn in full."""
    for folder in ("a", "b", "a/reference", "a/other/deeper"):
        record(tmp_path / folder)
    record(tmp_path / "a/reference", dataset="kmnist")

    def labels(*names):
        return {line.label: line.front for line in lines_in(*(tmp_path / name for name in names))["mnist"].values()}

    assert labels("a") == {"vit": True, "vit (reference)": False}
    own, behind = (line.style for line in lines_in(tmp_path / "a")["mnist"].values())
    assert (own["color"], own["marker"]) == (behind["color"], behind["marker"])
    assert all(own[name] > behind[name] for name in ("linewidth", "alpha", "zorder"))
    assert labels("a/reference") == {"vit": True}
    assert labels("a", "a/reference") == {"vit": True, "vit (reference)": True}
    assert labels("a", "b") == {"vit (a)": True, "vit (b)": True, "vit (a/reference)": False}
    record(tmp_path / "a/reference", epochs=3, folder="short")
    assert labels("a") == {
        "vit, epochs 20": True, "vit, epochs 20 (reference)": False, "vit, epochs 3 (reference)": False}
    assert lines_in(tmp_path / "a")["kmnist"]["vit"].front and lines_in(tmp_path) == {}
    for folder in ("c#1", "c@1"):  # whose names charts cannot have
        record(tmp_path / folder)
    assert labels("c#1", "c@1") == {"vit (c?1)": True, "vit (c?1) 2": True}


def test_seeds_alone_share_a_line(tmp_path):
    """Runs of other settings are other lines, named after what differs between lines of a model; facts split none, nor
    does a setting that was left out instead of null."""
    record(tmp_path, "vit", 0)
    folder = record(tmp_path, "vit", 1)
    config = json.loads((folder / "config.json").read_text())
    del config["settings"]["plugin"]
    (folder / "config.json").write_text(json.dumps(config | dict(facts=dict(compiled=True, stack=[1, 2]))))
    record(tmp_path, "vitbalanced", dim=48)  # its own width goes without saying
    record(tmp_path, "vitdiff", 10, lr=0.1)  # no vit has this rate
    record(tmp_path, "vitdiff", 2, lr=0.1)
    record(tmp_path, "vitcosine", patch_size=4)  # nor these patches, which change no number of parameters
    lines = lines_in(tmp_path)["mnist"]
    assert {label: [run.settings["seed"] for run in line.runs] for label, line in lines.items()} == {
        "vit": [0, 1], "vitbalanced": [0], "vitcosine, patch_size 4": [0], "vitdiff, lr 0.1": [2, 10]}
    record(tmp_path, "vit", 0, epochs=3, folder="short")
    record(tmp_path, "vitdiff", 0, lr=0.1, dim=48, folder="wide")
    assert list(lines_in(tmp_path)["mnist"]) == [
        "vit, epochs 20", "vit, epochs 3", "vitbalanced", "vitcosine, patch_size 4",
        "vitdiff, dim 32, lr 0.1", "vitdiff, dim 48, lr 0.1"]


@pytest.mark.parametrize("models, rates", [(60, 1), (6, 10)])
def test_no_two_lines_share_a_style(tmp_path, models, rates):
    """However many lines a chart has, and a reference behind them, each has a style of its own, and a model of the
    project the same colour whatever it is shown with, which no other model has."""
    names = ["vit", "vitdiff", *(f"model{i}" for i in range(models - 2))]
    for root in (tmp_path, tmp_path / "reference"):
        for model, rate in itertools.product(names, range(rates)):
            record(root, model, epochs=2, lr=0.001 * (rate + 1), folder=f"{model}-{rate}")
    lines = lines_in(tmp_path)["mnist"].values()
    assert len(lines) == len({str(line.style) for line in lines}) == 120
    colors = {model: {line.style["color"] for line in lines if line.model == model} for model in names}
    assert all(colors[model] == {plot.COLORS[model]} for model in ("vit", "vitdiff"))
    assert not set(plot.COLORS.values()) & set.union(*(colors[model] for model in names[2:]))


# Curves.

def test_mean_and_band(tmp_path):
    """A drawn line is the mean of the records after a quarter of the epochs, its band the 95% interval, and its end is
    named; the panels of lambda share one scale. Nothing of another recipe stands beside them."""
    for seed, values in enumerate([[5.0, 0.9, 0.7, 0.6], [4.0, 0.8, 0.7, 0.5]]):
        record(tmp_path, "vit", seed, epochs=4, values=values, accuracy=0.98 - 0.01 * seed)
    record(tmp_path, "vitdiff", 0, epochs=4, values=[3, 0.7, 0.6, 0.55], lambdas=[0.2, 0.35], parameters=37_290)
    figures = charts(tmp_path)
    (axes,) = figures["val-loss"].axes
    lines, (band,) = drawn(axes), axes.collections
    assert lines["vit (2 seeds)"].get_xdata().tolist() == [2, 3, 4]
    assert lines["vit (2 seeds)"].get_ydata() == pytest.approx([0.85, 0.7, 0.55])
    assert lines["vitdiff (1 seed)"].get_ydata() == pytest.approx([0.7, 0.6, 0.55])
    half = 12.7062 * 0.05  # Student's t, 1 degree of freedom, of two values 0.1 apart
    assert {round(y, 4) for y in band.get_paths()[0].vertices[:, 1]} >= {
        round(0.85 - half, 4), round(0.85 + half, 4), round(0.55 + half, 4), 0.7}
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        "vit (2 seeds) 0.550", "vitdiff (1 seed) 0.550"]
    panels = figures["lambda"].axes
    assert [drawn(axes)["vitdiff"].get_ydata().tolist() for axes in panels] == [[0.2] * 4, [0.35] * 4]
    assert panels[0].get_ylim() == panels[1].get_ylim() == (pytest.approx(0.2 - 0.0075), pytest.approx(0.35 + 0.0075))
    assert all(set(drawn(axes)) == {"vitdiff"} and axes.get_xlim() == pytest.approx((0.91, 4.09)) for axes in panels)
    (axes,) = figures["parameters"].axes
    assert interval(axes.containers[0]) == pytest.approx([0.975, 0.975 - half / 10, 0.975 + half / 10], abs=1e-5)
    assert len(axes.containers) == 2 and axes.containers[1].lines[2] == ()  # of one seed there is no interval


def test_maps_of_other_images(tmp_path):
    """Maps stand below the images that they are of: those of other images, as of other canvases, are left out."""
    for model in ("vit", "vitdiff"):
        folder = analyse(record(tmp_path, model), {"blur": [0.9] * 5})
        if model == "vitdiff":
            with numpy.load(folder / "attention.npz") as arrays:
                records.write_arrays(folder / "attention.npz", {**arrays, "images": arrays["images"] + 1})
    texts = {text.get_text() for text in charts(tmp_path)["maps"].axes[0].texts}
    assert "vit" in texts and "vitdiff" not in texts


def test_labels_do_not_overlap(tmp_path):
    """No text of a chart stands on another or outside the figure, however many lines end within a hair's breadth."""
    for i in range(15):
        model, values = f"vitofalongername{i}" if i else "vit", [0.9 - 0.018 * j + 0.0001 * i for j in range(20)]
        record_parts(tmp_path, model, [20, 10, 5, 6 + i], (0.4, 0.5, 0.1), 1, values=values, lambdas=(0.5, 0.6))
    figures = charts(tmp_path)
    assert figures.keys() == plot.CHARTS.keys()
    for name, figure in figures.items():
        figure.draw_without_rendering()
        texts = [*figure.texts, *itertools.chain(*(legend.get_texts() for legend in figure.legends)),
                 *itertools.chain(*((*axes.texts, axes.title) for axes in figure.axes))]
        axes_of = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axes.axison]
        boxes = [*(Text.get_window_extent(text) for text in texts if text.get_text()),
                 *filter(None, (axis.get_tightbbox() for axis in axes_of))]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), name
        assert all(0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
                   for box in boxes), name


# Tables and statistics.

def test_result_table(tmp_path):
    """The table has means, 95% intervals, none for one seed, the best of a column bold, and what is published where
    model, data set and number of parameters are the same."""
    for seed, loss in enumerate([0.50, 0.52, 0.54]):
        record(tmp_path, "vit", seed, epochs=1, values=[loss], accuracy=[0.980, 0.981, 0.982][seed])
    record(tmp_path, "vitdiff", 0, epochs=1, values=[0.51], parameters=37_290)
    half = f"{4.303 * 0.02 / math.sqrt(3):.4f}"  # Student's t with 2 degrees of freedom; the deviation of the losses
    assert rows_of(tables(tmp_path)["table"]) == [
        ["model", "parameters", "seeds", "validation loss", "test loss", "test accuracy", "published"],
        ["vit", "33,034", "3", f"0.5200 ± {half}", f"0.5100 ± {half}", "**98.10%** ± 0.25%", "0.638, 0.626, 95.51%"],
        ["vitdiff", "37,290", "1", "**0.5100**", "**0.5000**", "98.00%", "0.624, 0.618, 95.75%"]]
    assert list(tables(tmp_path)) == ["table"]  # of a single pair nothing more can be said
    record(tmp_path, "vitbalanced", epochs=1)
    assert cells_of(tables(tmp_path)["table"])["vitbalanced"]["published"] == ""
    record(tmp_path, "vit", dataset="kmnist")
    assert "published" not in tables(tmp_path, dataset="kmnist")["table"]


def test_intervals():
    """Quantiles of t are those of the tables. Of samples of normal values 95% of the intervals hold the mean, and a
    true difference as large as the detectable one is shown in 80% by p after Holm's correction."""
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}
    assert {freedom: round(stats.t_quantile(freedom), 4) for freedom in known} == known
    assert stats.half_interval([1.0]) is None and stats.half_interval([1.0, math.nan]) is None
    for size in (3, 5, 10, 20):
        samples = numpy.random.default_rng(size).normal(size=(20_000, size))
        halves = stats.t_quantile(size - 1) * samples.std(1, ddof=1) / math.sqrt(size)
        assert stats.half_interval(samples[0].tolist()) == pytest.approx(halves[0])
        assert numpy.mean(abs(samples.mean(1)) < halves) == pytest.approx(0.95, abs=0.007)
        if size > 5:  # with 5 seeds p is 1/16 at least
            shown = [3 * stats.sign_flip_p(sample.tolist()) < 0.05
                     for sample in samples[:1_000] + stats.detectable_effect(size, 3)]
            assert statistics.fmean(shown) == pytest.approx(0.8, abs=0.04)
    shown = [103 * stats.sign_flip_p(sample.tolist()) < 0.05
             for sample in samples[:1_000] + stats.detectable_effect(size, 103)]
    assert statistics.fmean(shown) == pytest.approx(0.8, abs=0.06)
    assert stats.detectable_effect(5, 1) == stats.detectable_effect(6, 2) == math.inf


def test_p_values():
    """p is the share of all choices of signs whose sum is as far from 0; of more than 40 values, of those drawn. That
    of Student's t is 5% where the interval ends at 0. By Holm's correction the smallest p is multiplied by the number
    of tests, the next by one less, and none is less than one before."""
    assert stats.sign_flip_p([0.1] * 5) == 2 / 32  # rounding does not keep a sum from reaching itself
    assert stats.sign_flip_p([0.1] * 24) == 2 / 2**24 and 0 < stats.sign_flip_p([0.1] * 44) < 1e-9
    for values in ([1.0, 2.0, -4.0], [0.0, 0.0], [0.3], numpy.random.default_rng(8).normal(0.2, 1, 8).tolist()):
        sums = [abs(sum(sign * value for sign, value in zip(signs, values)))
                for signs in itertools.product([-1, 1], repeat=len(values))]
        assert stats.sign_flip_p(values) == statistics.fmean(found >= abs(sum(values)) - 1e-12 for found in sums)
    mean = 4.3027 / math.sqrt(3)  # of three values whose deviation is 1
    assert stats.student_p([mean - 1, mean, mean + 1]) == pytest.approx(0.05, abs=1e-5)
    assert stats.student_p([0.0, 0.0]) == 1 and stats.student_p([0.5, 0.5]) == 1e-15
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_comparison_with_vit(tmp_path):
    """A model is compared with `vit` of the same seed and recipe, whatever its size and precision, with Holm's p."""
    for seed, (vit, diff) in enumerate([(0.980, 0.981), (0.970, 0.973), (0.960, 0.964)]):
        record(tmp_path, "vit", seed, accuracy=vit)
        record(tmp_path, "vitdiff", seed, accuracy=diff)
        record(tmp_path, "vitwide", seed, accuracy=vit, dim=48, amp="bfloat16")
        record(tmp_path, "vitshort", seed, epochs=3)  # there is no vit of 3 epochs
    record(tmp_path, "vitdiff", 3, accuracy=0.1)  # has no partner
    record(tmp_path, "vitbalanced", 0)  # nor has a single pair an interval
    rows = {label: cells for label, *cells in rows_of(tables(tmp_path)["paired-table"])[1:]}
    assert set(rows) == {"vitdiff", "vitwide, amp bfloat16"}
    mean, half = 0.8 / 3, 4.3027 * statistics.stdev([0.1, 0.3, 0.4]) / math.sqrt(3)
    assert rows["vitdiff"][:5] == [
        f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", "3 of 3", "0.25", "0.0942", "0.5"]
    assert rows["vitwide, amp bfloat16"][:5] == ["+0.00 (+0.00 to +0.00)", "0 of 3", "1", "1", "1"]
    assert cells_of(tables(tmp_path)["table"])["vitdiff"]["p (Holm)"] == "0.5"


def test_nearest_baseline(tmp_path):
    """`vit` of one's own folder serves before the reference's, seed by seed, but never one of another size beside it;
    the size most alike that makes two pairs serves. The reference is compared with itself."""
    for root, model, dims, seeds in [("reference", "vit", [32], 3), ("reference", "vitwide", [64], 2),
                                     ("", "vitcosine", [32, 48, 64], 3), ("", "vit", [32, 48], 2),
                                     ("", "vit", [64], 1)]:
        for dim, seed in itertools.product(dims, range(seeds)):
            record(tmp_path / root, model, seed, dim=dim, folder=f"{model}-{dim}-{seed}")
    lines = lines_in(tmp_path)["mnist"]
    shared = ["vit-32-0", "vit-32-1", "reference/vit-32-2"]
    for name, expected in [("vitcosine, dim 32", shared), ("vitcosine, dim 48", ["vit-48-0", "vit-48-1"]),
                           ("vitcosine, dim 64", shared),
                           ("vitwide", ["reference/vit-32-0", "reference/vit-32-1"])]:
        pairs = stats.pair_with_baseline(lines[name], list(lines.values()))
        assert [str(other.folder.relative_to(tmp_path)) for _, other in pairs] == expected


# Analyses.

def record_analyses(root):
    """Two seeds of `vit` and one of `vitdiff` with made-up analyses, and a run without."""
    for seed in range(2):
        analyse(record(root, "vit", seed, accuracy=0.98 + 0.001 * seed),
                dict(blur=[0.9, 0.8, 0.7, 0.6, 0.5 - 0.1 * seed], shot_noise=[0.6] * 5), share=0.2 + 0.02 * seed)
    analyse(record(root, "vitdiff", 0), dict(blur=[0.9, 0.9, 0.8, 0.8, 0.6], shot_noise=[0.4] * 5), share=0.1,
            negative=0.25, weight=0.2)
    record(root, "vitdiffv2", 0)


def test_charts_of_an_analysis(tmp_path):
    """They show the figures of noise.csv and attention.csv, with intervals where there are seeds. Each head has a map
    of its own, all of a figure on one scale, in the order of the patches, with an outline."""
    record_analyses(tmp_path)
    figures = charts(tmp_path)
    panels = {axes.get_title(): axes for axes in figures["noise"].axes}
    assert set(panels) == {"Blur", "Shot noise"} and panels["Blur"].get_ylim()[0] == 0
    lines, (band,) = drawn(panels["Blur"]), panels["Blur"].collections
    assert lines["vit (2 seeds)"].get_ydata() == pytest.approx([0.0195, 0.1, 0.2, 0.3, 0.4, 0.55])  # 0: clean
    assert lines["vitdiff (1 seed)"].get_ydata() == pytest.approx([0.02, 0.1, 0.1, 0.2, 0.2, 0.4])
    assert max(band.get_paths()[0].vertices[:, 1]) == pytest.approx(0.55 + 12.7062 * 0.05, abs=1e-5)
    for block, axes in enumerate(figures["relevance"].axes):
        vit, vitdiff = axes.containers
        assert vit.lines[0].get_ydata() == pytest.approx([0.22 + 0.1 * block, 0.27 + 0.1 * block])
        assert vitdiff.lines[0].get_ydata() == pytest.approx([0.11 + 0.1 * block, 0.16 + 0.1 * block])
        ends = vit.lines[2][0].get_segments()[0][:, 1]
        assert ends[1] - ends[0] == pytest.approx(2 * 12.706 * 0.01, rel=1e-4) and vitdiff.lines[2] == ()
    panels = figures["blocks"].axes
    assert [found.lines[0].get_ydata().tolist() for found in panels[2].containers] == [[0, 0], [0.25, 0.25]]
    assert [axes.containers[0].lines[0].get_ydata().tolist() for axes in panels[4:]] == [[0.2, 0.2], [0.5, 0.5]]
    axes = figures["maps"].axes[0]
    shown = [image for image in axes.images if image.get_cmap().name == "RdBu_r"]
    assert len(shown) == 2 * 4 * 2  # lines, images, heads
    assert {(round(low, 3), round(high, 3)) for low, high in map(AxesImage.get_clim, shown)} == {(-0.6, 0.6)}
    assert [image.get_array()[0, 0] for image in shown] == pytest.approx([0.1] * 8 + [0.2] * 8, rel=1e-3)
    negative = [(i, *map(int, place)) for i, image in enumerate(shown)
                for place in numpy.argwhere(image.get_array() < 0)]
    assert negative == [(0, 1, 1), (8, 1, 1)]  # of the first head of the first image
    left, _, _, top = shown[0].get_extent()
    squares = [path.vertices.mean(0) - (left, top) for found in axes.collections if isinstance(found, ContourSet)
               for path in found.get_paths()]
    assert len(squares) == 16 and squares[0] == pytest.approx([0.75, 0.25], abs=0.03)  # the image's, upper right


def test_tables_of_an_analysis(tmp_path):
    """They have means with intervals and ratios to `vit` of the same seeds, and the seed-paired difference."""
    record_analyses(tmp_path)
    written = tables(tmp_path)
    rows = cells_of(written["noise-table"])
    half = 12.706 * 0.01 / math.sqrt(2) / math.sqrt(2)  # of the mean errors 0.35 and 0.36
    assert list(rows["vit"].values()) == ["vit", "2", "31.0% (1.00)", "40.0% (1.00)", f"35.5% ± {half:.1%} (1.00)"]
    assert list(rows["vitdiff"].values()) == [  # vit of seed 0 has errors of 30%, 40%, 35%
        "vitdiff", "1", f"20.0% ({2 / 3:.2f})", "60.0% (1.50)", f"40.0% ({0.4 / 0.35:.2f})"]
    rows = cells_of(written["attention-table"])
    assert list(rows["vit"].values())[1:] == ["2", "32.0% ± 12.7% (2.50)", "37.0% ± 12.7% (2.50)"]
    analyse(record(tmp_path, "vitdiff", 1), dict(blur=[0.9, 0.9, 0.8, 0.8, 0.6], shot_noise=[0.4] * 5), share=0.16)
    row = rows_of(tables(tmp_path)["attention-table"].split("## ")[2])[1]
    half = 12.7062 * 2  # the differences are -10 and -6
    assert row[:3] == ["vitdiff", f"-8.00 ({-8 - half:+.2f} to {-8 + half:+.2f})", "2 of 2"]


@pytest.mark.parametrize("seeds, bold", [(7, False), (8, True)])
def test_tables_of_the_parts(tmp_path, seeds, bold):
    """Noise, its shift alone and its fluctuation alone have tables of errors and of differences, by severity, too,
    apart from plain corruptions. A cell is bold where p is below 0.05 by Holm for all."""
    record_parts(tmp_path, "vit", [20, 10, 5, 6], (0.4, "", 0.4), seeds)
    record_parts(tmp_path, "vitdiff", [12, 4, 4.9, 9], (0.6, 0.5, 0.1), seeds)
    written = tables(tmp_path)
    assert list(cells_of(written["noise-table"])["vit"]) == ["model", "seeds", "gaussian noise", "mean"]
    errors, paired, each, severities, differences = map(rows_of, written["shift-table"].split("## ")[1:])
    assert errors[0][2:] == list(map(stats.readable, PARTS))
    assert errors[1][1:] == [str(seeds), *(f"{value}.00% ± 0.00%" for value in (22, 12, 7, 8))]
    extra, half = 2 / seeds, stats.t_quantile(seeds - 1) * 2 / seeds  # of seed 0 alone, so that it is the mean's error
    cells = {shift: stats.difference_cell(shift + extra, half) for shift in (-8, -6, -0.1, 3)}
    p, p_t = 2 / 2**seeds, stats.student_p([-4.0] + [-6.0] * (seeds - 1))
    detectable = stats.detectable_effect(seeds, 1) * 2 / math.sqrt(seeds)
    row = [cells[-6], f"{seeds} of {seeds}", f"{p:.3g}", f"{p_t:.3g}", f"{p:.3g}", f"{detectable:.2f}"]
    assert paired[1][7:13] == row
    assert each[1][1:] == [f"**{cell}**" if bold and shift != -0.1 else cell for shift, cell in cells.items()]
    assert severities[3] == ["gaussian noise shift", "vit", *(f"{10 + i}.00% ± 0.00%" for i in range(5))]
    assert differences[1:] == [[name, "vitdiff", *[cell] * 5]
                               for name, cell in zip(map(stats.readable, PARTS[:3]), cells.values())]


def test_charts_of_the_parts(tmp_path):
    """Errors stand in rows from 0, below the family that the records show, the largest of a family first: a model whose
    maps have negative weights subtracts. The response of each branch stands above and below that of both, which
    self-attention has alone; both with intervals."""
    for model, errors, branches, lambdas in [
            ("vit", [20, 10, 5, 6], (0.4, "", 0.4), ()), ("vitcosine", [30, 9, 5, 6], (0.3, "", 0.3), ()),
            ("vitdiff", [12, 4, 5, 9], (0.6, 0.5, 0.1), (0.5,)), ("vitsum", [19, 9, 5, 9], (0.6, 0.5, 0.7), (0.5,)),
            ("vitcentered", [13, 4, 5, 9], (0.6, 0.5, 0.1), (0.5,))]:
        record_parts(tmp_path, model, errors, branches, 2, lambdas=lambdas)
    figures = charts(tmp_path)
    def found(axes, model):
        """{how far below its row: [mean, ends]}"""
        place = rows.index(model)
        heights = [(marks.lines[0].get_ydata()[0] - place, marks) for marks in axes.containers]
        return {round(below, 1): interval(marks) for below, marks in heights if abs(below) < 0.5}

    rows = [label.get_text() for label in figures["shift"].axes[0].get_yticklabels()]
    assert rows == ["Self-attention", "vitcosine", "vit", "Subtracting", "vitcentered", "vitdiff",
                    "Adding in place of subtracting", "vitsum"] and figures["shift"].axes[0].get_xlim()[0] == 0
    for axes, mean in zip(figures["shift"].axes, (0.15, 0.07, 0.08), strict=True):
        assert found(axes, "vitdiff") == {0: pytest.approx([mean, mean - 0.127062, mean + 0.127062], abs=1e-5)}
    rows = [label.get_text() for label in figures["response"].axes[0].get_yticklabels()]
    assert len(found(figures["response"].axes[1], "vit")) == 1
    assert found(figures["response"].axes[1], "vitdiff") == {  # block 1, mean of two heads and two seeds
        below: pytest.approx([mean, mean - 0.063531, mean + 0.063531], abs=1e-5)
        for below, mean in [(-0.3, 1.655), (0.3, 1.555), (0, 1.155)]}
    row = rows_of(tables(tmp_path)["response-table"].split("## ")[2])[7]
    assert row == ["vitdiff", "gaussian noise shift, severity 3", *(
        f"{mean} ± 0.064" for mean in ("1.655", "1.555", "1.155")), *[""] * 5]


def test_flags(tmp_path, monkeypatch, capsys):
    """--seed and --dataset show the runs named alone, of the reference too, and --no-reference none of these. A pair
    that cannot be compared is said."""
    monkeypatch.setattr(plot, "CHARTS", {})
    record(tmp_path, dataset="kmnist")
    assert plot.main([str(tmp_path), "--dataset", "kmnist", "mnist"]) == 0
    assert [path.name for path in tmp_path.glob("*.md")] == ["kmnist-table.md"]
    for seed in range(2):
        record(tmp_path, "vitdiff", seed)
        record(tmp_path / "reference", "vit", seed)
    for flags, rows in [(["--seed", "1"], [["vitdiff", "1"], ["vit", "1"]]), (["--no-reference"], [["vitdiff", "2"]])]:
        assert plot.main([str(tmp_path), *flags]) == 0
        assert [row[:3:2] for row in rows_of((tmp_path / "mnist-table.md").read_text())[1:]] == rows
    record(tmp_path, "vitdiffv2")
    assert plot.main([str(tmp_path), "--compare", "vitdiff", "vit", "--compare", "vitdiffv2", "vit"]) == 0
    assert capsys.readouterr().err == "not compared: vitdiffv2 and vit, which share no two seeds of one recipe\n"


def test_compare(tmp_path, monkeypatch):
    """--compare pairs models by seed in one file: in accuracy, then in the error under both parts of Gaussian noise,
    where there is noise on record, each p corrected by the number of rows of its table."""
    monkeypatch.setattr(plot, "CHARTS", {})
    for dataset, less in [("mnist", 3), ("fashionmnist", 5)]:
        for model, errors in [("vit", [20, 12, 10]), ("vitdiff", [8, 12 - less, 3]), ("vitdiffv2", [6, 12, 3])]:
            record_parts(tmp_path, model, errors, seeds=7, dataset=dataset, accuracy=0.9 + 0.01 * len(model))
    for model, seed in itertools.product(("vit", "vitdiff"), range(2)):
        record(tmp_path, model, seed, dataset="clutteredmnist")
    pairs = ["vitdiff", "vit"], ["vitdiffv2", "vitdiff"]
    assert plot.main([str(tmp_path), *itertools.chain(*(["--compare", *pair] for pair in pairs))]) == 0
    accuracy, error = (tmp_path / "comparisons.md").read_text().split("## ")[1:]
    names = [[name, " - ".join(pair)] for name in ("Fashion-MNIST", "MNIST") for pair in pairs]
    assert [row[:2] for row in rows_of(accuracy)[1:]] == [["cluttered MNIST", "vitdiff - vit"], *names]
    assert rows_of(accuracy)[2][2:7] == ["+4.00 (+4.00 to +4.00)", "7 of 7", "0.0156", "1e-15", "0.0781"]  # 5 p
    extra, half = 2 / 7, stats.t_quantile(6) * 2 / 7  # of seed 0 alone, so that it is the mean's error
    rows, cells = rows_of(error)[1:], {mean: stats.difference_cell(mean + extra, half) for mean in (-3, -5, -7)}
    assert [row[:3] for row in rows] == [[*name, part] for name in names for part in ("shift", "fluctuation")]
    same = "+0.00 (+0.00 to +0.00)"
    assert [row[3] for row in rows] == [cells[-5], cells[-7], "+5.00 (+5.00 to +5.00)", same,
                                        cells[-3], cells[-7], "+3.00 (+3.00 to +3.00)", same]
    assert [row[7] for row in rows] == 2 * ["0.125", "0.125", "0.125", "1"]  # 8 times 2 / 2^7
    assert "rows compared, 5. With 2 and 7 seeds" in accuracy and "rows compared, 8. With 7 seeds" in error


@pytest.mark.parametrize("names", [stats.GAUSSIAN_PARTS, ["image_offset"], ["blur"]])
def test_some_corruptions_alone(tmp_path, monkeypatch, names):
    """Tables are made of what runs have met, be it parts of a noise without the noise, or an offset alone."""
    monkeypatch.setattr(plot, "CHARTS", {})
    for model, error in (("vit", 0.4), ("vitdiff", 0.3)):
        for seed in range(2):
            analyse(record(tmp_path, model, seed), {name: [1 - error] * 5 for name in names})
    assert plot.main([str(tmp_path)]) == 0
    written = {table for table in ("noise", "shift") if (tmp_path / f"mnist-{table}-table.md").exists()}
    assert written == ({"noise"} if names == ["blur"] else {"shift"} if len(names) == 2 else set())
    for table in written:
        assert "30.0" in (tmp_path / f"mnist-{table}-table.md").read_text()


def test_amounts_never_mix(tmp_path, monkeypatch, capsys):
    """Figures under corruptions of other amounts than the first run's are left out, and that is said; attention on
    clean images and on canvases as in training stays."""
    monkeypatch.setattr(plot, "CHARTS", {})
    for model, amount in [("vit", 0.1), ("vitother", 0.2)]:
        analyse(record(tmp_path, model), dict(blur=[0.9] * 5), amount=amount,
                conditions=("clean", "4_distractors", "gaussian_noise_3"))
    assert plot.main([str(tmp_path)]) == 0
    assert "left out: what 1 runs did under noise" in capsys.readouterr().err
    assert list(cells_of((tmp_path / "mnist-noise-table.md").read_text())) == ["vit"]
    cells = cells_of((tmp_path / "mnist-attention-table.md").read_text())["vitother"]
    assert list(cells.values())[2:] == ["31.0% (2.50)", "36.0% (2.50)", ""]


def test_unlike_analyses(tmp_path):
    """Runs of other depths, conditions and corruptions are drawn side by side, and a cell without a figure is empty;
    where no corruption was met by all runs there is no chart of noise, and all else is drawn."""
    record_analyses(tmp_path)
    analyse(record(tmp_path, "vit", 0, depth=3, distractors=6, folder="other"), dict(blur=[0.9] * 5), share=0.5,
            conditions=("6_distractors", "gaussian_noise_3"), blocks=3)
    figures = charts(tmp_path)
    assert len(figures["noise"].axes) == 1 and len(figures["relevance"].axes) == 3
    assert list(cells_of(tables(tmp_path)["noise-table"])["vitdiff"]) == ["model", "seeds", "blur", "mean"]
    rows = cells_of(tables(tmp_path)["attention-table"])
    assert list(rows["vit, depth 3, distractors 6"].values())[1:] == ["1", "", "76.0% (2.50)", "71.0% (2.50)"]
    assert list(rows["vitdiff"].values())[2:] == ["21.0% (2.50)", "26.0% (2.50)", ""]
    analyse(record(tmp_path, "vitnew"), {"occlusion": [0.9] * 5})
    assert "noise" not in charts(tmp_path) and set(tables(tmp_path)) == {"table", "attention-table"}


def test_photographs(tmp_path):
    """Where hardly a patch is black, as in photographs, no outline is drawn and there is no relevance to show."""
    analyse(record(tmp_path), {"blur": [0.9] * 5}, uniform=0.0004)
    figures = charts(tmp_path)
    assert "relevance" not in figures and "blocks" in figures and "attention-table" not in tables(tmp_path)
    assert not any(isinstance(found, ContourSet) for found in figures["maps"].axes[0].collections)


# Damage.

def figures_of(run):
    """All that is drawn or written of a run."""
    return (run.settings, run.metrics, {name: run.summary.get(name) for name in SUMMARY_FIGURES}, run.noise,
            run.amounts, run.attention, run.response, [array.tolist() for array in run.maps or []])


def test_damage(tmp_path):
    """A damaged run is named and left out, or it was read right: no other figure without a word, and no traceback."""
    for model, branches in [("vit", (0.4, "", 0.4)), ("vitdiff", (0.6, 0.5, 0.1))]:
        record_parts(tmp_path, model, [20, 10, 5, 6], branches, lambdas=(0.5, 0.6))
    for folder in tmp_path.iterdir():
        records.write_summary(folder, records.read_summary(folder))  # with checksums
    content = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}
    right = {run.folder: figures_of(run) for run in records.find_runs(tmp_path)[0]}
    chance, named = random.Random(16), 0
    for path in chance.choices(list(content), k=160):
        data, place = content[path], chance.randrange(len(content[path]))
        path.write_bytes(chance.choice([
            b"", data[:place], data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1:],
            chance.choice([content[other] for other in content if other.name == path.name and other != path])]))
        runs, skipped = records.find_runs(tmp_path)
        read = {run.folder: figures_of(run) for run in runs}
        assert right == {path.parent: right[path.parent]} | read
        if path.parent not in read:
            (line,) = skipped
            assert str(path.parent) in line and path.name in line
            named += 1
        path.write_bytes(data)
    assert named > 120


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"settings": {"model": "../vit", "dataset": "mnist", "seed": 0, "epochs": 20}, "facts": {}}'),
    ("config.json", '{"settings": {"model": "vit", "dataset": "mnist", "seed": 0, "epochs": 2000000000}, "facts": {}}'),
    ("summary.json", '{"parameters": 0, "val_loss": 0.5, "test_loss": 0.5, "test_accuracy": 0.98}'),
    ("summary.json", '{"parameters": 33034, "val_loss": NaN, "test_loss": 0.5, "test_accuracy": 0.98}'),
    ("metrics.csv", "epoch,val_loss,val_accuracy\n"),
    ("metrics.csv", "epoch,val_loss,val_accuracy\n" + "".join(f"{i},1e300,0.5\n" for i in range(1, 21))),
    ("noise.csv", "corruption,severity,test_loss,test_accuracy\nblur,1,0.5,nan\n"), ("noise.csv", b"\xff\x00"),
    ("noise.csv", "corruption,severity,amount,test_loss,test_accuracy\nblur,1,nan,0.5,0.5\n"),
    ("response.csv", "condition,block,head,noise_to_signal\nblur_3,1,0,0.5\n"),
    ("noise.csv", "corruption,severity,test_loss,test_accuracy\nblur,2,0.5,0.5\n"),
    ("attention.csv", f"condition,block,head,{','.join(records.ATTENTION_FIGURES)}\nclean,0,1,0,0,0,0,0,0,0\n"),
    ("attention.npz", b"PK\x03\x04"), ("attention.npz", b"not an archive"), *(("attention.npz", shapes) for shapes in [
        ((8, 2, 18, 18), (8, 1, 28, 28)), ((7, 2, 17, 17), (8, 1, 28, 28)), ((8, 2, 17, 17), (8, 2, 28, 28))])])
def test_damage_without_checksums(tmp_path, name, content):
    """Of a run made by hand, which has no checksums, a file of another structure is named, and the run left out."""
    record_analyses(tmp_path)
    path = tmp_path / "mnist-vit-seed1" / name
    if isinstance(content, tuple):
        records.write_arrays(path, dict(images=numpy.zeros(content[1], numpy.uint8),
                                        map_0=numpy.ones(content[0], numpy.float16)))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, (line,) = records.find_runs(tmp_path)
    assert len(runs) == 3
    assert str(path.parent) in line and (name in line or "epochs" in content)  # metrics.csv has not as many


# The command.

def test_command(tmp_path):
    """It names what it skips, needs neither torch nor data, and writes the same bytes whatever the user's matplotlibrc
    and MPLBACKEND say."""
    runs = tmp_path / "runs"
    record_analyses(runs)
    record(runs / "trial/deeper")
    record(runs / "reference", "vitbalanced")
    (record(runs, "unfinished") / "summary.json").unlink()
    (record(runs, "cut") / "metrics.csv").write_text("epoch,val_loss\n1,0.5\n")
    (runs / "holiday").mkdir()
    (tmp_path / "matplotlibrc").write_text("\n".join([
        "text.usetex: True", "image.origin: lower", "savefig.bbox: tight", "figure.constrained_layout.use: True",
        "axes.facecolor: black", "savefig.facecolor: black", "font.size: 20", "lines.marker: x", "figure.dpi: 30"]))
    code = ("import sys\nsys.modules.update(torch=None, torchvision=None, train=None, vit=None)\n"
            "import plot\nsys.exit(plot.main(sys.argv[1:]))")
    process = subprocess.run([sys.executable, "-c", code, runs, "--out", "out/new"], cwd=tmp_path, capture_output=True,
                             text=True, env=os.environ | dict(MPLBACKEND="inline", PYTHONPATH=str(HERE)))
    assert process.returncode == 0, process.stderr
    skipped = sorted(process.stderr.splitlines())
    for line, name in zip(skipped, ["holiday", "mnist-cut-seed0/metrics.csv", "mnist-unfinished-seed0"], strict=True):
        assert line.startswith("skipped ") and str(runs / name) in line
    assert process.stdout.endswith("\n3 tables and 7 charts are in out/new\n")
    assert plot.main([str(runs), "--out", str(tmp_path / "plain")]) == 0
    hostile, plain = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
                      for out in ("out/new", "plain"))
    assert hostile == plain and len(plain) == 3 + 7


def test_what_is_printed(tmp_path):
    """A table a data set with the figures of the records, in lines of at most 100 characters; with the errors under the
    parts of Gaussian noise where these are on record."""
    for model, seed in itertools.product(("vit", "vitdiff"), range(2)):
        record(tmp_path, model, seed)
    record_parts(tmp_path, "vitwith" + 5 * "averylongname", [8, 4, 3], seeds=1, dataset="kmnist")
    text = stats.overview(plot.arrange(records.find_runs(tmp_path)[0]), tmp_path).splitlines()
    cells = [re.split("  +", line) for line in text]
    assert cells[-6:-2] == [["MNIST", "seeds", "parameters", "val loss", "accuracy", "minus vit, points"],
                            ["vit", "2", "33,034", "0.5050", "98.00%"],
                            ["vitdiff", "2", "33,034", "0.5050", "98.00%", "+0.00 (+0.00 to +0.00)"], [""]]
    assert cells[0] == ["KMNIST", *cells[-6][1:], "shift", "fluctuation"] and cells[1][-2:] == ["8.0%", "7.0%"]
    assert max(map(len, text)) <= 100 and text[-1].startswith("Shift, fluctuation:")


@pytest.mark.parametrize("datasets, models", [(1, 1), (3, 14), (1, 60), (9, 6), (30, 2)])
def test_a_screen(tmp_path, datasets, models):
    """However many lines there are, 40 are printed at most, all of them where they fit; what is left out is said."""
    for dataset, model in itertools.product(range(datasets), range(models)):
        record(tmp_path, f"model{model}", dataset=f"data{dataset}", epochs=1)
    text = stats.overview(plot.arrange(records.find_runs(tmp_path)[0]), tmp_path).splitlines()
    left = sum(int(line.split()[1]) for line in text if line.startswith("... "))
    assert len(text) + 1 <= 40 and sum(line.startswith("model") for line in text) + left == datasets * models
    assert (left > 0) == (datasets * (models + 2) + 3 > 40)


def test_no_further_process(tmp_path, monkeypatch, capsys):
    """Where none can be started, or one is killed, the charts are drawn by this one."""
    def kill(dataset, lines, parent=os.getpid()):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return plot.draw_validation("loss", "{}".format, dataset, lines)

    def no_shared_memory():
        raise FileNotFoundError("/dev/shm")

    record(tmp_path)
    monkeypatch.setattr(plot, "CHARTS", {"val-loss": kill})
    for out in (tmp_path / "killed", tmp_path / "alone"):
        assert plot.main([str(tmp_path), "--out", str(out), "--format", "svg"]) == 0
        assert "1 charts" in capsys.readouterr().out
        assert xml.etree.ElementTree.parse(out / "mnist-val-loss.svg")
        monkeypatch.setattr(plot, "ProcessPoolExecutor", no_shared_memory)


@pytest.mark.parametrize("flags, said", [
    (["empty"], "no finished run"), (["nowhere"], "nowhere"), (["file"], "file"), (["x" * 300], "too long"),
    (["runs", "runs/mnist-vit-seed0"], "is a run"), (["runs", "--out", "file"], "file"),
    (["runs", "--out", "table"], "mnist-table.md"), (["runs", "--compare", "vti", "vit"], "did you mean vit?"),
    (["runs", "--compare", "vit", "vit"], "--compare: vit vit"),
    (["runs", "--compare", "vit", "vitdiff", "--compare", "vitdiff", "vit"], "compared twice"),
    (["runs", "--seed", "4"], "no finished run of these seeds"), (["runs", "--dataset", "cifar10"], "data sets"),
    (["runs", "--out", "chart"], "mnist-val-loss.png"), (["twice"], "twice/first and twice/second")])
def test_errors_of_the_user(tmp_path, monkeypatch, capsys, flags, said):
    """What the user can put right is said in one line, and the exit status is 2."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    Path("table/mnist-table.md").mkdir(parents=True)
    Path("chart/mnist-val-loss.png").mkdir(parents=True)
    for root, folder in [("runs", None), ("twice", "first"), ("twice", "second")]:
        record(Path(root), folder=folder)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(plot.main(flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot.py: error: ") and said in line
