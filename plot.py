"""Draw what train.py has recorded: charts and a table for each data set below a folder of runs.

    python plot.py runs/

Reads config.json, metrics.csv and summary.json of every finished run and nothing else; needs neither torch nor data.
Runs that differ in their seed alone are one line, their mean. Writes DATASET-val-loss.png, DATASET-val-accuracy.png,
DATASET-lambda.png and DATASET-table.md into the same folder.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# From NanoDiffVision's README, one run each: epochs and validation loss.
PUBLISHED = {
    ("mnist", "vit"): (20, 0.638),
    ("mnist", "vitbalanced"): (20, 0.633),
    ("mnist", "vitdiff"): (20, 0.624),
    ("fashionmnist", "vit"): (30, 0.813),
    ("fashionmnist", "vitbalanced"): (30, 0.792),
    ("fashionmnist", "vitdiff"): (30, 0.788),
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
# Student's t of a 95% interval for 1 to 30 degrees of freedom; the last serves for more, and is 4% too wide at most.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def read_run(folder):
    """A finished run's config and summary (dicts) and metrics (column: list of floats, one an epoch).

    Raises ValueError, which says what is wrong with it, for anything else.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        if not (folder / "summary.json").exists():
            raise ValueError("unfinished: run its command again to go on")
        summary = json.loads((folder / "summary.json").read_text())
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        metrics = {column: [float(row[column]) for row in rows] for column in rows[0]}
        right = (all(math.isfinite(summary[name]) for name in FIGURES)
                 and all(math.isfinite(value) for column in metrics.values() for value in column)
                 and {"val_loss", "val_accuracy"} <= metrics.keys()
                 and metrics["epoch"] == list(range(1, config["epochs"] + 1))
                 and isinstance(config["seed"], int) and isinstance(config["dataset"] + config["model"], str))
    except FileNotFoundError as error:
        raise ValueError(f"has no {Path(error.filename).name}") from None
    except (OSError, KeyError, IndexError, TypeError, AttributeError, csv.Error, json.JSONDecodeError,
            UnicodeDecodeError) as error:
        raise ValueError(f"damaged: {error!r}") from None
    if not right:
        raise ValueError("damaged: its figures are not finite, or not one row an epoch")
    return config, metrics, summary


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
    for folder, config, metrics, summary in runs:
        settings = {name: value for name, value in config.items() if name not in FACTS}
        seeds = runs_of[json.dumps(settings, sort_keys=True)]
        if config["seed"] in seeds:
            skipped.append(f"{folder}: same settings and seed as {seeds[config['seed']]['folder']}")
        else:
            seeds[config["seed"]] = dict(folder=folder, settings=settings, metrics=metrics, summary=summary)
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


def draw_lines(axes, groups, column, styles, number, published, skip):
    """A line a group, its mean over seeds with a band of one standard deviation: what `label_ends` needs of each end.

    column: of metrics.csv. number: how a value is written. published: {label: value}, faint marks at the right edge.
    skip: the share of the epochs that may leave the frame, so that their steepness does not flatten all that follows.
    """
    ends = []  # (epoch, value, text, colour, opacity)
    for label, members in groups.items():
        columns = [run["metrics"][column] for run in members]
        epochs = range(1, len(columns[0]) + 1)
        means, deviations = mean_and_deviation(columns)
        axes.plot(epochs, means, **styles[label], linewidth=1.6, markersize=4.5, markevery=max(1, len(means) // 10),
                  label=f"{label} ({len(members)} seed{'s' if len(members) > 1 else ''})")
        if len(members) > 1:
            axes.fill_between(epochs, [m - d for m, d in zip(means, deviations)],
                              [m + d for m, d in zip(means, deviations)], color=styles[label]["color"], alpha=0.15,
                              linewidth=0)
        ends.append((len(means), means[-1], f"{label} {number(means[-1])}", styles[label]["color"], 1.0))
    last = max(end[0] for end in ends)
    for label, value in published.items():
        axes.plot([last], [value], marker=styles[label]["marker"], color=styles[label]["color"], alpha=0.5,
                  markerfacecolor="none", markersize=8, linestyle="none")
        ends.append((last, value, f"{label}, published {number(value)}", styles[label]["color"], 0.65))
    axes.set_xlim(1 - max(0.02 * last, 0.1), last + max(0.02 * last, 0.1))
    seen = [y for line in axes.get_lines() for x, y in line.get_xydata()
            if x > skip * last or x == line.get_xdata()[-1]]
    margin = 0.06 * (max(seen) - min(seen)) or 0.01
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel("epoch")
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
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
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=small)
    for axes, marks in ends:
        label_ends(axes, marks, small)
    return figure


def make_charts(dataset, groups, styles):
    """{name: figure} of a data set."""
    models = dict.fromkeys(members[0]["settings"]["model"] for members in groups.values())
    published = {model: PUBLISHED[dataset, model][1] for model in models if (dataset, model) in PUBLISHED}
    epochs = max((PUBLISHED[dataset, model][0] for model in published), default=0)
    charts = {
        "val-loss": draw_curves(f"{dataset}: validation loss", {"": ("val_loss", groups)}, "validation loss",
                                "{:.3f}".format, styles, published,
                                f"hollow marks: published, one run of {epochs} epochs", skip=0.1),
        "val-accuracy": draw_curves(f"{dataset}: validation accuracy", {"": ("val_accuracy", groups)},
                                    "validation accuracy", "{:.2%}".format, styles, skip=0.1),
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


def confidence(values):
    """Half the 95% confidence interval of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    return T_95[min(len(values) - 2, len(T_95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def write_table(dataset, groups):
    """The data set's table in Markdown; the best of a column is bold."""
    columns = [("val_loss", min, "{:.4f}".format), ("test_loss", min, "{:.4f}".format),
               ("test_accuracy", max, "{:.2%}".format), ("milliseconds_per_step", min, "{:.1f}".format)]
    cells = {label: [] for label in groups}
    for name, best, number in columns:
        means = {label: statistics.fmean(run["summary"][name] for run in members) for label, members in groups.items()}
        for label, members in groups.items():
            half = confidence([run["summary"][name] for run in members])
            text = number(means[label])
            if number(best(means.values())) == text and len(groups) > 1:
                text = f"**{text}**"
            cells[label].append(text + (f" ± {number(half)}" if half is not None else ""))
    lines = [f"## {dataset}", "",
             "| model | parameters | seeds | validation loss | test loss | test accuracy | ms a step |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for label, members in groups.items():
        row = [label, f"{members[0]['summary']['parameters']:,}", str(len(members)), *cells[label]]
        lines.append(f"| {' | '.join(row)} |")
    if any(len(members) > 1 for members in groups.values()):
        lines += ["", "Mean ± half the 95% confidence interval over seeds (Student's t)."]
    return "\n".join(lines) + "\n"


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
            table = write_table(dataset, groups)
            print(table)
            (out / f"{dataset}-table.md").write_text(table)
            for name, figure in make_charts(dataset, groups, styles).items():
                path = out / f"{dataset}-{name}.{args.format}"
                figure.savefig(path, facecolor="white", metadata={"CreationDate": None} if args.format == "pdf"
                               else {"Date": None} if args.format == "svg" else None)
                print(path)
    except OSError as error:
        parser.error(f"cannot write into {out}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
