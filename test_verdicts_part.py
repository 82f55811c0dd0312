"""Verdicts: what is said of lines, seeds and intervals. Runs are made up in memory.

    python -m pytest test_verdicts_part.py
"""

import re
from pathlib import Path

import numpy
import pytest

import report
import stats
from test_report import analyse, draw, lines_of, make_run, marks, rows_of


# Verdicts.

def test_labels_beside_the_reference():
    """What sets a line apart from any line that it stands beside is in its label, though one's own `vit` has it as
    well. The precision, a plugin and the sizes of models set models apart from no other."""
    reference = [make_run(model, folder="runs/reference", epochs=20, amp="off") for model in ("vit", "vitdiff")]
    own = [make_run(model, epochs=2, amp="bfloat16", plugin="mine.py 012", dim=48) for model in ("vit", "vitcosine")]
    assert list(lines_of(own[1:], reference)) == ["vitcosine, epochs 2", "vit", "vitdiff"]
    assert list(lines_of(own, reference)) == [
        "vit, plugin mine.py 012, dim 48, epochs 2, amp bfloat16", "vitcosine, epochs 2", "vit (reference)", "vitdiff"]
    assert list(lines_of([own[1], make_run("vitdeep", epochs=2, depth=4)], reference[:1])) == [
        "vitcosine, epochs 2, depth 0", "vitdeep, epochs 2, depth 4", "vit"]
    trained_by_plugin = make_run("vitboth", folder="runs/reference", plugin="plugin.py 012")
    assert list(lines_of([make_run("vitboth")], [trained_by_plugin])) == ["vitboth", "vitboth (reference)"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 6])
def test_verdicts_of_few_seeds(seeds):
    """Fewer than six seeds are said to decide nothing, by p they cannot, and two have no interval. A line that is not
    compared says why, and one of another recipe is not."""
    runs = [make_run("vit", seed) for seed in range(seeds)]
    runs += [make_run("vitdiff", seed, accuracy=0.981 + 0.001 * seed) for seed in range(seeds)]
    runs += [make_run("vitlate", seed + seeds - 1) for seed in range(2)]
    runs += [make_run("vitshort", seed, epochs=2) for seed in range(seeds)]
    (line_of, lines), = stats.arrange(runs).items()
    text = report.overview({line_of: lines}, Path("out"))
    said = {row[0].split(",")[0]: row[5:] for row in (re.split("  +", line) for line in text.splitlines())}
    assert said["vitlate"] == ["no two seeds in common"] and said["vitshort"] == ["no vit of this recipe"]
    assert said["vit"] == [] and stats.sign_flip_p([1] * 5) > 0.05 > stats.sign_flip_p([1] * 6)
    assert ("\nFewer than six seeds decide nothing" in text) == (seeds < 6)
    mean = 0.1 + 0.05 * (seeds - 1)
    assert re.fullmatch(rf"\+{mean:.2f}" + r" \(\S+ to \S+\)" * (seeds > 2), *said["vitdiff"])
    compared = rows_of(report.comparison_tables({line_of: lines}, [("vitdiff", "vit")]))[0][1]
    assert compared[2] == said["vitdiff"][0] and compared[4] == f"{2 / 2**seeds:.3g}"


def test_charts_of_few_seeds():
    """No interval of a share reaches below 0 or above 100%, two seeds have none, and that none is drawn is said."""
    three = [analyse(make_run(seed=seed, accuracy=share, errors=dict.fromkeys(
        ["gaussian_noise", *stats.GAUSSIAN_PARTS], [100 * share] * 5)), [5 * share] * 2, share=share - 0.1)
        for seed, share in enumerate([0.1, 0.99, 0.6])]
    figures = draw([*three, analyse(make_run("vitdiff"))])
    for name in ("parameters", "shift", "relevance", "noise", "val-accuracy"):
        for axes in figures[name].axes:
            bounds = [ends[:, name != "shift"] for _, *intervals in marks(axes) for ends in intervals]
            bounds += [band.get_datalim(axes.transData).intervaly for band in axes.collections if not axes.containers]
            assert bounds and 0 <= numpy.min(bounds) and numpy.max(bounds) <= 1 + 1e-9, name
    figures = draw(three[:2])
    assert not figures["val-loss"].axes[0].collections and "mean of 2 seeds" == figures["val-loss"].texts[1].get_text()
    assert figures["val-loss"].axes[0].lines[0].get_xdata().tolist() == [1, 2]
