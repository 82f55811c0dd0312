"""What runs say together: which belong together and which are compared, seed by seed, with intervals and p-values.

Student's t for intervals, the exact sign-flip permutation test for p, Holm's correction for several comparisons.
report.py lays out what is computed here, plot.py draws it.
"""

import functools
import itertools
import math
import os
import re
import statistics
from collections import defaultdict, namedtuple

import numpy

import records
from command import UserError, read_csv

BASELINE = "vit"  # what every other model is compared with
# In these, models as such differ, and runs on a GPU from those on a CPU.
OF_A_MODEL = {"model", "plugin", "dim", "num_heads", "mlp_dim", "head_hidden_dim", "amp"}
IN_PRINT = {"mnist": "MNIST", "fashionmnist": "Fashion-MNIST", "kmnist": "KMNIST", "cifar10": "CIFAR-10"}
Published = namedtuple("Published", "epochs parameters val_loss test_loss test_accuracy")
PUBLISHED = {  # from NanoDiffVision's README, one run each
    ("mnist", "vit"): Published(20, 33_802, 0.638, 0.626, 0.9551),
    ("mnist", "vitbalanced"): Published(20, 55_626, 0.633, 0.624, 0.9553),
    ("mnist", "vitdiff"): Published(20, 38_106, 0.624, 0.618, 0.9575),
    ("fashionmnist", "vit"): Published(30, 33_802, 0.813, 0.826, 0.8586),
    ("fashionmnist", "vitbalanced"): Published(30, 55_626, 0.792, 0.798, 0.8679),
    ("fashionmnist", "vitdiff"): Published(30, 38_106, 0.788, 0.796, 0.8726),
}


# Samples of numbers.

@functools.cache
def t_quantile(freedom):
    """The t for which |T| < t with probability 95%, by Student's t. T is sqrt(freedom) tan(angle), of an angle whose
    density is proportional to cos(angle)^(freedom - 1), which is summed by trapezia."""
    angles = numpy.linspace(0, math.pi / 2, 2**18)
    density = numpy.cos(angles) ** (freedom - 1)
    coverage = numpy.cumsum(density) - (1 + density) / 2
    return math.sqrt(freedom) * math.tan(numpy.interp(0.95 * coverage[-1], coverage, angles))


def half_interval(values):
    """Half the 95% confidence interval of the mean by Student's t; None of fewer than three values, for which it says
    next to nothing, or if one is nan."""
    if len(values) < 3 or any(map(math.isnan, values)):
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def signed_sums(values):
    """The sums of values for all choices of their signs."""
    sums = numpy.zeros(1)
    for value in values:
        sums = numpy.concatenate([sums + value, sums - value])
    return sums


def sign_flip_p(differences):
    """The two-sided p of the sign-flip permutation test: the share of all choices of signs for the differences whose
    sum is as far from 0 as theirs, or further. Of more than 40 differences every 40th shares its sign, which leaves
    the test exact and its p no smaller than 2 / 2^40."""
    values = [sum(differences[i::40]) for i in range(min(len(differences), 40))]
    first, second = signed_sums(values[::2]), signed_sums(values[1::2])
    second.sort()  # each sum is one of the first half and one of the second: these are counted, not added
    least = abs(sum(values)) - 1e-9 * sum(map(abs, values))  # rounding keeps no sum from reaching itself
    high = len(second) - numpy.searchsorted(second, least - first)  # opposite signs make a sum that is as low
    return min(1.0, 2 * high.sum().item() / (len(first) * len(second)))


def holm(p_values):
    """{name: p} of several tests, corrected for their number by Holm's method."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


# Of differences: their mean, half the mean's 95% interval or None, how many of how many are for the better, the p of
# the sign-flip test, and the same corrected by Holm for all that are compared at once.
Comparison = namedtuple("Comparison", "mean half better count p p_holm")


def compare(differences_of, more_is_better=False):
    """{name: Comparison} of {name: differences, two or more}."""
    p_values = {name: sign_flip_p(differences) for name, differences in differences_of.items()}
    corrected, sign = holm(p_values), 1 if more_is_better else -1
    return {name: Comparison(
        statistics.fmean(differences), half_interval(differences), sum(sign * value > 0 for value in differences),
        len(differences), p_values[name], corrected[name]) for name, differences in differences_of.items()}


# Which runs belong together.

# One line of each chart and one row of each table: the runs of all seeds of one folder and the same settings, by seed.
# settings: those of the first. front: drawn in full, as reference runs behind others are not. style: plot.py's.
Line = namedtuple("Line", "label model folder settings runs front style", defaults=[None])


def settings_beside(settings, names):
    """The settings except for those named, as a frozenset of pairs, without those that change nothing."""
    return frozenset((name, value) for name in settings.keys() - names
                     if (value := records.setting_of(settings, name)) is not None)


def settings_apart(line, others):
    """The settings that set a line apart, as texts: those in which it differs from any of the others, where that is
    a line of another model except for those in OF_A_MODEL."""
    def differs(name, other):
        return records.setting_of(line.settings, name) != records.setting_of(other.settings, name)

    names = dict.fromkeys(name for other in [line, *others] for name in other.settings if name != "seed")
    found = {name: line.settings.get(name, 0) for name in names if any(
        differs(name, other) for other in others if other.model == line.model or name not in OF_A_MODEL)}
    return [f"{name} {value}" for name, value in found.items() if value is not None]


def label_lines(lines):
    """Label each line of a chart by its model and by what sets it apart: settings and, from others of that model, the
    folder. The reference is set apart from the reference alone, as it is compared with nothing else."""
    parts = {line.folder: line.folder.resolve().parts for line in lines}
    shared = len(os.path.commonprefix(list(parts.values())))
    labelled = []
    for line in lines:
        beside = [other for other in lines if line.front or not other.front]
        label, folder = ", ".join([line.model, *settings_apart(line, beside)]), parts[line.folder][shared:]
        if folder and len({other.folder for other in lines if other.model == line.model}) > 1:
            label += f" ({'/'.join(folder)})"
        # No TeX in charts, no bars in tables, and still no two labels alike.
        label = re.sub(r"[^\w ,.:;/()+-]", lambda found: f"%{ord(found[0]):X}", label)
        labelled.append(line._replace(label=label))
    return sorted(labelled, key=lambda line: (not line.front, line.model, line.label))


def runs_of(lines):
    return [run for line in lines for run in line.runs]


def keep_runs(lines, condition):
    """The lines of only those runs for which the condition holds."""
    kept = [line._replace(runs=list(filter(condition, line.runs))) for line in lines]
    return [line for line in kept if line.runs]


def lambda_columns(run):
    return [name for name in run.metrics if name.startswith("lambda_")]


FAMILIES = ["Self-attention", "Subtracting", "Adding in place of subtracting"]


def family_of(line):
    """Which of FAMILIES a line is of, by what its runs recorded and whatever its model's name: it subtracts, be it a
    second map or a part of the mean, if its maps have negative weights; of others, self-attention has no lambda."""
    if any(figures["negative_share"] for run in line.runs for blocks in (run.attention or {}).values()
           for figures in blocks.values()):
        return 1
    return 2 if any(map(lambda_columns, line.runs)) else 0


def keep_one_protocol(lines):
    """The lines without what their runs did under corruption by other amounts than the first run's: such figures never
    stand beside each other."""
    amounts = next((run.amounts for run in runs_of(lines) if run.amounts), {})

    def restrict(run):
        found = run.amounts or {}
        if found | amounts == amounts | found:  # all that both have is the same
            return run
        attention = {condition: blocks for condition, blocks in (run.attention or {}).items()
                     if condition.rpartition("_")[0] not in found}
        return run._replace(noise=None, response=None, aligned=None, attention=attention or None)

    return [line._replace(runs=list(map(restrict, line.runs))) for line in lines]


def arrange(own, reference=()):
    """Sort runs into lines: {data set: [Line]}, one's own first, then the reference, each by name. Of a data set that
    one has no run of, the reference stands in front.

    Raises:
        UserError: if two runs of one folder have the same settings and seed.
    """
    folders, datasets = {run.folder.parent for run in own}, {run.settings["dataset"] for run in own}
    groups, lines_of = defaultdict(dict), defaultdict(list)
    for run in [*own, *reference]:
        group = groups[run.folder.parent, settings_beside(run.settings, {"seed"})]
        twin = group.setdefault(run.settings["seed"], run)
        if twin is not run:
            raise UserError(f"{twin.folder} and {run.folder} have the same settings and seed: move one away")
    for (folder, _), group in groups.items():
        runs = [group[seed] for seed in sorted(group)]
        settings = runs[0].settings
        front = folder in folders or settings["dataset"] not in datasets
        lines_of[settings["dataset"]].append(Line("", settings["model"], folder, settings, runs, front))
    return {dataset: keep_one_protocol(label_lines(lines)) for dataset, lines in sorted(lines_of.items())}


# Which are compared.

def recipe_of(run, *names):
    """The settings that two runs must share to be compared, the seed among them, as a frozenset of pairs: all but the
    model, its sizes, those named, and the precision, which is another on a GPU than on a CPU where --amp is left out.
    """
    return settings_beside(run.settings, {"model", "plugin", "amp", *records.MODEL_SETTINGS, *names})


def size_of(line):
    return settings_beside(line.settings, line.settings.keys() - records.MODEL_SETTINGS)


def baselines_of(line, lines, baseline=BASELINE):
    """The lines that a line may be compared with. The reference is not compared with one's own runs."""
    return [other for other in lines if other.model == baseline and (line.front or not other.front)]


def pair_with_baseline(line, lines, baseline=BASELINE):
    """Each run of a line with the baseline's run of the same recipe and seed, where there is one: [(run, baseline's)].

    All baselines are of one size, the most alike that makes two pairs; of several runs of a seed it is one of the
    line's own folder, or else of the reference.
    """
    def distance(other):
        return len(size_of(line) ^ size_of(other)), other.folder != line.folder, other.front

    by_size = defaultdict(dict)
    for other in sorted(baselines_of(line, lines, baseline), key=distance):
        for run in other.runs:
            by_size[size_of(other)].setdefault(recipe_of(run), run)
    found = [[(run, others[recipe_of(run)]) for run in line.runs if recipe_of(run) in others]
             for others in by_size.values()]
    return max(found, key=lambda pairs: min(len(pairs), 2), default=[])


def why_alone(line, lines):
    """Why a line that shares no two seeds with `vit` is not compared with it, in at most 22 characters; "" of `vit`."""
    recipes = {recipe_of(run, "seed") for run in runs_of(baselines_of(line, lines))}
    if line.model == BASELINE:
        return ""
    return "no two seeds in common" if recipe_of(line.runs[0], "seed") in recipes else f"no {BASELINE} of this recipe"


def paired_differences(lines, figure_of, compared=()):
    """{label: differences} from `vit`, of the other models' lines that share two or more seeds with it; or between the
    models of each pair in `compared`, the first minus the second.

    figure_of: a number of a run; runs of which it is nan are left out.
    """
    lines, found = keep_runs(lines, lambda run: not math.isnan(figure_of(run))), {}
    for line in lines:
        for model, other in compared or [(line.model, BASELINE)]:
            if line.model == model != other:
                pairs = pair_with_baseline(line, lines, other)
                label = f"{line.label} - {other}" if compared else line.label
                found[label] = [figure_of(run) - figure_of(partner) for run, partner in pairs]
    return {label: differences for label, differences in found.items() if len(differences) > 1}


def compare_lines(lines, figure_of, more_is_better=False):
    """{label: Comparison} with `vit` of the differences that paired_differences finds."""
    return compare(paired_differences(lines, figure_of), more_is_better)


# Names.

GAUSSIAN_PARTS = ["gaussian_noise_shift", "gaussian_noise_fluctuation"]
OFFSETS = ["image_offset", "patch_offset"]
REMOVED = {  # what was taken out of the heads' outputs: what follows the corruption in the conditions of aligned.csv
    "offset": "", "random vector": "_random", "offset of the class token": "_class_token",
    "offset of another corruption": "_by_.*", "offset of the pixels": "_pixels"}


def in_print(dataset):
    """The name of a data set in charts: that in IN_PRINT, behind what stands before it, as in rotatedmnist."""
    return re.sub(f"({'|'.join(IN_PRINT)})$", lambda found: f" {IN_PRINT[found[0]]}", dataset).lstrip()


def readable(name):
    """A corruption's or condition's name in words: gaussian_noise_3 for a corruption of severity 3."""
    return re.sub(r"_(\d+)$", r", severity \1", name).replace("_", " ")


def part_of(name):
    """A corruption's name, taken apart: the noise and "shift", "fluctuation" or "unclipped"; or all of it and ""."""
    noise, _, part = name.rpartition("_")
    return (noise, part) if part in ("shift", "fluctuation", "unclipped") else (name, "")


def plain_corruptions(names):
    """Those that are neither a part of a noise nor one of those that stand beside it, not clipped."""
    return [name for name in names if not part_of(name)[1] and name not in OFFSETS]


def noise_parts(names):
    """Each noise that was met in parts, too, with these, and what is not clipped."""
    noises = [noise for noise, part in map(part_of, names) if part == "shift"]
    parts = [noise + part for noise in noises for part in ("", "_shift", "_fluctuation")]
    return [name for name in [*parts, "gaussian_noise_unclipped", *OFFSETS] if name in names]


# Figures of runs: what was published, and what the analyses found.

def published_of(dataset, line):
    """The published figures of a line's model, if it has as many parameters; None for any other."""
    figures = PUBLISHED.get((dataset, line.model))
    return figures if figures and abs(line.runs[0].summary["parameters"] / figures.parameters - 1) <= 0.03 else None


def test_accuracy(run):
    """In percent."""
    return 100 * run.summary["test_accuracy"]


def shared_corruptions(lines):
    """The corruptions that every run has met which has met any, and the number of severities."""
    found = [run.noise for run in runs_of(lines) if run.noise] or [{}]
    names = [name for name in found[0] if all(name in noise for noise in found)]
    return names, len(found[0][names[0]]) if names else 0  # as keep_one_protocol leaves no others beside them


def noise_error(run, names, first=1, last=None):
    """The mean test error under some corruptions at severities from the first to the last."""
    return statistics.fmean(1 - accuracy for name in names for accuracy in run.noise[name][first - 1:last])


def error_under(*names, **severities):
    """A function of a run: the same in percent; nan of a run that has not met all of these corruptions."""
    return lambda run: 100 * noise_error(run, names, **severities) if {*names} <= {*(run.noise or ())} else math.nan


def part_errors(lines):
    """{"shift": a function of a run: its error in percent, "fluctuation": ...} under the parts of Gaussian noise, by
    which models are compared, if all runs have met both."""
    names, _ = shared_corruptions(lines)
    parts = GAUSSIAN_PARTS if set(GAUSSIAN_PARTS) <= set(names) else []
    return {part_of(name)[1]: error_under(name) for name in parts}


def error_without(removed, *names, images=math.inf, severities=(3,)):
    """A function of a run: the mean test error in percent under some corruptions when what `removed` says, of REMOVED,
    was taken out, by so many images, or by as many as there are, nothing by 0; nan where that was not measured."""
    def accuracy(run, name, severity):
        found = next((part.get(str(severity), {}) for condition, part in (run.aligned or {}).items()
                      if re.fullmatch(name + REMOVED[removed], condition)), {})
        return found.get(min(images, max(found, default=0)), math.nan)

    return lambda run: 100 * statistics.fmean(
        1 - accuracy(run, name, severity) for name, severity in itertools.product(names, severities))


def aligned_conditions(lines):
    """Of aligned.csv the corruptions; by how many images offsets were estimated, from 0; and under which corruption
    which other's offset was subtracted."""
    aligned = lines[0].runs[0].aligned if lines else {}
    found = {name: part["3"] for name, part in aligned.items() if 0 in part.get("3", {})}
    return list(found), sorted(set().union(*found.values())), [
        name.split("_by_") for name in aligned if "_by_" in name]


def attack_errors(run):
    """{attack: {"epsilon 0.04": its test error in percent, ...}}; of colour "epsilon 0.25/255"."""
    def label(epsilon):
        quarters = round(1020 * epsilon, 3)
        return f"epsilon {quarters / 4:g}/255" if quarters.is_integer() else f"epsilon {epsilon:g}"

    return {attack: {label(epsilon): 100 * (1 - accuracy) for epsilon, accuracy in accuracies.items()}
            for attack, accuracies in (run.attack or {}).items()}


def error_under_attack(attack, epsilon):
    """A function of a run; epsilon: as in attack_errors."""
    return lambda run: attack_errors(run).get(attack, {}).get(epsilon, math.nan)


def conditions_and_blocks(lines, analysis):
    """Those of the attention or the response, whichever `analysis` names, of several runs: two lists."""
    found = [getattr(run, analysis) for run in runs_of(lines)]
    return (list(dict.fromkeys(condition for conditions in found for condition in conditions)),
            sorted({block for conditions in found for blocks in conditions.values() for block in blocks}))


def response_figure(run, condition, block, figure):
    """A figure of a run's response; nan where it has none, as self-attention has no second branch."""
    found = run.response.get(condition, {}).get(block, {}).get(figure)
    return math.nan if found is None else found


def attention_figure(run, condition, block, figure):
    """A figure of a run's attention; nan where it has no such block or was not shown the condition. -1: the last."""
    blocks = run.attention.get(condition, {})
    return blocks.get(len(blocks) - 1 if block == -1 else block, {}).get(figure, math.nan)


def has_background(run):
    """Whether the class token can attend to patches without any of the object: of photographs hardly any is black."""
    return any(blocks[0]["uniform_share"] > 0.01 for blocks in (run.attention or {}).values())


def uniform_share(lines, condition):
    """What uniform attention would give to irrelevant patches; nan where that is not the same in all runs, as their
    patches are of different sizes."""
    found = {round(attention_figure(run, condition, 0, "uniform_share"), 4) for run in runs_of(lines)
             if condition in run.attention}
    return found.pop() if len(found) == 1 else math.nan


def trained_irrelevant_share(run):
    """The irrelevant share in the last block, in percent, under the condition that is as in the run's training: one
    that is called by the value of a setting, as 4_distractors, or clean."""
    as_trained = {f"{value}_{setting}" for setting, value in run.settings.items()}.intersection(run.attention)
    return 100 * attention_figure(run, min(as_trained, default="clean"), -1, "irrelevant_share")


# Figures of runs by the words for them in tables: of each its format, and a function of a run and perhaps a corruption.

@functools.cache
def rows_of(path):
    """The rows of a CSV file, {column: text of a cell}."""
    return read_csv(path, advice=records.ORIGINAL)[1]


def published_accuracy(run):
    found = PUBLISHED.get((run.settings["dataset"], run.settings["model"]))
    return 100 * found.test_accuracy if found else math.nan


def response(name, run, corruption):
    return response_figure(run, f"{corruption}_3", 1, name)


def shared_part(run, corruption):
    """Noise to signal of the change that all images share, the mean over the heads of the last block."""
    name, folder = run.folder.name, run.folder if run.folder.exists() else run.folder.parent
    return statistics.fmean(
        float(row["noise_to_signal"]) * float(row["common_share"]) for row in rows_of(folder / "response.csv")
        if row.get("run", name) == name and (row["condition"], row["block"]) == (f"{corruption}_3", "1"))


def of_names(figure_of, **options):
    """A figure of a run under one corruption, or under several with spaces between them."""
    return lambda run, corruption: figure_of(*corruption.split(" "), **options)(run)


def share_removed(run, corruption):
    """In percent of what a corruption of severity 3 adds to the error, what is gone when the offset was taken out."""
    left, as_it_is = (FIGURES[f"error {which}"][1](run, corruption) for which in ("without offset", "at severity 3"))
    return 100 * (as_it_is - left) / (as_it_is - 100 + test_accuracy(run))


BRANCHES = {"first branch": "noise_to_signal_1", "second branch": "noise_to_signal_2", "output": "noise_to_signal",
            "cosine of changes": "noise_cosine", "cosine of clean outputs": "signal_cosine"}
FIGURES = {
    "parameters": ("{:,.0f}", lambda run, *_: run.summary["parameters"]),
    "val loss": ("{:.4f}", lambda run, *_: run.summary["val_loss"]),
    "test loss": ("{:.4f}", lambda run, *_: run.summary["test_loss"]),
    "accuracy": ("{:.2f}%", lambda run, *_: test_accuracy(run)),
    "published": ("{:.2f}%", lambda run, *_: published_accuracy(run)),
    "error": ("{:.1f}%", lambda run, corruption: of_names(error_under)(run, corruption) if corruption
              else 100 - test_accuracy(run)),
    "error at severity 3": ("{:.1f}%", of_names(error_under, first=3, last=3)),
    **{f"error without {removed}": ("{:.1f}%", of_names(functools.partial(error_without, removed)))
       for removed in REMOVED},
    "share of excess removed": ("{:.1f}%", share_removed),
    **{word: ("{:.1f}%", lambda run, epsilon, attack=attack: error_under_attack(attack, epsilon)(run))
       for word, attack in {"robust error": "pgd", "fgsm error": "fgsm", "sign noise error": "sign_noise"}.items()},
    "irrelevant share": ("{:.1f}%", lambda run, *_: trained_irrelevant_share(run)),
    **{word: ("{:.2f}", functools.partial(response, name)) for word, name in BRANCHES.items()},
    "shared part": ("{:.2f}", shared_part),
    "own part": ("{:.2f}", lambda *of: response("noise_to_signal", *of) - shared_part(*of))}
