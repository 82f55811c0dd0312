"""Charts and tables of what train.py has recorded: one's own runs, in front of the reference runs.

    python plot.py runs/

draws the finished runs that lie directly in each folder named and, thin and pale behind them, those of its `reference`
folder; for a data set of which the folder has no run of its own, the reference is the chart. Runs that differ in their
seed alone are one line, their mean. Needs neither torch nor data. Writes, for each data set, into the first folder
DATASET-table.md, -paired-table.md, -noise-table.md, -partial-noise-table.md, -attention-table.md and the charts
DATASET-val-loss.png, -val-accuracy.png, -parameters.png, -lambda.png, -noise.png, -partial-noise.png, -pixel-noise.png,
-relevance.png, -maps.png and -blocks.png; with --compare DATASET-comparisons.md, too.
"""

import argparse
import functools
import io
import itertools
import math
import os
import re
import statistics
import sys
from collections import defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter

import records
import stats
from records import UserError
from stats import BASELINE

Published = namedtuple("Published", "epochs parameters val_loss test_loss test_accuracy")
PUBLISHED = {  # from NanoDiffVision's README, one run each
    ("mnist", "vit"): Published(20, 33_802, 0.638, 0.626, 0.9551),
    ("mnist", "vitbalanced"): Published(20, 55_626, 0.633, 0.624, 0.9553),
    ("mnist", "vitdiff"): Published(20, 38_106, 0.624, 0.618, 0.9575),
    ("fashionmnist", "vit"): Published(30, 33_802, 0.813, 0.826, 0.8586),
    ("fashionmnist", "vitbalanced"): Published(30, 55_626, 0.792, 0.798, 0.8679),
    ("fashionmnist", "vitdiff"): Published(30, 38_106, 0.788, 0.796, 0.8726),
}
PIXEL_NOISES = ["gaussian_noise", "impulse_noise"]  # compared apart from the other corruptions
# Okabe and Ito's colours, for colour-blind eyes; dashes and markers, for grey print. 7 and 11 have no common divisor,
# so the first 77 models differ in colour or marker.
COLORS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h"]
DASHES = ["-", (0, (6, 2)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (3, 1)), (0, (8, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1))]
FRONT = dict(linewidth=1.7, markersize=5, alpha=1.0, zorder=3)
BEHIND = dict(linewidth=0.9, markersize=3.5, alpha=0.45, zorder=2)
BAND, INTERVAL = "mean over seeds, band: one standard deviation", "mean over seeds with its 95% interval"

DETECTABLE_NOTE = ("Detectable: the smallest true difference that so many seeds, as far apart as these, show in 80% of "
                   "experiments, by a 95% interval that leaves out 0.")
INTERVAL_NOTE = "±: half the 95% confidence interval of the mean over seeds (Student's t)."

# One line of each chart and one row of each table: the runs of all seeds of one folder and the same settings, by seed.
# settings: those of the first. front: drawn in full, as reference runs behind others are not. style: for matplotlib.
Line = namedtuple("Line", "label model folder settings runs front style", defaults=[None])


# From folders to lines.

def subfolders(folder):
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name a folder of runs") from None


def find_runs(*folders):
    """The finished runs that lie directly in the folders, and a line for each folder in them that is left out."""
    runs, skipped = [], []
    for child in itertools.chain(*map(subfolders, folders)):
        try:
            if any(os.path.exists(child / name) for name in ("config.json", "metrics.csv", "summary.json")):
                runs.append(records.read_run(child))
            elif not subfolders(child):
                skipped.append(f"{child}: not a run")
        except UserError as error:
            skipped.append(str(error))
    return runs, skipped


def find_references(folders):
    """The folders called reference in these folders, without those that are themselves among them."""
    named = {folder.resolve() for folder in folders}
    found = {path.resolve(): path for path in (folder / "reference" for folder in folders) if path.is_dir()}
    return [path for place, path in found.items() if place not in named]


def group_runs(runs, front):
    """Lines without labels and styles, of runs of one folder that differ in their seed alone."""
    groups = defaultdict(dict)
    for run in runs:
        settings = frozenset((name, str(value)) for name, value in run.settings.items()
                             if name != "seed" and value is not None)
        seeds, seed = groups[run.folder.parent, settings], run.settings["seed"]
        if seed in seeds:
            raise UserError(f"{seeds[seed].folder} and {run.folder} have the same settings and seed: move one away")
        seeds[seed] = run
    lines = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    return [Line("", runs[0].settings["model"], runs[0].folder.parent, runs[0].settings, runs, front) for runs in lines]


def settings_apart(line, rivals, baselines):
    """The settings that set a line apart, as texts: those in which it differs from a rival, a line of the same model,
    or in its recipe from every line of `vit`, with which models are compared."""
    def differs(name, other):
        return str(other.settings.get(name)) != str(line.settings.get(name))

    names = dict.fromkeys(name for other in [line, *rivals] for name in other.settings if name != "seed")
    return [f"{name} {line.settings.get(name)}" for name in names
            if any(differs(name, other) for other in rivals) or name in records.RECIPE_SETTINGS
            and baselines and all(differs(name, other) for other in baselines)]


def label_lines(lines):
    """Label each line of a chart by its model and by what sets it apart from others of that model: settings, folder."""
    parts = {line.folder: line.folder.resolve().parts for line in lines}
    shared = len(os.path.commonprefix(list(parts.values())))
    baselines = [line for line in lines if line.model == BASELINE]
    labelled = []
    for line in lines:
        namesakes = [other for other in lines if other.model == line.model and other is not line]
        rivals = [other for other in namesakes if line.front or not other.front]
        label, folder = ", ".join([line.model, *settings_apart(line, rivals, baselines)]), parts[line.folder][shared:]
        if folder and any(other.folder != line.folder for other in namesakes):
            label += f" ({'/'.join(folder)})"
        plain = re.sub(r"[^\w ,.:;/()+-]", "?", label)  # no TeX in charts, no bars in tables
        labelled.append(line._replace(label=plain))
    return sorted(labelled, key=lambda line: (not line.front, line.model, line.label))


def style_lines(lines, models):
    """Give each line of a chart the colour of its model, and a style that no other line has: of the first line of a
    model always the same, before and behind."""
    styled, taken = [], set()
    for line in lines:
        place = models.index(line.model)
        for n in itertools.count(place):
            dashes = DASHES[n] if n < len(DASHES) else (0, (n, 2, 1, 2))
            style = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[n % len(MARKERS)], linestyle=dashes)
            if (line.front, *style.values()) not in taken:
                break
        taken.add((line.front, *style.values()))
        styled.append(line._replace(style=style | (FRONT if line.front else BEHIND)))
    return styled


def arrange(own, reference=()):
    """Sort runs into lines: {data set: [Line]}, one's own first, then the reference, each by name.

    Raises:
        UserError: if two runs of one folder have the same settings and seed.
    """
    lines_of = defaultdict(list)
    for line in group_runs(own, front=True) + group_runs(reference, front=False):
        lines_of[line.settings["dataset"]].append(line)
    # The models of the reference, and those of no plugin, have the same colours whatever they are shown with.
    models = list(dict.fromkeys(run.settings["model"] for runs in (reference, own) for run in sorted(
        runs, key=lambda run: (run.settings.get("plugin") is not None, run.settings["model"]))))
    for dataset, lines in lines_of.items():
        if not any(line.front for line in lines):
            lines = [line._replace(front=True) for line in lines]
        lines_of[dataset] = style_lines(label_lines(lines), models)
    return dict(sorted(lines_of.items()))


def keep_runs(lines, condition):
    """The lines of only those runs for which the condition holds."""
    kept = [line._replace(runs=[run for run in line.runs if condition(run)]) for line in lines]
    return [line for line in kept if line.runs]


def published_of(dataset, line):
    """The published figures of a line's model, if it has as many parameters; None for any other."""
    figures = PUBLISHED.get((dataset, line.model))
    return figures if figures and abs(line.runs[0].summary["parameters"] / figures.parameters - 1) <= 0.03 else None


def published_in_front(dataset, lines):
    """[(line, its published figures)], for each model in front once."""
    found = {line.model: (line, published_of(dataset, line)) for line in reversed(lines) if line.front}
    return [(line, figures) for line, figures in reversed(found.values()) if figures]


def readable(name):
    """A corruption's or condition's name in words: 4_distractors, gaussian_noise_3 for a corruption of severity 3."""
    words = name.split("_")
    if len(words) > 1 and words[-1].isdigit():
        return f"{' '.join(words[:-1])}, severity {words[-1]}"
    return " ".join(words)


# What the analyses found.

def shared_corruptions(lines):
    """The corruptions of whole images that every run has met, and the number of severities that every run has met."""
    found = [run.noise for line in lines for run in line.runs]
    names = [name for name in (found[0] if found else [])
             if name not in records.PARTIAL_NOISE.values() and all(name in noise for noise in found)]
    return names, min((len(accuracies) for noise in found for accuracies in noise.values()), default=0)


def met_partial_noise(run):
    return run.noise and {"gaussian_noise", *records.PARTIAL_NOISE.values()} <= set(run.noise)


def noise_error(run, names, severities):
    """The mean test error under some corruptions at severities from 1."""
    return statistics.fmean(1 - accuracy for name in names for accuracy in run.noise[name][:severities])


def attention_axes(lines):
    """The conditions and the blocks of all runs: two lists."""
    found = [run.attention for line in lines for run in line.runs]
    return (list(dict.fromkeys(condition for attention in found for condition in attention)),
            sorted({block for attention in found for blocks in attention.values() for block in blocks}))


def attention_of(run, condition, block, figure):
    """A figure of a run's attention; nan where it has no such block or was not shown the condition. -1: the last."""
    blocks = run.attention.get(condition, {})
    return blocks.get(len(blocks) - 1 if block == -1 else block, {}).get(figure, math.nan)


def uniform_share(lines, condition):
    """What uniform attention would give to irrelevant patches, by any run that was shown the condition."""
    return next(run.attention[condition][0]["uniform_share"] for line in lines for run in line.runs
                if condition in run.attention)


def trained_irrelevant_share(run):
    """The irrelevant share in the last block, in percent, under the condition that is most like the run's training."""
    trained = f"{run.settings.get('distractors', 0)}_distractors"
    return 100 * attention_of(run, trained if trained in run.attention else "clean", -1, "irrelevant_share")


# Tables, in Markdown.

def make_table(heading, columns, rows, *notes):
    lines = [f"## {heading}", "", f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|",
             *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines + [text for note in notes for text in ("", note)]) + "\n"


def result_table(dataset, lines):
    """The figures of each line, the seed-paired difference of its accuracy from `vit`'s, and what is published."""
    columns = ["model", "parameters", "seeds", "validation loss", "test loss", "test accuracy"]
    rows = [[line.label, f"{line.runs[0].summary['parameters']:,}", str(len(line.runs))] for line in lines]
    for name, best, number in [("val_loss", min, "{:.4f}".format), ("test_loss", min, "{:.4f}".format),
                               ("test_accuracy", max, "{:.2%}".format)]:
        samples = [[run.summary[name] for run in line.runs] for line in lines]
        means = [number(statistics.fmean(values)) for values in samples]
        for row, values, mean in zip(rows, samples, means):
            bold = mean == best(means, key=lambda text: float(text.rstrip("%"))) and len(lines) > 1
            row.append(stats.mean_cell(values, number).replace(mean, f"**{mean}**" if bold else mean, 1))
    notes = [INTERVAL_NOTE] * any(
        len(line.runs) > 1 for line in lines)
    comparisons = stats.compare_lines(lines, lambda run: 100 * run.summary["test_accuracy"], more_is_better=True)
    if comparisons:
        columns += [f"accuracy minus `{BASELINE}`'s, points", "better in", "p (Holm)"]
        for row, line in zip(rows, lines):
            found = comparisons.get(line.label)
            difference, better, _, p_holm, _ = stats.comparison_cells(found, 2) if found else [""] * 5
            row += [difference, better, p_holm]
        notes.append(stats.comparison_note(comparisons, f"`{BASELINE}`"))
    published = [published_of(dataset, line) for line in lines]
    if any(published):
        columns.append("published")
        for row, found in zip(rows, published):
            row.append(f"{found.val_loss:.3f}, {found.test_loss:.3f}, {found.test_accuracy:.2%}" if found else "")
        notes.append("Published: validation loss, test loss and test accuracy of one run of "
                     f"{max(found.epochs for found in published if found)} epochs.")
    return make_table(dataset, columns, rows, *notes)


def paired_table(heading, lines, measures, compared=()):
    """How each line differs from `vit` of the same recipe and seed; "" where none can be compared.

    measures: {heading: (figure of a run, number of digits, whether more is better)}. compared: pairs of models to be
    compared in place of each with `vit`.
    """
    columns, rows = ["model"], defaultdict(list)
    for name, (figure_of, digits, more_is_better) in measures.items():
        comparisons = stats.compare_lines(lines, figure_of, more_is_better, compared)
        columns += [f"{name} (95% interval)", "better in", "p", "p (Holm)", "detectable"]
        for label, found in comparisons.items():
            rows[label] += stats.comparison_cells(found, digits)
    if not rows:
        return ""
    return make_table(heading, columns, ([label, *cells] for label, cells in rows.items()),
                      stats.comparison_note(comparisons, "the second model" if compared else f"`{BASELINE}`"),
                      DETECTABLE_NOTE)


def noise_tables(dataset, lines):
    """The mean over severities of each corruption's test error, its ratio to `vit`'s, and the paired difference."""
    names, severities = shared_corruptions(lines)

    def errors(run):  # of each corruption, then of all
        return [noise_error(run, part, severities) for part in [*([name] for name in names), names]]

    noises = [name for name in names if name in PIXEL_NOISES]
    parts = {"gaussian and impulse noise": noises, "other corruptions": [name for name in names if name not in noises],
             "mean of all": names} if noises else {"mean of all": names}
    rows = []
    for line in lines:
        columns, pairs = list(zip(*map(errors, line.runs))), stats.pair_with_baseline(line, lines)
        cells = [*(f"{statistics.fmean(column):.1%}" for column in columns[:-1]),
                 stats.mean_cell(columns[-1], "{:.1%}".format)]
        sums = [[sum(column) for column in zip(*map(errors, runs))] for runs in zip(*pairs)] or [[0] * len(cells)] * 2
        rows.append([line.label, str(len(line.runs)), *(
            cell + (f" ({own / base:.2f})" if base else "") for cell, own, base in zip(cells, *sums))])
    return make_table(
        f"{dataset}: mean test error over severities 1 to {severities} (ratio to that of `{BASELINE}`)",
        ["model", "seeds", *map(readable, names), "mean"], rows,
        f"{INTERVAL_NOTE} Ratios are to `{BASELINE}` of the same recipe and seeds.") + "\n" + paired_table(
            f"{dataset}: difference in the mean test error", lines,
            {f"{what}, points": (lambda run, part=part: 100 * noise_error(run, part, severities), 2, False)
             for what, part in parts.items() if part})


def partial_noise_tables(dataset, lines):
    """The mean test error under Gaussian noise on a part of the image, and the paired difference of each part."""
    _, severities = shared_corruptions(lines)
    parts = {f"{part} patches": name for part, name in records.PARTIAL_NOISE.items()}

    def error(run, name):
        return noise_error(run, [name], severities)

    rows = [[line.label, str(len(line.runs)),
             stats.mean_cell([1 - run.summary["test_accuracy"] for run in line.runs], "{:.1%}".format),
             *(stats.mean_cell([error(run, name) for run in line.runs], "{:.1%}".format)
               for name in [*parts.values(), "gaussian_noise"])] for line in lines]
    measures = {f"noise on {part}, points": (lambda run, name=name: 100 * error(run, name), 2, False)
                for part, name in parts.items()}
    relevant, irrelevant = parts.values()
    measures["irrelevant less relevant, points"] = (
        lambda run: 100 * (error(run, irrelevant) - error(run, relevant)), 2, False)
    return make_table(
        f"{dataset}: mean test error over severities 1 to {severities} of Gaussian noise on a part of the image",
        ["model", "seeds", "clean", *(f"noise on {part}" for part in parts), "noise on the whole image"], rows,
        INTERVAL_NOTE) + "\n" + paired_table(
            f"{dataset}: difference in the test error under Gaussian noise on a part of the image", lines, measures)


def comparison_tables(dataset, lines, compared):
    """The paired differences of the pairs of models in `compared`, a table for each figure."""
    noise = keep_runs(lines, lambda run: run.noise)
    names, severities = shared_corruptions(noise)
    tables = [paired_table(f"{dataset}: differences between models in accuracy", lines, {
        "test accuracy, points": (lambda run: 100 * run.summary["test_accuracy"], 2, True)}, compared)]
    if set(PIXEL_NOISES) <= set(names):
        tables.append(paired_table(f"{dataset}: differences between models in the error under noise", noise, {
            "error under gaussian and impulse noise, points": (
                lambda run: 100 * noise_error(run, PIXEL_NOISES, severities), 2, False)}, compared))
    return "\n".join(filter(None, tables))


def attention_tables(dataset, lines):
    """The share of the class token's weight on irrelevant patches in the last block, the ratio of relevant to
    irrelevant weight per patch, and the paired difference of the share."""
    conditions, _ = attention_axes(lines)
    rows = []
    for line in lines:
        rows.append([line.label, str(len(line.runs))])
        for condition in conditions:
            shares, ratios = ([attention_of(run, condition, -1, name) for run in line.runs]
                              for name in ("irrelevant_share", "signal_to_noise"))
            text = f"{stats.mean_cell(shares, '{:.1%}'.format)} ({statistics.fmean(ratios):.2f})"
            rows[-1].append("" if math.isnan(sum(shares)) else text)
    uniform = [f"{uniform_share(lines, condition):.1%} (1.00)" for condition in conditions]
    return make_table(
        f"{dataset}: share of attention on irrelevant patches in the last block (signal-to-noise ratio)",
        ["model", "seeds", *map(readable, conditions)], [*rows, ["uniform attention", "", *uniform]],
        INTERVAL_NOTE) + "\n" + paired_table(
            f"{dataset}: difference in the irrelevant share, on images as in training", lines,
            {"irrelevant share, points": (trained_irrelevant_share, 2, False)})


def make_tables(dataset, lines, compared=()):
    """{name: Markdown} of a data set."""
    noise = keep_runs(lines, lambda run: run.noise)
    partial = keep_runs(lines, met_partial_noise)
    attention = keep_runs(lines, lambda run: run.attention)
    tables = {
        "table": result_table(dataset, lines),
        "paired-table": paired_table(f"{dataset}: difference from `{BASELINE}`", lines, {
            "test accuracy, points": (lambda run: 100 * run.summary["test_accuracy"], 2, True),
            "test loss": (lambda run: run.summary["test_loss"], 4, False)}),
        "noise-table": noise_tables(dataset, noise) if shared_corruptions(noise)[0] else "",
        "partial-noise-table": partial_noise_tables(dataset, partial) if partial else "",
        "attention-table": attention_tables(dataset, attention) if attention else "",
        "comparisons": comparison_tables(dataset, lines, compared) if compared else "",
    }
    return {name: table for name, table in tables.items() if table}


# Parts of charts. All sizes are in inches, so that no layout has to be searched for.

CHARACTER, TEXT_LINE = 0.075, 0.19  # of small text


def seeds_of(line):
    return f"{line.label} ({len(line.runs)} seed{'s' if len(line.runs) > 1 else ''})"


def new_figure(title, lines, shown, rows, columns, panel, right=0.2, gap=(0.2, 0.5), **sharing):
    """A figure and its panels, an array (rows, columns), with room for a legend of the lines.

    shown: what is drawn of several seeds. panel, gap: width and height of a panel and of the space between two of them.
    right: the width of the margin for what stands beside the last panel.
    """
    notes = [shown if any(len(line.runs) > 1 for line in lines) else "one seed a model"]
    notes += ["thin and pale: the reference"] * any(not line.front for line in lines)
    title = f"{title}\n{'; '.join(notes)}".splitlines()
    width = max(0.95 + columns * (panel[0] + gap[0]) - gap[0] + right, 0.1 * max(map(len, title)))
    texts = [*map(seeds_of, lines), "uniform attention"]  # which some charts show, too
    top, bottom = 0.35 + 0.21 * len(title), 0.65 + 0.21 * math.ceil(len(texts) / legend_columns(width, texts))
    height = top + rows * (panel[1] + gap[1]) - gap[1] + bottom
    figure = Figure(figsize=(width, height))
    figure.suptitle("\n".join(title), y=1 - 0.1 / height, va="top", fontsize="medium")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing, gridspec_kw=dict(
        left=0.95 / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=gap[0] / panel[0], hspace=gap[1] / panel[1]))


def legend_columns(width, texts):
    """How many columns as wide as the longest text there is room for, or fewer, if that takes no more rows."""
    most = max(1, int(width / (0.7 + CHARACTER * max(map(len, texts)))))
    return math.ceil(len(texts) / math.ceil(len(texts) / most))


def legend_below(figure):
    handles = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", frameon=False, fontsize="small",
                  ncols=legend_columns(figure.get_figwidth(), handles))


def tidy(axes, number):
    is_percentage = number(1).endswith("%")  # ticks have as many digits as their distance needs
    axes.yaxis.set_major_formatter((lambda value, _: f"{100 * value:.6g}%") if is_percentage
                                   else ScalarFormatter(useOffset=False))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_mean(axes, places, columns, line, **options):
    """The mean of columns (one a run) over places; of several runs in front a band of one standard deviation, too.
    Returns the mean and the band's lower and upper edges, where there is none the mean as both."""
    means = [statistics.fmean(values) for values in zip(*columns)]
    axes.plot(places, means, **line.style, label=seeds_of(line), **options)
    if not line.front or len(columns) < 2:
        return means, means, means
    deviations = [statistics.stdev(values) for values in zip(*columns)]
    low, high = ([mean + sign * deviation for mean, deviation in zip(means, deviations)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=line.style["color"], alpha=0.15, linewidth=0)
    return means, low, high


def draw_intervals(axes, places, samples, line, **options):
    """At each place the mean of a sample, and its 95% interval where it is of several values."""
    halves = [stats.half_interval(values) for values in samples]
    axes.errorbar(places, list(map(statistics.fmean, samples)), None if None in halves else halves, capsize=2.5,
                  label=seeds_of(line), **line.style | options)


def side_by_side(width, lines):
    """How far from the middle each line's mark stands, so that together they take this width and none hides another."""
    return [width * ((place + 0.5) / len(lines) - 0.5) for place in range(len(lines))]


def spread(heights, gap, low, high):
    """Move heights apart, as little as may be, until neighbours are `gap` from each other and all from low to high."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks = []  # of [sum of (height - rank * gap), count]: their members stand `gap` apart around their mean
    for rank, i in enumerate(order):
        blocks.append([heights[i] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    placed = [min(max(total / count, low), high - (len(heights) - 1) * gap)
              for total, count in blocks for _ in range(count)]
    moved = [0.0] * len(heights)
    for rank, i in enumerate(order):
        moved[i] = placed[rank] + rank * gap
    return moved


# Charts of the training.

def draw_curves(title, ylabel, number, lines, panels, published=(), skip=0.0):
    """A figure of curves over epochs, panels side by side.

    panels: {column of metrics.csv: heading}. number: how a value is written. published: [(line, value)], faint marks at
    the right edge. skip: the share of the epochs that may leave the frame, so that their steepness does not flatten
    all that follows.
    """
    texts = [line.label for line in lines if line.front] + [f"{line.model}, published" for line, _ in published]
    margin = 0.4 + CHARACTER * (8 + max(map(len, texts), default=0))
    figure, axes_of = new_figure(title, lines, BAND, 1, len(panels), (5.2 if len(panels) == 1 else 3.6, max(
        3.2, TEXT_LINE * (len(texts) + 1))), right=margin, gap=(margin + 0.6, 0))
    for axes, (column, heading) in zip(axes_of[0], panels.items()):
        shown = keep_runs(lines, lambda run: column in run.metrics)
        seen = [value for _, value in published]  # the heights that the frame must hold
        last = max(len(line.runs[0].metrics[column]) for line in shown)
        ends = [(line, last, value, f"{line.model}, published", 0.65) for line, value in published]
        for line in shown:
            columns = [run.metrics[column] for run in line.runs]
            epochs = range(1, len(columns[0]) + 1)
            means, low, high = draw_mean(axes, epochs, columns, line, markevery=max(1, len(epochs) // 10))
            first_seen = min(int(skip * last), len(epochs) - 1)
            seen += low[first_seen:] + high[first_seen:]
            ends += [(line, len(means), means[-1], line.label, 1.0)] * line.front
        for line, value in published:
            axes.plot([last], [value], marker=line.style["marker"], color=line.style["color"], alpha=0.5,
                      markerfacecolor="none", markersize=8, linestyle="none")
        frame = 0.06 * (max(seen) - min(seen)) or 0.01
        axes.set_xlim(1 - max(0.02 * last, 0.1), last + max(0.02 * last, 0.1))
        axes.set_ylim(min(seen) - frame, max(seen) + frame)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlabel("epoch")
        axes.set_title(heading, fontsize="medium")
        tidy(axes, number)
        label_ends(axes, number, ends)
    axes_of[0, 0].set_ylabel(ylabel)
    legend_below(figure)
    return figure


def label_ends(axes, number, ends):
    """Write what each end, (line, epoch, value, text, opacity), is and its value right of the frame, none over another,
    with a thin line to where it belongs."""
    low, high = axes.get_ylim()
    gap = TEXT_LINE * (high - low) / (axes.get_position().height * axes.figure.get_figheight())
    heights = spread([end[2] for end in ends], gap, low + gap / 2, high - gap / 2)
    for (line, epoch, value, text, alpha), height in zip(ends, heights):
        axes.annotate(f"{text} {number(value)}", xy=(epoch, value), xytext=(1.03, height), fontsize="small",
                      textcoords=axes.get_yaxis_transform(), color=line.style["color"], alpha=alpha, va="center",
                      annotation_clip=False, arrowprops=dict(arrowstyle="-", color=line.style["color"], shrinkA=0,
                                                             alpha=0.4 * alpha, linewidth=0.7, relpos=(0, 0.5)))


def draw_parameters(dataset, lines):
    """Test accuracy against parameters, with 95% intervals over seeds; where figures are published, once beside them
    and once alone, closer."""
    published = published_in_front(dataset, lines)
    counts = [line.runs[0].summary["parameters"] for line in lines]
    gap = 0.025 * (max(counts) - min(counts)) or 1  # so that no interval hides another
    places = spread(counts, gap, min(counts) - len(counts) * gap, max(counts) + len(counts) * gap)
    panels = {"hollow: published, one run each": published, "the same without the published": []}
    figure, axes_of = new_figure(
        f"{dataset}: test accuracy by parameters", lines, f"{INTERVAL}; neighbours moved apart", 1,
        2 if published else 1, (4.2 if published else 5.5, 3), gap=(0.9, 0))
    for axes, (heading, beside) in zip(axes_of[0], panels.items() if published else [("", [])]):
        for line, place in zip(lines, places):
            draw_intervals(axes, [place], [[run.summary["test_accuracy"] for run in line.runs]], line, linestyle="none")
        for line, figures in beside:
            axes.plot(figures.parameters, figures.test_accuracy, linestyle="none", marker=line.style["marker"],
                      color=line.style["color"], markerfacecolor="none", markersize=8, alpha=0.7)
        axes.set_title(heading, fontsize="medium")
        axes.margins(0.12)
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        tidy(axes, "{:.2%}".format)
    axes_of[0, 0].set_ylabel("test accuracy")
    legend_below(figure)
    return figure


def draw_val_loss(dataset, lines):
    published = published_in_front(dataset, lines)
    note = f"\nhollow marks: published, one run of {published[0][1].epochs} epochs" if published else ""
    return draw_curves(f"{dataset}: validation loss{note}", "validation loss", "{:.3f}".format, lines,
                       dict(val_loss=""), [(line, figures.val_loss) for line, figures in published], skip=0.1)


def draw_val_accuracy(dataset, lines):
    return draw_curves(f"{dataset}: validation accuracy", "validation accuracy", "{:.2%}".format, lines,
                       dict(val_accuracy=""), skip=0.1)


def draw_lambda(dataset, lines):
    blocks = {int(name[7:]) for line in lines for run in line.runs for name in run.metrics
              if re.fullmatch(r"lambda_\d+", name)}
    if not blocks:
        return None
    lines = keep_runs(lines, lambda run: any(f"lambda_{block}" in run.metrics for block in blocks))
    return draw_curves(f"{dataset}: lambda, the weight of the second attention map\nmean over heads and tokens of the "
                       "validation split", "lambda", "{:.3f}".format, lines,
                       {f"lambda_{block}": f"block {block}" for block in sorted(blocks)})


# Charts of the analyses.

def draw_severities(title, lines, panels):
    """Accuracy by severity, a panel a corruption; severity 0 is the clean test split. panels: {corruption: heading}."""
    _, severities = shared_corruptions(lines)
    figure, grid = new_figure(title, lines, BAND, math.ceil(len(panels) / 3), 3, (3.3, 2.5), sharex=True, sharey=True)
    for axes, (name, heading) in zip(grid.flat, panels.items()):
        for line in lines:
            draw_mean(axes, range(severities + 1), [
                [run.summary["test_accuracy"], *run.noise[name][:severities]] for run in line.runs], line)
        axes.set_title(heading, fontsize="medium")
        tidy(axes, "{:.0%}".format)
    for axes in grid.flat[len(panels):]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy")
    for axes in grid[-1]:
        axes.set_xlabel("severity (0: clean)")
    legend_below(figure)
    return figure


def draw_noise(dataset, lines):
    lines = keep_runs(lines, lambda run: run.noise)
    names, _ = shared_corruptions(lines)
    return draw_severities(f"{dataset}: trained without corruption, tested with it", lines,
                           {name: readable(name) for name in names}) if names else None


def draw_partial_noise(dataset, lines):
    lines = keep_runs(lines, met_partial_noise)
    panels = {name: f"on {part} patches" for part, name in records.PARTIAL_NOISE.items()}
    return draw_severities(f"{dataset}: Gaussian noise on a part of the image; relevant is a patch with any of the "
                           "object", lines, panels | {"gaussian_noise": "on the whole image"}) if lines else None


def draw_pixel_noise(dataset, lines):
    """The mean error under Gaussian and impulse noise, a row a line, those with the fewest errors at the bottom."""
    lines = keep_runs(lines, lambda run: run.noise)
    names, severities = shared_corruptions(lines)
    if not set(PIXEL_NOISES) <= set(names):
        return None
    samples = [[noise_error(run, PIXEL_NOISES, severities) for run in line.runs] for line in lines]
    order = sorted(range(len(lines)), key=lambda i: statistics.fmean(samples[i]))
    margin = 0.3 + CHARACTER * 1.15 * max(len(seeds_of(line)) for line in lines)
    width, height = margin + 5.2, 1.3 + 0.28 * len(lines)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes([margin / width, 0.55 / height, 5 / width, (height - 1.2) / height])
    for place, i in enumerate(order):
        half = stats.half_interval(samples[i])
        axes.errorbar([statistics.fmean(samples[i])], [place], xerr=None if half is None else [half], capsize=2.5,
                      **lines[i].style | dict(linestyle="none", alpha=1.0))
        if lines[i].model == BASELINE:
            axes.axvline(statistics.fmean(samples[i]), color="0.6", linestyle="--", linewidth=0.9, zorder=1)
    axes.set_yticks(range(len(lines)), [seeds_of(lines[i]) for i in order], fontsize="small")
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_xlabel(f"mean test error over severities 1 to {severities}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{dataset}: Gaussian and impulse noise, unseen in training\n{INTERVAL}; dashed: {BASELINE}",
                    y=1 - 0.1 / height, va="top", fontsize="medium")
    return figure


def draw_attention(title, lines, figures):
    """Figures of the class token's row of the attention maps by condition: a row of panels a figure, a column a block.

    figures: {name in attention.csv: (its axis, how a value is written)}.
    """
    lines = keep_runs(lines, lambda run: run.attention)
    if not lines:
        return None
    conditions, blocks = attention_axes(lines)
    texts = [readable(condition).replace(", ", "\n") for condition in conditions]
    figure, panels = new_figure(f"{title}\nmean of the heads over the test split", lines, INTERVAL, len(figures),
                                len(blocks), (max(3.4, 1.1 * len(conditions)), 2.4), gap=(0.2, 0.25), sharex=True,
                                sharey="row")
    for row, (name, (ylabel, number)) in zip(panels, figures.items()):
        for axes, block in zip(row, blocks):
            for offset, line in zip(side_by_side(0.7, lines), lines):
                samples = [[attention_of(run, condition, block, name) for run in line.runs]
                           for condition in conditions]
                draw_intervals(axes, [i + offset for i in range(len(conditions))], samples, line, linestyle="none")
            if name == "irrelevant_share":
                for i, condition in enumerate(conditions):
                    axes.plot([i - 0.42, i + 0.42], [uniform_share(lines, condition)] * 2, color="0.3",
                              linestyle="--", linewidth=1.2, label="uniform attention")
                axes.set_ylim(bottom=0)  # where Student's t of few seeds goes below
            axes.set_xticks(range(len(conditions)), texts, fontsize="small")
            tidy(axes, number)
        row[0].set_ylabel(ylabel)
    for axes, block in zip(panels[0], blocks):
        axes.set_title(f"block {block}", fontsize="medium")
    legend_below(figure)
    return figure


def draw_relevance(dataset, lines):
    return draw_attention(
        f"{dataset}: absolute weight of the class token on patches without any of the object",
        lines, dict(irrelevant_share=("share of its weight", "{:.0%}".format)))


def draw_blocks(dataset, lines):
    return draw_attention(f"{dataset}: the class token's row of the attention maps", lines, {
        "entropy": ("entropy (nats)", "{:.1f}".format), "negative_share": ("negative weight", "{:.0%}".format),
        "lambda": ("1 less the row's sum:\nlambda of the class token", "{:.1f}".format)})


def draw_maps(dataset, lines):
    """Eight images, and under them the class token's map in the last block of one run a line, with the outline of its
    image: of all lines in front, and of `vit` behind them."""
    lines = [line for line in keep_runs(lines, lambda run: run.maps) if line.front or line.model == BASELINE]
    if not lines:
        return None
    figure = Figure(figsize=(11, 0.9 + 1.2 * (1 + len(lines))))
    top = 1 - 0.6 / figure.get_figheight()
    rows = figure.subplots(1 + len(lines), 1, gridspec_kw=dict(left=0.12, right=0.93, bottom=0.02, top=top,
                                                               hspace=0.06))
    images, _ = lines[0].runs[0].maps
    seeds = " and ".join(map(str, sorted({line.runs[0].settings["seed"] for line in lines})))
    draw_row(rows[0], "image", images.transpose(0, 2, 3, 1), images, cmap="gray_r", vmin=0, vmax=255)
    for axes, line in zip(rows[1:], lines):
        images, maps = line.runs[0].maps
        largest = abs(maps).max() or 1
        shown = draw_row(axes, line.label, maps, images, cmap="RdBu_r", vmin=-largest, vmax=largest)
        for place, image in enumerate(images.max(1)):
            if image.min() < 80 < image.max():
                height, width = image.shape
                axes.contour([1.06 * place + (i + 0.5) / width for i in range(width)],
                             [1 - (i + 0.5) / height for i in range(height)], image, levels=[80], colors="black",
                             linewidths=0.6)
        figure.colorbar(shown, cax=axes.inset_axes([1.01, 0.05, 0.01, 0.9])).ax.tick_params(labelsize="x-small")
    figure.suptitle(f"{dataset}: the class token's weight on each patch in the last block, mean of the heads; "
                    f"seed {seeds}\nred: positive, blue: negative, white: none; one scale a row; black: outline of the "
                    "image",
                    fontsize="medium", y=1 - 0.1 / figure.get_figheight(), va="top")
    return figure


def draw_row(axes, label, pictures, images, **options):
    """Pictures side by side, each 1 wide and 1 high."""
    for place, picture in enumerate(pictures):
        shown = axes.imshow(picture, extent=(1.06 * place, 1.06 * place + 1, 0, 1), **options)
        axes.add_patch(Rectangle((1.06 * place, 0), 1, 1, fill=False, edgecolor="0.8"))
    axes.set(xlim=(-0.01, 1.06 * len(pictures) - 0.05), ylim=(-0.01, 1.01), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label.replace(", ", "\n").replace(" (", "\n("), fontsize="small")
    return shown


# Each makes a figure of (data set, lines), or returns None where there is nothing to show.
CHARTS = {"val-loss": draw_val_loss, "val-accuracy": draw_val_accuracy, "parameters": draw_parameters,
          "lambda": draw_lambda, "noise": draw_noise, "partial-noise": draw_partial_noise,
          "pixel-noise": draw_pixel_noise, "relevance": draw_relevance, "blocks": draw_blocks,
          "maps": draw_maps}


# The command.

def write_chart(out, file_format, dataset, lines, name):
    """Write a chart, the same bytes at every call, and return its path; None where there is nothing to show."""
    options = dict(png=dict(pil_kwargs=dict(compress_level=1)), svg=dict(metadata={"Date": None}),
                   pdf=dict(metadata={"CreationDate": None}))
    path, content = out / f"{dataset}-{name}.{file_format}", io.BytesIO()
    # axes.titley: without it matplotlib searches a place for each title, a tenth of the whole time.
    with matplotlib.rc_context({"font.size": 11, "savefig.dpi": 150, "svg.hashsalt": "plot", "axes.titley": 1.0}):
        figure = CHARTS[name](dataset, lines)
        if figure is None:
            return None
        figure.savefig(content, format=file_format, facecolor="white", **options[file_format])
    records.write_whole(path, content.getvalue())
    return path


def plot(folders, out, file_format, with_reference, compared):
    for folder in folders:
        if (folder / "config.json").exists():
            raise UserError(f"{folder} is a run: name the folder that it lies in, {folder.parent}")
    own, skipped = find_runs(*dict.fromkeys(folders))
    reference, more_skipped = find_runs(*find_references(folders)) if with_reference else ([], [])
    for line in skipped + more_skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not own and not reference:
        raise UserError(f"there is no finished run in {', '.join(map(str, folders))}: train one with train.py first")
    datasets = arrange(own, reference)
    for model in itertools.chain(*compared):
        records.check_name("model", model, sorted({run.settings["model"] for run in own + reference}))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name another folder with --out") from None
    for dataset, lines in datasets.items():
        for name, table in make_tables(dataset, lines, compared).items():
            print(table)
            records.write_whole(out / f"{dataset}-{name}.md", table)
    charts = [(dataset, lines, name) for dataset, lines in datasets.items() for name in CHARTS]
    with ProcessPoolExecutor() as pool:
        for path in filter(None, pool.map(functools.partial(write_chart, out, file_format), *zip(*charts))):
            print(path)


def main(argv=None):
    """Returns the exit status: 0, or 2 where there is nothing to draw or nowhere to draw it."""
    parser = records.Parser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER",
                        help="a folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: into the first folder)")
    parser.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="default: %(default)s")
    parser.add_argument("--no-reference", dest="reference", action="store_false",
                        help="do not draw the folders' reference runs")
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("MODEL", "OTHER"),
                        help="compare two models seed by seed; given several times, p is corrected for all of them")
    args = parser.parse_args(argv)
    return records.exit_status("plot.py", plot, args.folders, args.out or args.folders[0], args.format, args.reference,
                               args.compare)


if __name__ == "__main__":
    sys.exit(main())
