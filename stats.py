"""What runs say together: intervals over seeds, and models compared with `vit` seed by seed, as numbers and in words.

Student's t for intervals, the exact sign-flip permutation test for p, Holm's correction for several comparisons.
"""

import functools
import math
import statistics
from collections import namedtuple

import numpy

import records

BASELINE = "vit"  # what every other model is compared with
# Of one row's differences: their mean, half the mean's 95% interval, how many of how many are for the better, the p of
# the sign-flip test, that p corrected by Holm over all rows, and what difference so many seeds would have shown.
Comparison = namedtuple("Comparison", "mean half better count p p_holm detectable")


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
def t_quantile(freedom, coverage=0.95):
    """The t for which |T| < t with probability `coverage`, by bisection of its angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        too_high = t_coverage(math.sqrt(freedom) * math.tan(middle), freedom) > coverage
        low, high = (low, middle) if too_high else (middle, high)
    return math.sqrt(freedom) * math.tan(low)


def half_interval(values):
    """Half the 95% confidence interval of the mean by Student's t; None for a single value, or if one is nan."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def detectable_difference(differences):
    """The smallest mean difference that as many pairs, as far apart as these, show in 80% of experiments: a 95%
    interval by Student's t leaves out 0. The non-central t distribution is taken for a shifted central one."""
    half, freedom = half_interval(differences), len(differences) - 1
    return half * (1 + t_quantile(freedom, 0.6) / t_quantile(freedom))  # 20% of T are below -t_quantile(freedom, 0.6)


def sign_flip_p(differences):
    """The two-sided p of the sign-flip permutation test: the share of all choices of signs for the differences whose
    sum is as far from 0 as theirs, or further. From the 21st difference on, signs are drawn: 2^20 choices in all."""
    sums, random = numpy.zeros(1), numpy.random.default_rng(0)
    for difference in differences:
        if len(sums) < 2**20:
            sums = numpy.concatenate([sums + difference, sums - difference])
        else:
            signs = random.choice([-1, 1], len(sums))
            signs[0] = 1  # the first choice is the differences as they are, so that p is never 0
            sums += difference * signs
    rounding = 1e-9 * sum(map(abs, differences))
    return numpy.mean(abs(sums) >= abs(sum(differences)) - rounding).item()


def holm(p_values):
    """p-values corrected for their number by Holm's method, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def compare(rows, more_is_better):
    """{name: Comparison} of {name: differences, two or more}."""
    p_values = {name: sign_flip_p(differences) for name, differences in rows.items()}
    corrected = dict(zip(rows, holm(list(p_values.values()))))
    return {name: Comparison(
        statistics.fmean(differences), half_interval(differences),
        sum(difference > 0 if more_is_better else difference < 0 for difference in differences), len(differences),
        p_values[name], corrected[name], detectable_difference(differences)) for name, differences in rows.items()}


def recipe_of(run):
    """The settings that two runs must share to be compared, the seed among them: all but the model and its sizes."""
    return {name: value for name, value in run.settings.items()
            if value is not None and name not in ("model", "plugin", *records.MODEL_SETTINGS)}


def pair_with_baseline(line, lines, baseline=BASELINE):
    """Each run of a line with the baseline's run of the same recipe and seed, where there is one: [(run, baseline's)].

    Of several it is one of the line's own folder, or else of the reference; then the one most alike in size.
    """
    def distance(other):
        return other.folder != line.folder, other.front, sum(
            other.settings.get(name) != line.settings.get(name) for name in ["plugin", *records.MODEL_SETTINGS])

    baselines = sorted((other for other in lines if other.model == baseline), key=distance)
    pairs = []
    for run in line.runs:
        alike = [other for found in baselines for other in found.runs if recipe_of(other) == recipe_of(run)]
        pairs += [(run, other) for other in alike[:1]]
    return pairs


def compare_lines(lines, figure_of, more_is_better, compared=()):
    """{label: Comparison} with `vit`, of the other models' lines that share two or more seeds with it; or of the pairs
    of models in `compared`, each model with the one named after it.

    figure_of: a number of a run; a pair in which it is nan is left out.
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
    return compare(rows, more_is_better)


# Cells and captions of tables.

def mean_cell(values, number):
    """The mean, and half its 95% interval where there are several values."""
    half = half_interval(values)
    return number(statistics.fmean(values)) + (f" ± {number(half)}" if half is not None else "")


def comparison_cells(found, digits):
    """The difference with its interval, in how many seeds it is for the better, p, p by Holm, what could be shown."""
    ends = (found.mean + sign * found.half for sign in (0, -1, 1))
    return ["{} ({} to {})".format(*(f"{value:+.{digits}f}" for value in ends)), f"{found.better} of {found.count}",
            f"{found.p:.3g}", f"{found.p_holm:.3g}", f"{found.detectable:.{digits}f}"]


def comparison_note(comparisons, baseline):
    """What the columns of a comparison with a baseline say."""
    counts = {found.count for found in comparisons.values()}
    text = (f"The difference is from {baseline} of the same recipe and seed: its mean over seeds with a 95% interval "
            "(Student's t), and in how many seeds it is for the better. p is that of the exact sign-flip test over "
            "seeds, two-sided; p (Holm) is corrected by Holm's method for the number of rows compared, "
            f"{len(comparisons)}.")
    return text + (f" With {max(counts)} seeds p cannot be below {2 / 2**max(counts):.3g} before the correction."
                   if len(counts) == 1 else "")
