"""Claims about training: the loop, its records, and the command as a user types it.

Most runs here have models of a few parameters, and the first 2,001 images of each split of MNIST.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import analysis
import data
import records
import stack
import train
from data import DATASETS, Split
from muon import Muon
from test_data import CPU, HERE, META, OnOneDevice, cut, meta_split, mnist, original
from test_plot import SUMMARY_FIGURES
from vit import MODELS, SelfAttention

TINY = ["--patch-size", "14", "--dim", "8", "--depth", "1", "--mlp-dim", "16", "--head-hidden-dim", "16",
        "--batch-size", "500", "--device", "cpu", "--no-analysis"]
STEPS = 5  # of an epoch; its last batch is a single image
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
# A plugin that does to another process what the fixture `small` does to this one, and on demand kills it.
SMALL = """
import itertools, os, signal
import data

load_splits, draw_epoch, get_batch = data.load_splits, data.draw_epoch, data.get_batch

def load_less(*arguments):
    return {name: data.Split(*(part[:2_001] for part in split)) for name, split in load_splits(*arguments).items()}

def count_batches(seeds, epoch, *arguments):
    global here
    here = (f"rank {os.environ.get('RANK', 0)} epoch {epoch} batch {batch}" for batch in itertools.count(1))
    return draw_epoch(seeds, epoch, *arguments)

def get_or_die(*arguments):
    if next(here) == os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return get_batch(*arguments)

data.load_splits, data.draw_epoch, data.get_batch = load_less, count_batches, get_or_die
"""


@pytest.fixture(scope="module")
def small():
    """The first images of each split."""
    def load_splits(name, data_dir, device):
        return {part: Split(*(tensor.to(device) for tensor in cut(split, 2_001)))
                for part, split in original(name.removeprefix("cluttered")).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_splits", load_splits)
        yield


pytestmark = pytest.mark.usefixtures("small")


def command(*flags, main=train.main):
    """The exit status of a command, run in this process."""
    try:
        return main([str(flag) for flag in flags])
    except SystemExit as exit_:
        return exit_.code


def launch(*command, **environment):
    """A command as a process of its own, on one thread, as here."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


def assert_one_line(capsys, *words):
    """What went to stderr is a single line that has all these words."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error, error
    for word in words:
        assert str(word) in error, error


def assert_refused(capsys, flags, *words):
    """The command is answered by one line on stderr that has all these words, and exit 2."""
    capsys.readouterr()
    assert command(*flags) == 2, flags
    assert_one_line(capsys, "train.py: error: ", *words)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def untimed(folder):
    """metrics.csv without its timing columns, as text."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}
            for row in table(folder / "metrics.csv")]


def column(folder, name):
    return torch.tensor([float(row[name]) for row in table(folder / "metrics.csv")], dtype=torch.double)


def read_json(path):
    return json.loads(path.read_text())


def assert_same_run(folder, expected):
    """The same record but for times, and the same best weights."""
    assert untimed(folder) == untimed(expected)
    summaries = [read_json(run / "summary.json") for run in (folder, expected)]
    for name in ("seed", *SUMMARY_FIGURES):
        assert summaries[0][name] == summaries[1][name]
    best = [torch.load(run / "best.pt", weights_only=True) for run in (folder, expected)]
    assert best[0].keys() == best[1].keys() and all(torch.equal(best[0][name], best[1][name]) for name in best[1])


def settings_for(*flags, model="vit", dataset="mnist", seed=0, device=CPU):
    return train.resolve_settings(train.parse_flags([*flags]), model, dataset, seed, device)


def make_runs(*flags, count=2_001, model="vit", seeds=(0,), device=CPU, compiled=False, runs_dir=""):
    """Runs of untrained models, splits of `count` images, and settings, as train_stack takes them."""
    settings = settings_for(*TINY, *flags, model=model, seed=seeds[0], device=device)
    splits = {name: Split(*(part.to(device) for part in cut(split, count))) for name, split in mnist().items()}
    runs = train.make_runs(settings, list(seeds), runs_dir, device, compiled, required=True)
    for folder in runs.folders if runs_dir else []:
        folder.mkdir()
    return runs, splits, settings


class EpochEnd(Exception):
    pass


def epoch_losses(runs, splits, settings):
    """The losses (S, steps) of the next epoch, which is not recorded."""
    def end(runs, splits, settings, epoch, factor, losses, correct, start):
        raise EpochEnd(losses)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EpochEnd) as ended:
        patch.setattr(train, "record_epoch", end)
        train.train_stack(runs, splits, settings)
    return ended.value.args[0].cpu()


# The loop.

def loss_by_hand(model, split, settings):
    """Mean over samples of cross entropy with label smoothing, -(1 - s) log p_y - s mean_c log p_c, and accuracy."""
    with torch.no_grad():
        logits = model.double().eval()((split.images.double() / 255 - 0.1307) / 0.3081)
    log_p, s = logits - logits.logsumexp(1, keepdim=True), settings["label_smoothing"]
    losses = -(1 - s) * log_p[torch.arange(len(logits)), split.labels] - s * log_p.mean(1)
    return losses.mean().item(), (logits.argmax(1) == split.labels).double().mean().item()


def test_losses_are_means_over_all_samples(tmp_path, monkeypatch):
    """Losses and accuracies of an epoch are means over all samples, also of the smaller last batch. The images of all
    seeds are counted, and each seed has its share of the time: by a clock that ticks when it is read."""
    runs, splits, settings = make_runs("--lr", "0", "--muon-lr", "0", "--no-augment", "--epochs", "1",
                                       "--label-smoothing", "0.3", seeds=[0, 5], count=1_845, runs_dir=tmp_path)
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)
    train.train_stack(runs, splits, settings)
    for seed, (row,) in zip([0, 5], runs.metrics):
        model = analysis.make_model(settings | dict(seed=seed))
        expected = [*loss_by_hand(model, splits["train"], settings), *loss_by_hand(model, splits["val"], settings)]
        found = [row[name] for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")]
        assert found == pytest.approx(expected, abs=1e-6) and row["step"] == 4
        assert row["images_per_second"] == 2 * 1_845
    assert [row["seconds"] for (row,) in runs.metrics] == [2 / 2, 3 / 2]


def test_learning_rate(tmp_path, monkeypatch):
    """The learning rates rise, stay and fall to zero, each from its own peak, and that of AdamW is recorded."""
    rates, set_lr = [], stack.set_lr
    monkeypatch.setattr(stack, "set_lr", lambda optimizer, factor: set_lr(optimizer, factor) or rates.append(
        [group["lr"].item() for group in optimizer.param_groups]))
    runs, splits, settings = make_runs("--epochs", "2", "--lr", "0.006", "--muon-lr", "0.02", "--warmup", "0.3",
                                       "--decay", "0.5", runs_dir=tmp_path)
    train.train_stack(runs, splits, settings)
    factors = [1 / 3, 2 / 3, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    assert rates == [pytest.approx([0.02 * factor, 0.006 * factor]) for factor in factors]
    assert column(runs.folders[0], "lr").tolist() == pytest.approx([0.006, 0.006 / 5])
    assert train.lr_factor(0, 3, 0.0, 0.0) == 1.0


def repeat_image(split):
    """A split of as many times its first image."""
    return Split(*(part[:1].expand_as(part).contiguous() for part in split))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision, model", [
    *itertools.product(["bfloat16"], ["vit", "vitdiff", "vitdiffv2"]), ("float16", "vitdiff")])
def test_amp(precision, model):
    """In half precision losses are close to those in float32, the optimizer's averages of gradients are as large, and
    the weights stay float32."""
    losses, averages = {}, {}
    for amp in ("off", precision):
        runs, splits, settings = make_runs("--amp", amp, "--lr", "1e-3", "--muon-lr", "2e-3", model=model, count=801)
        losses[amp] = epoch_losses(runs, splits, settings)
        averages[amp] = [runs.optimizer.state[leaf][name] for leaf, name in zip(
            runs.net.parameters(), ("momentum_buffer", "exp_avg"), strict=True)]
        assert all(leaf.dtype == torch.float32 for leaf in runs.net.parameters())
    for plain, half in zip(*averages.values()):
        assert plain.norm() / 5 < half.norm() < 5 * plain.norm()
    assert not torch.equal(losses["off"], losses[precision])
    torch.testing.assert_close(losses["off"], losses[precision], rtol=0.02, atol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_float16_overflow(optimizer):
    """When float16 gradients overflow, the step is skipped as a whole: no weight and no state of the optimizer moves.
    """
    def copy():
        states = [value for leaf in leaves for value in runs.optimizer.state[leaf].values()]
        return [value.detach().clone() for value in [*leaves, *states]]

    runs, splits, settings = make_runs("--amp", "float16", "--optimizer", optimizer)
    leaves, batches = list(runs.net.parameters()), train.epoch_batches(splits["train"], [0], 1, settings)
    for overflow, (images, labels, share) in zip([1, 1e38, 1], batches):
        before, scale = copy(), runs.scaler.get_scale()
        runs.step(images, labels, overflow * share)
        moved = [not torch.equal(*pair) for pair in zip(before, copy())]
        assert all(moved) if overflow == 1 else not any(moved)
        assert runs.scaler.get_scale() == scale / (1 if overflow == 1 else 2)


@pytest.mark.parametrize("model, dataset", [
    *itertools.product(MODELS, ["clutteredmnist"]), ("vitdiff", "mnist"), ("vit", "cifar10")])
def test_meta(monkeypatch, model, dataset):
    """A training step of one seed and of a stack, and a batch of evaluation and analysis, run on a device that is not
    the CPU and wait for none of its values: on meta, which has neither AdamW nor autocast."""
    monkeypatch.setattr(stack, "make_optimizer", lambda net, settings: Muon(
        net.matrices, net.shapes["matrices"].values(), torch.zeros((), device=META), 0.1))
    monkeypatch.setattr(torch, "autocast", lambda **precision: contextlib.nullcontext())
    settings = settings_for("--batch-size", "3", "--depth", "1", "--rotation", "3", "--flip", "--dropout", "0.1",
                            model=model, dataset=dataset)
    split, net = meta_split(dataset), analysis.make_model(settings).to(META).eval()
    with OnOneDevice():
        (batch,) = data.evaluation_batches(split, settings)
        results = [*analysis.evaluate_batch(net, *batch, settings), *net.mean_lambdas(batch[0])]
        condition = list(analysis.attention_conditions(settings).values())[-1]
        (batch,) = analysis.attention_batches(split, settings, *condition)
        results += analysis.sum_attention(net, *batch)
    for seeds in ([0], [0, 1]):
        runs = train.make_runs(settings, seeds, "", META)
        with OnOneDevice():
            results += runs.step(*next(train.epoch_batches(split, seeds, 1, settings)))
        assert results[-1].shape == results[-2].shape == (len(seeds),)
    assert all(result.is_meta for result in results)


# Records.

@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run that was never interrupted: its folder. Dropout is on, so that its random numbers count too."""
    runs = tmp_path_factory.mktemp("finished")
    assert command(*TINY, "--dropout", "0.1", "--epochs", "3", "--analysis", "--runs-dir", runs) == 0
    return runs / "mnist-vitdiff-seed0"


@pytest.fixture(scope="module")
def untested(small, tmp_path_factory):
    """The same run, interrupted before its test: its folder."""
    runs = tmp_path_factory.mktemp("untested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_runs", interrupt)
        assert command(*TINY, "--dropout", "0.1", "--epochs", "3", "--analysis", "--runs-dir", runs) == 130
    return runs / "mnist-vitdiff-seed0"


STACK = [*TINY, "--dropout", "0.1", "--epochs", "3", "--seed", "1", "2"]


@pytest.fixture(scope="module")
def finished_stack(small, tmp_path_factory):
    """Two seeds trained side by side and never interrupted: the folder of their runs."""
    runs = tmp_path_factory.mktemp("stack")
    assert command(*STACK, "--runs-dir", runs) == 0
    return runs


def copy_run(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "runs" / folder.name))


def test_records(finished, finished_stack):
    """Each run, alone or of a stack, leaves its settings, facts, metrics of every epoch, figures with checksums, and
    weights of its own, and they agree; last.pt is gone."""
    runs = [finished, *sorted(finished_stack.iterdir())]
    for folder, seed, of_stack in zip(runs, (0, 1, 2), ([0], [1, 2], [1, 2]), strict=True):
        left_out = {"last.pt", *(records.ANALYSIS if seed else [])}
        assert {path.name for path in folder.iterdir()} == set(records.FILES) - left_out
        config, summary = (read_json(folder / name) for name in ("config.json", "summary.json"))
        settings, facts, metrics = config["settings"], config["facts"], table(folder / "metrics.csv")
        assert list(settings) == records.SETTINGS and settings["seed"] == summary["seed"] == seed
        assert f"--seed {seed}\n" in (folder / "args.txt").read_text()
        assert [facts[name] for name in ("device", "torch", "processes", "compiled", "stack", "threads")] == [
            "cpu", torch.__version__, 1, False, of_stack, 1]
        assert [(row["epoch"], row["step"]) for row in metrics] == [("1", "5"), ("2", "10"), ("3", "15")]
        best = min(metrics, key=lambda row: float(row["val_loss"]))
        assert summary["best_epoch"] == int(best["epoch"]) and summary["epochs"] == 3
        model = analysis.load_model(folder, settings, CPU)
        loss, accuracy = loss_by_hand(model, cut(mnist()["test"], 2_001), settings)
        epoch_seconds = 2_001 / column(folder, "images_per_second")
        for name, expected, atol in [
                ("val_loss", float(best["val_loss"]), 1e-6), ("test_loss", loss, 1e-5), ("test_accuracy", accuracy, 0),
                ("seconds", column(folder, "seconds").sum().item(), 0.01),
                ("train_seconds", epoch_seconds.sum().item(), 0.01),
                ("milliseconds_per_step", 1e3 * epoch_seconds.median().item() / 5, 0.1)]:
            assert summary[name] == pytest.approx(expected, rel=1e-2 if "seconds" in name else 0, abs=atol)
        assert facts["parameters"] == summary["parameters"] == sum(
            weights.numel() for weights in records.read_checkpoint(folder / "best.pt").values())
        assert summary["crc32"] == records.checksums(folder, summary)
    assert len({row["val_loss"] for folder in runs for row in untimed(folder)}) == 9


def test_checkpoints(untested, tmp_path):
    """Checkpoints hold tensors of their own memory, are loaded without pickled code, and hold nothing twice."""
    big = torch.zeros(10**6)
    records.write_checkpoint(tmp_path / "view.pt", dict(part=big[:2], parts=[dict(part=big[2:4].requires_grad_())]))
    content = torch.load(tmp_path / "view.pt", weights_only=True)
    assert torch.equal(content["part"], big[:2]) and not content["parts"][0]["part"].requires_grad
    size = 4 * read_json(untested / "config.json")["facts"]["parameters"]
    for path, limit in [(tmp_path / "view.pt", 0), (untested / "best.pt", 2 * size),
                        (untested / "last.pt", 3 * size)]:  # with two averages
        assert path.stat().st_size < limit + 10_000


def test_git_commit(tmp_path, monkeypatch):
    """A record names the commit, and says that it is dirty when a module has changed, not when a plugin was copied."""
    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=N", "-c", "user.email=e@x.org", *arguments], cwd=tmp_path,
                              capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    (tmp_path / "records.py").write_text("one = 1\n")
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "first")
    (tmp_path / "plugin.py").write_text("two = 2\n")
    assert records.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "records.py").write_text("one = 2\n")
    assert records.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(records, "__file__", str(tmp_path / "inside/records.py"))
    assert records.git_commit() is None  # the checkout is another project's


def test_best_weights_are_tested_once(tmp_path, monkeypatch):
    """When validation losses fall and rise, with Ctrl-C in between, the weights of the lowest are tested, once."""
    val_losses, tested, validated, load_splits = iter([0.9, 0.5, None, 0.7]), [], [], data.load_splits

    def evaluate(models, split, settings):
        if len(split.labels) == 2_001:
            tested.append({name: weights.clone() for name, weights in models[0].state_dict().items()})
            return [(0.6, 0.4)]
        validated.append(models[0].state_dict())
        return [(next(val_losses) or interrupt(), 0.5)]

    monkeypatch.setattr(data, "load_splits", lambda *arguments: {
        **load_splits(*arguments), "val": cut(load_splits(*arguments)["val"], 2_000)})
    monkeypatch.setattr(analysis, "evaluate", evaluate)
    assert [command(*TINY, "--epochs", "3", "--runs-dir", tmp_path) for _ in range(2)] == [130, 0]
    folder, (weights,) = tmp_path / "mnist-vitdiff-seed0", tested
    best = records.read_checkpoint(folder / "best.pt")
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert not torch.equal(weights["head.fc2.bias"], validated[-1]["head.fc2.bias"])
    assert read_json(folder / "summary.json")["best_epoch"] == 2


# Interrupted and resumed.

def test_interrupted_at_any_write(tmp_path, monkeypatch):
    """A stack that ends at any of its writes and is started again, its analysis too, leaves what one does that was
    never interrupted."""
    flags, replace = [*TINY, "--epochs", "2", "--dropout", "0.1", "--seed", "0", "1", "--analysis"], os.replace
    splits = {name: cut(split, 201) for name, split in mnist().items()}
    monkeypatch.setattr(data, "load_splits", lambda *arguments: splits)
    for name in ("measure_noise", "measure_attention", "measure_response"):  # which take longer than the rest
        monkeypatch.setattr(analysis, name, lambda *arguments: [
            [dict(loss=loss)] for loss, _ in analysis.evaluate(*arguments)])
    assert command(*flags, "--runs-dir", tmp_path / "whole") == 0
    (plan,) = train.plan_experiments(train.parse_flags(flags), CPU, None)
    monkeypatch.setattr(train, "plan_experiments", lambda args, *others: [  # which is the same each time
        plan._replace(request=plan.request | dict(runs_dir=args.runs_dir))])

    def replace_or_end(source, target):
        if not next(countdown):
            raise KeyboardInterrupt
        replace(source, target)

    for number in itertools.count():
        runs, countdown = tmp_path / str(number), itertools.count(number, -1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_end)
            status = command(*flags, "--runs-dir", runs)
        if status == 0:
            break
        finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
        assert status == 130 and command(*flags, "--runs-dir", runs) == 0
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
        for seed in (0, 1):
            found, expected = (folder / f"mnist-vitdiff-seed{seed}" for folder in (runs, tmp_path / "whole"))
            assert_same_run(found, expected)
            assert all((found / name).read_bytes() == (expected / name).read_bytes() for name in records.ANALYSIS)
    # Of each seed config.json, args.txt, four files of the analysis, summary.json, twice best.pt and metrics.csv; two
    # last.pt.
    assert number == 24


def run_plugin(tmp_path, monkeypatch, source):
    """The path of a plugin; what it changes is as before when the test is over."""
    for module, name in [(data, "load_splits"), (data, "draw_epoch"), (data, "get_batch"), (train, "lr_factor")]:
        monkeypatch.setattr(module, name, getattr(module, name))
    path = tmp_path / "my plugin.py"
    path.write_text(source)
    return path


def interrupt(*arguments):
    raise KeyboardInterrupt


def end_at(monkeypatch, epoch, how=interrupt):
    """End as by Ctrl-C when an epoch is drawn."""
    draw_epoch = data.draw_epoch
    monkeypatch.setattr(data, "draw_epoch", lambda seeds, number, *arguments: (
        how() if number == epoch else draw_epoch(seeds, number, *arguments)))


def test_a_stack_is_resumed_as_a_whole(tmp_path, monkeypatch, capsys):
    """Other seeds than those of an interrupted stack are refused by a line that names its seeds; more are trained
    beside it, and finished ones are left alone."""
    flags = [*TINY, "--epochs", "2", "--runs-dir", tmp_path]
    with monkeypatch.context() as patch:
        end_at(patch, epoch=2)
        assert command(*flags, "--seed", "0", "1") == 130
    assert_one_line(capsys, "interrupted", "again")
    for seeds in (["1"], ["0"], ["1", "2"]):
        assert_refused(capsys, [*flags, "--seed", *seeds], "--seed 0 1", "--overwrite")
    assert_refused(capsys, [*flags, "--seed", "0", "1", "--lr", "0.01"], "lr is 0.006 there and 0.01 here")
    assert command(*flags, "--seed", "2") == 0
    capsys.readouterr()
    assert command(*flags, "--seed", "0", "1", "2", "3") == 0
    out = capsys.readouterr().out
    assert [out.count(f"seed{seed}  epoch ") for seed in range(4)] == [1, 1, 0, 2]


def test_products_are_trained_once(tmp_path, capsys):
    """Every combination is trained once; the same command again trains what is missing alone, shows the results of all,
    and says how to draw them."""
    flags = [*TINY, "--epochs", "1", "--model", "vit", "vitdiffv2", "--seed", "0", "1", "--runs-dir", tmp_path / "a b"]
    assert command(*flags) == 0
    folders = [tmp_path / f"a b/mnist-{model}-seed{seed}" for model in ("vit", "vitdiffv2") for seed in (0, 1)]
    assert sorted((tmp_path / "a b").iterdir()) == folders and capsys.readouterr().out.count(" epoch 1/1 ") == 4
    shutil.rmtree(folders[1])
    assert command(*flags) == 0
    out = capsys.readouterr().out
    assert out.count(" epoch 1/1 ") == out.count("mnist-vit-seed1  epoch 1/1 ") == 1
    assert "finished before this command: 3 of 4; " in out and f"plot.py '{tmp_path / 'a b'}'\n" in out
    for folder in folders:
        assert f"{read_json(folder / 'summary.json')['test_accuracy']:.2%}" in out.split(f"\n{folder.name} ")[-1]
    assert command(*flags, "--model", "vitdiffv2", "--overwrite") == 0
    assert capsys.readouterr().out.count(" epoch 1/1 ") == 2


# What goes wrong.

BAD_FLAGS = [
    (["--model", "vitdif"], ["'vitdif'", "vitdiff?", "--plugin FILE"]),
    (["--patch-size", "5"], ["patch size 5", "28", "[1, 2, 4, 7, 14, 28]"]), (["--dim", "33"], ["width 33", "2 heads"]),
    (["--model", "vitdiffpaper", "--dim", "18", "--num-heads", "6"], ["18", "6 heads of 2 branches"]),
    (["--dim", "999999999999"], ["--dim", "'999999999999'"]),
    (["--batch-size", "55001"], ["--batch-size", "55001", "55000", "mnist"]),
    (["--dropout", "1"], ["--dropout", "'1'"]), (["--seed", "0", "4294967296"], ["--seed", "'4294967296'"]),
    (["--device", "cuda:99"], ["--device cuda:99", "--device auto"]),
    (["--distractors", "4"], ["--distractors", "mnist", "clutteredmnist", "clutteredfashionmnist"]),
    (["--no-augment", "--rotation", "3"], ["--no-augment", "--rotation"]), (["--plugin", "README.md"], ["README.md"]),
    (["@missing.txt"], ["missing.txt"]), (["@data/MNIST/raw/t10k-labels-idx1-ubyte.gz"], ["@file"]),
    (["--data-dir", "README.md"], ["--data-dir", "README.md"]),
    (["--data-dir", "locked"], ["--data-dir", "'locked'", "Permission denied"]),
    (["--runs-dir", "x" * 300], ["--runs-dir", "too long"]), (["--runs-dir", "/proc/runs"], ["/proc/runs"]),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[" ".join(flags)[:40] for flags, _ in BAD_FLAGS])
def test_bad_flags(flags, words, tmp_path, capsys, monkeypatch):
    """A wrong flag is one line, which names flag and value, and exit 2; nothing is created."""
    monkeypatch.chdir(HERE)
    if "locked" in flags:  # root may look into any folder
        monkeypatch.chdir(tmp_path)
        Path("locked").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: path != Path("locked"))
    assert_refused(capsys, [*([] if "--runs-dir" in flags else ["--runs-dir", tmp_path / "runs"]), *flags], *words)
    assert not (tmp_path / "runs").exists()


class Rated(SelfAttention):
    """An attention whose mean lambda is `rate`, and infinite in an epoch of training if `later`."""
    rate, later = 0.5, False

    def mean_lambda(self, x):
        return torch.tensor(math.inf if self.later and len(x) > 2 else self.rate)


@pytest.mark.parametrize("row, words", [
    ("vit=2", ["'vit=2'", "name"]), ("my vit/x", ["'my vit/x'", "name"]), ("_v", ["'_v'", "name"]),
    ("my vit", []), ("rated", ["rated", "mean_lambda is nan before the first step"]),
    ("later", ["mean lambda is inf at epoch 1, validation"])])
def test_what_cannot_be_read_again(tmp_path, capsys, monkeypatch, row, words):
    """A model or a data set whose name no chart's file can have, and a lambda that is not finite, are refused before
    they are recorded: what was trained can be read."""
    monkeypatch.setitem(MODELS, row, dict(attention=Rated))
    monkeypatch.setitem(data.DATASETS, row, data.DATASETS["mnist"])
    monkeypatch.setattr(data, "load_splits", lambda name, *others, load=data.load_splits: load("mnist", *others))
    monkeypatch.setattr(Rated, "rate", math.nan if row == "rated" else 0.5)
    monkeypatch.setattr(Rated, "later", row == "later")
    for kind, flags in [("model", ["--model", row]), ("dataset", ["--dataset", row, "--model", "vitdiff"])]:
        flags = [*TINY, "--epochs", "1", *flags, "--runs-dir", tmp_path / kind]
        if words and (kind == "model" or "name" in words):
            assert_refused(capsys, flags, *words)
            assert row == "later" or not (tmp_path / kind).exists()
        else:
            assert command(*flags) == 0
            (folder,) = (tmp_path / kind).iterdir()
            assert records.read_run(folder)
            assert command(f"@{folder / 'args.txt'}", *TINY, "--runs-dir", folder.parent) == 0


def test_a_row_of_sizes(tmp_path, monkeypatch):
    """A row of MODELS decides its sizes where no flag does, and the lambda of block 1 is lambda_1."""
    def attention(dim, num_heads, depth, **options):
        return (Rated if depth else SelfAttention)(dim, num_heads, depth, **options)

    monkeypatch.setitem(MODELS, "own", dict(attention=attention, patch_size=14, depth=2, dropout=0.2))
    settings = settings_for(model="own")
    assert [settings[name] for name in ("patch_size", "depth", "dropout", "dim")] == [14, 2, 0.2, 32]
    assert command(*TINY, "--depth", "2", "--epochs", "1", "--model", "own", "--runs-dir", tmp_path) == 0
    assert [name for name in records.read_run(tmp_path / "mnist-own-seed0").metrics if "lambda" in name] == ["lambda_1"]


def test_help(tmp_path, capsys):
    """--help names every model, data set and flag; in an @FILE, too, ~ is the home folder."""
    (tmp_path / "flags").write_text("--runs-dir ~/runs\n")
    assert train.parse_flags([f"@{tmp_path / 'flags'}"]).runs_dir == Path.home() / "runs"
    assert command("--help") == 0
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    flags = [*records.SETTINGS[3:], "device", "threads", "data_dir", "runs_dir", "overwrite", "analysis", "compile",
             "stack"]
    assert words >= {*MODELS, *DATASETS, *(f"--{name.replace('_', '-')}" for name in flags)}


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json", "summary.json"])
def test_damaged_records(finished, untested, tmp_path, capsys, monkeypatch, name):
    """A record that is cut short, empty, foreign or changed is named, is left as it is, and exit 2; so is a config.json
    that does not say which seeds of an interrupted run were side by side."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # so that those of the run are read
    folder, foreign = copy_run(finished if name == "summary.json" else untested, tmp_path), io.BytesIO()
    torch.save(dict(weights=torch.zeros(3)), foreign)
    content = (folder / name).read_bytes()
    damaged = [content[:len(content) // 2], b"", foreign.getvalue(), b"[]", b'{"settings": {}, "facts": []}']
    if name.endswith(".pt"):  # a bit of a weight has flipped
        with zipfile.ZipFile(folder / name) as archive:
            weights = max(map(archive.read, archive.namelist()), key=len)
        damaged.append(content.replace(weights, bytes([weights[0] ^ 16]) + weights[1:]))
    if name == "config.json":
        damaged += [json.dumps(json.loads(content) | dict(facts=facts)).encode() for facts in (
            {}, dict(stack=3), dict(stack=[1]), dict(stack=["0"]), dict(stack=[0], threads="2"))]
    for bad in damaged:
        (folder / name).write_bytes(bad)
        assert_refused(capsys, [*TINY, "--dropout", "0.1", "--epochs", "3", "--runs-dir", folder.parent], folder / name,
                       "--overwrite")
        assert (folder / name).read_bytes() == bad
    assert untimed(folder) == untimed(finished)


def test_folders_in_use(tmp_path, capsys):
    """A folder that another process trains in, or that is not a run's, or a file in its place, is named and left alone.
    """
    used, file, other = (tmp_path / f"mnist-{model}-seed0" for model in ("vitdiff", "vitdiffv2", "vit"))
    file.write_text("mine")
    other.mkdir()
    (other / "metrics.csv").write_text("mine")
    with records.locked(used):
        for model, words in dict(vitdiff=[used], vitdiffv2=[file], vit=[other, "metrics.csv", "config.json"]).items():
            assert_refused(capsys, ["--model", model, "--runs-dir", tmp_path], *words)
    assert file.read_text() == (other / "metrics.csv").read_text() == "mine"


def test_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    """A loss that is not finite is one line with epoch and step, or validation, and the record of the epochs before is
    kept."""
    flags = ["--batch-size", "2001", "--optimizer", "adamw", "--lr", "1e38", "--runs-dir", tmp_path / "validation"]
    assert_refused(capsys, [*TINY, *flags], "epoch 1, validation", "--lr")
    calls, step = itertools.count(), train.train_step
    monkeypatch.setattr(train, "train_step", lambda net, images, labels, share, **others: step(
        net, images, labels, share * (math.nan if next(calls) == STEPS + 2 else 1), **others))
    assert_refused(capsys, [*TINY, "--epochs", "3", "--seed", "0", "1", "--runs-dir", tmp_path],
                   tmp_path / "mnist-vitdiff-seed0", "nan", "epoch 2, step 3 of 5", "--lr")
    for seed in (0, 1):
        folder = tmp_path / f"mnist-vitdiff-seed{seed}"
        assert len(untimed(folder)) == 1 and not (folder / "summary.json").exists()


def test_full_disk(tmp_path, capsys):
    """A full disk, for which a limit on the size of files stands, is one line and loses nothing."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert_refused(capsys, [*TINY, "--epochs", "2", "--runs-dir", tmp_path], "best.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "mnist-vitdiff-seed0").iterdir()} == {"config.json", "args.txt"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory(tmp_path, monkeypatch, capsys, error):
    """Too little memory is one line that names the flags that need less, and exit 2."""
    def fail(*arguments, **options):
        raise error
    monkeypatch.setattr(data, "get_batch", fail)
    assert_refused(capsys, [*TINY, "--runs-dir", tmp_path], "memory", "--batch-size", "--stack")


class Misshapen(SelfAttention):
    """An attention with a bug: some of its products do not fit."""

    def forward(self, x, keep=None):
        return super().forward(x if x.is_meta else x @ torch.ones(3, 3), keep)


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    """A bug in a user's attention is raised as it is, and so is one in a plugin."""
    monkeypatch.setitem(MODELS, "vitbug", dict(attention=Misshapen))
    with pytest.raises(RuntimeError, match="shape") as error:
        command(*TINY, "--epochs", "1", "--model", "vitbug", "--runs-dir", tmp_path)
    assert any(entry.name == "forward" and entry.path == Path(__file__) for entry in error.traceback)
    plugin = run_plugin(tmp_path, monkeypatch, "\n\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as error:
        command(*TINY, "--plugin", plugin, "--runs-dir", tmp_path / "runs")
    assert str(error.traceback[-1].path) == str(plugin) and error.traceback[-1].lineno == 2


def test_attention_without_a_map(tmp_path, monkeypatch, capsys):
    """An attention that has no attention_map is refused before training, unless without analysis."""
    class Plain(torch.nn.Module):
        def __init__(self, *sizes, **options):
            super().__init__()
            self.forward = SelfAttention(*sizes, qkv_bias=options["qkv_bias"]).forward

    monkeypatch.setitem(MODELS, "vitplain", dict(attention=Plain))
    flags = [*TINY, "--model", "vitplain", "--epochs", "1", "--runs-dir", tmp_path / "runs"]
    assert_refused(capsys, [*flags, "--analysis"], "vitplain", "Plain", "attention_map", "--no-analysis")
    assert not (tmp_path / "runs").exists() and command(*flags) == 0


def test_a_changed_plugin(tmp_path, monkeypatch, capsys):
    """A run is resumed with the plugin that it was begun with alone; another is refused and named. The kept
    copy serves to start it afresh."""
    plugin = run_plugin(tmp_path, monkeypatch, "")
    flags = [*TINY, "--epochs", "2", "--runs-dir", tmp_path / "runs"]
    with monkeypatch.context() as patch:
        end_at(patch, epoch=2)
        assert command(*flags, "--plugin", plugin) == 130
    folder = tmp_path / "runs/mnist-vitdiff-seed0"
    plugin.write_text("changed = True")
    for more in (["--plugin", plugin], []):
        assert_refused(capsys, [*flags, *more], folder, "plugin is my plugin.py", "--overwrite")
    again = [f"@{folder / 'args.txt'}", "--runs-dir", tmp_path / "runs", "--device", "cpu", "--no-analysis"]
    assert command(*again) == 0
    assert command(*again, "--overwrite") == 0
    assert records.find_run_plugin(folder, records.read_config(folder)[0]["plugin"]).read_text() == ""


def test_an_attention_of_ones_own(tmp_path):
    """The README's own lines, in a file of their own, train a new model and draw it in front of the reference."""
    code = next(code for code in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
                if "MODELS[" in code)
    (tmp_path / "my_attention.py").write_text(code)
    shutil.copytree(HERE / "runs/reference/mnist-vit-seed0", tmp_path / "runs/reference/mnist-vit-seed0")
    flags = ["--plugin", tmp_path / "my_attention.py", "--model", "vitcosine", *TINY, "--epochs", "1"]
    for arguments in (["train.py", *flags, "--runs-dir", tmp_path / "runs"], ["plot.py", tmp_path / "runs"]):
        printed = subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True,
                                 check=True).stdout
    (row,) = re.findall(r"^ *vitcosine.*$", printed, re.MULTILINE)
    summary = read_json(tmp_path / "runs/mnist-vitcosine-seed0/summary.json")
    assert f"{summary['test_accuracy']:.2%}" in row and (tmp_path / "runs/mnist-val-loss.png").exists()
