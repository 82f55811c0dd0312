"""The charts: each is a function of a data set and its lines that makes a figure, or None where there is nothing to
show. plot.py writes them; there stands how each is read."""

import functools
import itertools
import os
from math import ceil
from statistics import fmean

os.environ["MPLBACKEND"] = "agg"  # one that a notebook set may not be installed here, and matplotlib refuses that
import matplotlib.style
import numpy
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import stats
from stats import BASELINE, in_print

# What a chart is drawn with besides matplotlib's own defaults. axes.titley: without it matplotlib searches a place for
# each title, a tenth of the whole time.
STYLE = {"font.size": 10, "axes.titlesize": "medium", "axes.titley": 1.0, "axes.xmargin": 0.03, "axes.axisbelow": True,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.9", "axes.spines.top": False,
         "axes.spines.right": False, "axes.formatter.useoffset": False, "savefig.dpi": 150, "svg.hashsalt": "plot"}


def house_style():
    """A block that draws by matplotlib's own defaults and ours, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


# Parts of charts. All sizes are in inches, so that no layout has to be searched for.

CHARACTER, TEXT_LINE = 0.064, 0.19  # of small text
UNIFORM = "uniform attention"


def percent(value, _):
    """With as many digits as the distance of ticks needs, and nothing where no share can be."""
    return f"{100 * value:.6g}%" if 0 <= value <= 1 else ""


def texts_of(lines):
    return [line.label for line in lines]


def labelled(lines, condition=lambda run: True):
    """The lines of the runs for which the condition holds, labelled with their numbers of seeds if these differ."""
    lines = stats.keep_runs(lines, condition)
    if len({len(line.runs) for line in lines}) < 2:
        return lines
    return [line._replace(label=f"{line.label} ({len(line.runs)} seed{'s' * (len(line.runs) > 1)})") for line in lines]


def what_is_shown(lines):
    """How seeds are shown, and which lines are the reference's: a note of a chart."""
    counts = {len(line.runs) for line in lines}
    seeds = f"of {max(counts)} seeds" if len(counts) == 1 else "over seeds"
    text = f"mean {seeds}" if max(counts) > 1 else "one seed a model"
    text += " with its 95% interval" if stats.half_interval(range(max(counts))) else ""
    return text + "; thin and muted: the reference" * any(not line.front for line in lines)


def width_of(texts):
    return CHARACTER * max(map(len, texts))


def new_figure(title, notes, panel, shape=(1, 1), left=0.95, right=0.2, bottom=0.6, gap=(0.2, 0.5), legend=(),
               sharey=True):
    """A figure and its panels, an array of this shape, (rows, columns).

    notes: lines of small text below the title. panel, gap: width and height of a panel and of the space between two of
    them. left, right, bottom: margins. legend: the texts that it will have.
    """
    rows, columns = shape
    width = max(left + columns * (panel[0] + gap[0]) - gap[0] + right, 0.3 + 0.105 * len(title), 0.3 + width_of(notes))
    top = 0.6 + TEXT_LINE * len(notes)
    bottom += 0.1 + TEXT_LINE * ceil(len(legend) / legend_columns(width, legend)) if legend else 0
    height = top + rows * (panel[1] + gap[1]) - gap[1] + bottom
    figure = Figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.1 / height, title, va="top", fontsize=11.5, fontweight="bold")
    figure.text(0.15 / width, 1 - 0.36 / height, "\n".join(notes), va="top", fontsize="small", color="0.3")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey, gridspec_kw=dict(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=gap[0] / panel[0], hspace=gap[1] / panel[1]))


def legend_columns(width, texts):
    """How many columns as wide as the longest text there is room for, or fewer, if that takes no more rows."""
    most = max(1, int(width / (0.7 + width_of(texts))))
    return ceil(len(texts) / ceil(len(texts) / most))


def with_legend(figure):
    handles = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", frameon=False, fontsize="small",
                  ncols=legend_columns(figure.get_figwidth(), handles))
    return figure


def means_and_arms(line, values_of, shares=False):
    """Of the lists that `values_of` makes of a line's runs: means (N,), and how far 95% intervals, of shares from 0 to
    1 at most, reach below and above them, nan where there are none (2, N)."""
    means, halves = numpy.array([(fmean(sample), stats.half_interval(sample))
                                 for sample in zip(*map(values_of, line.runs))], float).T
    return means, numpy.minimum(halves, [means, 1 - means]) if shares else numpy.array([halves, halves])


def draw_mean(axes, places, line, values_of, shares=False):
    """A curve of the means of a run's values, one a place; of several runs in front a band, their 95% intervals."""
    means, (below, above) = means_and_arms(line, values_of, shares)
    axes.plot(places, means, **line.style, label=line.label, markevery=max(1, len(means) // 10))
    if line.front and not numpy.isnan(below).any():
        axes.fill_between(places, means - below, means + above, color=line.style["color"], alpha=0.15, linewidth=0)


def draw_intervals(axes, places, line, values_of, across=False, shares=False):
    """The means of a run's values, one a place or, across, one a height, with their 95% intervals; it returns both."""
    means, arms = means_and_arms(line, values_of, shares)
    bars = None if numpy.isnan(arms).all() else arms
    axes.errorbar(*((means, places, None, bars) if across else (places, means, bars)), capsize=2.5,
                  label=line.label, **line.style | dict(linestyle="none"))
    return means, arms


def show_shares(axes):
    """Have the y axis show percent, and nothing above 100%."""
    axes.set_ylim(top=min(axes.get_ylim()[1], 1))
    axes.yaxis.set_major_formatter(percent)


def spread(heights, gap, low, high):
    """Move heights apart, as little as may be, until neighbours are `gap` from each other and all from low to high."""
    count, moved = len(heights), {}
    order = sorted(range(count), key=lambda i: heights[i])
    wanted = [heights[i] - rank * gap for rank, i in enumerate(order)]  # of these, none may be below the one before
    for rank, i in enumerate(order):  # isotonic regression, in the form of a maximum of minima
        place = max(min(fmean(wanted[first:last]) for last in range(rank + 1, count + 1)) for first in range(rank + 1))
        moved[i] = min(max(place, low), high - (count - 1) * gap) + rank * gap
    return [moved[i] for i in range(count)]


# Charts of the training.

def draw_curves(title, notes, ylabel, write, lines, panels, skip=0.0):
    """A figure of curves over epochs, panels side by side on one scale, each curve named at its end.

    panels: {column of metrics.csv: heading}. write: what makes the text of a value. skip: the part of a line's epochs,
    if these are 8 or more, left out at the beginning, so that their steepness does not flatten all that follows.
    """
    margin = 0.75 + CHARACTER * 8 + width_of(texts_of(lines))
    panel = 3.6 if len(panels) > 1 else 5.2, max(3.4, TEXT_LINE * (len(lines) + 1))
    figure, (row,) = new_figure(
        title, [*notes, what_is_shown(lines)], panel, (1, len(panels)), right=margin, gap=(margin + 0.2, 0))
    shown, shares = [stats.keep_runs(lines, lambda run: column in run.metrics) for column in panels], "%" in write(1)
    for axes, column, kept in zip(row, panels, shown):
        for line in kept:
            epochs = line.runs[0].metrics["epoch"]
            start = int(skip * len(epochs)) if len(epochs) >= 8 else 0
            draw_mean(axes, epochs[start:], line, lambda run: run.metrics[column][start:], shares)
    if shares:
        show_shares(row[0])
    row[0].set_ylabel(ylabel)
    for axes, heading, kept in zip(row, panels.values(), shown):  # when all are drawn, so that their scale stays
        axes.set(title=heading, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.autoscale_view()
        axes.autoscale(False)
        name_ends(axes, kept, write)
    return figure


def name_ends(axes, lines, write):
    """Write right of the frame where each curve ends, none over another, each beside a sample of its line that a thin
    line connects with it."""
    (low, high), (width, height) = axes.get_ylim(), axes.get_position().size * axes.figure.get_size_inches()
    gap, beside = TEXT_LINE * (high - low) / height, axes.get_yaxis_transform()
    ends = [curve.get_xydata()[-1] for curve in axes.get_lines()]
    sample = [1 + inches / width for inches in (0.2, 0.38, 0.56)]
    for line, end, place in zip(lines, ends, spread([value for _, value in ends], gap, low + gap / 2, high - gap / 2)):
        axes.annotate("", xy=end, xytext=(sample[0], place), textcoords=beside, annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=line.style["color"], shrinkA=0, alpha=0.5, linewidth=0.7))
        axes.plot(sample, [place] * 3, **line.style, markevery=[1], transform=beside, clip_on=False)
        axes.text(1 + 0.64 / width, place, f"{line.label} {write(end[1])}", transform=beside, fontsize="small",
                  va="center", color="0.1" if line.front else "0.5")


def draw_validation(figure, write, dataset, lines):
    return draw_curves(f"Validation {figure} on {in_print(dataset)}", [], f"validation {figure}", write,
                       labelled(lines), {f"val_{figure}": ""}, skip=0.25)


def draw_lambda(dataset, lines):
    lines = labelled(lines, stats.lambda_columns)
    columns = {name for run in stats.runs_of(lines) for name in stats.lambda_columns(run)}
    return draw_curves(
        f"Lambda, the weight of the second branch, on {in_print(dataset)}",
        ["mean over heads and tokens of the validation split; the last block uses that of the class token alone"],
        "lambda", "{:.2f}".format, lines, {name: name.replace("lambda_", "block ") for name in sorted(
            columns, key=lambda name: (len(name), name))}) if columns else None


def draw_parameters(dataset, lines):
    """Test accuracy against parameters, with 95% intervals over seeds, of two lines or more."""
    lines = labelled(lines)
    if len(lines) < 2:
        return None
    counts = [line.runs[0].summary["parameters"] for line in lines]
    gap = 0.025 * (max(counts) - min(counts)) or 1  # so that no interval hides another
    places = spread(counts, gap, min(counts) - len(counts) * gap, max(counts) + len(counts) * gap)
    figure, ((axes,),) = new_figure(
        f"Test accuracy by parameters on {in_print(dataset)}", [f"{what_is_shown(lines)}; neighbours moved apart"],
        (5.5, 3.2), right=0.35, legend=texts_of(lines))
    for line, place in zip(lines, places):
        draw_intervals(axes, [place], line, lambda run: [run.summary["test_accuracy"]], shares=True)
    axes.margins(0.08)
    axes.set(xlabel="parameters", ylabel="test accuracy")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    show_shares(axes)
    return with_legend(figure)


# Charts with a row a model.

def dashed_note(lines):
    return f"; dashed: {BASELINE}" if any(line.model == BASELINE for line in lines) else ""


def training_note(before, lines):
    """What the runs met in training of the corruptions of the test, by settings that these are called after, such as
    brightness, after the words `before`; empty if nothing."""
    names = stats.plain_corruptions(lines[0].runs[0].noise)
    settings = dict.fromkeys(setting for line in lines for setting in line.settings)
    met = {setting: {line.settings.get(setting) or 0 for line in lines} for setting in settings
           if any(name.endswith(setting) for name in names)}
    texts = [f"{setting} {' or '.join(map(str, sorted(found)))}" for setting, found in met.items() if any(found)]
    return f"{before} {' and '.join(texts)}" if texts else ""


def draw_rows(title, notes, lines, panels, draw, finish, width, columns, legend=()):
    """A figure with a row a line below the heading of its family, the line with the largest mean in the first panel
    first; dashed, the mean of the baseline.

    panels: {heading: figures of a run, of which the last is the one meant}. draw: a function of (panel, height, line,
    *figures) that draws a row. finish: one of a panel. width: of a panel, of which so many columns stand side by side.
    """
    def mean(line, figures):
        return fmean(map(figures[-1], line.runs))

    first, *_ = panels.values()
    rows = {}  # the line of each text at the left, None for the heading of a family
    order = sorted(lines, key=lambda line: (stats.family_of(line), -mean(line, first)))
    for family, members in itertools.groupby(order, stats.family_of):
        rows |= {stats.FAMILIES[family]: None} | {line.label: line for line in members}
    figure, grid = new_figure(
        title, [*notes, what_is_shown(lines)], (width, 0.27 * len(rows)), (len(panels) // columns, columns),
        left=0.4 + width_of(rows), gap=(0.4, 0.65), legend=legend)
    grid[0, 0].set_yticks(range(len(rows)), rows)
    for axes, (heading, figures) in zip(grid.flat, panels.items()):
        axes.set(title=heading, ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.grid(axis="x")
        for height, line in enumerate(rows.values()):
            if line:
                draw(axes, height, line, *figures)
        for line in lines:
            if line.model == BASELINE:
                axes.axvline(mean(line, figures), color="0.6", linestyle="--", linewidth=0.9, zorder=1)
        finish(axes)
    for axes in grid[:, 0]:
        for text, line in zip(axes.get_yticklabels(), rows.values()):
            text.set(fontsize="small", fontweight="normal" if line else "bold")
    return figure


def draw_shift(dataset, lines):
    """The mean error under Gaussian noise, under its shift alone and under its fluctuation alone, by rows."""
    lines = labelled(lines, lambda run: run.noise)
    names, severities = stats.shared_corruptions(lines)
    panels = {"noise as tested": "gaussian_noise", "its shift alone": "gaussian_noise_shift",
              "its fluctuation alone": "gaussian_noise_fluctuation"}
    if not set(panels.values()) <= set(names):
        return None
    return draw_rows(
        f"Test error under Gaussian noise on {in_print(dataset)}", [
            "shift: each pixel becomes the mean of what the noise makes of it; fluctuation: the rest",
            f"mean over severities 1 to {severities}{dashed_note(lines)}{training_note('; trained with', lines)}"],
        lines, {heading: [functools.partial(stats.noise_error, names=[name], last=severities)]
                for heading, name in panels.items()}, draw_error, show_errors, 2.4, len(panels))


def draw_error(axes, height, line, error):
    """A mean and its interval, on a thin line from 0, and the mean in figures."""
    (mean,), (_, (arm,)) = draw_intervals(axes, [height], line, lambda run: [error(run)], across=True, shares=True)
    axes.plot([0, mean], [height, height], color="0.8", linewidth=0.8, zorder=1)
    axes.annotate(f"{mean:.1%}", (mean + numpy.nan_to_num(arm), height), fontsize="small", va="center", xytext=(6, 0),
                  textcoords="offset points", color="0.1" if line.front else "0.5",
                  bbox=dict(facecolor="white", edgecolor="none", pad=0.5))


def show_errors(axes):
    axes.set_xlabel("test error")
    axes.margins(x=0.25)  # for the means in figures
    axes.locator_params(axis="x", nbins=7, steps=[1, 2, 5, 10])
    axes.set_xlim(0, max(axes.get_xlim()[1], axes.dataLim.x1))  # the first panel's, if it will do
    axes.xaxis.set_major_formatter(percent)


BRANCHES = {  # of a figure of response.csv its name, its mark, and how far below the middle of a row it stands
    "noise_to_signal_1": ("branch 1", dict(marker="o", markerfacecolor="white"), -0.27),
    "noise_to_signal_2": ("branch 2", dict(marker="s", markerfacecolor="white"), 0.27),
    "noise_to_signal": ("output of the head", dict(marker="D"), 0)}


def draw_response(dataset, lines):
    """Noise to signal of the heads' branches and of what they make together, under each part of Gaussian noise."""
    lines = labelled(lines, lambda run: run.response)
    conditions, blocks = stats.conditions_and_blocks(lines, "response")
    shown = [(part, name) for part in stats.GAUSSIAN_PARTS for name in conditions if name.startswith(part)]
    if not shown:
        return None
    panels = {f"{stats.part_of(part)[1]} alone, block {block}": [
        functools.partial(stats.response_figure, condition=condition, block=block, figure=name) for name in BRANCHES]
        for part, condition in shown for block in blocks}
    figure = draw_rows(
        f"Response of the heads to the two parts of Gaussian noise, {in_print(dataset)}", [
            "noise to signal: energy of what the noise changes, by that of the clean outputs around their mean image",
            f"severity {shown[0][1].split('_')[-1]}, mean over heads{dashed_note(lines)}"],
        lines, panels, draw_branches, show_ratios, 2.9, len(blocks), legend=[text for text, _, _ in BRANCHES.values()])
    set_decades(figure.axes[0])
    for text, mark, _ in BRANCHES.values():
        figure.axes[0].plot([], [], color="0.3", linestyle="none", markersize=5, label=text, **mark)
    return with_legend(figure)


def draw_branches(axes, height, line, *figures):
    """What the branches make together, the last figure, and, of a line that has two, each of them above and below it,
    on a thin line to it."""
    means, _ = means_and_arms(line, lambda run: [figure_of(run) for figure_of in figures])
    for figure_of, mean, (_, mark, below) in zip(figures, means, BRANCHES.values()):
        if figure_of is figures[-1] or not numpy.isnan(means).any():
            axes.plot([mean, means[-1]], [height + below, height], color=line.style["color"], linewidth=0.8, alpha=0.4)
            draw_intervals(axes, [height + below], line._replace(label="", style=line.style | mark),
                           lambda run: [figure_of(run)], across=True)


def show_ratios(axes):
    axes.set(xlabel="noise to signal", xscale="log")
    axes.minorticks_off()
    axes.label_outer()


def set_decades(axes):
    """Have a logarithmic scale begin and end at 1, 2 or 5 times a power of ten, with ticks there and between."""
    low, high = axes.get_xlim()
    ticks = numpy.outer(10.0 ** numpy.arange(-9, 9), (1, 2, 5) if high < 500 * low else 1).ravel()
    axes.set_xticks(ticks)
    axes.set_xlim(ticks[ticks <= low][-1], ticks[ticks >= high][0])
    axes.xaxis.set_major_formatter("{x:g}")


# Other charts.

def draw_panels(title, notes, lines, panels, draw, xlabel, ticks=()):
    """A figure of test errors on one scale. panels: {heading: what draw is given}, three side by side at most. draw: a
    function of (panel, line, that). ticks: texts at 0, 1, ... of the x axis."""
    columns = min(3, len(panels))
    figure, grid = new_figure(title, [*notes, what_is_shown(lines)], (3.1, 2.2), (ceil(len(panels) / columns), columns),
                              legend=texts_of(lines))
    for axes in grid.flat[len(panels):]:
        axes.remove()
    for place, (axes, heading) in enumerate(zip(grid.flat, panels)):
        for line in lines:
            draw(axes, line, panels[heading])
        axes.set(title=heading, ylabel="test error")
        axes.label_outer()
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks, fontsize="small")
        if place >= len(panels) - columns:  # nothing stands below it
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
    grid[0, 0].set_ylim(bottom=0)
    show_shares(grid[0, 0])
    return with_legend(figure)


def draw_severities(title, choose, dataset, lines):
    """Test error by severity, a panel for each corruption that `choose` takes; severity 0 is the clean test split."""
    lines = labelled(lines, lambda run: run.noise)
    shared, severities = stats.shared_corruptions(lines)
    names = choose(shared)
    return draw_panels(
        f"Test error by severity of {title} on {in_print(dataset)}",
        ["trained without corruption" + training_note(", except for", lines)], lines,
        {stats.readable(name).capitalize(): name for name in names},
        lambda axes, line, name: draw_mean(axes, range(severities + 1), line, lambda run: [
            1 - share for share in (run.summary["test_accuracy"], *run.noise[name][:severities])], shares=True),
        "severity (0: clean)") if names else None


def draw_attack(dataset, lines):
    """Test error by epsilon, under attack by the gradient and under random signs."""
    lines = labelled(lines, lambda run: run.attack)
    sizes = [epsilon.split()[1] for line in lines[:1] for epsilon in stats.attack_errors(line.runs[0])["pgd"]]
    return draw_panels(
        f"Test error under attack on {in_print(dataset)}",
        ["each pixel is changed by epsilon at most, a share of white; the first 1,000 test images"], lines,
        {"By the gradient (pgd)": "pgd", "By random signs": "sign_noise"},
        lambda axes, line, attack: draw_mean(axes, range(len(sizes)), line, lambda run: [
            error / 100 for error in stats.attack_errors(run)[attack].values()], shares=True),
        "epsilon" + ", in 255ths" * ("/" in str(sizes)), [size.split("/")[0] for size in sizes]) if sizes else None


def draw_aligned(dataset, lines):
    """Test error with the offset removed, by the images that it is estimated from; muted, with a random vector."""
    lines = labelled(lines, lambda run: run.aligned)
    names, counts, _ = stats.aligned_conditions(lines)

    def draw(axes, line, name):
        draw_mean(axes, range(len(counts)), line, lambda run: [
            stats.error_without("offset", name, images=count)(run) / 100 for count in counts], shares=True)
        muted = line.style | dict(alpha=0.4, markerfacecolor="white")
        draw_intervals(axes, [len(counts)], line._replace(label="", style=muted), lambda run: [
            stats.error_without("random vector", name)(run) / 100], shares=True)

    return draw_panels(
        f"Test error at severity 3 with the offset removed, {in_print(dataset)}",
        ["offset: what the corruption adds to a head's mean output; hollow: a random vector of the same length"], lines,
        {stats.readable(name).capitalize(): name for name in names}, draw,
        "validation images (0: as it is)", [*(f"{count:,.0f}" for count in counts), "random"]) if names else None


def draw_attention(title, condition, figures, dataset, lines):
    """Figures of the class token's row of the attention maps by condition of the test images: a row of panels a figure,
    a column a block. condition: of runs that are shown. figures: {name in attention.csv: label of its axis}."""
    lines = labelled(lines, lambda run: run.attention and condition(run))
    if not lines:
        return None
    conditions, blocks = stats.conditions_and_blocks(lines, "attention")
    texts = [stats.readable(condition).capitalize().replace(", ", "\n") for condition in conditions]
    figure, grid = new_figure(
        f"{title} on {in_print(dataset)}", [f"mean of the heads over the test split; {what_is_shown(lines)}"],
        (max(3.4, len(conditions) * max(1.1, 0.1 * len(lines))), 2.2), (len(figures), len(blocks)), gap=(0.2, 0.2),
        legend=[*texts_of(lines), UNIFORM], sharey="row")
    for row, (name, ylabel) in zip(grid, figures.items()):
        is_share = name.endswith("share")
        for axes, block in zip(row, blocks):
            for place, line in enumerate(lines):
                beside = 0.7 * ((place + 0.5) / len(lines) - 0.5)  # so that no mark hides another
                draw_intervals(axes, [i + beside for i in range(len(conditions))], line, lambda run: [
                    stats.attention_figure(run, condition, block, name) for condition in conditions], shares=is_share)
            if name == "irrelevant_share":
                for i, condition in enumerate(conditions):
                    axes.plot([i - 0.42, i + 0.42], [stats.uniform_share(lines, condition)] * 2, color="0.3",
                              linestyle="--", linewidth=1.2, label=UNIFORM)
                axes.set_ylim(0, max(axes.get_ylim()[1], axes.dataLim.y1))  # the first block's scale, if it will do
            axes.set_xticks(range(len(conditions)), texts, fontsize="small")
        row[0].set_ylabel(ylabel)
        if is_share:
            show_shares(row[0])
    for axes, block in zip(grid[0], blocks):
        axes.set_title(f"block {block}")
    return with_legend(figure)


def draw_maps(dataset, lines):
    """A few images, and the class token's maps of them in the last block, head by head: of one run of each line in
    front, and of `vit` behind them."""
    lines = [line for line in stats.keep_runs(lines, lambda run: run.maps) if line.front or line.model == BASELINE]
    if not lines:
        return None
    images, _ = lines[0].runs[0].maps
    lines = stats.keep_runs(lines, lambda run: numpy.array_equal(run.maps[0], images))  # not all show the same
    runs = {line.label: line.runs[0] for line in lines}
    heads = max(run.maps[1].shape[1] for run in runs.values())
    images = images[:max(1, 8 // heads)]
    limit = max(abs(run.maps[1][:len(images)]).max() for run in runs.values()) or 1
    seeds = " and ".join(map(str, sorted({run.settings["seed"] for run in runs.values()})))
    pitch, height = 1.04 * heads + 0.3, 1.3 + 1.15 * len(runs)
    width = len(images) * pitch
    figure, ((axes,),) = new_figure(
        f"Attention of the class token in the last block, {in_print(dataset)}", [
            f"weight on each patch, a column a head, seed {seeds}; one scale, with dashes below -5% of it"],
        (0.88 * width, 0.88 * height), left=0.4 + width_of(runs), right=1.0, bottom=0.1)
    for i, image in enumerate(images):
        show(axes, image.transpose(1, 2, 0), i * pitch + 0.52 * (heads - 1), 0, cmap="gray_r", vmin=0, vmax=255)
    for top, (label, run) in zip(itertools.count(1.3, 1.15), runs.items()):
        axes.text(-0.12, top + 0.5, label, ha="right", va="center", fontsize="small")
        for i, image in enumerate(images):
            for head, weights in enumerate(run.maps[1][i]):
                left = i * pitch + 1.04 * head
                if stats.has_background(run):
                    outline(axes, image.max(0), left, top)
                picture = show_map(axes, weights, left, top, limit)
    axes.set(xlim=(-0.02, width - 0.32), ylim=(height - 0.13, -0.02))
    axes.axis("off")
    bar = figure.colorbar(picture, cax=axes.inset_axes([1 + 0.15 / width, 0.25, 0.2 / width, 0.5]), label="weight")
    bar.ax.tick_params(labelsize="small")
    return figure


def show(axes, picture, left, top, **options):
    """A picture, 1 wide and high, with its upper left corner at (left, top) of axes whose y grows downwards."""
    axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="0.7", linewidth=0.6))
    return axes.imshow(picture, extent=(left, left + 1, top + 1, top), aspect="auto", **options)


def outline(axes, image, left, top):
    """The outline of the object of an image, where `show` would show the image."""
    if image.min() < 80 < image.max():
        y, x = ((numpy.arange(side) + 0.5) / side for side in image.shape)
        axes.contour(left + x, top + y, image, levels=[80], colors="black", linewidths=0.6)


def show_map(axes, weights, left, top, limit):
    """A map, with a dash on what is blue enough to be seen, for grey print."""
    side = len(weights)
    y, x = (numpy.argwhere(weights < -0.05 * limit).T + 0.5) / side
    axes.scatter(left + x, top + y, (24 / side) ** 2, "black", marker="_", linewidths=0.8)
    return show(axes, weights, left, top, cmap="RdBu_r", vmin=-limit, vmax=limit)
