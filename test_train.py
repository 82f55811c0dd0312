"""Claims of train.py and machine.py: the loop, what a run leaves, the command as a user types it, where it runs.
Most runs have models of a few parameters, and the first 2,001 images of each split of MNIST."""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import analysis
import data
import machine
import records
import stack
import train
from command import UserError
from test_data import CPU, HERE, META, OnOneDevice, cut, meta_split, mnist, original
from vit import MODELS, SelfAttention, ViT

TINY = """--patch-size 14 --dim 8 --depth 1 --mlp-dim 16 --head-hidden-dim 16 --batch-size 500
          --device cpu --no-analysis""".split()
DROPOUT = [*TINY, *"--epochs 3 --dropout 0.1".split()]  # random numbers of all kinds
STACK = [*DROPOUT, *"--lr 0.3 --muon-lr 0.3 --seed 1 2".split()]  # the best epoch of seed 2 is not the last
STEPS = 5  # of an epoch; its last batch is a single image
pytestmark = pytest.mark.usefixtures("small")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
# A plugin that leaves the first images of each split, and on demand ends the process as by Ctrl-C, or kills it.
SMALL = """
import os, signal, data
def load_less(*arguments, load_splits=data.load_splits):
    return {name: data.Split(*(part[:2_001].to(arguments[-1]) for part in split))
            for name, split in load_splits(*arguments).items()}
def batches_or_end(split, seeds, epoch, settings, epoch_batches=data.epoch_batches):
    for number, batch in enumerate(epoch_batches(split, seeds, epoch, settings), 1):
        for event in (signal.SIGINT, signal.SIGKILL):
            if os.environ.get(event.name) == f"rank {os.environ.get('RANK', 0)} epoch {epoch} batch {number}":
                signal.raise_signal(event)
        yield batch
data.load_splits, data.epoch_batches = load_less, batches_or_end
"""


@pytest.fixture(scope="module")
def small():
    """The first images of each split, of archives that are read once."""
    with mock.patch.dict(vars(data), load_splits=lambda name, *others: original(name)):
        exec(SMALL, {})
        yield


def command(*flags, main=train.main):
    """The exit status of a command, run in this process."""
    return main([str(flag) for flag in flags])


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


def begin(*flags):
    """Run a command that ends as by Ctrl-C after the first epoch."""
    with mock.patch.dict(os.environ, SIGINT="rank 0 epoch 2 batch 1"):
        assert command(*flags) == 130


@pytest.fixture
def plugin(tmp_path):
    """Where a plugin may lie; what it changes is as before when the test is over."""
    with mock.patch.dict(vars(data)), mock.patch.dict(data.DATASETS), mock.patch.dict(MODELS):
        yield tmp_path / "my plugin.py"


def table(path):
    return [*csv.DictReader(path.read_text().splitlines())]


def column(folder, name):
    return torch.tensor([float(row[name]) for row in table(folder / "metrics.csv")], dtype=torch.double)


def assert_same_run(folder, expected):
    """The same record but for times, to the last bit of the best weights and of the analysis, if there is one."""
    def content(run):
        rows = [*table(run / "metrics.csv"), records.read_summary(run)]
        figures = [item for row in rows for item in row.items() if not re.search("second|crc32", item[0])]
        return figures, [path.read_bytes() for path in sorted(run.iterdir()) if path.name in files]

    files = ["best.pt", *analysis.by_itself()]
    assert content(folder) == content(expected)


def copy_run(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "runs" / folder.name))


def settings_for(*flags, model="vit", dataset="mnist", seed=0, device=CPU):
    return train.resolve_settings(train.parse_flags([*flags]), model, dataset, seed, device)


def make_runs(*flags, count=2_001, model="vit", seeds=(0,), device=CPU, compiled=False, runs_dir=""):
    """A Stack of untrained models, splits of `count` images, and settings, as train_stack takes them."""
    settings = settings_for(*TINY, *flags, model=model, seed=seeds[0], device=device)
    splits = {name: data.Split(*(part.to(device) for part in cut(split, count))) for name, split in mnist().items()}
    stacked = train.make_stack(settings, list(seeds), runs_dir, device, compiled, required=True)
    for run in stacked.runs if runs_dir else []:
        run.folder.mkdir()
    return stacked, splits, settings


def epoch_losses(stacked, splits, settings):
    """The losses (S, steps) of the next epoch, which is not recorded."""
    with mock.patch.object(train, "record_epoch", side_effect=KeyboardInterrupt) as record:
        with pytest.raises(KeyboardInterrupt):
            train.train_stack(stacked, splits, settings)
    return torch.as_tensor(record.call_args.args[4])


def loss_by_hand(model, split, settings):
    """Mean over samples of cross entropy with label smoothing, -(1 - s) log p_y - s mean_c log p_c, and accuracy."""
    with torch.no_grad():
        logits = model.double().eval()((split.images.double() / 255 - 0.1307) / 0.3081)
    log_p, s = logits - logits.logsumexp(1, keepdim=True), settings["label_smoothing"]
    losses = -(1 - s) * log_p[torch.arange(len(logits)), split.labels] - s * log_p.mean(1)
    return losses.mean().item(), (logits.argmax(1) == split.labels).double().mean().item()


def repeat_image(split):
    """A split of as many times its first image."""
    return data.Split(*(part[:1].expand_as(part).contiguous() for part in split))


def test_epochs(tmp_path, monkeypatch):
    """Losses and accuracies are means over all samples of an epoch, also of its smaller last batch. Each seed has its
    share of the time, by a clock that ticks when it is read. The rates rise, stay and fall. No test split is read."""
    flags = "--lr 6e-9 --muon-lr 2e-8 --warmup 0.3 --decay 0.5 --no-augment --epochs 5 --label-smoothing 0.3"
    stacked, splits, settings = make_runs(*flags.split(), seeds=[0, 5], count=1_845, runs_dir=tmp_path)
    del splits["test"]
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)
    train.train_stack(stacked, splits, settings)
    for i, (seed, _, rows, _) in enumerate(stacked.runs):
        model = stack.make_model(settings | dict(seed=seed))  # whose weights such rates leave as they are
        figures = [*loss_by_hand(model, splits["train"], settings), *loss_by_hand(model, splits["val"], settings)]
        for epoch, row in enumerate(rows, 1):
            _, step, _, *found = list(row.values())[:9]
            assert step == 4 * epoch and found == pytest.approx([*figures, 1 + i / 2, 2 * 1_845], abs=1e-6)
        assert [row["lr"] / 6e-9 for row in rows] == pytest.approx([4 / 6, 1, 9 / 10, 5 / 10, 1 / 10])
    assert [group["lr"].item() for group in stacked.optimizer.param_groups] == pytest.approx([2e-9, 6e-10])
    assert train.lr_factor(0, 3, warmup=0, decay=0) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision, model", [
    ("bfloat16", "vit"), ("bfloat16", "vitdiff"), ("bfloat16", "vitdiffv2"), ("float16", "vitdiff")])
def test_amp(precision, model):
    """In half precision losses and averages of gradients are nearly those in float32, and weights stay float32."""
    losses, norms = [], []
    for amp in ("off", precision):
        stacked, splits, settings = make_runs("--amp", amp, "--lr", "1e-3", "--muon-lr", "2e-3", model=model, count=801)
        losses.append(epoch_losses(stacked, splits, settings))
        net, state = stacked.net, stacked.optimizer.state
        norms.append(torch.stack([state[net.matrices]["momentum_buffer"].norm(), state[net.rest]["exp_avg"].norm()]))
        assert net.matrices.dtype == net.rest.dtype == torch.float32
    assert not torch.equal(*losses) and (norms[1] / norms[0]).log2().abs().max() < 2
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_float16_overflow(optimizer):
    """When float16 gradients overflow, the step is skipped as a whole: neither weights nor optimizer move."""
    def state():
        return [leaf.detach().clone() for leaf in torch.utils._pytree.tree_leaves(
            [*stacked.net.parameters(), stacked.optimizer.state_dict()["state"]])]

    stacked, splits, settings = make_runs("--amp", "float16", "--optimizer", optimizer)
    batches = stack.rank_batches(splits["train"], [0], 1, settings)
    for factor, (images, labels, share) in zip([1, 1e38, 1], batches):
        before, scale = state(), stacked.scaler.get_scale()
        stacked.step(images, labels, factor * share)
        moved = {not torch.equal(*pair) for pair in zip(before, state())}
        assert moved == {factor == 1} and stacked.scaler.get_scale() == scale / (1 if factor == 1 else 2)


@pytest.mark.parametrize("model, dataset", [*zip(MODELS, ["mnist", "cifar10", *["clutteredmnist"] * 4])])
def test_meta(monkeypatch, model, dataset):
    """A training step of one seed and of a stack, and a batch of evaluation and analysis, run on a device that is not
    the CPU and wait for none of its values: on meta, which has neither AdamW nor autocast."""
    monkeypatch.setattr(stack, "make_optimizer", lambda net, settings: stack.muon.Muon(
        net.matrices, net.shapes["matrices"].values(), torch.zeros((), device=META), 0.1))
    monkeypatch.setattr(torch, "autocast", mock.MagicMock())
    flags = "--batch-size 3 --depth 1 --rotation 3 --flip --brightness 0.1 --dropout 0.1"
    settings, split = settings_for(*flags.split(), model=model, dataset=dataset), meta_split(dataset)
    *_, condition = analysis.attention_conditions(settings).values()
    for seeds in ([0], [0, 1]):
        stacked = train.make_stack(settings, seeds, "", META)
        with OnOneDevice():
            losses, correct = stacked.step(*next(stack.rank_batches(split, seeds, 1, settings)))
            net, (batch,) = stacked.net.eval(), data.evaluation_batches(split, settings)
            (shown,) = analysis.attention_batches(split, settings, *condition)
            results = [losses, correct, stack.evaluate_images(net, *batch, settings),
                       *net.map(ViT.mean_lambdas, batch[0]), *net.map(analysis.sum_attention, *shown)]
        assert losses.shape == correct.shape == (len(seeds),) and all(result.is_meta for result in results)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run that was never interrupted, its folder; beside it lie two that were trained side by side."""
    runs = tmp_path_factory.mktemp("finished")
    assert command(*DROPOUT, "--analysis", "--runs-dir", runs) == command(*STACK, "--runs-dir", runs) == 0
    return runs / "mnist-vitdiff-seed0"


def test_records(finished):
    """Each run, alone or of a stack, leaves its settings, facts, epochs, best weights and figures, and these agree."""
    found = [records.read_run(folder) for folder in sorted(finished.parent.iterdir())]
    for seed, (folder, settings, facts, summary, metrics, *_) in enumerate(found):
        assert {path.name for path in folder.iterdir()} == {
            "args.txt", "best.pt", "config.json", "metrics.csv", "summary.json",
            *([] if seed else analysis.by_itself())}
        assert settings == settings_for(*(STACK if seed else DROPOUT), model="vitdiff", seed=seed)
        model, best = stack.load_model(folder, settings), metrics["val_loss"].index(min(metrics["val_loss"])) + 1
        parameters = sum(weights.numel() for weights in model.parameters())
        assert facts == facts | dict(device="cpu", torch=torch.__version__, processes=1, compiled=False, threads=1,
                                     stack=[1, 2] if seed else [0], parameters=parameters)
        assert summary == summary | dict(seed=seed, epochs=3, best_epoch=best, parameters=parameters)
        for part in ("val", "test"):
            assert (summary[f"{part}_loss"], summary[f"{part}_accuracy"]) == pytest.approx(
                loss_by_hand(model, cut(mnist()[part], 2_001), settings), abs=1e-5)
        seconds, names = sorted(2_001 / speed for speed in metrics["images_per_second"]), ["seconds", "train_seconds"]
        assert [summary[name] for name in (*names, "milliseconds_per_step")] == pytest.approx(
            [sum(metrics["seconds"]), sum(seconds), 1e3 * seconds[1] / STEPS], rel=0.01, abs=0.01)
    assert len({loss for run in found for loss in run.metrics["val_loss"]}) == 9 and best < 3


def test_interrupted_at_any_write(tmp_path, monkeypatch):
    """A stack that ends at any write and is started again leaves what one does that was never interrupted."""
    monkeypatch.setattr(data, "load_splits", lambda *_: {name: cut(split, 201) for name, split in mnist().items()})
    monkeypatch.setattr(analysis, "ANALYSES", {"noise.csv": analysis.Analysis(lambda *arguments: [
        [dict(loss=loss)] for loss, _ in stack.evaluate(*arguments)])})  # the others take longer
    flags = [*DROPOUT, *"--epochs 2 --seed 0 1 --analysis --runs-dir".split()]
    plan = train.plan_experiments(train.parse_flags([*flags, "runs"]), CPU, None)  # which is the same each time
    monkeypatch.setattr(train, "plan_experiments", lambda *arguments: plan)
    assert command(*flags, tmp_path / "whole") == 0
    for last in itertools.count():
        runs, effects = tmp_path / str(last), [mock.DEFAULT] * last + [KeyboardInterrupt]
        with mock.patch.object(os, "replace", mock.Mock(wraps=os.replace, side_effect=effects)):
            if not (status := command(*flags, runs)):
                break
        finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
        assert status == 130 and command(*flags, runs) == 0
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
        for whole in (tmp_path / "whole").iterdir():
            assert_same_run(runs / whole.name, whole)
    assert last > 15


def test_the_same_command_again(tmp_path, capsys):
    """The same command again trains what is missing alone, shows the results of all, and says how to draw them. An
    interrupted stack is resumed, with its settings and from its own checkpoint, or overwritten, as a whole."""
    runs = tmp_path / "a b"
    flags, both = [*TINY, *"--epochs 2 --model vit vitdiff --runs-dir".split(), runs, "--seed"], ["0", "1"]
    begin(*flags, *both)
    assert_one_line(capsys, "interrupted", "again")
    for seeds in (["1"], ["0"], ["1", "2"], ["1", "--overwrite"]):
        assert_refused(capsys, [*flags, *seeds], "--seed 0 1")
    assert_refused(capsys, [*flags, *both, "--lr", "0.01"], "lr is 0.006 there and 0.01 here")
    state = torch.load(last := runs / "mnist-vit-seed0/last.pt", weights_only=True)
    for foreign in (state | dict(seeds=[0]), dict(seeds=[0, 1])):
        torch.save(foreign, last)
        assert_refused(capsys, [*flags, *both], last, "--overwrite")
    torch.save(state, last)
    folders = [runs / f"mnist-{model}-seed{seed}" for model in ("vit", "vitdiff") for seed in both]
    for more, epochs in [([], [1, 1, 2, 2]), ([], [0, 2, 0, 0]), (["--overwrite"], [2, 2, 2, 2])]:
        assert command(*flags, *both, *more) == 0
        out, err = capsys.readouterr()
        assert not err and f"plot.py '{runs}'\n" in out  # no bar, either, where it is no terminal
        assert [out.count(f"{folder.name}  epoch ") for folder in folders] == epochs
        assert ("finished before this command: 3 of 4; " in out) == (0 in epochs)
        for folder in folders:
            assert f"{records.read_summary(folder)['test_accuracy']:.2%}" in out.split(f"\n{folder.name} ")[-1]
        shutil.rmtree(folders[1])


# A plugin with a data set of one's own, and an attention with a bug: some of its products do not fit.
PLUGIN = """
import torch, data, vit
class Misshapen(vit.SelfAttention):
    def forward(self, x):
        return super().forward(x if x.is_meta else x @ torch.ones(3, 3))
split = torch.arange(60 * 64).byte().view(60, 8, 8), torch.arange(60) % 3
data.DATASETS["own"] = dict(load=lambda folder: 2 * split, defaults=dict(epochs=2, batch_size=20, patch_size=4))
vit.MODELS["mine"] = dict(attention=Misshapen)
"""


def test_a_changed_plugin(finished, tmp_path, plugin, capsys):
    """A plugin's data set is trained by its own defaults, if its flags take them. A run is resumed with its own plugin
    alone. args.txt and analysis.py take the kept copy, of one plugin at a time."""
    where = [*TINY[-3:], "--runs-dir", tmp_path / "runs"]
    flags, folder = [*where, "--plugin", plugin, "--dataset", "own"], tmp_path / "runs/own-vitdiff-seed0"
    plugin.write_text(PLUGIN)
    begin(*flags)
    for epochs, words in [("2.5", ["defaults of data set own", "--epochs", "2.5"]), ("2, flip='no'", ["own", "no"]),
                          ("3", [folder, "plugin is my plugin.py", "--overwrite"])]:
        plugin.write_text(PLUGIN.replace("epochs=2", f"epochs={epochs}"))
        assert_refused(capsys, flags, *words)
    for more, words in [([], "resumed after epoch 1 of 2"), (["--overwrite"], " epoch 1/2 ")]:
        assert command(f"@{folder / 'args.txt'}", *where, *more) == 0 and words in capsys.readouterr().out
    del data.DATASETS["own"]
    for others, status in [([], 0), ([finished], 2)]:
        assert command("--device", "cpu", folder, *others, main=analysis.main) == status
    assert_one_line(capsys, "different plugins")


@pytest.mark.parametrize("source, error", [("1 / 0", ZeroDivisionError), (PLUGIN, RuntimeError)])
def test_bugs_keep_their_traceback(tmp_path, plugin, source, error):
    """A bug in a plugin, or in its attention when that is trained, is raised as it is."""
    plugin.write_text(source)
    with pytest.raises(error) as raised:
        command(*TINY, "--plugin", plugin, "--model", "mine", "--runs-dir", tmp_path)
    assert str(plugin) in [str(entry.path) for entry in raised.traceback]


def test_an_attention_of_ones_own(tmp_path, plugin):
    """The README's own lines, in a file of their own, train a new model and draw it in front of the reference."""
    plugin.write_text(re.search(r"```python\n([^`]*MODELS\[.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1])
    shutil.copytree(HERE / "runs/reference/mnist-vit-seed0", tmp_path / "reference/mnist-vit-seed0")
    assert command(*TINY, "--plugin", plugin, "--model", "vitcosine", "--epochs", "1", "--runs-dir", tmp_path) == 0
    printed, error = launch("plot.py", tmp_path).communicate()
    (row,) = re.findall(r"^ *vitcosine.*$", printed, re.MULTILINE)
    accuracy = records.read_summary(tmp_path / "mnist-vitcosine-seed0")["test_accuracy"]
    assert f"{accuracy:.2%}" in row and (tmp_path / "report/index.html").exists(), error


def test_a_row_of_sizes(tmp_path, monkeypatch, capsys):
    """A row of MODELS is named by --help and decides its sizes where no flag does. The lambda of block 1 is lambda_1. A
    name may have spaces, args.txt repeats the run, and an attention needs no map unless it is analysed."""
    def attention(dim, *heads, **options):
        return MODELS["vitdiff"]["attention"](dim, *heads, **options) if options["depth"] else torch.nn.Linear(dim, dim)

    monkeypatch.setitem(MODELS, "my own", dict(attention=attention, patch_size=14, depth=2, dropout=0.2))
    assert command("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in (*MODELS, *data.DATASETS))
    settings, folder = settings_for(model="my own"), tmp_path / "mnist-my own-seed0"
    assert [settings[name] for name in ("patch_size", "depth", "dropout", "dim")] == [14, 2, 0.2, 32]
    flags = ["--model", "my own", *TINY[:-3], *"--depth 2 --epochs 1".split(), *TINY[-3:], "--runs-dir", tmp_path]
    assert_refused(capsys, [*flags, "--analysis"], "my own", "Linear has no attention_map", "--no-analysis")
    assert not folder.exists() and command(*flags) == command(*flags[-5:], f"@{folder / 'args.txt'}") == 0
    assert [name for name in records.read_run(folder).metrics if "lambda" in name] == ["lambda_1"]


BAD_FLAGS = {
    "--model vitdif": "'vitdif' ... vitdiff? ... --plugin FILE", "--model _v": "'_v' ... name",
    "--dataset my=1": "'my=1' ... name", "--dim 33": "width 33 ... 2 heads", "--plugin README.md": "README.md",
    "--model vitdiffpaper --dim 18 --num-heads 6": "18 ... 6 heads of 2 branches", "--device cuda:9": "--device auto",
    "--patch-size 5": "patch size 5 ... 28 ... [1, 2, 4, 7, 14, 28]", "--seed 0 4294967296": "--seed ... '4294967296'",
    "--batch-size 55001": "--batch-size ... 55001 ... 55000 ... mnist", "--runs-dir /proc/runs": "/proc/runs",
    "--distractors 4": "--distractors ... mnist ... clutteredmnist or clutteredfashionmnist",
    "--no-augment --rotation 3": "--no-augment ... --rotation", "@data/MNIST/raw/t10k-labels-idx1-ubyte.gz": "@file"}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, tmp_path, capsys, monkeypatch):
    """A wrong flag, or a name that no chart's file can have, is one line, which names it, and creates nothing."""
    monkeypatch.chdir(HERE)
    monkeypatch.setitem(MODELS, "_v", MODELS["vit"])
    monkeypatch.setitem(data.DATASETS, "my=1", data.DATASETS["mnist"])
    assert_refused(capsys, ["--runs-dir", tmp_path / "runs", *flags.split()], *BAD_FLAGS[flags].split(" ... "))
    assert not (tmp_path / "runs").exists()


def test_what_ends_a_training(tmp_path, monkeypatch, capsys):
    """A loss or a mean lambda that is not finite is one line that says where, and what was recorded before is kept. Too
    little memory is one line that names the flags that need less."""
    class Rated(SelfAttention):
        def mean_lambda(self, x):
            return torch.tensor(untrained if len(x) == 2 else torch.inf)

    monkeypatch.setitem(MODELS, "mine", dict(attention=Rated))
    flags = [*TINY, "--batch-size", "2001", "--runs-dir", tmp_path / "validation"]
    for untrained, words in [(torch.nan, "lambda is nan before the first step"), (0.5, "lambda_0 is inf at epoch 1")]:
        assert_refused(capsys, [*flags, "--model", "mine"], words)
    assert_refused(capsys, [*flags, *"--optimizer adamw --lr 1e29".split()], "val_loss is nan at epoch 1", "--lr")
    factors, step = iter([*[1] * (STEPS + 2), torch.nan, 1, 1]), train.train_step
    monkeypatch.setattr(train, "train_step", lambda forward, images, *others, **more: step(
        forward, images * next(factors), *others, **more))
    assert_refused(capsys, [*STACK, "--runs-dir", tmp_path], tmp_path / "mnist", "nan", "epoch 2, step 3 of 5", "--lr")
    assert [len(table(path)) for path in tmp_path.glob("mnist*/[ms]*")] == [1, 1]  # metrics.csv, and no summary.json
    errors = [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("CPUAllocator: can't allocate memory")]
    monkeypatch.setattr(data, "get_batch", mock.Mock(side_effect=errors))
    for _ in errors:
        assert_refused(capsys, [*TINY, "--runs-dir", tmp_path / "memory"], "memory", "--batch-size", "--stack")


# Where it runs.

@pytest.mark.parametrize("name, expected, line", [
    ("cuda:1", "cuda:1", ""), ("auto", "cuda:0", ""), ("auto", "cpu", "cuda cannot be used (no kernel image): cpu is"),
    ("cuda", None, "--device cuda is not available (no kernel image): try --device auto"),
    ("cuda:2", None, "--device cuda:2: torchrun gives each process a card of its own: give --device cuda")])
def test_cuda_device(monkeypatch, capsys, name, expected, line):
    """The card that is asked for becomes the current one. One that torch cannot use, or that ranks would share, is
    an error where it was named; else the next device is used, and a line says so. --amp auto depends on the card."""
    tries = [RuntimeError("no kernel image\nCompile with TORCH_USE_CUDA_DSA")] * bool(line) + [mock.Mock()]
    monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=tries))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(machine, "started_by_torchrun", lambda: name == "cuda:2")
    for function in ("cuda.is_available", "cuda.set_device", "cuda.is_bf16_supported", "use_deterministic_algorithms"):
        monkeypatch.setattr(f"torch.{function}", mock.Mock(return_value=name != "cuda:1"))
    try:
        device = machine.pick_device(name)
        assert str(device) == expected and line in capsys.readouterr().err
        assert machine.resolve_amp("auto", device) == ("bfloat16" if expected == "cuda:0" else "off")
    except UserError as error:
        assert expected is None and str(error) == line
    assert line or str(torch.cuda.set_device.call_args.args[0]) == expected
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # before any product


def test_idle_cores(monkeypatch):
    """Of the cores that this process may use those count that are idle, or wait for a disk."""
    texts = iter(["cpu0 50 0 0 50 0 0 0 0\ncpu1 0 0 0 90 0 0 0 0\ncpu2 0 0 10 90 0 0 0 0\nintr 1\n",
                  "cpu0 60 0 5 55 0 0 0 0\ncpu1 20 0 0 90 0 0 0 0\ncpu2 0 0 10 100 10 0 0 0\nintr 2\n"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: next(texts))
    assert machine.idle_cores(0) == pytest.approx(2 * (5 + 20) / 40)


@pytest.mark.parametrize("idle, variable, flag, device, expected", [
    (3.8, "", None, "cpu", 4), (2.6, "", None, "cpu", 3), (0.1, "", None, "cpu", 1), (None, "", None, "cpu", 4),
    (0.1, "4", None, "cpu", 4), (0.1, "", 3, "cpu", 3), (0.1, "", None, "cuda", 4)])
def test_threads(monkeypatch, capsys, idle, variable, flag, device, expected):
    """There are as many threads as idle cores, with a line if these are fewer, unless a flag or variable decides."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(machine, "idle_cores", lambda: idle)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", taken := mock.Mock())
    assert machine.take_threads(flag, torch.device(device)) == taken.call_args.args[0] == expected
    if expected < 4 and not flag:
        assert_one_line(capsys, f"{expected} of 4 threads", f"{idle} cores idle", "--threads")
    assert capsys.readouterr().err == ""


def test_threads_of_a_resumed_run(tmp_path, monkeypatch):
    """A run is resumed with the threads that it began with, unless --threads says otherwise; others fill idle cores."""
    used, told, get_batch = [], [], data.get_batch
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "idle_cores", mock.Mock(side_effect=[3.0, 3.0, 2.0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(data, "get_batch", lambda *arguments: used.append(told[-1]) or get_batch(*arguments))
    for run, seeds in [(begin, ["0"]), (begin, ["1"]), (command, ["0", "2"]), (command, ["1", "--threads", "1"])]:
        told.append(4)
        run(*TINY, *"--batch-size 2001 --epochs 2 --stack 1 --runs-dir".split(), tmp_path, "--seed", *seeds)
    facts = [records.read_config(tmp_path / f"mnist-vitdiff-seed{seed}")[1]["threads"] for seed in range(3)]
    assert used == [3, 3, 3, 2, 2, 1] and facts == [3, 3, 2]


def test_closed_terminal(finished, tmp_path, plugin, capsys):
    """A training outlives its terminal, progress bar and all; killed later on and started again, it loses nothing."""
    plugin.write_text(SMALL)
    flags = [*STACK, "--plugin", str(plugin), "--runs-dir", str(tmp_path)]
    process, terminal = os.forkpty()
    if not process:
        os.execvpe("sh", ["sh", "-c", 'stty rows 24 cols 100; cd "$0"; exec "$@"', HERE, sys.executable, "train.py",
                         *flags], os.environ | dict(OMP_NUM_THREADS="1", SIGKILL="rank 0 epoch 3 batch 3"))
    said = b""
    while b" epoch 1/3 " not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert b"steps" in said and os.waitpid(process, 0)[1] == 9  # SIGKILL
    assert command(*flags) == 0 and capsys.readouterr().out.count("resumed after epoch 2 of 3") == 2
    for folder in tmp_path.glob("mnist*"):
        assert_same_run(folder, finished.parent / folder.name)


def test_two_processes(tmp_path, plugin):
    """Two processes give the losses of one, also where one has nothing of the last batch. When one dies the other ends
    too, and the same command resumes. The others wait for hours while the first analyses alone."""
    with mock.patch.object(machine, "started_by_torchrun"), mock.patch("torch.distributed.init_process_group") as init:
        machine.connect_ranks(CPU)
    assert init.call_args.kwargs["timeout"].total_seconds() > 6 * 3600
    plugin.write_text(SMALL)
    flags = [*TINY, *"--epochs 3 --lr 1e-3 --muon-lr 2e-3 --seed 0 1 --plugin".split(), plugin, "--runs-dir"]
    torchrun = [*"-m torch.distributed.run --standalone --nproc-per-node 2 train.py".split(), *flags, tmp_path / "two"]
    launch(*torchrun, SIGKILL="rank 1 epoch 2 batch 3").communicate(timeout=300)  # connected by gloo on loopback
    assert [len(table(path)) for path in tmp_path.glob("two/*/metrics.csv")] == [1, 1]
    process = launch(*torchrun)
    assert command(*flags, tmp_path / "one") == 0  # meanwhile
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("resumed after epoch 1 of 3") == 2 and out.count(" epoch 3/3 ") == 2  # one process writes
    for one in (tmp_path / "one").glob("mnist*"):
        two = tmp_path / "two" / one.name
        assert records.read_config(two)[1]["processes"] == 2
        for name, atol in [("train_loss", 1e-4), ("train_accuracy", 1e-3), ("val_loss", 1e-4)]:
            torch.testing.assert_close(column(two, name), column(one, name), rtol=0, atol=atol)
