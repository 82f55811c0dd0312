"""Tables of runs, in Markdown: what stats.py computes, laid out.

plot.py writes those of each data set (make_tables) and of the models that are compared.
`python report.py` writes the numbers in the tables of README.md and of the pages in runs/.
"""

import functools
import itertools
import math
import re
import statistics
import sys
from pathlib import Path

import command
import records
import stats
from command import UserError, read_text, reading, write_whole
from stats import (
    BASELINE, FIGURES, REMOVED, compare_lines, error_under, error_without, in_print, keep_runs, part_of, readable, rows_of,
    test_accuracy)

VIT = f"`{BASELINE}`"
INTERVAL_NOTE = "±: half the 95% confidence interval of the mean over seeds (Student's t)."
PARTS_NOTE = (
    "Shift: each pixel replaced by the mean of what the noise makes of it. Fluctuation: the noise less its shift. "
    "Unclipped: the noise not clipped at black and white. Offset: one number added to all pixels of an image, or "
    "of a patch, each patch its own.")
RESPONSE_NOTE = (
    "Means over heads. 1, 2: of the first branch, and of minus the second; without a number: of their sum. "
    "Self-attention has one branch, which is the sum. Noise to signal: the energy of the change that the corruption "
    "makes, by that of the clean outputs around their mean over images. Common share: the part of the change's energy "
    "that is the same in all images. Cosines: between the first branch and minus the second, of the changes and of the "
    "clean outputs. A third branch and those after it are in the sum alone.")

OFFSET_NOTE = (
    "Offset: what the corruption adds to the mean of each head's output at each token and block, by so many validation "
    "images without labels. It is subtracted at the test. Random vector: as long as the offset at each token.")
ATTACK_NOTE = (
    "The first 1,000 test images, of which each pixel is changed by epsilon at most, a share of white. Pgd: 40 steps "
    "by the gradient. Fgsm: one step. Sign noise: random signs, without a gradient.")


# Cells.

def write(value, form):
    """The text of a number by a form such as "{:.1%}", or by none: three decimals, or two digits of a small one; "" of
    nan and None."""
    if value is None or math.isnan(value):
        return ""
    return (form or ("{:.3f}" if value >= 0.1 else "{:#.2g}")).format(value)


def mean_cell(line, form, figure_of, interval=True):
    """The mean of a figure over those of a line's runs that have it, and half its 95% interval if there are several."""
    values = [value for value in map(figure_of, line.runs) if not math.isnan(value)]
    mean = write(statistics.fmean(values) if values else None, form)
    half = write(stats.half_interval(values) if interval else None, form)
    return f"{mean} ± {half.lstrip('+')}" if half else mean


def difference_cell(found, digits=2):
    """The mean difference and its interval, if it has one."""
    mean, low, high = (f"{found.mean + sign * (found.half or 0):+.{digits}f}" for sign in (0, -1, 1))
    return mean if found.half is None else f"{mean} ({low} to {high})"


def comparison_cells(found, digits=2):
    """The difference with its interval, in how many seeds it is better, p, and p by Holm; empty if found is None."""
    if found is None:
        return [""] * 4
    return [difference_cell(found, digits), f"{found.better} of {found.count}", f"{found.p:.3g}", f"{found.p_holm:.3g}"]


# Columns: the cells of one for each line, or {heading: cells}.

def line_columns(lines):
    return {"model": [line.label for line in lines], "seeds": [str(len(line.runs)) for line in lines]}


def figure_column(lines, figure, interval=True):
    return [mean_cell(line, *FIGURES[figure], interval) for line in lines]


def bold_best(cells, best):
    """The cells, those bold whose number at the beginning is the `best` of several, which is min or max."""
    means = [float(re.match(r"[\d.]+", cell)[0]) for cell in cells]
    return [re.sub(r"^\S+", r"**\g<0>**", cell) if mean == best(means) and len(cells) > 1 else cell
            for cell, mean in zip(cells, means)]


# Tables.

def make_table(heading, columns, rows, *notes):
    """Markdown. columns: their headings. rows: of each as many cells."""
    ruler = "|---" + "|---:" * (len(columns) - 1) + "|"
    first, *others = (f"| {' | '.join(cells)} |" for cells in [columns, *rows])
    return "\n".join([f"## {heading}", "", first, ruler, *others, *(f"\n{note}" for note in notes), ""])


def make_columns(heading, columns, *notes):
    """Markdown of {heading: cells}."""
    return make_table(heading, columns, zip(*columns.values()), *notes)


def difference_note(baseline=VIT):
    return (f"The difference is from {baseline} of the same recipe and seed: its mean over seeds with a 95% interval "
            "(Student's t)")


def comparison_note(comparisons, baseline):
    """What the columns of a comparison with a baseline say."""
    counts = sorted({found.count for found in comparisons.values()})
    least = " and ".join(f"{2 / 2**count:.3g}" for count in counts)
    return (f"{difference_note(baseline)}, and in how many seeds the model is better. p: the exact two-sided "
            f"sign-flip test over seeds; p (Holm): corrected for the number of rows compared, {len(comparisons)}. "
            f"With {' and '.join(map(str, counts))} seeds p cannot be below {least} before the correction.")


def paired_table(heading, measures, corner=("model",), baseline=VIT):
    """Markdown of comparisons seed by seed; "" where there are none.

    measures: {name, which ends with "points" where these are the unit: {label, or first cells of a row: Comparison}},
    all of the same rows. corner: the headings of the first cells.
    """
    first, *_ = measures.values()
    columns, rows = [*corner], [[key] if isinstance(key, str) else [*key] for key in first]
    for name, found in measures.items():
        columns += [f"{name} (95% interval)", "better in", "p", "p (Holm)"]
        for row, comparison in zip(rows, found.values(), strict=True):
            row += comparison_cells(comparison, 2 if name.endswith("points") else 4)
    return make_table(heading, columns, rows, comparison_note(first, baseline)) if rows else ""


# The tables of a data set: of each, a function of (data set, lines) that yields Markdown, "" for nothing to show.

def result_table(dataset, lines):
    """The figures of each line, the seed-paired difference of its accuracy from `vit`'s, and what is published."""
    model, seeds = line_columns(lines).values()
    columns = {"model": model, "parameters": figure_column(lines, "parameters", interval=False), "seeds": seeds,
               "validation loss": bold_best(figure_column(lines, "val loss"), min),
               "test loss": bold_best(figure_column(lines, "test loss"), min),
               "test accuracy": bold_best(figure_column(lines, "accuracy"), max)}
    notes = [INTERVAL_NOTE] if any(len(line.runs) > 1 for line in lines) else []
    comparisons = compare_lines(lines, test_accuracy, more_is_better=True)
    if comparisons:
        difference, better, _, p_holm = zip(*(comparison_cells(comparisons.get(label)) for label in model))
        columns |= {f"accuracy minus {VIT}'s, points": difference, "better in": better, "p (Holm)": p_holm}
        notes.append(comparison_note(comparisons, VIT))
    published = [stats.published_of(dataset, line) for line in lines]
    if any(published):
        columns["published"] = [
            f"{found.val_loss:.3f}, {found.test_loss:.3f}, {found.test_accuracy:.2%}" if found else ""
            for found in published]
        notes.append("Published: validation loss, test loss and test accuracy of one run of "
                     f"{max(found.epochs for found in published if found)} epochs.")
    yield make_columns(dataset, columns, *notes)


def difference_table(dataset, lines):
    yield paired_table(f"{dataset}: difference from {VIT}", {
        "test accuracy, points": compare_lines(lines, test_accuracy, more_is_better=True),
        "test loss": compare_lines(lines, lambda run: run.summary["test_loss"])})


def cells_table(heading, lines, figures):
    """The paired difference of each figure, {heading: a function of a run}, with one correction for all of them."""
    found = stats.compare({(label, name): differences for name, figure_of in figures.items() for label, differences in (
        stats.paired_differences(lines, figure_of).items())})
    cells = {key: f"**{difference_cell(comparison)}**" if comparison.p_holm < 0.05 else difference_cell(comparison)
             for key, comparison in found.items()}
    labels = dict.fromkeys(label for label, _ in found)
    return make_columns(
        heading, {"model": labels} | {name: [cells.get((label, name), "") for label in labels] for name in figures},
        f"{difference_note()}. Bold: p is below 0.05 by the exact two-sided sign-flip test with Holm's correction for "
        f"all {len(found)} cells.") if found else ""


def corruption_table(dataset, lines, names):
    return cells_table(f"{dataset}: difference in the test error under each corruption, points", lines,
                       {readable(name): error_under(name) for name in names})


def noise_tables(dataset, lines):
    """The mean over severities of each corruption's test error, its ratio to `vit`'s, and the paired difference."""
    shared, severities = stats.shared_corruptions(lines)
    names = stats.plain_corruptions(shared)
    if not names:
        return

    def cell(line, part):
        error, pairs = error_under(*part), stats.pair_with_baseline(line, lines)
        text = mean_cell(line, "{:.1f}%", error, interval=part is names)
        theirs = sum(error(partner) for _, partner in pairs)
        return f"{text} ({sum(error(run) for run, _ in pairs) / theirs:.2f})" if theirs else text

    lines = keep_runs(lines, lambda run: run.noise)
    parts = {readable(name): [name] for name in names} | {"mean": names}
    yield make_columns(
        f"{dataset}: mean test error over severities 1 to {severities} (ratio to that of {VIT})",
        line_columns(lines) | {heading: [cell(line, part) for line in lines] for heading, part in parts.items()},
        f"{INTERVAL_NOTE} Ratios are to {VIT} of the same recipe and seeds.")
    yield paired_table(f"{dataset}: difference in the mean test error", {
        "mean of all, points": compare_lines(lines, error_under(*names))})
    yield corruption_table(dataset, lines, names)


def shift_tables(dataset, lines):
    """The mean test error under each noise and each of its parts, and the paired differences, also by severity."""
    shared, severities = stats.shared_corruptions(lines)
    if not stats.part_errors(lines):
        return
    lines, names = keep_runs(lines, lambda run: run.noise), stats.noise_parts(shared)
    gaussian = [name for name in names if part_of(name)[0] == "gaussian_noise"]
    yield make_columns(
        f"{dataset}: mean test error over severities 1 to {severities} under each noise and under its parts alone",
        line_columns(lines) | {readable(name): [
            mean_cell(line, "{:.2%}", lambda run: stats.noise_error(run, [name])) for line in lines]
            for name in names}, INTERVAL_NOTE, PARTS_NOTE)
    yield paired_table(f"{dataset}: difference in the test error under Gaussian noise", {
        f"{readable(name)}, points": compare_lines(lines, error_under(name))
        for name in gaussian if part_of(name)[1] != "unclipped"})
    yield corruption_table(dataset, lines, names)
    yield from severity_tables(dataset, lines, gaussian)


def figure_table(heading, corner, lines, rows, *notes, form="{:.1f}%"):
    """Markdown of means. rows: {first cell: {heading of a column: a function of a run}}, a row a line for each."""
    first, *_ = rows.values()
    return make_table(heading, [corner, "model", *first], [
        [name, line.label, *(mean_cell(line, form, figure_of) for figure_of in figures.values())]
        for name, figures in rows.items() for line in lines], *notes)


def severity_tables(dataset, lines, names):
    """The test error under each of some corruptions at each severity, and the paired difference."""
    amounts, differences = lines[0].runs[0].amounts[names[0]], []
    rows = {readable(name): {f"severity {i} ({amount:g})": error_under(name, first=i, last=i)
                             for i, amount in enumerate(amounts, 1)} for name in names}
    yield figure_table(f"{dataset}: test error by severity", "corruption", lines, rows, INTERVAL_NOTE, form="{:.2f}%")
    for name, figures in rows.items():
        found = [compare_lines(lines, figure_of) for figure_of in figures.values()]
        differences += [[name, label, *(difference_cell(comparisons[label]) for comparisons in found)]
                        for label in found[0]]
    if differences:
        yield make_table(f"{dataset}: difference in the test error by severity, points",
                         ["corruption", "model", *figures], differences, f"{difference_note()}.")


def attack_tables(dataset, lines):
    """The test error under each attack by epsilon, and the paired difference under the strongest."""
    lines = keep_runs(lines, lambda run: run.attack)
    rows = {readable(attack): {epsilon: stats.error_under_attack(attack, epsilon) for epsilon in epsilons}
            for run in stats.runs_of(lines)[:1] for attack, epsilons in stats.attack_errors(run).items()}
    if rows:
        yield figure_table(f"{dataset}: test error under attack", "attack", lines, rows, INTERVAL_NOTE, ATTACK_NOTE)
        yield cells_table(f"{dataset}: difference in the test error under pgd, points", lines, rows["pgd"])


def aligned_tables(dataset, lines):
    """The test error with the offset removed, by the images that it is estimated from; with what controls remove; and
    the paired difference with the offset removed."""
    lines = keep_runs(lines, lambda run: run.aligned)
    names, counts, others = stats.aligned_conditions(lines)

    def by_images(name, *severities):
        return {f"{count:,.0f} images" if count else "as it is": error_without(
            "offset", name, images=count, severities=severities) for count in counts}

    if not names:
        return
    rows = {f"{readable(name)}, {text}": by_images(name, *severities) for name in names
            for text, severities in {"severity 3": [3], "mean of 1, 3, 5": [1, 3, 5]}.items()}
    yield figure_table(f"{dataset}: test error with the offset removed", "corruption", lines,
                       rows | {"clean": by_images("clean", 0)}, INTERVAL_NOTE, OFFSET_NOTE)
    rows = {readable(name): {"as it is": by_images(name, 3)["as it is"]} | {
        removed: error_without(removed, name) for removed in REMOVED} for name in names}
    yield figure_table(f"{dataset}: test error at severity 3 with the offset or a control removed", "corruption", lines,
                       rows, INTERVAL_NOTE, "Another corruption: {}.".format(", ".join(
                           f"{readable(other)} under {readable(name)}" for name, other in others)))
    yield cells_table(f"{dataset}: difference in the test error at severity 3 with the offset removed, points", lines,
                      {name: figures["offset"] for name, figures in rows.items()})


def response_tables(dataset, lines):
    """How the branches of the heads respond to each noise: a table a block, with a row a model and condition."""
    lines = keep_runs(lines, lambda run: run.response)
    conditions, blocks = stats.conditions_and_blocks(lines, "response")
    forms = {name: "{:+.2f}" if "cosine" in name else "{:.1%}" if "share" in name else None
             for name in records.RESPONSE_FIGURES}
    columns = ["model", "condition", *(name.replace("_", " ") for name in forms)]
    for block in blocks:
        rows = [[line.label, readable(condition), *(
            mean_cell(line, form, lambda run: stats.response_figure(run, condition, block, name))
            for name, form in forms.items())] for line in lines for condition in conditions]
        yield make_table(f"{dataset}: response of the branches in block {block}", columns, [
            row for row in rows if any(row[2:])])  # not every model has this block
    if blocks:
        yield f"{INTERVAL_NOTE}\n\n{RESPONSE_NOTE}\n"


def attention_tables(dataset, lines):
    """The share of the class token's weight on irrelevant patches in the last block, the ratio of relevant to
    irrelevant weight per patch, and the paired difference of the share."""
    lines = keep_runs(lines, stats.has_background)
    if not lines:
        return

    def cell(line, condition):
        share, ratio = (mean_cell(line, form, lambda run: stats.attention_figure(run, condition, -1, name))
                        for name, form in (("irrelevant_share", "{:.1%}"), ("signal_to_noise", "{:.2f}")))
        return share and f"{share} ({ratio.split(' ')[0]})"

    columns, (conditions, _) = line_columns(lines), stats.conditions_and_blocks(lines, "attention")
    columns |= {readable(condition): [cell(line, condition) for line in lines] for condition in conditions}
    uniform = [write(stats.uniform_share(lines, condition), "{:.1%} (1.00)") for condition in conditions]
    yield make_table(
        f"{dataset}: share of attention on irrelevant patches in the last block (signal-to-noise ratio)",
        columns, [*zip(*columns.values()), ["uniform attention", "", *uniform]], INTERVAL_NOTE)
    yield paired_table(f"{dataset}: difference in the irrelevant share, on images as in training", {
        "irrelevant share, points": compare_lines(lines, stats.trained_irrelevant_share)})


DATASET_TABLES = {"table": result_table, "paired-table": difference_table, "noise-table": noise_tables,
                  "shift-table": shift_tables, "attack-table": attack_tables, "aligned-table": aligned_tables,
                  "response-table": response_tables, "attention-table": attention_tables}


def make_tables(dataset, lines):
    """{name: Markdown} of a data set."""
    tables = {name: "\n".join(filter(None, make(dataset, lines))) for name, make in DATASET_TABLES.items()}
    return {name: table for name, table in tables.items() if table}


def comparison_tables(lines_of, compared):
    """Markdown of the models of each pair in `compared`, seed by seed, in accuracy and in the error under the parts of
    Gaussian noise, each of the two with one correction for all that it compares; "" where they share no two seeds.

    lines_of: {data set: lines}. A data set whose runs did not all meet the parts is missing in the second.
    """
    def table(measure, corner, figures_of, more_is_better=False):
        found = {(in_print(dataset), label, part)[:len(corner)]: differences
                 for dataset, lines in lines_of.items() for pair in compared
                 for part, figure_of in figures_of(lines).items()
                 for label, differences in stats.paired_differences(lines, figure_of, [pair]).items()}
        return paired_table(f"Differences between models in {measure}",
                            {"difference, points": stats.compare(found, more_is_better)}, corner, "the second model")

    return "\n".join(filter(None, [
        table("test accuracy", ["data set", "models"], lambda lines: {"": test_accuracy}, more_is_better=True),
        table("the error under the parts of Gaussian noise, mean over severities", ["data set", "models", "part"],
              stats.part_errors)]))


# The pages: README.md and those in runs/. The headings of a table say what is in its cells.

RUNS = Path(__file__).parent / "runs"
HELP = """Write the numbers in the tables of README.md and of the pages in runs/, from the recorded runs.

A table stands between <!-- table: WORDS --> and <!-- end of table -->. You write its headings. WORDS and the headings
of a row and column say what their cell is, with commas between words: the data set, the model, the figure, the
corruption of the images or epsilon of the attack, the seeds ("seeds 0 to 4"), the folder in runs/. "vitdiff - vit" is
the difference between two models, seed by seed, and "vitdiff / vit" the ratio of their means; so are
"controls - reference" and "controls / reference" those of two folders. Nothing else is changed."""
PAGES = [*RUNS.parent.glob("README.md"), *sorted(RUNS.glob("**/README.md"))]
TABLES = {words: page for page in reversed(PAGES)  # {the words of a mark: the first page that has it}
          for words in re.findall("<!-- table: (.+) -->", page.read_text("utf-8", "replace"))}
NOISES = ["gaussian_noise", "shot_noise", "impulse_noise"]
REST = ["gaussian_blur", "brightness", "contrast", "occlusion", "distractors"]
COLUMNS = {"clean": "clean", "as they are": "left", "first branch alone": "undone",  # of CSV files, in percent
           "without the shared part": "own", "the shared part alone": "common"}
WORDS = {  # what each says of a cell
    **{figure: dict(figure=figure) for figure in FIGURES},
    **{word: dict(figure=column) for word, column in COLUMNS.items()},
    **{part_of(name)[1] or readable(name): dict(corruption=name) for name in [*stats.GAUSSIAN_PARTS, *NOISES, *REST]},
    "three noises": dict(corruption=" ".join(NOISES)), "the rest": dict(corruption=" ".join(REST)),
    "error of the first without offset": dict(figure="error at severity 3", first="error without offset"),
    "p (Holm)": {}}


def meaning(headings):
    """What the words of headings, with commas between them, say of a cell: what WORDS has, seeds, a model and a folder
    or CSV file in runs/, of both of which there may be sums and ratios, as in `vitdiff` - `vit`."""
    said = dict(place="reference+controls", seeds=range(10**6), corruption="")
    for word in headings.replace("`", "").split(", "):
        name = re.sub(r"\W", "", word.lower())  # of a data set: fashionmnist, in print Fashion-MNIST
        seeds = re.fullmatch(r"seeds (\d+) to (\d+)", word)
        if seeds:
            said["seeds"] = range(int(seeds[1]), int(seeds[2]) + 1)
        elif word.startswith("vit"):
            said["model"] = word
        elif word.startswith("epsilon "):
            said["corruption"] = word
        elif in_print(name) == word != name:
            said["dataset"] = name
        elif (RUNS / re.split("[ +]", word)[0]).exists():
            said["place"] = word
        else:
            command.check_name("word", word, WORDS)
            said |= WORDS[word]
    for name in ("dataset", "model", "figure"):
        if name not in said:
            raise UserError(f"{headings!r} does not say which {name}")
    return said


@functools.cache
def runs_at(place):
    """The runs of folders in runs/, with + between them."""
    runs, left_out = records.find_runs(*(RUNS / name for name in place.split("+")))
    for line in left_out:
        if not line.endswith("not a run"):
            raise UserError(line)
    return runs


def figures_of(place, figure, corruption, seeds, **which):
    """{seed: figure} of the runs of a model on a data set, or of the rows of a CSV file."""
    if place.endswith(".csv"):
        which["part"] = part_of(corruption)[1]
        return {row.get("seed"): float(row[figure]) for row in rows_of(RUNS / place) if row | which == which | row}
    found = {run.settings["seed"]: FIGURES[figure][1](run, corruption) for run in runs_at(place)
             if run.settings | which == run.settings and run.settings["seed"] in seeds}
    return {seed: value for seed, value in found.items() if figure == "published" or not math.isnan(value)}


def sample(place, model, figure, first=None, **said):
    """The figures of a cell, one a seed, and those that they are divided by: of places or models with signs between
    them, their sums. first: the figure of the first model, if it is another."""
    places, models = (re.findall(r"([-/] )?(\w\S*)", text) for text in (place, model))
    terms = [(sign + other_sign, figures_of(
        name, model=other, figure=first if first and other == models[0][1] else figure, **said))
        for (sign, name), (other_sign, other) in itertools.product(places, models)]
    seeds = set.intersection(*(set(figures) for _, figures in terms))
    if len(seeds) < min(len(terms), 2):
        raise UserError(f"there are too few runs of {model} in {place} that have: {first or figure}")
    return [[sum((-1) ** signs.count("-") * figures[seed] for signs, figures in terms if ("/" in signs) == below)
             for seed in seeds] for below in (False, True)]


def write_column(cells, by_holm):
    """The texts of a column: of models means; of differences their means with 95% intervals, or their p by Holm for all;
    of ratios those of the means."""
    samples, figure = [sample(**cell) for cell in cells], cells[0]["figure"]
    signs = [cell["place"] + cell["model"] for cell in cells]
    found = stats.compare({i: values for i, (values, _) in enumerate(samples) if " - " in signs[i]})
    form, _ = FIGURES.get(figure, ("{:.1f}%", None))

    def text_of(i, values, others):
        if " / " in signs[i]:
            return f"{sum(values) / sum(others):.2f}"
        if i not in found:
            return write(statistics.fmean(values), form)
        return f"{found[i].p_holm:.2g}" if by_holm else difference_cell(found[i], 4 if "loss" in figure else 2)

    return [text_of(i, *parts) for i, parts in enumerate(samples)]


TABLE = re.compile(r"(<!-- table: (.+) -->\n)((?:\|.*\|\n){3,})(?=<!-- end of table -->)")


def fill_table(found):
    """A table that was found between its marks, with its headings as they are and its cells written anew."""
    mark, said, text = found.groups()
    (_, *columns), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    names = [name for name, *_ in rows]
    cells = [write_column([meaning(f"{said}, {name}, {column}") for name in names], "p (Holm)" in column)
             for column in columns]
    lines = [f"| {' | '.join(line)} |" for line in zip(names, *cells)]
    return mark + "\n".join([*text.split("\n")[:2], *lines, ""])


def write_page(path):
    """Write the tables of a page; whether that changed it. A UserError if a table has no end or no headings, or a word
    in them is unknown."""
    with reading(path, advice="name a page in Markdown"):
        text = read_text(path)
    try:
        written, count = TABLE.subn(fill_table, text)
        if count < text.count("<!-- table"):
            raise UserError("write nothing but a table, with its headings, between <!-- table: WORDS --> and "
                            "<!-- end of table -->")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if written != text:
        write_whole(path, written)
    return written != text


def write_pages(args):
    changed = [f"{path} is written" for path in args.pages if write_page(path)]
    print("\n".join(changed or ["all pages are as they are"]))


def parse_flags(argv):
    parser = command.Parser("report.py", HELP)
    parser.add_argument("pages", nargs="*", type=command.usable_path, metavar="PAGE", default=PAGES,
                        help="a page in Markdown (default: README.md and every README.md in runs/)")
    return parser.parse_args(argv)


def main(argv=None):
    return command.exit_status("report.py", parse_flags, write_pages, argv)


if __name__ == "__main__":
    sys.exit(main())
