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

# Okabe and Ito's colours, then a grey and five of Paul Tol's, for colour-blind eyes; dashes and markers, for grey
# print. 13 and 11 have no common divisor, so the first 143 models differ in colour or marker.
COLORS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9",
          "#882255", "#7F7F7F", "#999933", "#332288", "#44AA99", "#AA4499"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h"]
DASHES = ["-", (0, (6, 2)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (3, 1)), (0, (8, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1))]
FRONT = dict(linewidth=1.7, markersize=5, alpha=1.0, zorder=3)
BEHIND = dict(linewidth=0.9, markersize=3.5, alpha=0.45, zorder=2)
BAND, INTERVAL = "mean over seeds, band: one standard deviation", "mean over seeds with its 95% interval"

# One line of each chart and one row of each table: the runs of all seeds of one folder and the same settings, by seed.
# settings: those of the first. front: drawn in full, as reference runs behind others are not. style: for matplotlib.
Line = namedtuple("Line", "label model folder settings runs front style", defaults=[None])


# From folders to lines.

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

def published_in_front(dataset, lines):
    """[(line, its published figures)], for each model in front once."""
    found = {line.model: (line, stats.published_of(dataset, line)) for line in reversed(lines) if line.front}
    return [(line, figures) for line, figures in reversed(found.values()) if figures]


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
        shown = stats.keep_runs(lines, lambda run: column in run.metrics)
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
    lines = stats.keep_runs(lines, lambda run: any(f"lambda_{block}" in run.metrics for block in blocks))
    return draw_curves(f"{dataset}: lambda, the weight of the second attention map\nmean over heads and tokens of the "
                       "validation split", "lambda", "{:.3f}".format, lines,
                       {f"lambda_{block}": f"block {block}" for block in sorted(blocks)})


# Charts of the analyses.

def draw_severities(title, lines, panels):
    """Accuracy by severity, a panel a corruption; severity 0 is the clean test split. panels: {corruption: heading}."""
    _, severities = stats.shared_corruptions(lines)
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
    lines = stats.keep_runs(lines, lambda run: run.noise)
    names, _ = stats.shared_corruptions(lines)
    cluttered = any(line.settings.get("distractors") for line in lines)
    training = "trained with distractors, tested with other corruptions, too" if cluttered else (
        "trained without corruption, tested with it")
    return draw_severities(f"{dataset}: {training}", lines,
                           {name: stats.readable(name) for name in names}) if names else None


def draw_partial_noise(dataset, lines):
    lines = stats.keep_runs(lines, stats.met_partial_noise)
    panels = {name: f"on {part} patches" for part, name in records.PARTIAL_NOISE.items()}
    return draw_severities(f"{dataset}: Gaussian noise on a part of the image; relevant is a patch with any of the "
                           "object", lines, panels | {"gaussian_noise": "on the whole image"}) if lines else None


def draw_pixel_noise(dataset, lines):
    """The mean error under Gaussian and impulse noise, a row a line, those with the fewest errors at the bottom."""
    lines = stats.keep_runs(lines, lambda run: run.noise)
    names, severities = stats.shared_corruptions(lines)
    if not set(stats.PIXEL_NOISES) <= set(names):
        return None
    samples = [[stats.noise_error(run, stats.PIXEL_NOISES, severities) for run in line.runs] for line in lines]
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
    lines = stats.keep_runs(lines, lambda run: run.attention)
    if not lines:
        return None
    conditions, blocks = stats.attention_axes(lines)
    texts = [stats.readable(condition).replace(", ", "\n") for condition in conditions]
    figure, panels = new_figure(f"{title}\nmean of the heads over the test split", lines, INTERVAL, len(figures),
                                len(blocks), (max(3.4, 1.1 * len(conditions)), 2.4), gap=(0.2, 0.25), sharex=True,
                                sharey="row")
    for row, (name, (ylabel, number)) in zip(panels, figures.items()):
        for axes, block in zip(row, blocks):
            for offset, line in zip(side_by_side(0.7, lines), lines):
                samples = [[stats.attention_of(run, condition, block, name) for run in line.runs]
                           for condition in conditions]
                draw_intervals(axes, [i + offset for i in range(len(conditions))], samples, line, linestyle="none")
            if name == "irrelevant_share":
                for i, condition in enumerate(conditions):
                    axes.plot([i - 0.42, i + 0.42], [stats.uniform_share(lines, condition)] * 2, color="0.3",
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
    lines = [line for line in stats.keep_runs(lines, lambda run: run.maps) if line.front or line.model == BASELINE]
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


def plot(args):
    folders, out = args.folders, args.out or args.folders[0]
    for folder in folders:
        if (folder / "config.json").exists():
            raise UserError(f"{folder} is a run: name the folder that it lies in, {folder.parent}")
    own, skipped = records.find_runs(*dict.fromkeys(folders))
    reference, more_skipped = records.find_runs(*find_references(folders)) if args.reference else ([], [])
    for line in skipped + more_skipped:
        print(f"skipped {line}", file=sys.stderr)
    if args.seed:
        own, reference = ([run for run in runs if run.settings["seed"] in args.seed] for runs in (own, reference))
    if not own and not reference:
        raise UserError(f"there is no finished run {'of these seeds ' if args.seed else ''}in "
                        f"{', '.join(map(str, folders))}: train one with train.py first")
    datasets = arrange(own, reference)
    for model in itertools.chain(*args.compare):
        records.check_name("model", model, sorted({run.settings["model"] for run in own + reference}))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name another folder with --out") from None
    for dataset, lines in datasets.items():
        for name, table in stats.make_tables(dataset, lines, args.compare).items():
            print(table)
            records.write_whole(out / f"{dataset}-{name}.md", table)
    charts = [(dataset, lines, name) for dataset, lines in datasets.items() for name in CHARTS]
    with ProcessPoolExecutor() as pool:
        for path in filter(None, pool.map(functools.partial(write_chart, out, args.format), *zip(*charts))):
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
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="draw the runs of these seeds alone")
    return records.exit_status("plot.py", plot, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
