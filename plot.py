"""Draw what train.py has recorded: charts and tables for each data set below a folder of runs.

    python plot.py runs/

Reads config.json, metrics.csv and summary.json of every finished run, and noise.csv, attention.csv and attention.npz
where they are; needs neither torch nor data. Runs that differ in their seed alone are one line, their mean. Writes into
the same folder DATASET-table.md, where there are several seeds with a test of each model against vit, and
DATASET-val-loss.png, -val-accuracy.png, -parameters.png, -lambda.png; and of the analyses DATASET-noise-table.md,
DATASET-attention-table.md and DATASET-noise.png, -relevance.png, -maps.png, -blocks.png.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import zipfile
from collections import defaultdict, namedtuple
from pathlib import Path

import matplotlib
import numpy
from matplotlib.figure import Figure

Published = namedtuple("Published", "epochs parameters val_loss test_loss test_accuracy")
PUBLISHED = {  # from NanoDiffVision's README, one run each
    ("mnist", "vit"): Published(20, 33_802, 0.638, 0.626, 0.9551),
    ("mnist", "vitbalanced"): Published(20, 55_626, 0.633, 0.624, 0.9553),
    ("mnist", "vitdiff"): Published(20, 38_106, 0.624, 0.618, 0.9575),
    ("fashionmnist", "vit"): Published(30, 33_802, 0.813, 0.826, 0.8586),
    ("fashionmnist", "vitbalanced"): Published(30, 55_626, 0.792, 0.798, 0.8679),
    ("fashionmnist", "vitdiff"): Published(30, 38_106, 0.788, 0.796, 0.8726),
}
MODELS = ["vit", "vitbalanced", "vitdiff", "vitdiffpaper", "vitdiffv2"]  # the order of lines and rows; others follow
# Okabe and Ito's colours, for colour-blind eyes; dashes and markers, for grey print.
STYLES = [dict(color=color, linestyle=dashes, marker=marker) for color, dashes, marker in [
    ("#000000", "-", "o"), ("#E69F00", (0, (6, 2)), "s"), ("#0072B2", "-", "^"), ("#D55E00", (0, (4, 1, 1, 1)), "D"),
    ("#009E73", (0, (1, 1)), "v"), ("#CC79A7", (0, (3, 1)), "P"), ("#56B4E9", (0, (8, 1, 1, 1)), "X")]]
FACTS = {"seed", "parameters", "flops_per_image", "torch", "device_name", "git_commit", "stack",
         "processes"}  # of config.json; not settings
SIZES = {"dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "patch_norm", "qkv_bias"}  # a model's own
FIGURES = ["parameters", "val_loss", "test_loss", "test_accuracy", "milliseconds_per_step"]  # needed of summary.json
# Of attention.csv, drawn or tabled.
ATTENTION_FIGURES = ["irrelevant_share", "uniform_share", "signal_to_noise", "entropy", "negative_share", "lambda"]
# Student's t of a 95% interval for 1 to 30 degrees of freedom; the last serves for more, and is 4% too wide at most.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def read_rows(path):
    """The rows of a CSV file as dicts, a number wherever a cell is one."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="") as file:
        return [{column: number(text) for column, text in row.items()} for row in csv.DictReader(file, strict=True)]


def read_noise(path):
    """{corruption: accuracies, one a severity} of noise.csv."""
    noise = defaultdict(list)
    for row in sorted(read_rows(path), key=lambda row: row["severity"]):
        noise[row["corruption"]].append(row["test_accuracy"])
    if not all(math.isfinite(accuracy) for accuracies in noise.values() for accuracy in accuracies):
        raise ValueError("not finite")
    return dict(noise=noise)


def read_attention(path):
    """{condition: {block: {figure: its mean over the heads}}} of attention.csv."""
    heads = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        heads[row["condition"]][int(row["block"])].append(row)
    return dict(attention={
        condition: {block: {figure: statistics.fmean(row[figure] for row in rows) for figure in ATTENTION_FIGURES}
                    for block, rows in blocks.items()} for condition, blocks in heads.items()})


def read_maps(path):
    """Of attention.npz the images (8, C, H, W), and as maps the class token's weights on their patches in the last
    block, the mean of the heads (8, H / patch, W / patch)."""
    with numpy.load(path) as arrays:
        last = max((name for name in arrays if name.startswith("map_")), key=lambda name: int(name[4:]))
        weights = arrays[last][:, :, 0, 1:].mean(1, dtype=float)
        side = math.isqrt(weights.shape[1])
        return dict(images=arrays["images"], maps=weights.reshape(-1, side, side))


def read_run(folder):
    """A finished run's config and summary (dicts), metrics (column: list of floats, one an epoch) and analysis, which
    has what read_noise, read_attention and read_maps return where their files are.

    Raises ValueError, which says what is wrong with it, for anything else.
    """
    if (folder / "config.json").exists() and not (folder / "summary.json").exists():
        raise ValueError("unfinished: run its command again to go on")
    name, analysis = "config.json", {}
    try:
        config = json.loads((folder / name).read_text())
        name = "summary.json"
        summary = json.loads((folder / name).read_text())
        right = (all(math.isfinite(summary[figure]) for figure in FIGURES)
                 and isinstance(config["seed"], int) and isinstance(config["dataset"] + config["model"], str))
        name = "metrics.csv"
        rows = read_rows(folder / name)
        metrics = {column: [row[column] for row in rows] for column in rows[0]}
        right = (right and all(math.isfinite(value) for column in metrics.values() for value in column)
                 and {"val_loss", "val_accuracy"} <= metrics.keys()
                 and metrics["epoch"] == list(range(1, config["epochs"] + 1)))
        for name, read in [("noise.csv", read_noise), ("attention.csv", read_attention), ("attention.npz", read_maps)]:
            if (folder / name).exists():
                analysis |= read(folder / name)
    except FileNotFoundError:
        raise ValueError(f"has no {name}") from None
    except (OSError, KeyError, IndexError, TypeError, AttributeError, ValueError, EOFError, csv.Error,
            zipfile.BadZipFile) as error:
        raise ValueError(f"damaged: {name} ({type(error).__name__})") from None
    if not right:
        raise ValueError("damaged: its figures are not finite, or not one row an epoch")
    return config, metrics, summary, analysis


def find_runs(root):
    """The finished runs in and below a folder, and a line for each folder that is skipped."""
    runs, skipped = [], []
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir())]:
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        if any((folder / name).exists() for name in ("config.json", "metrics.csv", "summary.json")):
            try:
                runs.append((folder, *read_run(folder)))
            except ValueError as error:
                skipped.append(f"{folder}: {error}")
        elif folder != root and not any(path.is_dir() for path in folder.iterdir()):
            skipped.append(f"{folder}: not a run")
    return runs, skipped


def group_runs(runs):
    """Sort runs into {data set: {label: runs}}: a group is all seeds of one model and one set of settings.

    The label is the model's name and, where not most groups share them, its settings: a line of fewer epochs, say, is
    never mistaken for a rival of the others. Returns also a line for each run left out because its group has that seed.
    """
    runs_of, skipped = defaultdict(dict), []  # {settings: {seed: run}}
    for folder, config, metrics, summary, analysis in runs:
        settings = {name: value for name, value in config.items() if name not in FACTS}
        seeds = runs_of[json.dumps(settings, sort_keys=True)]
        if config["seed"] in seeds:
            skipped.append(f"{folder}: same settings and seed as {seeds[config['seed']]['folder']}")
        else:
            seeds[config["seed"]] = dict(folder=folder, seed=config["seed"], settings=settings, metrics=metrics,
                                         summary=summary, analysis=analysis)
    groups = [[seeds[seed] for seed in sorted(seeds)] for seeds in runs_of.values()]

    def rank(members):
        model = members[0]["settings"]["model"]
        return MODELS.index(model) if model in MODELS else len(MODELS), model

    datasets = defaultdict(dict)
    for members in sorted(groups, key=rank):
        own = members[0]["settings"]
        rivals = [other[0]["settings"] for other in groups if other[0]["settings"]["dataset"] == own["dataset"]]
        unusual = []
        for name, value in own.items():
            peers = [other.get(name) for other in rivals if name not in SIZES or other["model"] == own["model"]]
            if name != "model" and 2 * peers.count(value) <= len(peers):
                unusual.append(f"{name} {value}")
        datasets[own["dataset"]][", ".join([own["model"], *unusual])] = members
    return datasets, skipped


def pick_styles(datasets):
    """{label: line style}, the same in every chart; the models of the design have their own."""
    labels = MODELS + [label for groups in datasets.values() for label in groups]
    return {label: STYLES[i % len(STYLES)] for i, label in enumerate(dict.fromkeys(labels))}


def mean_and_deviation(columns):
    """Means and sample standard deviations over runs (0 for one run): lists of equal length, one a run."""
    return ([statistics.fmean(values) for values in zip(*columns)],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in zip(*columns)])


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


def draw_mean(axes, places, columns, style, **options):
    """A line, the mean of columns (one a run), with a band of one standard deviation if there are several: the values
    of the line and of the band's lower and upper edges."""
    means, deviations = mean_and_deviation(columns)
    axes.plot(places, means, **style, **options)
    low, high = ([mean + sign * deviation for mean, deviation in zip(means, deviations)] for sign in (-1, 1))
    if len(columns) > 1:
        axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return means, low, high


def tidy(axes):
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure, columns=5):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False,
                  fontsize="small")


def draw_lines(axes, groups, column, styles, number, published, skip):
    """A line a group, its mean over seeds with a band of one standard deviation: what `label_ends` needs of each end.

    column: of metrics.csv. number: how a value is written. published: {label: value}, faint marks at the right edge.
    skip: the share of the epochs that may leave the frame, so that their steepness does not flatten all that follows.
    """
    ends = []  # (epoch, value, text, colour, opacity)
    seen = list(published.values())  # the heights that the frame must hold
    last = max(len(run["metrics"][column]) for run in all_runs(groups))
    for label, members in groups.items():
        columns = [run["metrics"][column] for run in members]
        means, low, high = draw_mean(
            axes, range(1, len(columns[0]) + 1), columns, styles[label], linewidth=1.6, markersize=4.5,
            markevery=max(1, len(columns[0]) // 10),
            label=f"{label} ({len(members)} seed{'s' if len(members) > 1 else ''})")
        ends.append((len(means), means[-1], f"{label} {number(means[-1])}", styles[label]["color"], 1.0))
        first_seen = min(int(skip * last), len(means) - 1)
        seen += low[first_seen:] + high[first_seen:]
    for label, value in published.items():
        axes.plot([last], [value], marker=styles[label]["marker"], color=styles[label]["color"], alpha=0.5,
                  markerfacecolor="none", markersize=8, linestyle="none")
        ends.append((last, value, f"{label}, published {number(value)}", styles[label]["color"], 0.65))
    axes.set_xlim(1 - max(0.02 * last, 0.1), last + max(0.02 * last, 0.1))
    margin = 0.06 * (max(seen) - min(seen)) or 0.01
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel("epoch")
    tidy(axes)
    return ends


def label_ends(axes, ends, size):
    """Write each end's text right of the frame, none over another, with a thin line to where it belongs."""
    axes.figure.draw_without_rendering()  # so that the layout is known
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = 1.45 * size / points * (high - low)
    heights = spread([end[1] for end in ends], gap, low + gap / 2, high - gap / 2)
    for (epoch, value, text, color, alpha), height in zip(ends, heights):
        axes.annotate(text, xy=(epoch, value), xytext=(1.03, height), textcoords=axes.get_yaxis_transform(),
                      fontsize=size, color=color, alpha=alpha, va="center", annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=color, alpha=0.4 * alpha, linewidth=0.7, shrinkA=0,
                                      relpos=(0, 0.5)))


def draw_curves(title, panels, ylabel, number, styles, published=(), note="", skip=0.0):
    """A figure of curves over epochs, panels side by side.

    panels: {heading: (column, groups)}. note: a line under the title if anything published is marked. The rest is as in
    `draw_lines`.
    """
    figure = Figure(figsize=(max(8, 5.2 * len(panels)), 4.8), layout="constrained")
    small = matplotlib.rcParams["font.size"] - 1.5
    ends = []
    for axes, (heading, (column, groups)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        ends.append((axes, draw_lines(axes, groups, column, styles, number, dict(published), skip)))
        axes.set_title(heading, fontsize="medium")
    figure.axes[0].set_ylabel(ylabel)
    several = any(len(members) > 1 for _, groups in panels.values() for members in groups.values())
    notes = ["mean over seeds, band: one standard deviation"] * several + ([note] if published else [])
    figure.suptitle("\n".join([title, *notes]), fontsize="medium")
    legend_below(figure, columns=3)
    for axes, marks in ends:
        label_ends(axes, marks, small)
    return figure


def draw_parameters(dataset, groups, styles, published):
    """Test accuracy against parameters, with 95% intervals over seeds; where figures are published, {model: figures},
    once beside them and once alone, closer."""
    accuracies = {label: [run["summary"]["test_accuracy"] for run in members] for label, members in groups.items()}
    counts = [members[0]["summary"]["parameters"] for members in groups.values()]
    gap = 0.025 * (max(counts) - min(counts)) or 1  # so that no interval hides another
    places = spread(counts, gap, min(counts) - len(counts) * gap, max(counts) + len(counts) * gap)
    panels = [published, {}] if published else [{}]
    figure = Figure(figsize=(max(6.5, 5.2 * len(panels)), 4.4), layout="constrained")
    for axes, beside in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for (label, values), place in zip(accuracies.items(), places):
            axes.errorbar(place, statistics.fmean(values), confidence(values), **styles[label] | dict(linestyle="none"),
                          markersize=6, capsize=3, label=label)
        for model, figures in beside.items():
            axes.plot(figures.parameters, figures.test_accuracy, **styles[model] | dict(linestyle="none"),
                      markerfacecolor="none", markersize=8, alpha=0.7)
        if published:
            axes.set_title("hollow: published, one run each" if beside else "the same without the published",
                           fontsize="medium")
        axes.margins(0.12)
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}")
        tidy(axes)
    figure.axes[0].set_ylabel("test accuracy")
    figure.suptitle(f"{dataset}: test accuracy by parameters\n" + seeds_note(
        groups, "mean over seeds with its 95% interval; neighbours moved apart"), fontsize="medium")
    legend_below(figure)
    return figure


def make_charts(dataset, groups, styles):
    """{name: figure} of a data set's training."""
    models = dict.fromkeys(members[0]["settings"]["model"] for members in groups.values())
    published = {model: PUBLISHED[dataset, model] for model in models if (dataset, model) in PUBLISHED}
    epochs = max((figures.epochs for figures in published.values()), default=0)
    charts = {
        "val-loss": draw_curves(f"{dataset}: validation loss", {"": ("val_loss", groups)}, "validation loss",
                                "{:.3f}".format, styles,
                                {model: figures.val_loss for model, figures in published.items()},
                                f"hollow marks: published, one run of {epochs} epochs", skip=0.1),
        "val-accuracy": draw_curves(f"{dataset}: validation accuracy", {"": ("val_accuracy", groups)},
                                    "validation accuracy", "{:.2%}".format, styles, skip=0.1),
        "parameters": draw_parameters(dataset, groups, styles, published),
    }
    differential = {label: members for label, members in groups.items() if "lambda_0" in members[0]["metrics"]}
    columns = sorted({column for members in differential.values() for column in members[0]["metrics"]
                      if column.startswith("lambda_")}, key=lambda column: int(column.removeprefix("lambda_")))
    if columns:
        panels = {f"block {column.removeprefix('lambda_')}": (column, {
            label: members for label, members in differential.items() if column in members[0]["metrics"]})
            for column in columns}
        charts["lambda"] = draw_curves(f"{dataset}: lambda, the weight of the second attention map", panels, "lambda",
                                       "{:.3f}".format, styles)
    return charts


def with_analysis(groups, name):
    """{label: runs}, of only those whose analysis has that part."""
    kept = {label: [run for run in members if name in run["analysis"]] for label, members in groups.items()}
    return {label: members for label, members in kept.items() if members}


def all_runs(groups):
    return [run for members in groups.values() for run in members]


def shared_corruptions(groups):
    """The corruptions that every run has met."""
    first, *others = (run["analysis"]["noise"] for run in all_runs(groups))
    return [name for name in first if all(name in other for other in others)]


def attention_of(run, condition, block, figure):
    """A figure of a run's attention; not a number where it has no such block or was not shown the condition."""
    return run["analysis"]["attention"].get(condition, {}).get(block, {}).get(figure, math.nan)


def attention_axes(groups):
    """Conditions and blocks of all runs."""
    found = [run["analysis"]["attention"] for run in all_runs(groups)]
    return (list(dict.fromkeys(condition for attention in found for condition in attention)),
            sorted({block for attention in found for blocks in attention.values() for block in blocks}))


def last_block(members):
    """The number of the last block of runs of one model."""
    return attention_axes({"": members})[1][-1]


def training_condition(run):
    """The condition, among those its attention was measured on, that is most like its training."""
    trained = f"{run['settings'].get('distractors', 0)}_distractors"
    return trained if trained in run["analysis"]["attention"] else "clean"


def uniform_share(groups, condition):
    """What uniform attention would give to irrelevant patches, by any run that was shown the condition."""
    return next(blocks["uniform_share"] for run in all_runs(groups)
                for blocks in run["analysis"]["attention"].get(condition, {}).values())


def readable(name):
    """A corruption's or condition's name in words: 4_distractors, gaussian_noise_3 for a corruption of severity 3."""
    words = name.split("_")
    if len(words) > 1 and words[-1].isdigit():
        return f"{' '.join(words[:-1])}, severity {words[-1]}"
    return " ".join(words)


def seeds_note(groups, what):
    """`what`, where there are several seeds to show it of, or that there is one."""
    return what if any(len(members) > 1 for members in groups.values()) else "one seed a model: no interval"


def side_by_side(width, groups):
    """How far from the middle each group stands, so that together they take this width and none hides another."""
    return [width * ((place + 0.5) / len(groups) - 0.5) for place in range(len(groups))]


def draw_noise(dataset, groups, styles):
    """Accuracy by severity of each corruption, a panel a corruption; severity 0 is the clean test split."""
    names = shared_corruptions(groups)
    rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(11, 0.6 + 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names):
        for label, members in groups.items():
            columns = [[run["summary"]["test_accuracy"], *run["analysis"]["noise"][name]] for run in members]
            draw_mean(axes, range(len(columns[0])), columns, styles[label], linewidth=1.5, markersize=4.5, label=label)
        axes.set_title(readable(name), fontsize="medium")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        tidy(axes)
    for axes in panels.flat[len(names):]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("severity (0: clean)")
    figure.suptitle(f"{dataset}: trained without corruption, tested with it\n"
                    + seeds_note(groups, "mean over seeds, band: one standard deviation"), fontsize="medium")
    legend_below(figure)
    return figure


def draw_relevance(dataset, groups, styles):
    """The share of the class token's weight on patches without the object: a bar a model and condition, a panel a
    block."""
    conditions, blocks = attention_axes(groups)
    figure = Figure(figsize=(11, 0.8 + 3 * len(blocks)), layout="constrained")
    for axes, block in zip(figure.subplots(len(blocks), 1, sharex=True, sharey=True, squeeze=False).flat, blocks):
        for offset, (label, members) in zip(side_by_side(0.8, groups), groups.items()):
            values = [[attention_of(run, condition, block, "irrelevant_share") for run in members]
                      for condition in conditions]
            axes.bar([i + offset for i in range(len(conditions))], [statistics.fmean(own) for own in values],
                     0.8 / len(groups), color=styles[label]["color"], alpha=0.85, edgecolor="white", label=label,
                     yerr=[confidence(own) or 0.0 for own in values] if len(members) > 1 else None, capsize=2)
        for i, condition in enumerate(conditions):
            axes.plot([i - 0.45, i + 0.45], [uniform_share(groups, condition)] * 2, color="0.3", linestyle="--",
                      linewidth=1.2, label="uniform attention" if i == 0 else None)
        axes.set_title(f"block {block}", fontsize="medium")
        axes.set_ylabel("share of its weight")
        axes.set_ylim(bottom=0)  # where Student's t of few seeds goes below
        axes.set_xticks(range(len(conditions)), map(readable, conditions))
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        tidy(axes)
    figure.suptitle(f"{dataset}: the share of its absolute weight that the class token gives to patches without any of "
                    "the object\nlower is better; mean of the heads over the test split; "
                    + seeds_note(groups, "mean over seeds with its 95% interval"), fontsize="medium")
    legend_below(figure, columns=6)
    return figure


def draw_maps(dataset, groups):
    """The eight images, and under them each model's class-token map in the last block with the image's outline."""
    runs = {label: members[0] for label, members in groups.items()}
    images = next(iter(runs.values()))["analysis"]["images"]
    figure = Figure(figsize=(11, 0.7 + 1.3 * (1 + len(runs))), layout="constrained")
    rows = figure.subplots(1 + len(runs), len(images), squeeze=False)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.8")
    for axes, image in zip(rows[0], images):
        axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray_r", vmin=0, vmax=255)
    rows[0, 0].set_ylabel("image", fontsize="small")
    for row, (label, run) in zip(rows[1:], runs.items()):
        maps = run["analysis"]["maps"]
        largest, size = abs(maps).max(), images.shape[-1]
        for axes, image, weights in zip(row, run["analysis"]["images"], maps):
            shown = axes.imshow(weights, cmap="RdBu_r", vmin=-largest, vmax=largest,
                                extent=(-0.5, size - 0.5, size - 0.5, -0.5))
            axes.contour(image.max(0), levels=[80], colors="black", linewidths=0.6)
        row[0].set_ylabel(label.replace(", ", "\n"), fontsize="small")
        bar = figure.colorbar(shown, ax=row.tolist(), pad=0.01, aspect=8)
        bar.ax.tick_params(labelsize="x-small")
    figure.suptitle(f"{dataset}: the class token's weight on each patch in the last block, mean of the heads; one "
                    "seed\nred: positive, blue: negative, white: none; one scale a row; black: outline of the image",
                    fontsize="medium")
    return figure


def draw_blocks(dataset, groups, styles):
    """Entropy, share of negative weight and lambda of the class token's row by block: a row a figure, a column a
    condition, clean and noisy."""
    conditions, blocks = attention_axes(groups)
    conditions = [conditions[0], *(name for name in conditions if name.startswith("gaussian"))]
    titles = dict(entropy="entropy (nats)", negative_share="share of negative weight", **{"lambda": "lambda"})
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    for row, (name, title) in zip(figure.subplots(3, len(conditions), sharex=True, sharey="row", squeeze=False),
                                  titles.items()):
        for axes, condition in zip(row, conditions):
            for offset, (label, members) in zip(side_by_side(0.25, groups), groups.items()):
                values = [[attention_of(run, condition, block, name) for run in members] for block in blocks]
                axes.errorbar([block + offset for block in blocks], [statistics.fmean(own) for own in values],
                              [confidence(own) or 0.0 for own in values] if len(members) > 1 else None,
                              **styles[label], linewidth=1.5, markersize=5, capsize=2, label=label)
            axes.set_xticks(blocks, [f"block {block}" for block in blocks])
            axes.margins(x=0.15)
            tidy(axes)
        row[0].set_ylabel(title)
        if name == "entropy":
            for axes, condition in zip(row, conditions):
                axes.set_title(readable(condition), fontsize="medium")
    figure.suptitle(f"{dataset}: the class token's row of the attention maps, mean of the heads over the test split\n"
                    + seeds_note(groups, "mean over seeds with its 95% interval"), fontsize="medium")
    legend_below(figure)
    return figure


def confidence(values):
    """Half the 95% confidence interval of the mean, by Student's t; None for a single value, or one that is none."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    return T_95[min(len(values) - 2, len(T_95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def bootstrap_interval(values):
    """The 95% interval of the mean by the bootstrap: percentiles over 100,000 resamples, the same at every call."""
    chosen = numpy.random.default_rng(0).integers(len(values), size=(100_000, len(values)))
    return numpy.percentile(numpy.asarray(values)[chosen].mean(1), [2.5, 97.5]).tolist()


def sign_flip_p(differences):
    """Two-sided p of the sign-flip permutation test: of all choices of signs for the differences the share whose sum is
    as far from 0 as theirs or further. Of more than 20, each further one has random signs, in 2^20 choices."""
    sums, random = numpy.zeros(1), numpy.random.default_rng(0)
    for difference in differences:
        sums = (numpy.concatenate([sums + difference, sums - difference]) if len(sums) < 2**20
                else sums + difference * random.choice([-1, 1], len(sums)))
    return numpy.mean(abs(sums) >= abs(sum(differences)) - 1e-12).item()


def pair_with_vit(groups):
    """{label: pairs of a run and the run of `vit` of the same seed and settings, sizes aside}, where there are two."""
    def settings_and_seed(run):
        kept = {name: value for name, value in run["settings"].items() if name not in SIZES and name != "model"}
        return json.dumps(kept, sort_keys=True), run["seed"]

    base = {settings_and_seed(run): run for run in groups.get("vit", [])}
    pairs = {label: [(run, base[settings_and_seed(run)]) for run in members if settings_and_seed(run) in base]
             for label, members in groups.items() if label != "vit"}
    return {label: members for label, members in pairs.items() if len(members) > 1}


def comparison_table(groups, measures):
    """How each model differs from `vit` of the same seeds, in Markdown; nothing where there are no such pairs.

    measures: {heading: (figure of a run, number of digits, whether more is better)}.
    """
    lines = []
    for label, pairs in pair_with_vit(groups).items():
        cells = [label]
        for figure_of, digits, more_is_better in measures.values():
            differences = [figure_of(run) - figure_of(base) for run, base in pairs]
            mean, *interval = (f"{value:+.{digits}f}"
                               for value in [statistics.fmean(differences), *bootstrap_interval(differences)])
            better = sum((difference > 0) == more_is_better and difference != 0 for difference in differences)
            cells += [f"{mean} ({' to '.join(interval)})", f"{better} of {len(pairs)}",
                      f"{sign_flip_p(differences):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    return "\n".join([
        "", "Difference from `vit` of the same seed: mean over seeds (95% interval by bootstrap over seeds), in how "
        "many seeds it is for the better, and p of the exact sign-flip permutation test, two-sided, not corrected for "
        "the number of comparisons.", "",
        f"| model | {' | '.join(f'{heading} | better | p' for heading in measures)} |",
        "|---" + "|---:" * 3 * len(measures) + "|", *lines]) + "\n"


def summary_cells(groups):
    """{label: cells}: of each model its losses, accuracy and milliseconds a step, the best of a column bold."""
    columns = [("val_loss", min, "{:.4f}".format), ("test_loss", min, "{:.4f}".format),
               ("test_accuracy", max, "{:.2%}".format), ("milliseconds_per_step", min, "{:.1f}".format)]
    cells = {label: [] for label in groups}
    for name, best, number in columns:
        means = {label: statistics.fmean(run["summary"][name] for run in members) for label, members in groups.items()}
        for label, members in groups.items():
            timed = name == "milliseconds_per_step"  # seeds of a stack are timed together
            half = None if timed else confidence([run["summary"][name] for run in members])
            text = number(means[label])
            if number(best(means.values())) == text and len(groups) > 1:
                text = f"**{text}**"
            cells[label].append(text + (f" ± {number(half)}" if half is not None else ""))
    return cells


def write_table(dataset, groups):
    """The data set's tables in Markdown: the figures of each model, and its comparison with `vit`."""
    cells = summary_cells(groups)
    published = {label: figures for label, members in groups.items()  # of a model of other sizes nothing is published
                 if (figures := PUBLISHED.get((dataset, label)))
                 and abs(members[0]["summary"]["parameters"] / figures.parameters - 1) <= 0.03}
    lines = [f"## {dataset}", "",
             "| model | parameters | seeds | validation loss | test loss | test accuracy | ms a step |"
             + (" published |" if published else ""), "|---|---:|---:|---:|---:|---:|---:|" + "---|" * bool(published)]
    for label, members in groups.items():
        row = [label, f"{members[0]['summary']['parameters']:,}", str(len(members)), *cells[label]]
        if label in published:
            figures = published[label]
            row.append(f"{figures.val_loss:.3f}, {figures.test_loss:.3f}, {figures.test_accuracy:.2%}")
        elif published:
            row.append("")
        lines.append(f"| {' | '.join(row)} |")
    if any(len(members) > 1 for members in groups.values()):
        lines += ["", "Mean ± half the 95% confidence interval over seeds (Student's t)."]
    if published:
        epochs = max(figures.epochs for figures in published.values())
        lines += ["", f"Published: validation loss, test loss and test accuracy of one run of {epochs} epochs."]
    return "\n".join(lines) + "\n" + comparison_table(groups, {
        "test accuracy, points": (lambda run: 100 * run["summary"]["test_accuracy"], 2, True),
        "test loss": (lambda run: run["summary"]["test_loss"], 4, False)})


def draw_analyses(dataset, groups, styles):
    """{name: figure} of what the analyses of a data set's runs have found."""
    noise, attention, maps = (with_analysis(groups, name) for name in ("noise", "attention", "maps"))
    charts = {}
    if noise:
        charts["noise"] = draw_noise(dataset, noise, styles)
    if attention:
        charts["relevance"] = draw_relevance(dataset, attention, styles)
        charts["blocks"] = draw_blocks(dataset, attention, styles)
    if maps:
        charts["maps"] = draw_maps(dataset, maps)
    return charts


def noise_table(dataset, groups):
    """Mean corruption errors in Markdown: the mean over severities of the error, and its ratio to that of `vit`."""
    names = shared_corruptions(groups)

    def errors(run):  # of each corruption, then their mean
        means = [1 - statistics.fmean(run["analysis"]["noise"][name]) for name in names]
        return [*means, statistics.fmean(means)]

    of_vit, _ = mean_and_deviation([errors(run) for run in groups["vit"]]) if "vit" in groups else (None, None)
    lines = [f"## {dataset}: mean error over severities 1 to 5" + (" (ratio to that of vit)" if of_vit else ""), "",
             f"| model | seeds | {' | '.join(map(readable, names))} | mean |",
             "|---" + "|---:" * (len(names) + 2) + "|"]
    for label, members in groups.items():
        columns = list(zip(*(errors(run) for run in members)))
        cells = [f"{statistics.fmean(column):.1%}" for column in columns]
        if len(members) > 1:
            cells[-1] += f" ± {confidence(columns[-1]):.1%}"
        if of_vit:
            cells = [f"{cell} ({statistics.fmean(column) / base:.2f})"
                     for cell, column, base in zip(cells, columns, of_vit)]
        lines.append(f"| {label} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + comparison_table(
        groups, {"mean error, points": (lambda run: 100 * errors(run)[-1], 2, False)})


def attention_table(dataset, groups):
    """The share of the class token's weight on irrelevant patches in the last block, and the ratio of relevant to
    irrelevant weight per patch, in Markdown."""
    conditions, _ = attention_axes(groups)
    lines = [f"## {dataset}: attention to the irrelevant in the last block (signal-to-noise ratio)", "",
             f"| model | seeds | {' | '.join(map(readable, conditions))} |",
             "|---" + "|---:" * (len(conditions) + 1) + "|"]
    for label, members in groups.items():
        cells, block = [], last_block(members)
        for condition in conditions:
            share, ratio = ([attention_of(run, condition, block, name) for run in members]
                            for name in ("irrelevant_share", "signal_to_noise"))
            half = confidence(share)
            half = f" ± {half:.1%}" if half is not None else ""
            text = f"{statistics.fmean(share):.1%}{half} ({statistics.fmean(ratio):.2f})"
            cells.append("" if math.isnan(sum(share)) else text)
        lines.append(f"| {label} | {len(members)} | {' | '.join(cells)} |")
    uniform = [f"{uniform_share(groups, condition):.1%} (1.00)" for condition in conditions]
    lines.append(f"| uniform attention | | {' | '.join(uniform)} |")
    return "\n".join(lines) + "\n" + comparison_table(groups, {"irrelevant share as in training, points": (
        lambda run: 100 * attention_of(run, training_condition(run), last_block([run]), "irrelevant_share"), 2, False)})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    """Returns the exit status: 0, or 2 where there is nothing to draw or nowhere to draw it."""
    parser = Parser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="a folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: into the folder of runs)")
    parser.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.runs.is_dir():
        parser.error(f"{args.runs} is not a folder: name the one that train.py writes to")
    runs, unreadable = find_runs(args.runs)
    datasets, doubled = group_runs(runs)
    for line in unreadable + doubled:
        print(f"skipped {line}", file=sys.stderr)
    if not datasets:
        parser.error(f"there is no finished run in {args.runs}: train one with train.py first")
    matplotlib.rcParams.update({"font.size": 11, "savefig.dpi": 150, "svg.hashsalt": "plot"})
    out, styles = args.out or args.runs, pick_styles(datasets)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for dataset, groups in datasets.items():
            tables = dict(table=write_table(dataset, groups))
            for name, make_table in [("noise", noise_table), ("attention", attention_table)]:
                if with_analysis(groups, name):
                    tables[f"{name}-table"] = make_table(dataset, with_analysis(groups, name))
            for name, table in tables.items():
                print(table)
                (out / f"{dataset}-{name}.md").write_text(table)
            charts = make_charts(dataset, groups, styles) | draw_analyses(dataset, groups, styles)
            for name, figure in charts.items():
                path = out / f"{dataset}-{name}.{args.format}"
                figure.savefig(path, facecolor="white", metadata={"CreationDate": None} if args.format == "pdf"
                               else {"Date": None} if args.format == "svg" else None)
                print(path)
    except OSError as error:
        parser.error(f"cannot write into {out}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
