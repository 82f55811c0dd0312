"""What runs say together: intervals over seeds, models compared with `vit` seed by seed, and the tables of both.

Student's t for intervals, the exact sign-flip permutation test for p, Holm's correction for several comparisons.
`plot.py` prints the overview and writes the tables beside its charts. A line is its `Line`: a model's runs by seed.
"""

import functools
import itertools
import math
import statistics
import textwrap
from collections import namedtuple

import numpy

import records

BASELINE = "vit"  # what every other model is compared with
IN_PRINT = {"mnist": "MNIST", "fashionmnist": "Fashion-MNIST", "kmnist": "KMNIST", "cifar10": "CIFAR-10",
            "clutteredmnist": "cluttered MNIST", "clutteredfashionmnist": "cluttered Fashion-MNIST"}
GAUSSIAN_PARTS = ["gaussian_noise_shift", "gaussian_noise_fluctuation"]
NOT_CLIPPED = ["gaussian_noise_unclipped", "image_offset", "patch_offset"]
Published = namedtuple("Published", "epochs parameters val_loss test_loss test_accuracy")
PUBLISHED = {  # from NanoDiffVision's README, one run each
    ("mnist", "vit"): Published(20, 33_802, 0.638, 0.626, 0.9551),
    ("mnist", "vitbalanced"): Published(20, 55_626, 0.633, 0.624, 0.9553),
    ("mnist", "vitdiff"): Published(20, 38_106, 0.624, 0.618, 0.9575),
    ("fashionmnist", "vit"): Published(30, 33_802, 0.813, 0.826, 0.8586),
    ("fashionmnist", "vitbalanced"): Published(30, 55_626, 0.792, 0.798, 0.8679),
    ("fashionmnist", "vitdiff"): Published(30, 38_106, 0.788, 0.796, 0.8726),
}
# Of one row's differences: their mean, half the mean's 95% interval, how many of how many are for the better, the p of
# the sign-flip test, that of Student's t, the first corrected by Holm over all rows, and what difference so many seeds
# would have shown.
Comparison = namedtuple("Comparison", "mean half better count p p_t p_holm detectable")


def t_coverage(t, freedom):
    """The probability that |T| < t, for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@functools.cache
def t_quantile(freedom):
    """The t for which |T| < t with probability 95%, by bisection of its angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        too_high = t_coverage(math.sqrt(freedom) * math.tan(middle), freedom) > 0.95
        low, high = (low, middle) if too_high else (middle, high)
    return math.sqrt(freedom) * math.tan(low)


def half_interval(values):
    """Half the 95% confidence interval of the mean by Student's t; None for a single value, or if one is nan."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def signed_sums(values, random):
    """The sums of values for all choices of their signs, as they are first. From the 21st value on, signs are drawn:
    2^20 choices in all."""
    sums = numpy.zeros(1)
    for value in values:
        if len(sums) < 2**20:
            sums = numpy.concatenate([sums + value, sums - value])
        else:
            signs = random.choice([-1, 1], len(sums))
            signs[0] = 1  # the first choice is the values as they are, so that p is never 0
            sums += value * signs
    return sums


def sign_flip_p(differences):
    """The two-sided p of the sign-flip permutation test: the share of all choices of signs for the differences whose
    sum is as far from 0 as theirs, or further. Exact for up to 40 differences."""
    random, half = numpy.random.default_rng(0), len(differences) // 2
    first, second = (signed_sums(part, random) for part in (differences[:half], differences[half:]))
    second.sort()  # each sum is one of the first half and one of the second: these are counted, not added
    least = abs(sum(differences)) - 1e-9 * sum(map(abs, differences))  # rounding keeps no sum from reaching itself
    far = len(second) - numpy.searchsorted(second, least - first) + numpy.searchsorted(second, -least - first, "right")
    return min(1.0, far.sum().item() / (len(first) * len(second)))


def student_p(differences):
    """The two-sided p of Student's t for paired differences; 1e-15, which is what rounding leaves, if it is less."""
    mean, deviation = abs(statistics.fmean(differences)), statistics.stdev(differences)
    t = mean / deviation * math.sqrt(len(differences)) if deviation else math.inf if mean else 0.0
    return max(1 - t_coverage(t, len(differences) - 1), 1e-15)


def holm(p_values):
    """p-values corrected for their number by Holm's method, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


@functools.cache
def detectable_effect(seeds, rows):
    """The smallest true mean of paired differences, in their standard deviations, for which the sign-flip p is below
    0.05 in 80% of experiments though Holm's correction takes it for the smallest of `rows`; inf where so few seeds show
    none. By simulation of 1,000 experiments; beyond 12 seeds 2^11 choices of signs, or 100 a row, stand for all."""
    random = numpy.random.default_rng(0)
    if seeds <= 12:  # the opposite signs have the same sum but for its sign, so that of the first value stays
        signs = numpy.array([(1.0, *others) for others in itertools.product([1.0, -1.0], repeat=seeds - 1)]).T
    else:
        signs = random.choice([1.0, -1.0], (seeds, max(2**11, 100 * rows)))
        signs[:, 0] = 1
    sums, shifts = random.normal(size=(1_000, seeds)) @ signs, signs.sum(0)

    def power(effect):
        flipped = abs(sums + effect * shifts)
        p_values = (flipped >= flipped[:, :1] - 1e-9).mean(1)  # the first choice is the values as they are
        return (p_values * rows < 0.05).mean()

    low, high = 0.0, 4.0  # with six seeds, the fewest that show anything, 1.8
    if power(high) < 0.8:
        return math.inf
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= 0.8 else (middle, high)
    return high


def detectable_mean(differences, rows):
    """The detectable effect of as many differences among so many rows, in their own unit."""
    effect = detectable_effect(len(differences), rows)
    return effect * statistics.stdev(differences) if effect < math.inf else effect


def compare(rows, more_is_better):
    """{name: Comparison} of {name: differences, two or more}."""
    p_values = {name: sign_flip_p(differences) for name, differences in rows.items()}
    corrected = dict(zip(rows, holm(list(p_values.values()))))
    return {name: Comparison(
        statistics.fmean(differences), half_interval(differences),
        sum(difference > 0 if more_is_better else difference < 0 for difference in differences), len(differences),
        p_values[name], student_p(differences), corrected[name], detectable_mean(differences, len(rows)))
        for name, differences in rows.items()}


def recipe_of(run):
    """The settings that two runs must share to be compared, the seed among them: all but the model, its sizes and the
    precision, which is another on a GPU than on a CPU where --amp is left out."""
    return {name: value for name, value in run.settings.items()
            if value is not None and name not in ("model", "plugin", "amp", *records.MODEL_SETTINGS)}


def pair_with_baseline(line, lines, baseline=BASELINE):
    """Each run of a line with the baseline's run of the same recipe and seed, where there is one: [(run, baseline's)].

    All baselines are of one size, the most alike that makes two pairs; of several runs of a seed it is one of the
    line's own folder, or else of the reference. The reference is not compared with one's own runs.
    """
    def apart(other, names):
        return sum(other.settings.get(name) != line.settings.get(name) for name in names)

    def distance(other):
        return (apart(other, records.MODEL_SETTINGS), other.folder != line.folder, other.front,
                apart(other, ["plugin", "amp"]))

    baselines = [other for other in lines if other.model == baseline and (line.front or not other.front)]
    by_size, own = {}, [(run, recipe_of(run)) for run in line.runs]
    for other in sorted(baselines, key=distance):
        size = tuple(other.settings.get(name) for name in records.MODEL_SETTINGS)
        by_size.setdefault(size, []).extend((run, recipe_of(run)) for run in other.runs)
    found = []
    for others in by_size.values():
        pairs = [(run, [other for other, of_other in others if of_other == recipe]) for run, recipe in own]
        found.append([(run, nearest) for run, (nearest, *_) in filter(all, pairs)])
    return max(found, key=lambda pairs: min(len(pairs), 2), default=[])


def paired_differences(lines, figure_of, compared=()):
    """{label: differences} from `vit`, of the other models' lines that share two or more seeds with it; or between the
    models of each pair in `compared`, the first minus the second.

    figure_of: a number of a run; a pair of runs in which it is nan is left out.
    """
    contrasts = [(line.label, line, BASELINE) for line in lines if line.model != BASELINE]
    if compared:
        contrasts = [(f"{line.label} - {other}", line, other) for model, other in compared
                     for line in lines if line.model == model]
    rows = {}
    for label, line, other in contrasts:
        differences = [figure_of(run) - figure_of(pair) for run, pair in pair_with_baseline(line, lines, other)]
        differences = [difference for difference in differences if not math.isnan(difference)]
        if len(differences) > 1:
            rows[label] = differences
    return rows


def compare_lines(lines, figure_of, more_is_better):
    """{label: Comparison} with `vit` of the differences that paired_differences finds."""
    return compare(paired_differences(lines, figure_of), more_is_better)


# Figures of runs: what was published, and what the analyses found.

def keep_runs(lines, condition):
    """The lines of only those runs for which the condition holds."""
    kept = [line._replace(runs=[run for run in line.runs if condition(run)]) for line in lines]
    return [line for line in kept if line.runs]


def keep_one_protocol(lines):
    """The lines without what their runs did under corruption by other amounts than the first run's: such figures never
    stand beside each other."""
    first = next((run for line in lines for run in line.runs if run.noise), None)

    def restrict(run):
        if not run.noise or all(run.amounts[name] == first.amounts[name] for name in run.noise.keys() & first.noise):
            return run
        clean = {condition: blocks for condition, blocks in (run.attention or {}).items()
                 if condition == "clean" or condition.endswith("_distractors")}
        return run._replace(noise=None, response=None, attention=clean or None)

    return [line._replace(runs=list(map(restrict, line.runs))) for line in lines]


def test_accuracy(run):
    """In percent."""
    return 100 * run.summary["test_accuracy"]


def published_of(dataset, line):
    """The published figures of a line's model, if it has as many parameters; None for any other."""
    figures = PUBLISHED.get((dataset, line.model))
    return figures if figures and abs(line.runs[0].summary["parameters"] / figures.parameters - 1) <= 0.03 else None


def in_print(dataset):
    return IN_PRINT.get(dataset, dataset)


def readable(name):
    """A corruption's or condition's name in words: 4_distractors, gaussian_noise_3 for a corruption of severity 3."""
    words = name.split("_")
    if len(words) > 1 and words[-1].isdigit():
        return f"{' '.join(words[:-1])}, severity {words[-1]}"
    return " ".join(words)


def shared_corruptions(lines):
    """The corruptions that every run has met, and the number of severities that every run has met."""
    found = [run.noise for line in lines for run in line.runs]
    names = [name for name in (found[0] if found else []) if all(name in noise for noise in found)]
    return names, min((len(accuracies) for noise in found for accuracies in noise.values()), default=0)


def plain_corruptions(names):
    """Those that are neither a part of a noise nor one of those that stand beside it, not clipped."""
    return [name for name in names if name not in NOT_CLIPPED and not name.endswith(("_shift", "_fluctuation"))]


def noise_parts(names):
    """Each noise that was met in parts, too, with these, and what is not clipped."""
    noises = [name.removesuffix("_shift") for name in names if name.endswith("_shift")]
    parts = [noise + part for noise in noises for part in ("", "_shift", "_fluctuation")]
    return [name for name in parts + NOT_CLIPPED if name in names]


def gaussian_parts(names):
    """The parts of Gaussian noise, by which models are compared, if all runs have met both."""
    return GAUSSIAN_PARTS if set(GAUSSIAN_PARTS) <= set(names) else []


def noise_error(run, names, severities):
    """The mean test error under some corruptions at severities from 1."""
    return statistics.fmean(1 - accuracy for name in names for accuracy in run.noise[name][:severities])


def conditions_and_blocks(lines, table):
    """Those of the attention or the response, whichever `table` names, of several runs: two lists."""
    found = [getattr(run, table) for line in lines for run in line.runs]
    return (list(dict.fromkeys(condition for conditions in found for condition in conditions)),
            sorted({block for conditions in found for blocks in conditions.values() for block in blocks}))


def response_of(run, condition, block, figure):
    """A figure of a run's response; nan where it has none, as self-attention has no second branch."""
    found = run.response.get(condition, {}).get(block, {}).get(figure)
    return math.nan if found is None else found


def attention_of(run, condition, block, figure):
    """A figure of a run's attention; nan where it has no such block or was not shown the condition. -1: the last."""
    blocks = run.attention.get(condition, {})
    return blocks.get(len(blocks) - 1 if block == -1 else block, {}).get(figure, math.nan)


def has_background(run):
    """Whether the class token can attend to patches without any of the object: of photographs hardly any is black."""
    return any(blocks[0]["uniform_share"] > 0.01 for blocks in (run.attention or {}).values())


def uniform_share(lines, condition):
    """What uniform attention would give to irrelevant patches; nan where that is not the same in all runs, as their
    patches are of different sizes."""
    found = {round(run.attention[condition][0]["uniform_share"], 4) for line in lines for run in line.runs
             if condition in run.attention}
    return found.pop() if len(found) == 1 else math.nan


def trained_irrelevant_share(run):
    """The irrelevant share in the last block, in percent, under the condition that is most like the run's training."""
    trained = f"{run.settings.get('distractors', 0)}_distractors"
    return 100 * attention_of(run, trained if trained in run.attention else "clean", -1, "irrelevant_share")


# Tables, in Markdown: cells, captions, and each table of a data set.

STUDENT_NOTE = "p (t): Student's t."
DETECTABLE_NOTE = ("Detectable: the smallest true difference for which p (Holm) is below 0.05 in 80% of experiments "
                   "with this number and this spread of seeds, even if no other row shows one; inf where so few seeds "
                   "show none. By simulation.")
RESPONSE_NOTE = (
    "Means over heads. 1, 2: of the first branch, and of minus the second; without a number: of their sum. "
    "Self-attention has one branch, which is the sum. Noise to signal: the energy of the change that the corruption "
    "makes, by that of the clean outputs around their mean over images. Common share: the part of the change's energy "
    "that is the same in all images. Cosines: between the first branch and minus the second, of the changes and of the "
    "clean outputs.")
INTERVAL_NOTE = "±: half the 95% confidence interval of the mean over seeds (Student's t)."


def mean_cell(values, number):
    """The mean, and half its 95% interval where there are several values; empty if one is nan. number: how a value is
    written, with a sign or without."""
    mean, half = statistics.fmean(values), half_interval(values)
    if math.isnan(mean):
        return ""
    return number(mean) + (f" ± {number(half).lstrip('+')}" if half is not None else "")


def difference_cell(mean, half, digits=2):
    return "{} ({} to {})".format(*(f"{mean + sign * half:+.{digits}f}" for sign in (0, -1, 1)))


def comparison_headings(difference):
    return [f"{difference} (95% interval)", "better in", "p", "p (t)", "p (Holm)", "detectable"]


def comparison_cells(found, digits):
    """The difference with its interval, in how many seeds it is better, p, p by Student's t, p by Holm, what could be
    shown; empty cells where nothing was found."""
    if found is None:
        return [""] * 6
    return [difference_cell(found.mean, found.half, digits), f"{found.better} of {found.count}", f"{found.p:.3g}",
            f"{found.p_t:.3g}", f"{found.p_holm:.3g}", f"{found.detectable:.{digits}f}"]


def difference_note(baseline):
    return (f"The difference is from {baseline} of the same recipe and seed: its mean over seeds with a 95% interval "
            "(Student's t)")


def comparison_note(comparisons, baseline):
    """What the columns of a comparison with a baseline say."""
    counts = sorted({found.count for found in comparisons.values()})
    least = " and ".join(f"{2 / 2**count:.3g}" for count in counts)
    return (f"{difference_note(baseline)}, and in how many seeds the model is better. p: the exact two-sided "
            f"sign-flip test over seeds; p (Holm): corrected for the number of rows compared, {len(comparisons)}. "
            f"With {' and '.join(map(str, counts))} seeds p cannot be below {least} before the correction.")


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
            row.append(mean_cell(values, number).replace(mean, f"**{mean}**" if bold else mean, 1))
    notes = [INTERVAL_NOTE] if any(len(line.runs) > 1 for line in lines) else []
    comparisons = compare_lines(lines, test_accuracy, more_is_better=True)
    if comparisons:
        columns += [f"accuracy minus `{BASELINE}`'s, points", "better in", "p (Holm)"]
        for row, line in zip(rows, lines):
            difference, better, _, _, p_holm, _ = comparison_cells(comparisons.get(line.label), 2)
            row += [difference, better, p_holm]
        notes.append(comparison_note(comparisons, f"`{BASELINE}`"))
    published = [published_of(dataset, line) for line in lines]
    if any(published):
        columns.append("published")
        for row, found in zip(rows, published):
            row.append(f"{found.val_loss:.3f}, {found.test_loss:.3f}, {found.test_accuracy:.2%}" if found else "")
        notes.append("Published: validation loss, test loss and test accuracy of one run of "
                     f"{max(found.epochs for found in published if found)} epochs.")
    return make_table(dataset, columns, rows, *notes)


def paired_table(heading, lines, measures):
    """How each line differs from `vit` of the same recipe and seed; "" where none can be compared.

    measures: {heading: (figure of a run, number of digits, whether more is better)}.
    """
    columns, found = ["model"], []
    for name, (figure_of, digits, more_is_better) in measures.items():
        columns += comparison_headings(name)
        found.append((compare_lines(lines, figure_of, more_is_better), digits))
    labels = dict.fromkeys(label for comparisons, _ in found for label in comparisons)
    if not labels:
        return ""
    rows = [[label, *(cell for comparisons, digits in found
                      for cell in comparison_cells(comparisons.get(label), digits))] for label in labels]
    most, _ = max(found, key=lambda pair: len(pair[0]))
    return make_table(heading, columns, rows, f"{comparison_note(most, f'`{BASELINE}`')} {STUDENT_NOTE}",
                      DETECTABLE_NOTE)


def noise_tables(dataset, lines):
    """The mean over severities of each corruption's test error, its ratio to `vit`'s, and the paired difference."""
    names, severities = shared_corruptions(lines)
    names = plain_corruptions(names)

    def errors(run):  # of each corruption, then of all
        return [noise_error(run, part, severities) for part in [*([name] for name in names), names]]

    rows = []
    for line in lines:
        *columns, means = zip(*map(errors, line.runs))
        cells = [*(f"{statistics.fmean(column):.1%}" for column in columns), mean_cell(means, "{:.1%}".format)]
        pairs = pair_with_baseline(line, lines)
        if pairs:
            own, base = ([sum(column) for column in zip(*map(errors, runs))] for runs in zip(*pairs))
            cells = [cell + (f" ({a / b:.2f})" if b else "") for cell, a, b in zip(cells, own, base)]
        rows.append([line.label, str(len(line.runs)), *cells])
    tables = [make_table(
        f"{dataset}: mean test error over severities 1 to {severities} (ratio to that of `{BASELINE}`)",
        ["model", "seeds", *map(readable, names), "mean"], rows,
        f"{INTERVAL_NOTE} Ratios are to `{BASELINE}` of the same recipe and seeds."), paired_table(
            f"{dataset}: difference in the mean test error", lines,
            {"mean of all, points": (lambda run: 100 * noise_error(run, names, severities), 2, False)}),
        corruption_table(dataset, lines, names, severities)]
    return "\n".join(filter(None, tables))


def corruption_table(dataset, lines, names, severities):
    """The paired difference of the test error under each corruption, with one correction for all of them."""
    found = compare({(label, name): differences for name in names for label, differences in (
        paired_differences(lines, lambda run: 100 * noise_error(run, [name], severities)).items())}, False)
    labels = dict.fromkeys(label for label, _ in found)
    if not labels:
        return ""
    cells = {key: difference_cell(comparison.mean, comparison.half) for key, comparison in found.items()}
    rows = [[label, *(f"**{cells[label, name]}**" if found[label, name].p_holm < 0.05 else cells[label, name]
                      for name in names)] for label in labels]
    return make_table(
        f"{dataset}: difference in the test error under each corruption, points", ["model", *map(readable, names)],
        rows, difference_note(f"`{BASELINE}`") + ". Bold: p is below 0.05 by the exact two-sided sign-flip test with "
        f"Holm's correction for all {len(found)} cells.")


def shift_tables(dataset, lines):
    """The mean test error under each noise, its shift alone and its fluctuation alone, and the paired differences; the
    same of Gaussian noise by severity."""
    shared, severities = shared_corruptions(lines)
    names = noise_parts(shared)
    rows = [[line.label, str(len(line.runs)), *(mean_cell(
        [noise_error(run, [name], severities) for run in line.runs], "{:.2%}".format) for name in names)]
        for line in lines]
    return "\n".join(filter(None, [make_table(
        f"{dataset}: mean test error over severities 1 to {severities} under each noise and under its parts alone",
        ["model", "seeds", *map(readable, names)], rows, INTERVAL_NOTE,
        "Shift: each pixel replaced by the mean of what the noise makes of it. Fluctuation: the noise less its shift. "
        "Unclipped: the noise not clipped at black and white. Offset: one number added to all pixels of an image, or "
        "of a patch, each patch its own."), paired_table(
            f"{dataset}: difference in the test error under Gaussian noise", lines,
            {f"{readable(name)}, points": (lambda run, name=name: 100 * noise_error(run, [name], severities), 2, False)
             for name in ("gaussian_noise", *GAUSSIAN_PARTS) if name in names}),
        corruption_table(dataset, lines, names, severities),
        *severity_tables(dataset, lines, [name for name in names if name.startswith("gaussian_noise")])]))


def severity_tables(dataset, lines, names):
    """The test error under each of some corruptions at each severity, and the paired difference: two texts."""
    amounts = next(run.amounts for line in lines for run in line.runs)[names[0]]
    columns = ["corruption", "model", *(f"severity {i} ({amount:g})" for i, amount in enumerate(amounts, 1))]
    errors, differences = [], []
    for name in names:
        measures = [lambda run, i=i: 100 * (1 - run.noise[name][i]) for i in range(len(amounts))]
        errors += [[readable(name), line.label, *(
            mean_cell(list(map(measure, line.runs)), "{:.2f}%".format) for measure in measures)] for line in lines]
        found = [paired_differences(lines, measure) for measure in measures]
        differences += [[readable(name), label, *(
            difference_cell(statistics.fmean(values[label]), half_interval(values[label])) for values in found)]
            for label in found[0]]
    return [make_table(f"{dataset}: test error by severity", columns, errors, INTERVAL_NOTE), make_table(
        f"{dataset}: difference in the test error by severity, points", columns, differences,
        difference_note(f"`{BASELINE}`") + ".") if differences else ""]


def response_tables(dataset, lines):
    """How the branches of the heads respond to each noise: a table a block, with a row a model and condition."""
    conditions, blocks = conditions_and_blocks(lines, "response")
    numbers = [("{:+.2f}".format if name.endswith("cosine") else "{:.1%}".format if "share" in name else
                lambda value: f"{value:.3f}" if value >= 0.1 else f"{value:#.2g}") for name in records.RESPONSE_FIGURES]
    tables = []
    for block in blocks:
        rows = [[line.label, readable(condition), *(mean_cell(
            [response_of(run, condition, block, name) for run in line.runs], number)
            for name, number in zip(records.RESPONSE_FIGURES, numbers))] for line in lines for condition in conditions]
        tables.append(make_table(
            f"{dataset}: response of the branches in block {block}",
            ["model", "condition", *(name.replace("_", " ") for name in records.RESPONSE_FIGURES)],
            [row for row in rows if any(row[2:])]))  # not every model has this block
    return "\n".join([*tables, INTERVAL_NOTE, "", RESPONSE_NOTE, ""])


def attention_tables(dataset, lines):
    """The share of the class token's weight on irrelevant patches in the last block, the ratio of relevant to
    irrelevant weight per patch, and the paired difference of the share."""
    conditions, _ = conditions_and_blocks(lines, "attention")
    rows = []
    for line in lines:
        rows.append([line.label, str(len(line.runs))])
        for condition in conditions:
            shares, ratios = ([attention_of(run, condition, -1, name) for run in line.runs]
                              for name in ("irrelevant_share", "signal_to_noise"))
            text = f"{mean_cell(shares, '{:.1%}'.format)} ({statistics.fmean(ratios):.2f})"
            rows[-1].append("" if math.isnan(sum(shares)) else text)
    uniform = ["" if math.isnan(share) else f"{share:.1%} (1.00)"
               for share in (uniform_share(lines, condition) for condition in conditions)]
    return make_table(
        f"{dataset}: share of attention on irrelevant patches in the last block (signal-to-noise ratio)",
        ["model", "seeds", *map(readable, conditions)], [*rows, ["uniform attention", "", *uniform]],
        INTERVAL_NOTE) + "\n" + paired_table(
            f"{dataset}: difference in the irrelevant share, on images as in training", lines,
            {"irrelevant share, points": (trained_irrelevant_share, 2, False)})


def make_tables(dataset, lines):
    """{name: Markdown} of a data set."""
    noise = keep_runs(lines, lambda run: run.noise)
    attention = keep_runs(lines, has_background)
    response = keep_runs(lines, lambda run: run.response)
    names, _ = shared_corruptions(noise)
    tables = {
        "table": result_table(dataset, lines),
        "paired-table": paired_table(f"{dataset}: difference from `{BASELINE}`", lines, {
            "test accuracy, points": (test_accuracy, 2, True),
            "test loss": (lambda run: run.summary["test_loss"], 4, False)}),
        "noise-table": noise_tables(dataset, noise) if plain_corruptions(names) else "",
        "shift-table": shift_tables(dataset, noise) if gaussian_parts(names) else "",
        "response-table": response_tables(dataset, response) if response else "",
        "attention-table": attention_tables(dataset, attention) if attention else "",
    }
    return {name: table for name, table in tables.items() if table}


def compare_models(lines_of, compared):
    """The models of each pair in `compared`, each of the two with one correction for all its rows: {(data set, models):
    Comparison} in accuracy, and {(data set, models, part): Comparison} in the error under the parts of Gaussian noise.

    lines_of: {data set: lines}. A data set whose runs did not all meet the parts has no rows of the second.
    """
    accuracy, error = {}, {}
    for dataset, lines in lines_of.items():
        noise = keep_runs(lines, lambda run: run.noise)
        names, severities = shared_corruptions(noise)
        for pair in compared:
            accuracy |= {(in_print(dataset), label): differences
                         for label, differences in paired_differences(lines, test_accuracy, [pair]).items()}
            for part in gaussian_parts(names):
                found = paired_differences(noise, lambda run: 100 * noise_error(run, [part], severities), [pair])
                error |= {(in_print(dataset), label, part.split("_")[-1]): differences
                          for label, differences in found.items()}
    return compare(accuracy, True), compare(error, False)


def comparison_tables(lines_of, compared):
    """What compare_models finds, in Markdown."""
    headings = {"Differences between models in test accuracy": ["data set", "models"],
                "Differences between models in the error under the parts of Gaussian noise, mean over severities": [
                    "data set", "models", "part"]}
    return "\n".join(
        make_table(heading, [*columns, *comparison_headings("difference, points")],
                   [[*row, *comparison_cells(found, 2)] for row, found in comparisons.items()],
                   f"{comparison_note(comparisons, 'the second model')} {STUDENT_NOTE}", DETECTABLE_NOTE)
        for (heading, columns), comparisons in zip(headings.items(), compare_models(lines_of, compared)) if comparisons)


# What is printed.

SCREEN, WIDTH = 40, 100  # lines and characters
OVERVIEW_NOTE = f"Means over seeds. Minus {BASELINE}: test accuracy less that of the same seeds, with a 95% interval."
PARTS_NOTE = "Shift, fluctuation: mean test error under each of these two parts of Gaussian noise alone."


def overview_rows(dataset, lines):
    """The rows of the data set's table as aligned texts, of more than one line where a label is long."""
    noise = keep_runs(lines, lambda run: run.noise)
    names, severities = shared_corruptions(noise)
    met_noise, parts = {line.label: line.runs for line in noise}, gaussian_parts(names)
    comparisons = compare_lines(lines, test_accuracy, more_is_better=True)
    rows = [["seeds", "parameters", "val loss", "accuracy", f"minus {BASELINE}, points",
             *(part.split("_")[-1] for part in parts)]]
    for line in lines:
        errors = [[noise_error(run, [part], severities) for run in met_noise.get(line.label, [])] for part in parts]
        loss, accuracy = (statistics.fmean(run.summary[name] for run in line.runs)
                          for name in ("val_loss", "test_accuracy"))
        rows.append([str(len(line.runs)), f"{line.runs[0].summary['parameters']:,}", f"{loss:.4f}", f"{accuracy:.2%}",
                     comparison_cells(comparisons.get(line.label), 2)[0],
                     *(f"{statistics.fmean(sample):.1%}" if sample else "" for sample in errors)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    labels = [in_print(dataset), *(line.label for line in lines)]
    room = min(max(map(len, labels)), WIDTH - len(cells[0]) - 2)
    wrapped = [textwrap.wrap(label, room, subsequent_indent="  ") for label in labels]
    return ["\n".join([f"{first.ljust(room)}  {text}".rstrip(), *more])
            for (first, *more), text in zip(wrapped, cells)]


def overview(lines_of, out):
    """What is printed of {data set: lines} whose tables are in the folder `out`: a table each, with as many rows as the
    screen has room for; it holds one more line."""
    tables = {dataset: overview_rows(dataset, lines) for dataset, lines in lines_of.items()}
    for most in range(SCREEN, -1, -1):
        text = ""
        for dataset, (heading, *rows) in tables.items():
            more = [f"... {len(rows) - most} more in {out / dataset}-table.md"] * (len(rows) > most)
            text += "\n".join([heading, *rows[:most], *more, "\n"] if most else [*more, ""])
        has_parts = any(rows[0].split("\n")[0].endswith("fluctuation") for rows in tables.values())
        text += "\n".join([OVERVIEW_NOTE, *[PARTS_NOTE] * has_parts])
        if text.count("\n") + 2 <= SCREEN:
            break
    return text
