"""Draw charts and tables of runs, and one page that shows them all, with your own runs in front of the reference runs.

    python plot.py runs/

draws the finished runs of each folder that is named. The runs of its `reference` folder are drawn behind them, thin and
muted, or alone for a data set of which the folder has no other run. Runs that differ in their seed alone are one line,
their mean. The command needs neither torch nor data. It prints a short table for each data set, and writes these files
into runs/report/: index.html, the page; charts, DATASET-CHART.png; tables, DATASET-TABLE.md; with --compare
comparisons.md.
"""

import functools
import html
import io
import itertools
import os
import re
import sys
import textwrap
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from urllib.parse import quote

import charts
import command
import records
import report
import stats
from command import UserError
from report import figure_column
from stats import BASELINE, compare_lines, test_accuracy

QUESTIONS = ["How accurate?", "How robust?", "Why?", "How was it trained?"]
ACCURATE, ROBUST, WHY, TRAINED = QUESTIONS
# Of each chart a function of (data set, lines) that makes its figure, or None where there is nothing to show; the
# question that it answers; and how to read it, in one sentence.
CHARTS = {
    "parameters": (
        charts.draw_parameters, ACCURATE,
        "The higher a mark, the more accurate the model, and the further right, the larger the model."),
    "noise": (
        functools.partial(charts.draw_severities, "corruption", stats.plain_corruptions), ROBUST,
        "The lower a curve stays on its way to the right, the less the corruption harms the model."),
    "shift": (
        charts.draw_shift, ROBUST,
        "The shorter a row, the fewer errors the model makes; the panels beside the first tell which part of the noise "
        "causes them."),
    "shift-by-severity": (
        functools.partial(charts.draw_severities, "noise and its parts", stats.noise_parts), ROBUST,
        "Where the curves under a noise look like those under its shift, it harms by making pixels brighter or darker "
        "on average, and where they look like those under its fluctuation, by the randomness that remains."),
    "attack": (
        charts.draw_attack, ROBUST,
        "The lower a curve stays on its way to the right, the better the model withstands small changes of all pixels, "
        "chosen by its own gradient in the left panel and by chance in the right one."),
    "response": (
        charts.draw_response, WHY,
        "Where the output of a head stands left of both its branches, subtracting one from the other has removed noise "
        "that they share."),
    "aligned": (
        charts.draw_aligned, WHY,
        "The further a curve falls on its way to the right, the more errors the offset made, and a hollow mark tells "
        "whether removing any other vector would do as well."),
    "relevance": (
        functools.partial(
            charts.draw_attention, "Attention to patches without any of the object", stats.has_background,
            {"irrelevant_share": "share of the class token's\nabsolute weight"}), WHY,
        "The lower a mark, the less weight the class token gives to patches that show nothing of the object."),
    "maps": (
        charts.draw_maps, WHY,
        "The class token adds what it finds at red patches and subtracts what it finds at blue ones."),
    "blocks": (
        functools.partial(
            charts.draw_attention, "The class token's row of the attention maps", bool, {
                "entropy": "entropy (nats)", "negative_share": "negative weight",
                "lambda": "1 less the row's sum:\nlambda of the class token"}), WHY,
        "The lower the entropy, the fewer patches the class token attends to, and the higher the negative weight, the "
        "more of them it subtracts."),
    "lambda": (
        charts.draw_lambda, TRAINED,
        "The higher a curve, the more of the second branch the model subtracts."),
    "val-loss": (
        functools.partial(charts.draw_validation, "loss", "{:.3f}".format), TRAINED,
        "The lower a curve ends, the better the model predicts the images of the validation split."),
    "val-accuracy": (
        functools.partial(charts.draw_validation, "accuracy", "{:.2%}".format), TRAINED,
        "The higher a curve ends, the more images of the validation split the model recognises."),
}
TABLES = {"table": ACCURATE, "paired-table": ACCURATE, "noise-table": ROBUST, "shift-table": ROBUST,
          "attack-table": ROBUST, "runs": TRAINED}
# The question of each table; that of others is WHY.

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>What the runs show</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --rule: #d0d7de; --link: #0b57a4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e5e9; --paper: #16191d; --rule: #40474f; --link: #8ab8ee } }
body { max-width: 72rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
       background: var(--paper); overflow-wrap: anywhere }
a { color: var(--link) }
nav a { margin-right: 1rem }
h2 { margin-top: 3rem; border-top: 2px solid var(--rule); padding-top: 1rem }
p, figcaption { max-width: 46rem }
figure { margin: 1.5rem 0; break-inside: avoid }
figure a, .table { display: block; overflow-x: auto }
img { max-width: max(100%, 40rem); box-sizing: border-box; padding: .5rem; border-radius: .5rem; background: #fff }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap;
         overflow-wrap: normal }
th { vertical-align: bottom; white-space: normal; min-width: 4rem }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); text-align: left }
@media print {
  body { max-width: none; font-size: 9pt }
  figure a, .table { overflow: visible }
  img { max-width: 100% }
  table { font-size: 6pt }
  th, td { padding: .1rem .2rem; white-space: normal; min-width: 0 }
  h2 ~ h2 { break-before: page }
  h3, h4 { break-after: avoid }
  tr { break-inside: avoid }
}
</style></head><body>"""


def describe_runs(dataset, lines):
    """What the runs were, in Markdown: of each line the flags that repeat it, the program and the machine."""
    texts = [f"## {dataset}: flags, program and machine of the runs"]
    for line in lines:
        flags = records.make_flags(line.settings | dict(seed=None), line.settings.get("plugin"))
        seeds = [str(run.settings["seed"]) for run in line.runs]
        facts = [" and ".join(sorted({str(run.facts.get(name) or "unknown") for run in line.runs}))
                 for name in ("git_commit", "device_name", "torch")]
        texts.append("**{}**: `{}`; commit {}, on {}, with torch {}.".format(
            line.label, " ".join([*flags, "--seed", *seeds]), *facts))
    return "\n\n".join([*texts, "Runs record no date; the commit tells how old they are."]) + "\n"


def to_html(markdown):
    """The HTML of a Markdown text of headings, tables and paragraphs with bold and code, as report.py writes it."""
    parts = []
    for block in re.split("\n\n+", html.escape(markdown.strip())):
        block = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub("`(.+?)`", r"<code>\1</code>", block))
        if block.startswith("## "):
            parts.append(f"<h4>{block[3:]}</h4>")
        elif block.startswith("|"):
            heading, _, *rows = [f"<tr><td>{line[1:-1].replace('|', '</td><td>')}</td></tr>"
                                 for line in block.splitlines()]
            parts.append(f'<div class="table"><table><thead>{heading.replace("td>", "th>")}</thead><tbody>'
                         f'{"".join(rows)}</tbody></table></div>')
        else:
            parts.append(f"<p>{block}</p>")
    return "\n".join(parts)


def chart_to_html(name, file_format, caption):
    file, text = quote(f"{name}.{file_format}"), html.escape(name)
    if file_format != "pdf":
        size = {"png": "1.5625x", "svg": "1x"}[file_format]  # of 150 dots an inch, where a page has 96
        text = f'<picture><source srcset="{file} {size}"/><img src="{file}" alt="{text}"/></picture>'
    return f'<figure><a href="{file}">{text}</a><figcaption>{caption}</figcaption></figure>'


def make_page(lines_of, answers, comparisons):
    """The text of index.html. answers: {(data set, question): pieces of HTML}."""
    runs = stats.runs_of(itertools.chain(*lines_of.values()))
    folders = html.escape(" and ".join(sorted({str(run.folder.parent) for run in runs})))
    names = {quote(dataset): html.escape(stats.in_print(dataset)) for dataset in lines_of}
    links = "".join(f'<a href="#{place}">{name}</a>' for place, name in names.items())
    parts = [PAGE, f"<h1>What the runs show</h1>\n<p>Drawn from {len(runs)} finished runs in {folders}. Each data set "
             f"ends with the flags, the program and the machine of its runs.</p>\n<nav>{links}</nav>"]
    if comparisons:
        parts += ["<h2>Models compared</h2>", to_html(comparisons)]
    for dataset, (place, name) in zip(lines_of, names.items()):
        parts.append(f'<h2 id="{place}">{name}</h2>')
        for question in QUESTIONS:
            if (dataset, question) in answers:
                parts += [f"<h3>{question}</h3>", *answers[dataset, question]]
    return "\n".join([*parts, "</body></html>\n"])


# What is printed.

SCREEN, WIDTH = 40, 100  # lines and characters
OVERVIEW_NOTE = f"Means over seeds. Minus {BASELINE}: test accuracy less that of the same seeds, with a 95% interval."
OVERVIEW_PARTS = "Shift, fluctuation: mean test error under each of these two parts of Gaussian noise alone."
FEW_SEEDS = "Fewer than six seeds decide nothing: of n, p is at least 2 / 2^n (six: 0.03). Two have no interval."


def overview_rows(dataset, lines):
    """The rows of the data set's table as aligned texts, of more than one line where a label is long."""
    model, seeds = report.line_columns(lines).values()
    comparisons = compare_lines(lines, test_accuracy, more_is_better=True)
    columns = {"seeds": seeds} | {
        figure: figure_column(lines, figure, interval=False) for figure in ("parameters", "val loss", "accuracy")}
    columns[f"minus {BASELINE}, points"] = [
        report.difference_cell(comparisons[line.label]) if line.label in comparisons else stats.why_alone(line, lines)
        for line in lines]
    for part, error in stats.part_errors(lines).items():
        columns[part] = [report.mean_cell(line, "{:.1f}%", error, interval=False) for line in lines]
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    texts = ["  ".join(map(str.rjust, cells, widths)) for cells in [columns, *zip(*columns.values())]]
    labels = [stats.in_print(dataset), *model]
    room = min(max(map(len, labels)), WIDTH - len(texts[0]) - 2)
    wrapped = [textwrap.wrap(label, room, subsequent_indent="  ") for label in labels]
    return ["\n".join([f"{first:{room}}  {text}".rstrip(), *more]) for (first, *more), text in zip(wrapped, texts)]


def overview(lines_of, out):
    """What is printed of {data set: lines}: of each table in the folder `out` the rows that the screen has room for."""
    tables = {dataset: overview_rows(dataset, lines) for dataset, lines in lines_of.items()}
    notes = [OVERVIEW_NOTE, *[OVERVIEW_PARTS] * any("fluctuation" in heading for heading, *_ in tables.values())]
    notes += [FEW_SEEDS] * any(
        found.count < 6 for lines in lines_of.values() for found in compare_lines(lines, test_accuracy).values())
    for most in range(SCREEN, -1, -1):
        texts = []
        for dataset, (heading, *rows) in tables.items():
            more = [f"... {len(rows) - most} more in {out / dataset}-table.md"] * (len(rows) > most)
            texts += [heading, *rows[:most], *more, ""] if most else more
        text = "\n".join([*texts, *notes])
        if text.count("\n") + 2 <= SCREEN:  # plot.py prints one more line
            break
    return text


# The command.

os.environ["SOURCE_DATE_EPOCH"] = "0"  # the date in a chart, so that it has the same bytes at every call


def write_chart(out, file_format, dataset, lines, name):
    """Write a chart and return True; False where there is nothing to show."""
    content = io.BytesIO()
    with charts.house_style():
        figure = CHARTS[name][0](dataset, lines)
        if figure is None:
            return False
        figure.savefig(content, format=file_format)
    command.write_whole(out / f"{dataset}-{name}.{file_format}", content.getvalue())
    return True


def write_charts(out, file_format, lines_of):
    """Write all charts and return the (data set, name) of each: in a process a core, or in this one where no other can
    be started, as without /dev/shm, or one is killed."""
    wanted = [(dataset, lines, name) for dataset, lines in lines_of.items() for name in CHARTS]
    write = functools.partial(write_chart, out, file_format)
    try:
        with ProcessPoolExecutor() as pool:
            written = list(pool.map(write, *zip(*wanted)))
    except (OSError, NotImplementedError, BrokenProcessPool):
        written = map(write, *zip(*wanted))
    return [(dataset, name) for (dataset, _, name), is_written in zip(wanted, written) if is_written]


# The lines of charts.

# A model has the same colour in every chart: self-attention and its controls cool ones, differential attention warm
# ones. Of Okabe and Ito's and Paul Tol's colours, for colour-blind eyes; markers and dashes, for grey print.
COLORS = dict(
    vit="#000000", vitbalanced="#56B4E9", vitdiff="#D55E00", vitdiffpaper="#E69F00", vitdiffv2="#AA4499",
    vitheads="#0072B2", vitmatched="#44AA99", vitheadnorm="#7F7F7F", vitboth="#7B68EE", vitsumscaled="#66A61E",
    vitdiffnonorm="#882255", vitcentered="#332288", vitsum="#117733", vitdiffabs="#5B3A1E")
SPARE_COLORS = ["#009E73", "#CC79A7", "#6699CC", "#997700", "#CC6677", "#004488"]  # of models not of this project
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", (0, (6, 2)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (3, 1)), (0, (8, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1))]
FRONT = dict(linewidth=1.7, markersize=5, alpha=1.0, zorder=3)
BEHIND = dict(linewidth=0.9, markersize=3.5, alpha=0.45, zorder=2)


def style_lines(lines, models):
    """Give each line of a chart the colour of its model, and a style that no other line has: of the first line of a
    model always the same, before and behind. models: those of all charts."""
    strangers = [model for model in models if model not in COLORS]
    colors = COLORS | dict(zip(strangers, itertools.cycle(SPARE_COLORS)))
    styled, free = [], {}  # the next style of each colour, before and behind
    for line in lines:
        color = colors[line.model]
        place = max(list(colors).index(line.model), free.get((line.front, color), 0))
        free[line.front, color] = place + 1
        style = dict(color=color, marker=MARKERS[place % len(MARKERS)],
                     linestyle=DASHES[place] if place < len(DASHES) else (0, (place, 2, 1, 2)))
        styled.append(line._replace(style=style | (FRONT if line.front else BEHIND)))
    return styled


def find_references(folders):
    """The folders called reference in these folders, without those that are themselves among them."""
    named = {folder.resolve() for folder in folders}
    found = {path.resolve(): path for path in (folder / "reference" for folder in folders) if path.is_dir()}
    return [path for place, path in found.items() if place not in named]


def find_lines(args):
    """{data set: lines} of the runs that the flags choose; what is left out is said."""
    for folder in args.folders:
        if records.run_state(folder) != "nothing":
            raise UserError(f"{folder} is a run: name the folder that it lies in, {folder.parent}")
    own, skipped = records.find_runs(*{folder.resolve(): folder for folder in args.folders}.values())
    reference, more_skipped = records.find_runs(*find_references(args.folders)) if args.reference else ([], [])
    for line in skipped + more_skipped:
        print(f"skipped {line}", file=sys.stderr)
    for name, wanted in [("seed", args.seed), ("dataset", args.dataset)]:
        if wanted:
            own, reference = ([run for run in runs if run.settings[name] in wanted] for runs in (own, reference))
    if not own and not reference:
        which = "of these seeds and data sets " if args.seed or args.dataset else ""
        raise UserError(f"there is no finished run {which}in "
                        f"{', '.join(map(str, args.folders))}: train one with train.py first")
    lines_of = stats.arrange(own, reference)
    lines = list(itertools.chain(*lines_of.values()))
    left_out = sum(run.noise is not None for run in own + reference) - sum(
        run.noise is not None for run in stats.runs_of(lines))
    if left_out:
        print(f"left out: what {left_out} runs did under noise of other amounts than the first run's", file=sys.stderr)
    models = sorted({line.model for line in lines})
    return {dataset: style_lines(found, models) for dataset, found in lines_of.items()}


def check_pairs(pairs, lines_of):
    """Raise a UserError unless the pairs are of two models each and differ; say which cannot be compared."""
    models = sorted({line.model for lines in lines_of.values() for line in lines})
    for pair in pairs:
        if len({*pair}) == 1 or [{*other} for other in pairs].count({*pair}) > 1:
            raise UserError(f"argument --compare: {' '.join(pair)} are not two models, or are compared twice")
        for model in pair:
            command.check_name("model", model, models)
        if not any(stats.paired_differences(lines, test_accuracy, [pair]) for lines in lines_of.values()):
            print(f"not compared: {' and '.join(pair)}, which share no two seeds of one recipe", file=sys.stderr)


def plot(args):
    lines_of = find_lines(args)
    check_pairs(args.compare, lines_of)
    out, answers = args.out or args.folders[0] / "report", defaultdict(list)
    command.make_folder(out, "name another folder with --out")
    drawn = write_charts(out, args.format, lines_of)
    for dataset, name in drawn:
        _, question, caption = CHARTS[name]
        answers[dataset, question].append(chart_to_html(f"{dataset}-{name}", args.format, caption))
    for dataset, lines in lines_of.items():
        tables = report.make_tables(dataset, lines) | {"runs": describe_runs(dataset, lines)}
        for name, table in tables.items():
            command.write_whole(out / f"{dataset}-{name}.md", table)
            answers[dataset, TABLES.get(name, WHY)].append(to_html(table))
    comparisons = report.comparison_tables(lines_of, args.compare)
    if comparisons:
        command.write_whole(out / "comparisons.md", comparisons)
    command.write_whole(out / "index.html", make_page(lines_of, answers, comparisons))
    print(f"{overview(lines_of, out)}\n{len(drawn)} charts and all tables: open {out / 'index.html'}")


def parse_flags(argv):
    parser = command.Parser(prog="plot.py", description=__doc__)
    parser.add_argument("folders", nargs="*", type=command.usable_folder, default=[Path("runs")], metavar="FOLDER",
                        help="a folder of runs (default: runs)")
    parser.add_argument("--out", type=command.usable_folder, metavar="DIR",
                        help="where to write (default: the folder report in the first folder)")
    parser.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="default: %(default)s")
    parser.add_argument("--no-reference", dest="reference", action="store_false",
                        help="do not draw the folders' reference runs")
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("MODEL", "OTHER"),
                        help="compare two models seed by seed; repeat the flag for several pairs, and p is "
                        "corrected for all pairs and data sets")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="draw only the runs of these seeds")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="draw only the runs on these data sets")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, or 2 where there is nothing to draw or nowhere to draw it."""
    return command.exit_status("plot.py", parse_flags, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
