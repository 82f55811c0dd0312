"""Claims about the analysis of trained models."""

import itertools
import math
import shutil

import numpy
import pytest
import torch
from torch.nn import functional as F

import analysis
import data
import records
from data import Split
from diff_attention import DiffAttention
from test_data import CPU, HERE, cut, mnist
from test_models import randomize
from test_train import (assert_one_line, command, copy_run, finished, loss_by_hand, read_json, settings_for, small,
                        table)

@pytest.fixture(scope="module", autouse=True)
def few_corruptions(small):
    """A few of the corruptions, so that an analysis takes a moment."""
    names = ("gaussian_noise", "gaussian_noise_shift", "distractors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CORRUPTIONS", {name: data.CORRUPTIONS[name] for name in names})
        yield


# What is relevant.

def test_attention_figures():
    """Each figure is that of two rows of weights computed by hand; the ratio is weight a relevant patch over weight an
    irrelevant one: of 2 and 6 patches with half of the weight on each kind, 3."""
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
    assert analysis.signal_to_noise(0.5, 6 / 8) == pytest.approx(3)
    assert math.isnan(analysis.signal_to_noise(0.0, 0.0))


def measured(look, split, settings):
    """The rows of attention.csv, by condition, of a model whose class token looks as `look` says in each of two heads:
    images (B, C, H, W) -> weights of the patches (B, P)."""
    model = torch.nn.Module()
    model.attention_maps = lambda images: [F.pad(look(images), (1, 0))[:, None, None].expand(-1, 2, 1, -1)]
    (rows,) = analysis.measure_attention([model], split, settings)
    assert [(row["block"], row["head"]) for row in rows] == [(0, 0), (0, 1)] * (len(rows) // 2)
    return {row["condition"]: row for row in rows}


@pytest.mark.parametrize("dataset, conditions", [
    ("mnist", ["clean", "gaussian_noise_3", "distractors_3"]),
    ("clutteredmnist", ["0_distractors", "4_distractors", "8_distractors", "16_distractors", "gaussian_noise_3"])])
def test_lookers(dataset, conditions):
    """A model that looks at ink scores nothing on the irrelevant where the object is alone, and the more the more
    distractors there are; one that looks anywhere scores its share, and one that looks away everything."""
    split, settings = cut(mnist()["test"], 1_100), settings_for(dataset=dataset)
    side, black = settings["patch_size"], data.normalize(torch.zeros(1, 1, 1, 1), dataset).item()
    objects = torch.cat([pixels for _, pixels in data.evaluation_pixels(split, settings | dict(distractors=0))])
    empty = objects.unflatten(2, (-1, side)).unflatten(4, (-1, side)).amax((1, 3, 5)).flatten(1) == 0

    def ink(images):
        return F.max_pool2d((images > black + 1e-4).float(), side).flatten(1)

    seeing = measured(ink, split, settings)
    assert list(seeing) == conditions
    counts = [row for condition, row in seeing.items() if condition != "gaussian_noise_3"]
    assert counts[0]["irrelevant_share"] == 0 and counts[0]["signal_to_noise"] == math.inf
    assert all(more["irrelevant_share"] > fewer["irrelevant_share"] for fewer, more in zip(counts, counts[1:]))
    for row in measured(lambda images: torch.ones_like(ink(images)), split, settings).values():
        assert [row["irrelevant_share"], row["uniform_share"]] == pytest.approx(2 * [empty.float().mean().item()])
        assert row["signal_to_noise"] == pytest.approx(1, abs=1e-4)
    blind = measured(lambda images: 1 - ink(images), split, settings)[conditions[0]]  # or nothing, where all is ink
    assert blind["irrelevant_share"] == pytest.approx(empty.any(1).float().mean().item()) and blind["ink_share"] == 0


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
def test_response(monkeypatch, name):
    """Each figure of response.csv is that of the definition, in plain float64, from what a hook sees enter the
    attention: change by the corruption over the clean outputs around their mean, the share of it that all images have
    in common, and mean cosines of first branch and minus the second."""
    monkeypatch.setattr(data, "EVALUATION_BATCH", 200)
    split, (settings, (model,)), seen = cut(mnist()["test"], 300), models_of(name), []
    (rows,) = analysis.measure_response([model], split, settings)
    for block in model.double().eval().blocks:
        block.attn.register_forward_pre_hook(lambda attn, arguments: seen.append(
            [branch.detach() * sign for branch, sign in zip(attn.branches(arguments[0]), (1, -1))]))

    def outputs(name):
        seen.clear()
        pixels = [data.corrupt(part.float(), name, 3 if name else 0, 200 * i, split, settings)
                  for i, part in enumerate(split.images.split(200))]
        model(data.normalize(torch.cat(pixels), "mnist").double())
        for branches, tokens in zip(seen, (None, 1)):  # of the last block the class token is read alone
            branches = [branch[:, :, :tokens] for branch in branches]
            yield branches if len(branches) == 1 else [*branches, branches[0] - branches[1]]

    clean = list(outputs(None))
    rows = {(row["condition"], row["block"], row["head"]): row for row in rows}
    conditions = ["gaussian_noise_3", "gaussian_noise_shift_3"]
    assert list(rows) == [*itertools.product(conditions, (0, 1), (0, 1))]
    for condition in conditions:
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


@pytest.mark.parametrize("mapped, fails", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
def test_a_stack_is_analysed_as_single_models(monkeypatch, name, mapped, fails):
    """The figures of models analysed together, mapped or one after the other, as where mapping fails, are those of each
    alone; what is drawn is drawn once for all of them."""
    draws, maps = [], []

    def vmap(*arguments, vmap=torch.vmap, **options):
        maps.append(arguments)
        if fails:
            raise RuntimeError("out of memory")
        return vmap(*arguments, **options)

    monkeypatch.setattr(torch, "vmap", vmap)
    monkeypatch.setattr(data, "draw_corruption", lambda *arguments, draw=data.draw_corruption: draws.append(
        arguments) or draw(*arguments))
    split, (settings, models) = cut(mnist()["test"], 130), models_of(name, 2)

    def measure(models):
        draws.clear()
        return [function(models, split, settings) for function in (
            analysis.evaluate, analysis.measure_lambdas, analysis.measure_noise, analysis.measure_attention,
            analysis.measure_response)], len(draws)

    singles, counts = zip(*(measure([model]) for model in models))
    monkeypatch.setattr(analysis, "is_mapped", lambda models: mapped)
    together, count = measure(models)
    assert set(counts) == {count} and bool(maps) == mapped
    for single, several in zip(zip(*singles), together, strict=True):
        leaves, expected = (torch.utils._pytree.tree_leaves(found) for found in (several, [one for one, in single]))
        assert len(leaves) == len(expected)
        for found, value in zip(leaves, expected):
            assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5))
    assert len({loss for loss, _ in together[0]}) == 2


# The command.

def run_analysis(*flags):
    return command("--device", "cpu", *flags, main=analysis.main)


def test_the_analysis_is_of_the_best_weights(finished):
    """noise.csv and attention.npz are those of the best weights on the test split."""
    config, test = read_json(finished / "config.json")["settings"], cut(mnist()["test"], 2_001)
    model = analysis.make_model(config).eval()
    model.load_state_dict(torch.load(finished / "best.pt", weights_only=True))
    noise = {(row["corruption"], row["severity"]): row for row in table(finished / "noise.csv")}
    assert list(noise) == [*itertools.product(data.CORRUPTIONS, "12345")]
    with numpy.load(finished / "attention.npz") as arrays:
        assert set(arrays) == {"images", "labels", "map_0"} and arrays["map_0"].shape == (8, 2, 5, 5)
        assert arrays["labels"].tolist() == list(range(8)) and arrays["images"].dtype == numpy.uint8
        maps, *_ = model.attention_maps(data.normalize(torch.tensor(arrays["images"]).float(), "mnist"))
        torch.testing.assert_close(torch.tensor(arrays["map_0"]).float(), maps.detach(), rtol=0, atol=1e-3)
        for label, image in enumerate(arrays["images"]):
            assert (image == test.images[test.labels == label][0].numpy()).all()
    row = noise["distractors", "4"]
    corrupted = torch.cat([data.corrupt(part.float(), "distractors", 4, 1_000 * i, test, config)
                           for i, part in enumerate(test.images.split(1_000))])
    loss, accuracy = loss_by_hand(model, Split(corrupted, test.labels), config)
    assert [float(row[name]) for name in ("amount", "test_loss", "test_accuracy")] == pytest.approx(
        [8, loss, accuracy], abs=1e-5)


def test_analysis_again(finished, tmp_path, capsys):
    """analysis.py RUN prints the test figures beside those recorded, equal, and writes the same bytes again."""
    folder = copy_run(finished, tmp_path)
    for name in records.ANALYSIS:
        (folder / name).unlink()
    assert run_analysis(folder) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "test loss" in line]
    assert [line[0] for line in lines] == ["again", "recorded"] and lines[0][1:] == lines[1][1:]
    assert f"{read_json(finished / 'summary.json')['test_loss']:.6f}" in lines[0]
    for path in finished.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_analysis_says_what_is_wrong(finished, tmp_path, capsys):
    """A run that cannot be analysed is one line that names the file at fault, and exit 2; its records stay."""
    folder, summary = tmp_path / "run", records.read_summary(finished)
    config = (finished / "config.json").read_text()
    for name, content, *words in [
            ("summary.json", "{}"), ("best.pt", "mine"), ("config.json", "{"), ("config.json", config + " "),
            ("metrics.csv", (finished / "metrics.csv").read_text().replace("1", "2")),
            ("config.json", config.replace('"clip"', '"slip"'), "config.json", "a setting is missing"),
            ("config.json", config.replace('"vitdiff"', '"vitdif"'), "vitdif", "vitdiff?"),
            ("config.json", config.replace('"mnist"', '"mnits"'), "mnits", "mnist?"),
            ("config.json", config.replace('"dim": 8', '"dim": 16'), "best.pt")]:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        (folder / name).write_text(content)
        if words:  # as of a run whose checksums are those of this file
            records.write_summary(folder, summary)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert run_analysis(folder) == 2, (name, content)
        assert_one_line(capsys, *(words or [folder / name]))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with records.locked(finished):
        assert run_analysis(finished) == 2
    assert_one_line(capsys, finished)
    for flags, word in [([], "RUN"), (["nowhere"], "nowhere/config.json"), ([finished, "--epochs", "3"], "--epochs")]:
        assert run_analysis(*flags) == 2
        assert_one_line(capsys, "analysis.py: error: ", word)


@pytest.mark.parametrize("where", ["forward", "attention_map"])
def test_bugs_keep_their_traceback_in_the_analysis(finished, tmp_path, monkeypatch, where):
    """A bug in an attention is raised as it is when a run is analysed."""
    monkeypatch.setattr(DiffAttention, where, lambda attn, x, keep=None: x @ torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="shape"):
        run_analysis(copy_run(finished, tmp_path))


def test_reference_weights(monkeypatch):
    """The weights of a reference run give its test figures again, and what it attends to on clean images."""
    monkeypatch.setattr(analysis, "attention_conditions", lambda settings: {"clean": (settings, None, 0)})
    run, test = records.read_run(HERE / "runs/reference/mnist-vitdiff-seed0"), mnist()["test"]
    model = analysis.load_model(run.folder, run.settings, CPU)
    ((loss, accuracy),) = analysis.evaluate([model], test, run.settings)
    assert loss == pytest.approx(run.summary["test_loss"], abs=1e-4)
    assert accuracy == pytest.approx(run.summary["test_accuracy"], abs=2e-4)
    (rows,) = analysis.measure_attention([model], test, run.settings)
    for row, expected in zip(rows, table(run.folder / "attention.csv")):
        for figure in records.ATTENTION_FIGURES[:-1]:  # the last is a ratio of two of the others
            assert row[figure] == pytest.approx(float(expected[figure]), abs=1e-3)
    (lambdas,) = analysis.measure_lambdas([model], test, run.settings)
    assert lambdas == pytest.approx([row["lambda"] for row in rows[::2]], abs=1e-5)
