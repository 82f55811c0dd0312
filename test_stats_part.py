"""Claims about lines, statistics and tables, each against an independent computation. Runs are made up in memory.

    python -m pytest test_stats_part.py
"""

import itertools
import math
import re
import statistics
from pathlib import Path

import numpy
import pytest

import records
import report
import stats
from command import UserError

PARTS = ["gaussian_noise", *stats.GAUSSIAN_PARTS, "patch_offset"]


# Made-up runs, and what becomes of them.

def make_run(model="vit", seed=0, folder="runs", loss=0.5, accuracy=0.98, parameters=33_034, errors={}, amount=0.1,
             **settings):
    """errors: {corruption: in percent at severities 1, 2, ...}, which are so many amounts."""
    plain = dict(dataset="mnist", plugin=None, dim=32, lr=0.006, distractors=0)
    return records.Run(**dict.fromkeys(records.Run._fields) | dict(
        folder=Path(folder, f"{model}-{len(settings)}-seed{seed}"),
        settings=dict(model=model, seed=seed) | plain | settings,
        summary=dict(parameters=parameters, val_loss=loss, test_loss=loss - 0.01, test_accuracy=accuracy),
        noise={name: [1 - error / 100 for error in found] for name, found in errors.items()} or None,
        amounts={name: [amount * (i + 1) for i in range(len(found))] for name, found in errors.items()}))


def make_parts(model, errors, seeds=2, **options):
    """Runs with errors [under each of PARTS], one point more at each further severity, and two in seed 0 of all but
    `vit`."""
    return [make_run(model, seed, errors={
        name: [error + i + 2 * (seed == 0 and model != "vit") for i in range(5)] for name, error in zip(PARTS, errors)},
        **options) for seed in range(seeds)]


def attend(run, figures):
    """The run with {condition: (irrelevant share, signal to noise)} in the last of two blocks."""
    return run._replace(attention={condition: {
        0: dict(uniform_share=0.4), 1: dict(uniform_share=0.4, irrelevant_share=share, signal_to_noise=ratio)}
        for condition, (share, ratio) in figures.items()})


def lines_of(own, reference=()):
    return {line.label: line for line in stats.arrange(own, reference)["mnist"]}


def tables_of(runs):
    return report.make_tables("mnist", stats.arrange(runs)["mnist"])


def rows_of(table):
    """The rows of each table in a Markdown text, its headings first: lists of lists of cells."""
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines() if "|---" not in row]
            for rows in re.findall(r"(?:^\|.*\n)+", table, re.MULTILINE)]


# Which runs are shown and compared, and as which lines.

def test_folders():
    """Lines of several folders are told apart by them, whatever characters these have. The reference stands behind
    one's own runs; of a data set that these lack it stands in front."""
    def labels(*groups):
        lines = lines_of(*([make_run(folder=folder) for folder in folders] for folders in groups))
        return {label: line.front for label, line in lines.items()}

    assert labels(["a"]) == labels([], ["a"]) == {"vit": True}
    assert labels(["a"], ["a/reference"]) == {"vit": True, "vit (reference)": False}
    assert labels(["a", "b"], ["a/reference"]) == {"vit (a)": True, "vit (b)": True, "vit (a/reference)": False}
    assert labels(["c#", "c|"]) == {"vit (c%23)": True, "vit (c%7C)": True}  # in no chart and no Markdown table


def test_seeds_alone_share_a_line():
    """Runs of other settings are other lines, named after what differs between lines of a model; a setting that
    is missing where it is 0 or null elsewhere splits none. A run that is there twice is an error."""
    own = [make_run(seed=1), make_run(seed=0, flip=False, noise=0.0), make_run("vitbalanced", dim=48),
           make_run("vitdiff", 10, lr=0.1), make_run("vitdiff", 2, lr=0.1), make_run("vitcosine", patch_size=4)]
    assert {label: [run.settings["seed"] for run in line.runs] for label, line in lines_of(own).items()} == {
        "vit": [0, 1], "vitbalanced": [0], "vitcosine, patch_size 4": [0], "vitdiff, lr 0.1": [2, 10]}
    own += [make_run("vitdiff", lr=0.1, dim=48), make_run("vitbalanced", dim=48, flip=True)]
    assert list(lines_of(own)) == ["vit", "vitbalanced, flip 0", "vitbalanced, flip True", "vitcosine, patch_size 4",
                                   "vitdiff, dim 32, lr 0.1", "vitdiff, dim 48, lr 0.1"]
    assert list(lines_of([make_run(lr=0.1)], [make_run(folder="ref")])) == ["vit, lr 0.1 (runs)", "vit (ref)"]
    with pytest.raises(UserError, match="runs/vit-1-seed0 and runs/vit-0-seed0 have the same settings and seed"):
        lines_of([make_run(distractors=0), make_run()])


def test_nearest_baseline():
    """`vit` of one's own folder serves before the reference's, seed by seed, but never one of another size beside it;
    the size most alike that makes two pairs serves. The reference is compared with itself."""
    own = [make_run("vitcosine", seed, dim=dim) for dim in (32, 48, 64) for seed in range(3)] + [
        make_run("vit", seed, dim=dim) for dim, seed in [(32, 0), (32, 1), (48, 0), (48, 1), (64, 0)]]
    lines = lines_of(own, [make_run(*run, "ref") for run in itertools.product(["vit", "vitwide"], (1, 2))]
                     + [make_run("vitwide", 0, "ref")])
    for name, dim, folders in [("vitcosine, dim 32", 32, "runs runs ref"), ("vitcosine, dim 48", 48, "runs runs"),
                               ("vitcosine, dim 64", 32, "runs runs ref"), ("vitwide", 32, "ref ref")]:
        pairs = stats.pair_with_baseline(lines[name], list(lines.values()))
        assert " ".join(other.folder.parts[0] for _, other in pairs) == folders
        assert all(other.settings == run.settings | dict(model="vit", dim=dim) for run, other in pairs)


# Statistics.

def test_intervals():
    """Quantiles of t are those of the tables, and half an interval is a quantile of the mean's standard error."""
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}
    assert {freedom: round(stats.t_quantile(freedom), 4) for freedom in known} == known
    assert stats.half_interval([1, 2, 4, 9]) == pytest.approx(3.1824 * statistics.stdev([1, 2, 4, 9]) / 2, rel=1e-4)


def test_p_values():
    """p is the share of all choices of signs whose sum is as far from 0; of more than 40 values, of those drawn. By
    Holm's correction the smallest p is multiplied by the number of tests, the next by one less, and none is less than
    one before."""
    assert stats.sign_flip_p([0.1] * 24) == 2 / 2**24 and 0 < stats.sign_flip_p([0.1] * 44) < 1e-9
    for values in ([0.1] * 5, [0.0, 0.0], [0.3, -0.9, 1.1, 0.2, 0.8, -0.4, 1.7]):
        signs = numpy.array([*itertools.product([-1, 1], repeat=len(values))])
        assert stats.sign_flip_p(values) == numpy.mean(abs(signs @ values) >= abs(sum(values)) - 1e-12)
    assert stats.holm(dict(a=0.01, b=0.04, c=0.03, d=0.005)) == pytest.approx(dict(a=0.03, b=0.06, c=0.06, d=0.02))


def test_names_of_corruptions():
    """A corruption is plain, or stands with its noise and the other parts of it, or beside them. Tables are made of
    what runs have met, be it parts of a noise without the noise, or an offset alone."""
    names = ["gaussian_noise_unclipped", *PARTS, "blur"]
    assert stats.plain_corruptions(names) == ["gaussian_noise", "blur"]
    assert stats.noise_parts(names) == [*PARTS[:3], "gaussian_noise_unclipped", "patch_offset"]
    for met, written in [(PARTS[1:3], ["shift-table"]), (["patch_offset"], []), (["blur"], ["noise-table"])]:
        assert list(tables_of([make_run(errors=dict.fromkeys(met, [30] * 5))]))[1:] == written


# Tables.

def test_result_table():
    """The table has means, 95% intervals, none for one seed, the best of a column bold, and what is published where
    model, data set and number of parameters are the same."""
    runs = [make_run("vit", seed, loss=0.5 + 0.02 * seed, accuracy=0.98 + 0.001 * seed) for seed in range(3)]
    runs += [make_run("vitbalanced"), make_run("vitdiff", loss=0.51, accuracy=0.981, parameters=37_290)]
    half = f"{4.303 * 0.02 / math.sqrt(3):.4f}"  # Student's t with 2 degrees of freedom; the deviation of the losses
    tables = tables_of(runs)
    assert list(tables) == ["table"]  # of a single pair nothing more can be said
    assert rows_of(tables["table"]) == [[
        ["model", "parameters", "seeds", "validation loss", "test loss", "test accuracy", "published"],
        ["vit", "33,034", "3", f"0.5200 ± {half}", f"0.5100 ± {half}", "**98.10%** ± 0.25%", "0.638, 0.626, 95.51%"],
        ["vitbalanced", "33,034", "1", "**0.5000**", "**0.4900**", "98.00%", ""],
        ["vitdiff", "37,290", "1", "0.5100", "0.5000", "**98.10%**", "0.624, 0.618, 95.75%"]]]


def test_comparison_with_vit():
    """A model is compared with `vit` of the same seed and recipe, whatever its size and precision, with Holm's p."""
    runs = [make_run("vitdiff", 3), make_run("vitbalanced")]  # no partner; no interval of one pair
    for seed, more in enumerate([0.001, 0.003, 0.004]):
        runs += [make_run("vit", seed), make_run("vitdiff", seed, accuracy=0.98 + more),
                 make_run("vitwide", seed, dim=48, amp="bfloat16"), make_run("vitshort", seed, epochs=3)]
    mean, half = 0.8 / 3, 4.3027 * statistics.stdev([0.1, 0.3, 0.4]) / math.sqrt(3)
    tables = tables_of(runs)
    assert [row[:5] for row in rows_of(tables["paired-table"])[0]] == [
        ["model", "test accuracy, points (95% interval)", "better in", "p", "p (Holm)"],
        ["vitdiff", f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", "3 of 3", "0.25", "0.5"],
        ["vitwide, amp bfloat16", "+0.00 (+0.00 to +0.00)", "0 of 3", "1", "1"]]
    assert "+0.0000" in tables["paired-table"] and "| 3 of 3 | 0.5 |" in tables["table"]


def test_tables_of_noise():
    """Errors have intervals over seeds, and ratios to `vit` of the same seeds. What not all have met is left out."""
    runs = [make_run(seed=seed, errors=dict(blur=[10, 20, 30, 40, 50 + 10 * seed], fog=[40] * 5, snow=[1] * 5))
            for seed in range(2)]
    runs += [make_run("vitdiff", errors=dict(blur=[10, 10, 20, 20, 40], fog=[60] * 5)), make_run("vitdiffv2")]
    half = 12.706 * 0.01 / math.sqrt(2) / math.sqrt(2)  # of the mean errors 0.35 and 0.36
    assert rows_of(tables_of(runs)["noise-table"]) == [[
        ["model", "seeds", "blur", "fog", "mean"],
        ["vit", "2", "31.0% (1.00)", "40.0% (1.00)", f"35.5% ± {half:.1%} (1.00)"],
        ["vitdiff", "1", f"20.0% ({2 / 3:.2f})", "60.0% (1.50)", f"40.0% ({0.4 / 0.35:.2f})"]]]


@pytest.mark.parametrize("seeds, bold", [(7, False), (8, True)])
def test_tables_of_the_parts(seeds, bold):
    """Noise, its shift alone and its fluctuation alone have tables of errors and of differences, by severity, too. A
    cell is bold where p is below 0.05 by Holm for all."""
    runs = make_parts("vit", [20, 10, 5, 6], seeds) + make_parts("vitdiff", [12, 4, 4.9, 9], seeds)
    errors, paired, each, severities, differences = rows_of(tables_of(runs)["shift-table"])
    assert errors[1] == ["vit", str(seeds), *(f"{value}.00% ± 0.00%" for value in (22, 12, 7, 8))]
    extra, half = 2 / seeds, stats.t_quantile(seeds - 1) * 2 / seeds  # of seed 0 alone, so that it is the mean's error
    cells = {shift: f"{shift + extra:+.2f} ({shift + extra - half:+.2f} to {shift + extra + half:+.2f})"
             for shift in (-8, -6, -0.1, 3)}
    assert paired[1][5:8] == [cells[-6], f"{seeds} of {seeds}", f"{2 / 2**seeds:.3g}"]
    assert each[1][1:] == [f"**{cell}**" if bold and shift != -0.1 else cell for shift, cell in cells.items()]
    assert severities[3] == ["gaussian noise shift", "vit", *(f"{10 + i}.00% ± 0.00%" for i in range(5))]
    assert differences[2] == ["gaussian noise shift", "vitdiff", *[cells[-6]] * 5]


def test_attention():
    """The irrelevant share has its interval, its ratio and the seed-paired difference; a cell without a figure is
    empty. Where hardly a patch is black, as in photographs, there is no table."""
    runs = [attend(make_run(model, seed), dict(clean=(share, 2.5))) for model, shares in dict(
        vit=[0.31, 0.33], vitdiff=[0.21, 0.27]).items() for seed, share in enumerate(shares)]
    shares, paired = rows_of(tables_of([*runs, attend(make_run("vitnew"), dict(fog=(0.5, 1)))])["attention-table"])
    assert shares[1:] == [["vit", "2", "32.0% ± 12.7% (2.50)", ""], ["vitdiff", "2", "24.0% ± 38.1% (2.50)", ""],
                          ["vitnew", "1", "", "50.0% (1.00)"], ["uniform attention", "", *["40.0% (1.00)"] * 2]]
    half = 12.7062 * 2  # the differences are -10 and -6
    assert paired[1][:3] == ["vitdiff", f"-8.00 ({-8 - half:+.2f} to {-8 + half:+.2f})", "2 of 2"]
    runs[0].attention["clean"][0]["uniform_share"] = 0.0004
    (table,) = tables_of(runs[:1]).values()
    assert "**" not in table  # the only line is not the best


def test_response():
    """Each block has a table, of the models that have this block; self-attention has no figure of a second branch."""
    runs = [make_run(model)._replace(response=dict(blur_3={block: dict.fromkeys(records.RESPONSE_FIGURES) | dict(
        noise_to_signal=0.032, common_share=0.5, signal_cosine=-0.25)})) for model, block in (("vit", 0), ("deep", 1))]
    assert [rows[1:] for rows in rows_of(tables_of(runs)["response-table"])] == [
        [[model, "blur, severity 3", "", "", "0.032", "", "", "50.0%", "", "-0.25"]] for model in ("vit", "deep")]


def test_amounts_never_mix():
    """Figures under corruptions of other amounts than the first run's are left out; attention on clean images and on
    canvases as in training stays."""
    tables = tables_of([attend(make_run(model, errors=dict(blur=[10] * 5), amount=amount), dict.fromkeys(
        ["clean", "4_distractors", "blur_3"], (0.3, 2))) for model, amount in (("vit", 0.1), ("vitother", 0.2))])
    assert [row[0] for row in rows_of(tables["noise-table"])[0]] == ["model", "vit"]
    assert rows_of(tables["attention-table"])[0][2][2:] == ["30.0% (2.00)", "30.0% (2.00)", ""]


def test_compare():
    """Pairs of models are compared by seed in accuracy, then in the error under both parts of Gaussian noise, where
    there is noise on record, each p corrected by the number of rows of its table."""
    runs = [make_run(model, seed, dataset="kmnist") for model in ("vit", "vitdiff") for seed in range(2)]
    for model, errors in [("vit", [20, 12, 10]), ("vitdiff", [8, 9, 3]), ("vitdiffv2", [6, 12, 3])]:
        runs += make_parts(model, errors, seeds=7, accuracy=0.9 + 0.01 * len(model))
    pairs = [("vitdiff", "vit"), ("vitdiffv2", "vitdiff")]
    accuracy, error = rows_of(report.comparison_tables(stats.arrange(runs), pairs))
    assert [row[0] for row in accuracy[1:]] == ["KMNIST", "MNIST", "MNIST"]
    assert accuracy[2][1:] == ["vitdiff - vit", "+4.00 (+4.00 to +4.00)", "7 of 7", "0.0156", "0.0469"]  # 3 p
    assert [[row[2], row[3].split()[0], row[6]] for row in error[1:]] == [
        ["shift", f"{-3 + 2 / 7:.2f}", "0.0625"], ["fluctuation", f"{-7 + 2 / 7:.2f}", "0.0625"],  # 4 times 2 / 2^7
        ["shift", "+3.00", "0.0625"], ["fluctuation", "+0.00", "1"]]


# What is printed.

def test_what_is_printed():
    """A table a data set with the figures of the records, in lines of at most 100 characters; with the errors under the
    parts of Gaussian noise where these are on record."""
    runs = make_parts("vitwith" + 5 * "averylongname", [8, 4, 3], seeds=1, dataset="kmnist") + [
        make_run(model, seed, loss=0.505) for model in ("vit", "vitdiff") for seed in range(2)]
    text = report.overview(stats.arrange(runs), Path("out"))
    first, second, *_, last, _, _, note = [re.split("  +", line) for line in text.splitlines()]
    assert first[-2:] + second[-2:] == ["shift", "fluctuation", "8.0%", "7.0%"] and "fluctuation" in note[0]
    assert last == ["vitdiff", "2", "33,034", "0.5050", "98.00%", "+0.00 (+0.00 to +0.00)"]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("datasets, models", [(3, 14), (1, 60), (30, 2)])
def test_a_screen(datasets, models):
    """However many lines there are, 40 are printed at most, all of them where they fit; what is left out is said."""
    runs = [make_run(f"model{i}", dataset=f"data{j}") for i in range(models) for j in range(datasets)]
    text = report.overview(stats.arrange(runs), Path("out")).splitlines()
    left = sum(int(line.split()[1]) for line in text if line.startswith("... "))
    assert len(text) + 1 <= 40 and sum(line.startswith("model") for line in text) + left == datasets * models
    assert (left > 0) == (datasets * (models + 2) + 3 > 40)
