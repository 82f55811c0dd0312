"""Charts and tables of what train.py has recorded: one's own runs, in front of the reference runs.

    python plot.py runs/

draws the finished runs that lie directly in each folder named and, thin and muted behind them, those of its `reference`
folder; for a data set of which the folder has no run of its own, the reference is the chart. Runs that differ in their
seed alone are one line, their mean. Needs neither torch nor data. Prints a short table a data set, after it has written
DATASET-table.md, -paired-table.md, -noise-table.md, -shift-table.md, -response-table.md, -attention-table.md and the
charts DATASET-shift.png, -shift-by-severity.png, -response.png, -noise.png, -val-loss.png, -val-accuracy.png,
-parameters.png, -lambda.png, -relevance.png, -maps.png and -blocks.png into the first folder; with --compare
comparisons.md of all data sets, too.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # one that a notebook set may not be installed here, and matplotlib refuses that
import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, ScalarFormatter

import records
import stats
from records import UserError
from stats import BASELINE, in_print

# A model has the same colour in every chart: self-attention and its controls cool ones, differential attention warm
# ones. Of Okabe and Ito's and Paul Tol's colours, for colour-blind eyes; markers and dashes, for grey print.
COLORS = dict(
    vit="#000000", vitbalanced="#56B4E9", vitdiff="#D55E00", vitdiffpaper="#E69F00", vitdiffv2="#AA4499",
    vitheads="#0072B2", vitmatched="#44AA99", vitheadnorm="#7F7F7F", vitcentered="#332288", vitsumscaled="#66A61E",
    vitdiffnonorm="#882255", vitboth="#7B68EE", vitsum="#117733", vitdiffabs="#5B3A1E")
SPARE_COLORS = ["#009E73", "#CC79A7", "#6699CC", "#997700", "#CC6677", "#004488"]  # of models not of this project
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", (0, (6, 2)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (3, 1)), (0, (8, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1))]
FRONT = dict(linewidth=1.7, markersize=5, alpha=1.0, zorder=3)
BEHIND = dict(linewidth=0.9, markersize=3.5, alpha=0.45, zorder=2)
# What a chart is drawn with besides matplotlib's own defaults. axes.titley: without it matplotlib searches a place for
# each title, a tenth of the whole time.
STYLE = {"font.size": 10, "axes.titlesize": "medium", "axes.titley": 1.0, "axes.xmargin": 0.03, "axes.axisbelow": True,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.9", "axes.spines.top": False,
         "axes.spines.right": False, "savefig.dpi": 150, "svg.hashsalt": "plot"}

# One line of each chart and one row of each table: the runs of all seeds of one folder and the same settings, by seed.
# settings: those of the first. front: drawn in full, as reference runs behind others are not. style: for matplotlib.
Line = namedtuple("Line", "label model folder settings runs front style", defaults=[None])


# From folders to lines.

ALIKE = {*records.RECIPE_SETTINGS, "patch_size", "depth", "dropout"}  # settings in which no two of MODELS differ


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
    or from every line of `vit`, with which models are compared, though no model as such differs from another in it."""
    def differs(name, other):
        return str(other.settings.get(name)) != str(line.settings.get(name))

    names = dict.fromkeys(name for other in [line, *rivals] for name in other.settings if name != "seed")
    return [f"{name} {line.settings.get(name)}" for name in names
            if any(differs(name, other) for other in rivals)
            or name in ALIKE and baselines and all(differs(name, other) for other in baselines)]


def label_lines(lines):
    """Label each line of a chart by its model and by what sets it apart from others of that model: settings, folder."""
    parts = {line.folder: line.folder.resolve().parts for line in lines}
    shared = len(os.path.commonprefix(list(parts.values())))
    baselines = [line for line in lines if line.model == BASELINE]
    labelled, taken = [], Counter()
    for line in lines:
        namesakes = [other for other in lines if other.model == line.model and other is not line]
        rivals = [other for other in namesakes if line.front or not other.front]
        label, folder = ", ".join([line.model, *settings_apart(line, rivals, baselines)]), parts[line.folder][shared:]
        if folder and any(other.folder != line.folder for other in namesakes):
            label += f" ({'/'.join(folder)})"
        plain = re.sub(r"[^\w ,.:;/()+-]", "?", label)  # no TeX in charts, no bars in tables
        taken[plain] += 1
        labelled.append(line._replace(label=f"{plain} {taken[plain]}" if taken[plain] > 1 else plain))
    return sorted(labelled, key=lambda line: (not line.front, line.model, line.label))


def style_lines(lines, models):
    """Give each line of a chart the colour of its model, and a style that no other line has: of the first line of a
    model always the same, before and behind."""
    strangers = [model for model in models if model not in COLORS]
    colors = COLORS | dict(zip(strangers, itertools.cycle(SPARE_COLORS)))
    styled, taken = [], set()
    for line in lines:
        for n in itertools.count(list(colors).index(line.model)):
            dashes = DASHES[n] if n < len(DASHES) else (0, (n, 2, 1, 2))
            style = dict(color=colors[line.model], marker=MARKERS[n % len(MARKERS)], linestyle=dashes)
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
    models = sorted({run.settings["model"] for run in (*own, *reference)})
    for dataset, lines in lines_of.items():
        if not any(line.front for line in lines):
            lines = [line._replace(front=True) for line in lines]
        lines_of[dataset] = style_lines(stats.keep_one_protocol(label_lines(lines)), models)
    return dict(sorted(lines_of.items()))


# Parts of charts. All sizes are in inches, so that no layout has to be searched for.

CHARACTER, TEXT_LINE = 0.064, 0.19  # of small text
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.6g}%")  # as many digits as the distance of ticks needs
UNIFORM = "uniform attention"


def lambda_blocks(run):
    return {int(name[7:]) for name in run.metrics if re.fullmatch(r"lambda_\d+", name)}


def texts_of(lines):
    return [line.label for line in lines]


def labelled(lines, condition=lambda run: True):
    """The lines of only those runs for which the condition holds, labelled with their numbers of seeds if these
    differ."""
    lines = stats.keep_runs(lines, condition)
    if len({len(line.runs) for line in lines}) < 2:
        return lines
    return [line._replace(label=f"{line.label} ({len(line.runs)} seed{'s' * (len(line.runs) > 1)})") for line in lines]


def what_is_shown(lines):
    """How seeds are shown, and which lines are the reference's: a note of a chart."""
    counts = {len(line.runs) for line in lines}
    seeds = f"mean of {max(counts)} seeds" if len(counts) == 1 else "mean over seeds"
    notes = [f"{seeds} with its 95% interval" if max(counts) > 1 else "one seed a model"]
    return "; ".join(notes + ["thin and muted: the reference"] * any(not line.front for line in lines))


def new_figure(title, notes, rows, columns, panel, left=0.95, right=0.2, bottom=0.6, gap=(0.2, 0.5),
               legend=(), **sharing):
    """A figure and its panels, an array (rows, columns).

    notes: lines of small text below the title. panel, gap: width and height of a panel and of the space between two of
    them. left, right, bottom: margins. legend: the texts that it will have.
    """
    width = max(left + columns * (panel[0] + gap[0]) - gap[0] + right, 0.3 + 0.105 * len(title),
                0.3 + CHARACTER * max(map(len, notes)))
    top = 0.6 + TEXT_LINE * len(notes)
    bottom += 0.1 + 0.19 * math.ceil(len(legend) / legend_columns(width, legend)) if legend else 0
    height = top + rows * (panel[1] + gap[1]) - gap[1] + bottom
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, x=0.15 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=11.5, fontweight="bold")
    figure.text(0.15 / width, 1 - 0.36 / height, "\n".join(notes), va="top", fontsize="small", color="0.3")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing, gridspec_kw=dict(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=gap[0] / panel[0], hspace=gap[1] / panel[1]))


def legend_columns(width, texts):
    """How many columns as wide as the longest text there is room for, or fewer, if that takes no more rows."""
    most = max(1, int(width / (0.7 + CHARACTER * max(map(len, texts)))))
    return math.ceil(len(texts) / math.ceil(len(texts) / most))


def legend_below(figure):
    handles = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", frameon=False, fontsize="small",
                  ncols=legend_columns(figure.get_figwidth(), handles))


def draw_mean(axes, places, columns, line, **options):
    """The mean of columns (one a run) over places, which is returned; of several runs in front a band, its 95%
    interval, too."""
    means = [statistics.fmean(values) for values in zip(*columns)]
    axes.plot(places, means, **line.style, label=line.label, **options)
    if line.front and len(columns) > 1:
        halves = [stats.half_interval(values) for values in zip(*columns)]
        low, high = ([mean + sign * half for mean, half in zip(means, halves)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=line.style["color"], alpha=0.15, linewidth=0)
    return means


def draw_intervals(axes, places, samples, line, across=False):
    """At each place the mean of a sample, and its 95% interval where it is of several values; across: places are
    heights."""
    halves = [math.nan if half is None else half for half in map(stats.half_interval, samples)]
    halves = None if all(map(math.isnan, halves)) else halves
    means = list(map(statistics.fmean, samples))
    axes.errorbar(*((means, places, None, halves) if across else (places, means, halves)), capsize=2.5,
                  label=line.label, **line.style | dict(linestyle="none"))


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

def draw_curves(title, notes, ylabel, number, lines, panels, skip=0.0):
    """A figure of curves over epochs, panels side by side on one scale, each curve named at its end.

    panels: {column of metrics.csv: heading}. number: how a value is written. skip: the share of the epochs that is left
    out at the beginning, so that their steepness does not flatten all that follows.
    """
    margin = 0.75 + CHARACTER * (8 + max(map(len, texts_of(lines))))
    figure, (row,) = new_figure(title, [*notes, what_is_shown(lines)], 1, len(panels), (
        5.2 if len(panels) == 1 else 3.6, max(3.4, TEXT_LINE * (len(lines) + 1))), right=margin, gap=(margin + 0.2, 0),
        sharey=True)
    lengths = [len(line.runs[0].metrics["epoch"]) for line in lines]
    start = min(int(skip * max(lengths)), min(lengths) - 1)
    ends_of = {axes: [] for axes in row}
    for axes, column in zip(row, panels):
        for line in stats.keep_runs(lines, lambda run: column in run.metrics):
            columns = [run.metrics[column][start:] for run in line.runs]
            epochs = range(start + 1, start + 1 + len(columns[0]))
            means = draw_mean(axes, epochs, columns, line, markevery=max(1, len(epochs) // 10))
            ends_of[axes].append((line, epochs[-1], means[-1]))
    for axes, heading in zip(row, panels.values()):  # when all panels are drawn, so that their scale stays
        axes.set(title=heading, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.autoscale_view()
        axes.autoscale(False)
        name_ends(axes, number, ends_of[axes])
    row[0].set_ylabel(ylabel)
    row[0].yaxis.set_major_formatter(PERCENT if number(1).endswith("%") else ScalarFormatter(useOffset=False))
    return figure


def name_ends(axes, number, ends):
    """Write right of the frame what each end, (line, epoch, value), is, none over another, each beside a sample of its
    line that a thin line connects with it."""
    (low, high), box = axes.get_ylim(), axes.get_position()
    width, height = box.width * axes.figure.get_figwidth(), box.height * axes.figure.get_figheight()
    gap, beside = TEXT_LINE * (high - low) / height, axes.get_yaxis_transform()
    places = spread([value for _, _, value in ends], gap, low + gap / 2, high - gap / 2)
    for (line, epoch, value), place in zip(ends, places):
        sample = [1 + inches / width for inches in (0.2, 0.38, 0.56)]
        axes.annotate("", xy=(epoch, value), xytext=(sample[0], place), textcoords=beside, annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=line.style["color"], shrinkA=0, alpha=0.5, linewidth=0.7))
        axes.plot(sample, [place] * 3, **line.style, markevery=[1], transform=beside, clip_on=False)
        axes.text(1 + 0.64 / width, place, f"{line.label} {number(value)}", transform=beside, fontsize="small",
                  va="center", color="0.1" if line.front else "0.5")


def draw_validation(figure, number, dataset, lines):
    return draw_curves(f"Validation {figure} on {in_print(dataset)}", [], f"validation {figure}", number,
                       labelled(lines), {f"val_{figure}": ""}, skip=0.25)


def draw_lambda(dataset, lines):
    lines = labelled(lines, lambda_blocks)
    blocks = {block for line in lines for run in line.runs for block in lambda_blocks(run)}
    return draw_curves(
        f"Lambda, the weight of the second branch, on {in_print(dataset)}",
        ["mean over heads and tokens of the validation split; the last block uses that of the class token alone"],
        "lambda", "{:.2f}".format, lines,
        {f"lambda_{block}": f"block {block}" for block in sorted(blocks)}) if blocks else None


def draw_parameters(dataset, lines):
    """Test accuracy against parameters, with 95% intervals over seeds, of two lines or more."""
    lines = labelled(lines)
    if len(lines) < 2:
        return None
    counts = [line.runs[0].summary["parameters"] for line in lines]
    gap = 0.025 * (max(counts) - min(counts)) or 1  # so that no interval hides another
    places = spread(counts, gap, min(counts) - len(counts) * gap, max(counts) + len(counts) * gap)
    figure, ((axes,),) = new_figure(
        f"Test accuracy by parameters on {in_print(dataset)}",
        [f"{what_is_shown(lines)}; neighbours moved apart"], 1, 1, (5.5, 3.2), right=0.35, legend=texts_of(lines))
    for line, place in zip(lines, places):
        draw_intervals(axes, [place], [[run.summary["test_accuracy"] for run in line.runs]], line)
    axes.margins(0.08)
    axes.set(xlabel="parameters", ylabel="test accuracy")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(PERCENT)
    legend_below(figure)
    return figure


# Charts of the error under noise.

FAMILIES = ["Self-attention", "Subtracting", "Adding in place of subtracting"]


def family_of(line):
    """The family of a line's model, by what its runs recorded and whatever its name: a model subtracts, be it a second
    map or a share of the mean, if its attention maps have negative weights; of others, self-attention has no lambda.
    """
    if any(figures["negative_share"] for run in line.runs if run.attention
           for blocks in run.attention.values() for figures in blocks.values()):
        return FAMILIES[1]
    return FAMILIES[2 if any(map(lambda_blocks, line.runs)) else 0]


def new_rows(title, notes, lines, order, headings, columns, width, **options):
    """A figure with a row a line below the heading of its family, the line of the largest `order` of a family first; as
    many panels as headings, in so many columns: the figure, its panels, and where each line stands."""
    families = {family: [] for family in FAMILIES}
    for line in sorted(lines, key=order, reverse=True):
        families[family_of(line)].append(line)
    rows = {text: line for family, members in families.items() if members
            for text, line in [(family, None), *((line.label, line) for line in members)]}
    figure, grid = new_figure(
        title, [*notes, what_is_shown(lines)], len(headings) // columns, columns, (width, 0.27 * len(rows)),
        gap=(0.4, 0.65), left=0.4 + CHARACTER * max(map(len, rows)), sharex=True, sharey=True, **options)
    for axes, heading in zip(grid.flat, headings):
        axes.set(title=heading, ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.grid(axis="x")
    grid[0, 0].set_yticks(range(len(rows)), rows, fontsize="small")
    for axes in grid[:, 0]:
        for text, line in zip(axes.get_yticklabels(), rows.values()):
            text.set(fontweight="normal" if line else "bold", fontsize="small")
    return figure, list(grid.flat), {place: line for place, line in enumerate(rows.values()) if line}


def dashed_note(lines):
    return f"; dashed: {BASELINE}" if any(line.model == BASELINE for line in lines) else ""


def mark_baseline(axes, lines, sample_of):
    for line in lines:
        if line.model == BASELINE:
            axes.axvline(statistics.fmean(sample_of(line)), color="0.6", linestyle="--", linewidth=0.9, zorder=1)


def brightness_note(before, lines):
    """What brightness was added in training, after the words `before`; empty if none was."""
    found = {line.settings.get("brightness") or 0 for line in lines}
    if not any(found):
        return ""
    return f"{before} brightness {' or '.join(map(str, sorted(found)))}"


def draw_shift(dataset, lines):
    """The mean error under Gaussian noise, under its shift alone and under its fluctuation alone, by rows."""
    lines = labelled(lines, lambda run: run.noise)
    names, severities = stats.shared_corruptions(lines)
    panels = dict(zip(["noise as tested", "its shift alone", "its fluctuation alone"],
                      ["gaussian_noise", *stats.GAUSSIAN_PARTS]))
    if not set(panels.values()) <= set(names):
        return None

    def errors(line, name):
        return [stats.noise_error(run, [name], severities) for run in line.runs]

    figure, row, places = new_rows(
        f"Test error under Gaussian noise on {in_print(dataset)}", [
            "shift: each pixel becomes the mean of what the noise makes of it; fluctuation: the rest",
            f"mean over severities 1 to {severities}{dashed_note(lines)}{brightness_note('; trained with', lines)}"],
        lines, lambda line: statistics.fmean(errors(line, "gaussian_noise")), panels, len(panels), 2.4)
    for axes, name in zip(row, panels.values()):
        for place, line in places.items():
            draw_error(axes, place, errors(line, name), line)
        mark_baseline(axes, lines, lambda line: errors(line, name))
        axes.set_xlabel("test error")
        axes.margins(x=0.25)  # for the means in figures
        axes.locator_params(axis="x", nbins=7, steps=[1, 2, 5, 10])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PERCENT)
    return figure


def draw_error(axes, place, sample, line):
    """A mean and its interval, on a thin line from 0, and the mean in figures."""
    mean, half = statistics.fmean(sample), stats.half_interval(sample) or 0
    draw_intervals(axes, [place], [sample], line, across=True)
    axes.plot([0, mean], [place, place], color="0.8", linewidth=0.8, zorder=1)
    axes.annotate(f"{mean:.1%}", (mean + half, place), fontsize="small", va="center", xytext=(6, 0),
                  textcoords="offset points", color="0.1" if line.front else "0.5",
                  bbox=dict(facecolor="white", edgecolor="none", pad=0.5))


def draw_severities(title, choose, dataset, lines):
    """Test error by severity, a panel for each corruption that `choose` takes; severity 0 is the clean test split."""
    lines = labelled(lines, lambda run: run.noise)
    names, severities = stats.shared_corruptions(lines)
    names = choose(names)
    if not names:
        return None
    cluttered = any(line.settings.get("distractors") for line in lines)
    met = "trained with distractors and no other corruption" if cluttered else "trained without corruption"
    figure, grid = new_figure(
        f"Test error by severity of {title} on {in_print(dataset)}", [
            met + brightness_note(", except for", lines), what_is_shown(lines)],
        math.ceil(len(names) / 3), min(3, len(names)), (3.1, 2.2),
        legend=texts_of(lines), sharex=True, sharey=True)
    for i, (axes, name) in enumerate(itertools.zip_longest(grid.flat, names)):
        if name is None:
            axes.remove()
            continue
        for line in lines:
            draw_mean(axes, range(severities + 1), [[1 - accuracy for accuracy in (
                run.summary["test_accuracy"], *run.noise[name][:severities])] for run in line.runs], line)
        axes.set(title=stats.readable(name).capitalize(), ylabel="test error")
        axes.label_outer()
        if i >= len(names) - grid.shape[1]:  # nothing stands below it
            axes.set_xlabel("severity (0: clean)")
            axes.tick_params(labelbottom=True)
    grid[0, 0].set_ylim(bottom=0)
    grid[0, 0].yaxis.set_major_formatter(PERCENT)
    legend_below(figure)
    return figure


BRANCHES = {  # of a figure of response.csv its name, its mark, and how far below the middle of a row it stands
    "noise_to_signal_1": ("branch 1", dict(marker="o", markerfacecolor="white"), -0.27),
    "noise_to_signal_2": ("branch 2", dict(marker="s", markerfacecolor="white"), 0.27),
    "noise_to_signal": ("output of the head", dict(marker="D"), 0)}


def draw_response(dataset, lines):
    """Noise to signal of the branches of the heads and of what they make together, by block, under each part of
    Gaussian noise."""
    lines = labelled(lines, lambda run: run.response)
    conditions, blocks = stats.conditions_and_blocks(lines, "response")
    panels = {f"{name.split('_')[-1]} alone, block {block}": (condition, block) for name in stats.GAUSSIAN_PARTS
              for condition in conditions if condition.startswith(name) for block in blocks}
    if not panels:
        return None

    first, *_ = panels.values()
    figure, grid, rows = new_rows(
        f"Response of the heads to the two parts of Gaussian noise, {in_print(dataset)}", [
            "noise to signal: energy of what the noise changes, by that of the clean outputs around their mean image",
            f"severity {first[0].split('_')[-1]}, mean over heads{dashed_note(lines)}"],
        lines, lambda line: statistics.fmean(response_samples(line, *first)["noise_to_signal"]), panels, len(blocks),
        2.9, legend=[text for text, _, _ in BRANCHES.values()])
    for axes, place in zip(grid, panels.values()):
        for row, line in rows.items():
            draw_branches(axes, row, line, response_samples(line, *place))
        mark_baseline(axes, lines, lambda line: response_samples(line, *place)["noise_to_signal"])
        axes.set(xlabel="noise to signal", xscale="log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.label_outer()
    set_decades(grid[0])
    for text, mark, _ in BRANCHES.values():
        grid[0].plot([], [], color="0.3", linestyle="none", markersize=5, label=text, **mark)
    legend_below(figure)
    return figure


def set_decades(axes):
    """Have a logarithmic scale begin and end at 1, 2 or 5 times a power of ten, with ticks there and between."""
    low, high = axes.get_xlim()
    digits = (1, 2, 5) if high < 500 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-9, 9) for digit in digits]
    first, last = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    axes.set_xticks([tick for tick in ticks if first <= tick <= last])
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter("{x:g}")


def response_samples(line, condition, block):
    return {name: [stats.response_of(run, condition, block, name) for run in line.runs] for name in BRANCHES}


def draw_branches(axes, row, line, samples):
    """What the branches make together and, of a line that has two, each of them above and below it."""
    if any(map(math.isnan, samples["noise_to_signal_2"])):
        samples = {"noise_to_signal": samples["noise_to_signal"]}
    means = {name: (statistics.fmean(sample), row + BRANCHES[name][2]) for name, sample in samples.items()}
    for name, (_, height) in means.items():
        axes.plot(*zip(means[name], means["noise_to_signal"]), color=line.style["color"], linewidth=0.8, alpha=0.4)
        draw_intervals(axes, [height], [samples[name]],
                       line._replace(label="", style=line.style | BRANCHES[name][1]), across=True)


# Charts of the attention.

def draw_attention(title, lines, figures):
    """Figures of the class token's row of the attention maps by condition: a row of panels a figure, a column a block.

    figures: {name in attention.csv: (its axis, whether it is a share)}.
    """
    lines = labelled(lines, lambda run: run.attention)
    if not lines:
        return None
    conditions, blocks = stats.conditions_and_blocks(lines, "attention")
    texts = [stats.readable(condition).capitalize().replace(", ", "\n") for condition in conditions]
    figure, panels = new_figure(
        title, [f"mean of the heads over the test split; {what_is_shown(lines)}"], len(figures), len(blocks),
        (max(3.4, len(conditions) * max(1.1, 0.1 * len(lines))), 2.2), gap=(0.2, 0.2),
        legend=[*texts_of(lines), UNIFORM], sharex=True, sharey="row")
    for row, (name, (ylabel, is_share)) in zip(panels, figures.items()):
        for axes, block in zip(row, blocks):
            for place, line in enumerate(lines):
                samples = [[stats.attention_of(run, condition, block, name) for run in line.runs]
                           for condition in conditions]
                beside = 0.7 * ((place + 0.5) / len(lines) - 0.5)  # so that no mark hides another
                draw_intervals(axes, [i + beside for i in range(len(conditions))], samples, line)
            if name == "irrelevant_share":
                for i, condition in enumerate(conditions):
                    axes.plot([i - 0.42, i + 0.42], [stats.uniform_share(lines, condition)] * 2, color="0.3",
                              linestyle="--", linewidth=1.2, label=UNIFORM)
                axes.set_ylim(bottom=0)  # where Student's t of few seeds goes below
            axes.set_xticks(range(len(conditions)), texts, fontsize="small")
        row[0].set_ylabel(ylabel)
        if is_share:
            row[0].yaxis.set_major_formatter(PERCENT)
    for axes, block in zip(panels[0], blocks):
        axes.set_title(f"block {block}")
    legend_below(figure)
    return figure


def draw_relevance(dataset, lines):
    return draw_attention(
        f"Attention to patches without any of the object on {in_print(dataset)}", stats.keep_runs(
            lines, stats.has_background), dict(irrelevant_share=("share of the class token's\nabsolute weight", True)))


def draw_blocks(dataset, lines):
    return draw_attention(f"The class token's row of the attention maps on {in_print(dataset)}", lines, {
        "entropy": ("entropy (nats)", False), "negative_share": ("negative weight", True),
        "lambda": ("1 less the row's sum:\nlambda of the class token", False)})


def draw_maps(dataset, lines):
    """A few images, and the class token's maps of them in the last block, head by head: of one run of each line in
    front, and of `vit` behind them."""
    lines = [line for line in stats.keep_runs(lines, lambda run: run.maps) if line.front or line.model == BASELINE]
    if not lines:
        return None
    pictures = lines[0].runs[0].maps[0].tolist()
    lines = [line for line in lines if line.runs[0].maps[0].tolist() == pictures]  # canvases may differ
    heads = max(line.runs[0].maps[1].shape[1] for line in lines)
    shown = max(1, 8 // heads)  # images
    limit = max(abs(line.runs[0].maps[1][:shown]).max() for line in lines) or 1
    seeds = " and ".join(map(str, sorted({line.runs[0].settings["seed"] for line in lines})))
    pitch, width, height = 1.04 * heads + 0.3, shown * (1.04 * heads + 0.3), 1.3 + 1.15 * len(lines)
    figure, ((axes,),) = new_figure(
        f"Attention of the class token in the last block, {in_print(dataset)}", [
            f"weight on each patch, a column a head, seed {seeds}; one scale, with dashes below -5% of it"], 1, 1,
        (0.88 * width, 0.88 * height), right=1.0, bottom=0.1,
        left=0.4 + CHARACTER * max(map(len, texts_of(lines))))
    for i, image in enumerate(lines[0].runs[0].maps[0][:shown]):
        show(axes, image.transpose(1, 2, 0), i * pitch + 0.52 * (heads - 1), 0, cmap="gray_r", vmin=0, vmax=255)
    for top, line in zip(itertools.count(1.3, 1.15), lines):
        images, maps = line.runs[0].maps
        outlined = stats.has_background(line.runs[0])
        axes.text(-0.12, top + 0.5, line.label, ha="right", va="center", fontsize="small")
        for i, head in itertools.product(range(min(shown, len(images))), range(maps.shape[1])):
            x = i * pitch + 1.04 * head
            if outlined:
                outline(axes, images[i].max(0), x, top)
            picture = show_map(axes, maps[i, head], x, top, limit)
    axes.set(xlim=(-0.02, width - 0.32), ylim=(height - 0.13, -0.02))
    axes.axis("off")
    bar = axes.inset_axes([1 + 0.15 / width, 0.25, 0.2 / width, 0.5])
    figure.colorbar(picture, cax=bar, label="weight").ax.tick_params(labelsize="small")
    return figure


def show(axes, picture, x, y, **options):
    """A picture, 1 wide and high, with its upper left corner at (x, y) of axes whose y grows downwards."""
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="0.7", linewidth=0.6))
    return axes.imshow(picture, extent=(x, x + 1, y + 1, y), aspect="auto", **options)


def outline(axes, image, x, y):
    """The outline of the object of an image, where `show` would show the image."""
    height, width = image.shape
    if image.min() < 80 < image.max():
        axes.contour([x + (i + 0.5) / width for i in range(width)], [y + (i + 0.5) / height for i in range(height)],
                     image, levels=[80], colors="black", linewidths=0.6)


def show_map(axes, weights, x, y, limit):
    """A map, with a dash on what is blue enough to be seen, for grey print."""
    side = len(weights)
    rows, columns = (weights < -0.05 * limit).nonzero()
    axes.scatter(x + (columns + 0.5) / side, y + (rows + 0.5) / side, (24 / side) ** 2, "black", marker="_",
                 linewidths=0.8)
    return show(axes, weights, x, y, cmap="RdBu_r", vmin=-limit, vmax=limit)


# Each makes a figure of (data set, lines), or returns None where there is nothing to show.
CHARTS = {"val-loss": functools.partial(draw_validation, "loss", "{:.3f}".format),
          "val-accuracy": functools.partial(draw_validation, "accuracy", "{:.2%}".format),
          "parameters": draw_parameters, "lambda": draw_lambda, "shift": draw_shift,
          "noise": functools.partial(draw_severities, "corruption", stats.plain_corruptions),
          "shift-by-severity": functools.partial(draw_severities, "noise and its parts", stats.noise_parts),
          "response": draw_response, "relevance": draw_relevance, "blocks": draw_blocks, "maps": draw_maps}


# The command.

@contextlib.contextmanager
def house_style():
    """A block that draws by matplotlib's own defaults and ours, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def write_chart(out, file_format, dataset, lines, name):
    """Write a chart, the same bytes at every call, and return True; False where there is nothing to show."""
    options = dict(png=dict(pil_kwargs=dict(compress_level=1)), svg=dict(metadata={"Date": None}),
                   pdf=dict(metadata={"CreationDate": None}))
    path, content = out / f"{dataset}-{name}.{file_format}", io.BytesIO()
    with house_style():
        figure = CHARTS[name](dataset, lines)
        if figure is None:
            return False
        figure.savefig(content, format=file_format, **options[file_format])
    records.write_whole(path, content.getvalue())
    return True


def write_charts(out, file_format, datasets):
    """Write all charts and return their number: in a process a core, or in this one where no other can be started, as
    without /dev/shm, or one is killed."""
    charts = [(dataset, lines, name) for dataset, lines in datasets.items() for name in CHARTS]
    write = functools.partial(write_chart, out, file_format)
    try:
        with ProcessPoolExecutor() as pool:
            return sum(pool.map(write, *zip(*charts)))
    except (OSError, NotImplementedError, BrokenProcessPool):
        return sum(map(write, *zip(*charts)))


def plot(args):
    folders, out = args.folders, args.out or args.folders[0]
    for folder in folders:
        if os.path.exists(folder / "config.json"):
            raise UserError(f"{folder} is a run: name the folder that it lies in, {folder.parent}")
    own, skipped = records.find_runs(*{folder.resolve(): folder for folder in folders}.values())
    reference, more_skipped = records.find_runs(*find_references(folders)) if args.reference else ([], [])
    for line in skipped + more_skipped:
        print(f"skipped {line}", file=sys.stderr)
    for name, wanted in [("seed", args.seed), ("dataset", args.dataset)]:
        if wanted:
            own, reference = ([run for run in runs if run.settings[name] in wanted] for runs in (own, reference))
    if not own and not reference:
        which = "of these seeds and data sets " if args.seed or args.dataset else ""
        raise UserError(f"there is no finished run {which}in "
                        f"{', '.join(map(str, folders))}: train one with train.py first")
    datasets = arrange(own, reference)
    shown = [run for lines in datasets.values() for line in lines for run in line.runs]
    left_out = sum(run.noise is not None for run in own + reference) - sum(run.noise is not None for run in shown)
    if left_out:
        print(f"left out: what {left_out} runs did under noise of other amounts than the first run's", file=sys.stderr)
    pairs = [frozenset(pair) for pair in args.compare]
    for pair in args.compare:
        if len({*pair}) == 1 or pairs.count(frozenset(pair)) > 1:
            raise UserError(f"argument --compare: {' '.join(pair)} are not two models, or are compared twice")
        for model in pair:
            records.check_name("model", model, sorted({run.settings["model"] for run in own + reference}))
        if not any(stats.paired_differences(lines, stats.test_accuracy, [pair]) for lines in datasets.values()):
            print(f"not compared: {' and '.join(pair)}, which share no two seeds of one recipe", file=sys.stderr)
    records.make_folder(out, "name another folder with --out")
    tables = {out / f"{dataset}-{name}.md": table for dataset, lines in datasets.items()
              for name, table in stats.make_tables(dataset, lines).items()}
    comparisons = stats.comparison_tables(datasets, args.compare)
    if comparisons:
        tables[out / "comparisons.md"] = comparisons
    for path, table in tables.items():
        records.write_whole(path, table)
    charts = write_charts(out, args.format, datasets)
    print(f"{stats.overview(datasets, out)}\n{len(tables)} tables and {charts} charts are in {out}")


def parse_flags(argv):
    parser = records.Parser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=records.usable_folder, default=[Path("runs")], metavar="FOLDER",
                        help="a folder of runs (default: runs)")
    parser.add_argument("--out", type=records.usable_folder, metavar="DIR",
                        help="where to write (default: into the first folder)")
    parser.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="default: %(default)s")
    parser.add_argument("--no-reference", dest="reference", action="store_false",
                        help="do not draw the folders' reference runs")
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("MODEL", "OTHER"),
                        help="compare two models seed by seed; given several times, p is corrected for all of them, "
                        "on all data sets")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="draw the runs of these seeds alone")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="draw the runs on these data sets alone")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, or 2 where there is nothing to draw or nowhere to draw it."""
    return records.exit_status("plot.py", parse_flags, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
