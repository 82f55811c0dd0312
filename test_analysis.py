"""Claims about the analysis of trained models."""

import itertools
import math
import shutil
import statistics

import numpy
import pytest
import torch
from torch.nn import functional as F

import analysis
import data
import records
from data import Split
from test_data import HERE, cut, mnist, original
from test_models import randomize
from test_train import (SMALL, TINY, Misshapen, assert_one_line, column, command, copy_run, finished, launch,
                        loss_by_hand, read_json, run_plugin, settings_for, small, table)
from vit import MODELS

pytestmark = pytest.mark.usefixtures("small")


# What is relevant.

def test_attention_figures():
    """Each figure is that of two rows of weights computed by hand."""
    row = torch.tensor([[[0.5, 0.25, -0.5, 0.0, 0.75], [0.2, 0.2, 0.2, 0.2, 0.2]]])  # an image, two heads, 4 patches
    relevant, ink = torch.tensor([[True, False, False, True]]), torch.tensor([[True, True, False, True]])
    figures = {name: figure[0].tolist() for name, figure in analysis.attention_figures(row, relevant, ink).items()}
    assert list(figures) == records.ATTENTION_FIGURES[:-1]
    assert figures["irrelevant_share"] == pytest.approx([0.5 / 1.5, 0.5])
    assert figures["uniform_share"] == pytest.approx([0.5, 0.5])
    assert figures["ink_share"] == pytest.approx([1.0, 0.75])
    assert figures["negative_share"] == pytest.approx([0.25, 0.0])
    assert figures["lambda"] == pytest.approx([0.0, 0.0], abs=1e-6)
    weights = [0.25, 0.125, 0.25, 0.375]
    assert figures["entropy"] == pytest.approx([-sum(w * math.log(w) for w in weights), math.log(5)])
    only_relevant = torch.tensor([[[0.1, 0.5, 0.0, 0.0, -0.4]]])
    assert analysis.attention_figures(only_relevant, relevant, ink)["irrelevant_share"].item() == 0


def test_signal_to_noise():
    """The ratio is weight a relevant patch over weight an irrelevant one: of 2 and 6 patches with 0.5 of the weight on
    each kind, 3."""
    assert analysis.signal_to_noise(0.5, 6 / 8) == pytest.approx((0.5 / 2) / (0.5 / 6))
    assert analysis.signal_to_noise(6 / 8, 6 / 8) == pytest.approx(1)
    assert analysis.signal_to_noise(0.0, 0.5) == math.inf
    assert math.isnan(analysis.signal_to_noise(0.0, 0.0))


class Looker(torch.nn.Module):
    """A model whose class token looks as `look` says: images (B, C, H, W) -> weights of the patches (B, P)."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def attention_maps(self, images):
        weights = F.pad(self.look(images), (1, 0))
        return [weights[:, None, None].expand(-1, 2, weights.shape[1], -1)]


def measured(look, split, settings):
    """The rows of attention.csv of a Looker, by condition; its two heads are equal."""
    (rows,) = analysis.measure_attention([Looker(look)], split, settings)
    assert [(row["block"], row["head"]) for row in rows] == [(0, 0), (0, 1)] * (len(rows) // 2)
    return {row["condition"]: row for row in rows}


def test_lookers():
    """A model that looks at the object alone scores nothing on the irrelevant, one that looks anywhere its share, and
    one that looks away everything."""
    split, settings = cut(mnist()["test"], 1_500), settings_for()
    black = data.normalize(torch.zeros(1, 1, 28, 28), "mnist")[0, 0, 0, 0]
    empty = [image[0, 7 * y:7 * y + 7, 7 * x:7 * x + 7].max() == 0
             for image in split.images.numpy() for y in range(4) for x in range(4)]

    def ink(images):
        return F.max_pool2d((images[:, :1] > black + 1e-4).float(), images.shape[2] // 4)

    uniform = measured(lambda images: torch.full((len(images), 16), 1 / 16), split, settings)
    seeing = measured(lambda images: ink(images).flatten(1), split, settings)
    blind = measured(lambda images: 1 - ink(images).flatten(1), split, settings)  # or nothing, where all is ink
    assert list(uniform) == ["clean", "gaussian_noise_3", "distractors_3"]
    for row in uniform.values():
        assert row["irrelevant_share"] == pytest.approx(statistics.fmean(empty))
        assert row["uniform_share"] == pytest.approx(statistics.fmean(empty))
        assert row["signal_to_noise"] == pytest.approx(1) and row["lambda"] == pytest.approx(0)
        assert row["ink_share"] == pytest.approx(1 - statistics.fmean(empty))
        assert row["entropy"] == pytest.approx(math.log(16)) and row["negative_share"] == 0
    assert seeing["clean"]["irrelevant_share"] == 0 and seeing["clean"]["signal_to_noise"] == math.inf
    some_empty = [any(empty[i:i + 16]) for i in range(0, len(empty), 16)]
    assert blind["clean"]["irrelevant_share"] == pytest.approx(statistics.fmean(some_empty))
    assert blind["clean"]["ink_share"] == 0
    assert 0 < seeing["distractors_3"]["irrelevant_share"] < uniform["clean"]["uniform_share"]  # relevant is the object


def test_lookers_at_canvases():
    """On canvases the object alone is relevant, however many distractors there are."""
    split, settings = cut(mnist()["test"], 1_100), settings_for(dataset="clutteredmnist")
    black = data.normalize(torch.zeros(1, 1, 1, 1), "clutteredmnist").item()

    def ink(images):
        return F.max_pool2d((images > black + 1e-4).float(), 6).flatten(1)

    rows = measured(ink, split, settings)
    assert list(rows) == ["0_distractors", "4_distractors", "8_distractors", "16_distractors", "gaussian_noise_3"]
    by_count = list(rows.values())[:4]
    assert by_count[0]["irrelevant_share"] == 0
    assert all(more["irrelevant_share"] > fewer["irrelevant_share"] for fewer, more in zip(by_count, by_count[1:]))
    assert len({row["uniform_share"] for row in by_count}) == 1 and 0.7 < by_count[0]["uniform_share"] < 0.9
    assert all(row["ink_share"] == pytest.approx(1) for row in by_count)
    assert "6_distractors" in analysis.attention_conditions(settings | dict(distractors=6))


@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"])
def test_lambda(name):
    """The recorded lambda is the weight of the second map of each head; a difference of maps has negative weights."""
    split, settings = cut(mnist()["test"], 500), settings_for(model=name)
    torch.manual_seed(0)
    model = randomize(analysis.make_model(settings)).float()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 10  # so that maps differ, and by more than lambda
    rows = [row for row in analysis.measure_attention([model], split, settings)[0] if row["condition"] == "clean"]
    expected, means = [], []
    with torch.no_grad():
        for attn, x in model.attention_inputs(data.normalize(split.images.float(), "mnist")):
            if name == "vit":
                expected += [0.0, 0.0]
            elif name == "vitdiffv2":
                expected += attn.lam(x)[:, :, 0, 0].mean(0).tolist()
                means.append(attn.lam(x).mean().item())
            else:
                expected += [attn.lam().item()] * attn.num_heads
                means.append(attn.lam().item())
    assert [row["lambda"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert all((row["negative_share"] > 0.01) == (name != "vit") for row in rows)
    assert analysis.measure_lambdas([model], split, settings) == [pytest.approx(means, abs=1e-5)]


# How branches respond, and stacks of seeds.

def models_of(name, count=1):
    """Settings and models of two blocks whose maps are far from uniform."""
    settings, models = settings_for("--depth", "2", model=name), []
    for seed in range(count):
        models.append(randomize(analysis.make_model(settings | dict(seed=seed))).float())
        for block in models[-1].blocks:
            block.attn.qkv.weight.data *= 3
    return settings, models


@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
def test_response(name):
    """Each figure of response.csv is that of the definition, in plain float64, from what a hook sees enter the
    attention: change by the corruption over the clean outputs around their mean, the share of it that all images have
    in common, and mean cosines of first branch and minus the second."""
    split, (settings, (model,)), seen = cut(mnist()["test"], 1_200), models_of(name), []
    (rows,) = analysis.measure_response([model], split, settings)
    for block in model.double().eval().blocks:
        block.attn.register_forward_pre_hook(lambda attn, arguments: seen.append(
            [branch.detach() * sign for branch, sign in zip(attn.branches(arguments[0]), (1, -1))]))

    def outputs(name):
        seen.clear()
        pixels = [data.corrupt(part.float(), name, 3 if name else 0, 1_000 * i, split, settings)
                  for i, part in enumerate(split.images.split(1_000))]
        model(data.normalize(torch.cat(pixels), "mnist").double())
        for branches, tokens in zip(seen, (None, 1)):  # of the last block the class token is read alone
            branches = [branch[:, :, :tokens] for branch in branches]
            yield branches if len(branches) == 1 else [*branches, branches[0] - branches[1]]

    clean = list(outputs(None))
    rows = {(row["condition"], row["block"], row["head"]): row for row in rows}
    assert set(rows) == {(f"{noise}{part}_3", block, head) for noise in data.NOISES for block in (0, 1)
                         for part in ("", "_shift", "_fluctuation") for head in (0, 1)} | {
        ("gaussian_noise_unclipped_3", block, head) for block in (0, 1) for head in (0, 1)}
    for condition in ("gaussian_noise_shift_3", "impulse_noise_3"):
        for block, (before, after) in enumerate(zip(clean, outputs(condition.removesuffix("_3")))):
            for head in range(2):
                signals, changes = ([kind[:, head] for kind in kinds] for kinds in (
                    [output - output.mean(0) for output in before], [x - y for x, y in zip(after, before)]))
                energies = [change.square().sum() for change in changes]
                expected = [[energy / signal.square().sum() for energy, signal in zip(energies, signals)],
                            [len(change) * change.mean(0).square().sum() / energy
                             for change, energy in zip(changes, energies)],
                            [F.cosine_similarity(*kind[:2], dim=2).mean() for kind in (changes, signals)
                             if len(kind) > 1]]
                found = [rows[condition, block, head][figure] for figure in records.RESPONSE_FIGURES]
                if name == "vit":
                    assert found[0] == found[2] and found[3] == found[5]
                    assert [found.pop(i) for i in (7, 6, 4, 3, 1, 0)].count("") == 4
                assert found == pytest.approx([float(value) for values in expected for value in values], rel=1e-3)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
def test_a_stack_is_analysed_as_single_models(monkeypatch, name, mapped):
    """The figures of models analysed together, mapped or one after the other, are those of each alone; what is drawn
    is drawn once for all of them."""
    draws, names = [], ("gaussian_noise", "distractors")
    monkeypatch.setattr(data, "CORRUPTIONS", {name: data.CORRUPTIONS[name] for name in names})
    monkeypatch.setattr(data, "draw_corruption", lambda *arguments, draw=data.draw_corruption: draws.append(
        arguments) or draw(*arguments))
    split, (settings, models) = cut(mnist()["test"], 300), models_of(name, 3)

    def measure(models):
        draws.clear()
        return [function(models, split, settings) for function in (
            analysis.evaluate, analysis.measure_lambdas, analysis.measure_noise, analysis.measure_attention,
            analysis.measure_response)], len(draws)

    singles, counts = zip(*(measure([model]) for model in models))
    monkeypatch.setattr(analysis, "is_mapped", lambda models: mapped)
    together, count = measure(models)
    assert set(counts) == {count}
    for single, several in zip(zip(*singles), together, strict=True):
        leaves, expected = (torch.utils._pytree.tree_leaves(found) for found in (several, [one for one, in single]))
        assert len(leaves) == len(expected)
        for found, value in zip(leaves, expected):
            assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5))
    assert len({loss for loss, _ in together[0]}) == 3


# The command.

def run_analysis(*flags):
    return command("--device", "cpu", *flags, main=analysis.main)


def test_the_analysis_is_of_the_best_weights(finished):
    """noise.csv, attention.csv and attention.npz are those of the best weights on the test split."""
    config, test = read_json(finished / "config.json")["settings"], cut(mnist()["test"], 2_001)
    model = analysis.make_model(config)
    model.load_state_dict(torch.load(finished / "best.pt", weights_only=True))
    noise = table(finished / "noise.csv")
    assert [(row["corruption"], row["severity"]) for row in noise] == [
        (name, str(severity)) for name in data.CORRUPTIONS for severity in range(1, 6)]
    assert [row["amount"] for row in noise[:5]] == ["0.08", "0.12", "0.18", "0.26", "0.38"]  # MNIST-C's
    (row,) = [row for row in noise if (row["corruption"], row["severity"]) == ("distractors", "4")]
    corrupted = torch.cat([data.corrupt(part.float(), "distractors", 4, 1_000 * i, test, config)
                           for i, part in enumerate(test.images.split(1_000))])
    maps = model.eval().attention_maps(data.normalize(test.images[:1_000].float(), "mnist"))
    loss, accuracy = loss_by_hand(model, Split(corrupted, test.labels), config)
    assert float(row["test_loss"]) == pytest.approx(loss, abs=1e-5)
    assert float(row["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    attention = table(finished / "attention.csv")
    assert list(attention[0]) == ["condition", "block", "head", *records.ATTENTION_FIGURES]
    assert [(row["condition"], row["block"], row["head"]) for row in attention] == [
        (condition, "0", str(head)) for condition in ("clean", "gaussian_noise_3", "distractors_3")
        for head in range(2)]
    assert list(table(finished / "response.csv")[0]) == ["condition", "block", "head", *records.RESPONSE_FIGURES]
    with numpy.load(finished / "attention.npz") as arrays:
        assert set(arrays) == {"images", "labels", "map_0"} and arrays["map_0"].shape == (8, 2, 5, 5)
        assert arrays["labels"].tolist() == list(range(8)) and arrays["images"].dtype == numpy.uint8
        for label, image, attention_map in zip(range(8), arrays["images"], arrays["map_0"]):
            first = (test.labels == label).nonzero()[0].item()
            assert (image == test.images[first].numpy()).all()
            assert abs(attention_map - maps[0][first].detach().numpy()).max() < 1e-3


def test_analysis_again(finished, tmp_path, capsys):
    """python analysis.py RUN prints the test figures beside those recorded, equal, and writes the analysis again to the
    byte."""
    folder = copy_run(finished, tmp_path)
    for name in records.ANALYSIS:
        (folder / name).unlink()
    assert run_analysis(folder) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "test loss" in line]
    assert [line[0] for line in lines] == ["again", "recorded"] and lines[0][1:] == lines[1][1:]
    assert f"{read_json(finished / 'summary.json')['test_loss']:.6f}" in lines[0]
    for name in records.FILES:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    records.read_run(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()}


def test_analysis_says_what_is_wrong(finished, tmp_path, capsys):
    """A run that cannot be analysed is one line that names the file at fault, and exit 2; its records stay."""
    def damage(name, content):
        folder = tmp_path / f"{next(numbers)}"
        shutil.copytree(finished, folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        return folder

    numbers, config = itertools.count(), (finished / "config.json").read_text()
    summary = records.read_summary(finished)
    assert run_analysis("nowhere") == 2
    assert_one_line(capsys, "nowhere/config.json")
    for name, content, *words in [
            ("summary.json", None), ("summary.json", "{}"), ("best.pt", None), ("best.pt", "mine"),
            ("config.json", "{"), ("config.json", config.replace('"clip"', '"slip"')),
            ("config.json", config.replace('"dim": 8', '"dim": "8"')),
            ("config.json", config.replace('"vitdiff"', '"vitdif"'), "vitdif", "vitdiff?"),
            ("config.json", config.replace('"mnist"', '"mnits"'), "mnits", "mnist?"),
            ("config.json", config.replace('"dim": 8', '"dim": 16'), "best.pt")]:
        folder = damage(name, content)
        if words:  # as of a run whose checksums are those of this file
            records.write_summary(folder, summary)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert run_analysis(folder) == 2, (name, content)
        assert_one_line(capsys, *(words or [folder / name]))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with records.locked(finished):
        assert run_analysis(finished) == 2
    assert_one_line(capsys, finished)
    for flags, words in [([], ["RUN"]), ([finished, "--device", "gpu"], ["gpu", "--device auto"]),
                         ([finished, "--epochs", "3"], ["--epochs"])]:
        assert run_analysis(*flags) == 2
        assert_one_line(capsys, "analysis.py: error: ", *words)


@pytest.mark.parametrize("where", ["forward", "attention_map"])
def test_bugs_keep_their_traceback_in_the_analysis(tmp_path, monkeypatch, where):
    """A bug in a user's attention is raised as it is when a run is analysed."""
    monkeypatch.setitem(MODELS, "vitbug", dict(attention=Misshapen))
    monkeypatch.setattr(data, "CORRUPTIONS", dict(gaussian_noise=data.CORRUPTIONS["gaussian_noise"]))
    monkeypatch.setattr(Misshapen, "where", "nowhere")
    assert command(*TINY, "--epochs", "1", "--model", "vitbug", "--runs-dir", tmp_path) == 0
    monkeypatch.setattr(Misshapen, "where", where)
    with pytest.raises(RuntimeError, match="shape") as error:
        run_analysis(tmp_path / "mnist-vitbug-seed0")
    assert any(entry.name == where for entry in error.traceback)


MINE = SMALL + """

import torch

import train

from vit import MODELS


class MeanAttention(torch.nn.Module):
    def __init__(self, dim, num_heads, depth, qkv_bias):
        super().__init__()
        self.proj = torch.nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attention_map(x)[:, 0] @ x)

    def attention_map(self, x):
        return x.new_full((len(x), 1, x.shape[1], x.shape[1]), 1 / x.shape[1])


MODELS["vitmean"] = dict(attention=MeanAttention)
train.lr_factor = lambda *arguments: 0.5
"""


def test_plugin_as_a_user_has_it(tmp_path, monkeypatch, capsys):
    """As a user does it: a plugin adds a row to MODELS and changes the program that runs, the run is trained and
    analysed with it, and analysed again with the kept copy, whatever became of the file."""
    path, folder = run_plugin(tmp_path, monkeypatch, MINE), tmp_path / "runs/mnist-vitmean-seed0"
    process = launch("train.py", "--plugin", path, "--model", "vitmean", *TINY, "--analysis", "--epochs", "1",
                     "--runs-dir", tmp_path / "runs")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err  # plain lines and no bar where output is no terminal
    assert column(folder, "lr").tolist() == pytest.approx([0.003])
    for row in table(folder / "attention.csv"):
        assert float(row["entropy"]) == pytest.approx(math.log(5), abs=1e-5) and float(row["lambda"]) == 0
    assert not (folder / "response.csv").exists()  # its attention has no branches
    path.write_text("1 / 0")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(MODELS, "vitmean", None)  # whatever this process had there
    assert run_analysis(folder) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    capsys.readouterr()
    other = copy_run(folder, tmp_path / "other")
    records.write_config(other, read_json(folder / "config.json")["settings"] | dict(plugin=None), {})
    assert run_analysis(folder, other) == 2
    assert_one_line(capsys, "plugin")
    (kept,) = (tmp_path / "runs/plugins").iterdir()
    for content in (MINE + "\n", None):
        kept.write_text(content) if content else kept.unlink()
        assert run_analysis(folder) == 2
        assert_one_line(capsys, folder, "no copy lies in")


def test_reference_weights(tmp_path, monkeypatch, capsys):
    """The weights of a reference run give its test figures again, and what it attends to on clean images."""
    monkeypatch.setattr(data, "load_splits", lambda name, *_: original(name))
    monkeypatch.setattr(data, "CORRUPTIONS", {
        name: data.CORRUPTIONS[name] for name in ("gaussian_noise", "distractors")})
    recorded, folder = HERE / "runs/reference/mnist-vitdiff-seed0", tmp_path / "mnist-vitdiff-seed0"
    shutil.copytree(recorded, folder)
    assert command(folder, "--device", "cpu", "--data-dir", HERE / "data", main=analysis.main) == 0
    again, before = ([float(word.rstrip("%")) for word in line.split() if word[0].isdigit()]
                     for line in capsys.readouterr().out.splitlines() if "test loss" in line)
    assert again == [pytest.approx(before[0], abs=1e-4), pytest.approx(before[1], abs=0.02)]
    found, expected = (records.read_run(place).attention["clean"] for place in (folder, recorded))
    for block, figures in expected.items():
        figures.pop("signal_to_noise"), found[block].pop("signal_to_noise")  # a ratio of two of the others
        assert found[block] == pytest.approx(figures, abs=1e-3)
