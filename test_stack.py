"""Claims about many seeds as one module: a stack is its models, plain, compiled and captured."""

import contextlib
import copy
import functools
import itertools
import shutil
import statistics
import types

import pytest
import torch
from torch.nn import functional as F

import analysis
import machine
import records
import stack
import train
from test_data import CPU, cut, mnist
from test_models import randomize
from test_muon import muon_by_hand
from test_train import (STEPS, TINY, assert_same_run, column, command, end_at, epoch_losses, launch, loss_by_hand,
                        make_runs, needs_cuda, read_json, repeat_image, settings_for, small)
from vit import MODELS, SelfAttention, build_model

pytestmark = pytest.mark.usefixtures("small")
float64 = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


class Buffered(SelfAttention):
    """Self-attention with a buffer that counts the training steps."""

    def __init__(self, dim, num_heads, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x)


# A stack is its models.

def step_by_hand(model, gradients, settings):
    """Take the first step of a single model: Muon by its formula, and torch's AdamW."""
    matrices = {name for name, weight in model.named_parameters()
                if weight.ndim > 1 and name not in ("cls_token", "pos_embed") and "lambda" not in name}
    with_muon, decay = settings["optimizer"] == "muon", settings["weight_decay"]
    adamw = torch.optim.AdamW([dict(params=[weight], weight_decay=decay if name in matrices else 0)
                               for name, weight in model.named_parameters() if not (with_muon and name in matrices)],
                              lr=settings["lr"])
    for name, weight in model.named_parameters():
        weight.grad = gradients[name]
        if with_muon and name in matrices:
            matrix, gradient = weight.detach().flatten(1), weight.grad.flatten(1)
            weight.data = muon_by_hand(matrix, [gradient], settings["muon_lr"], decay).view_as(weight)
    adamw.step()


@pytest.mark.parametrize("model, optimizer", [*itertools.product(MODELS, ["muon"]), ("vitdiff", "adamw")])
def test_a_stack_is_its_models(monkeypatch, model, optimizer):
    """A stack of five equals five single models, to 1e-12 in float64: logits, losses, gradients, of which clipping
    shortens the longer ones alone, and the weights after a step of the optimizer."""
    settings = settings_for("--optimizer", optimizer, model=model)
    models = [randomize(analysis.make_model(settings | dict(seed=seed))).train() for seed in range(5)]
    net = stack.StackedModel(copy.deepcopy(models))
    images, labels = torch.randn(5, 6, 1, 28, 28).double(), torch.randint(10, (5, 6))
    singles = [single(images[i]) for i, single in enumerate(models)]
    losses = [F.cross_entropy(logits, labels[i], label_smoothing=0.1) for i, logits in enumerate(singles)]
    gradients = [dict(zip(dict(single.named_parameters()), torch.autograd.grad(loss, list(single.parameters()))))
                 for single, loss in zip(models, losses)]
    norms = [torch.cat([gradient.flatten() for gradient in of_one.values()]).norm().item() for of_one in gradients]
    settings["clip"] = statistics.median(norms)
    float64(net(images), torch.stack(singles))
    found, optimizer = [], stack.make_optimizer(net, settings)
    monkeypatch.setattr(train, "clip_gradients", lambda parts, max_norm, clip=train.clip_gradients: (
        found.append([part.clone() for part in parts]), clip(parts, max_norm)))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step_losses, correct = train.train_step(net, images, labels, 1 / 6, optimizer, scaler, settings)
    float64(step_losses, torch.stack(losses).detach())
    assert correct.tolist() == [(logits.argmax(1) == labels[i]).sum() for i, logits in enumerate(singles)]
    net_gradients = cut_rows(net, *found)
    for i, single in enumerate(models):
        for name, gradient in gradients[i].items():
            float64(net_gradients[name][i], gradient, msg=name)
            gradient.mul_(min(1, settings["clip"] / (norms[i] + 1e-6)))
        step_by_hand(single, gradients[i], settings)
        float64(net.model_state(i), single.state_dict())


def cut_rows(net, leaves):
    """{name: (S, *shape)} of tensors in the order and shape of the parameters of `net`."""
    other = copy.deepcopy(net)
    for leaf, parameter in zip(leaves, other.parameters(), strict=True):
        parameter.data = leaf
    return other.weights()


def test_seeds_of_a_stack():
    """Each seed of a stack has the initial weights and the batches that it has alone."""
    seeds = [3, 0, 4294967295]
    together, splits, settings = make_runs(seeds=seeds)
    (images, labels, _), *_ = train.epoch_batches(splits["train"], seeds, 1, settings)
    for i, seed in enumerate(seeds):
        expected = analysis.make_model(settings | dict(seed=seed)).state_dict()
        for state in (together.net.model_state(i), make_runs(seeds=[seed])[0].net.model_state(0)):
            assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
        (own_images, own_labels, _), *_ = train.epoch_batches(splits["train"], [seed], 1, settings)
        assert torch.equal(images[i], own_images[0]) and torch.equal(labels[i], own_labels[0])
    assert not torch.equal(images[0], images[1])


def test_dropout_of_a_stack():
    """Each seed of a stack drops out on its own, and anew at each step of each epoch."""
    net = stack.StackedModel([build_model("vit", dropout=0.5)] * 2)
    images = torch.randn(1, 4, 1, 28, 28).expand(2, -1, -1, -1, -1)
    assert not torch.equal(*net(images))
    net.template.eval()
    torch.testing.assert_close(*net(images), rtol=0, atol=1e-6)
    runs, splits, settings = make_runs("--dropout", "0.5", "--lr", "0", "--muon-lr", "0", "--no-augment", count=1_000)
    splits["train"] = repeat_image(splits["train"])
    losses = epoch_losses(runs, splits, settings)
    assert torch.equal(losses, epoch_losses(runs, splits, settings))
    runs.metrics[0].append(None)  # as after the first epoch
    losses = torch.cat([losses, epoch_losses(runs, splits, settings)]).flatten().tolist()
    assert len(set(losses)) == 4  # of two batches each


def test_state_is_loaded_whole(monkeypatch):
    """A checkpoint brings back buffers and the scale of the gradients, as well as weights and the optimizer's state."""
    monkeypatch.setitem(MODELS, "vitbuffered", dict(attention=Buffered))
    (runs, splits, settings), (other, _, _) = (
        make_runs("--amp", "float16", model="vitbuffered", seeds=[seed]) for seed in (0, 1))
    epoch_losses(runs, splits, settings)
    state = copy.deepcopy(stack.get_state(runs.net, runs.optimizer, runs.scaler))
    state["scaler"]["scale"] = 8.0
    stack.set_state(other.net, other.optimizer, other.scaler, state)
    assert other.scaler.get_scale() == 8 and other.net.model_state(0)["blocks.0.attn.calls"] == STEPS
    float64(other.net.model_state(0), runs.net.model_state(0))


class InPlace(SelfAttention):
    def forward(self, x):
        out = torch.zeros(x.shape)
        out += super().forward(x)
        return out


class Frozen(SelfAttention):
    def __init__(self, dim, num_heads, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.proj.requires_grad_(False)


ONE_BY_ONE = [[0], [1], [2]]


@pytest.mark.parametrize("attention, flags, expected, why", [
    (SelfAttention, [], [[0, 1, 2]], ""), (SelfAttention, ["--stack", "1"], ONE_BY_ONE, ""),
    (SelfAttention, ["--stack", "2"], [[0, 1], [2]], ""), (SelfAttention, ["--dataset", "cifar10"], ONE_BY_ONE, ""),
    (SelfAttention, ["--dataset", "clutteredmnist"], ONE_BY_ONE, ""),  # whose images have 101 tokens
    (SelfAttention, ["--dataset", "clutteredmnist", "--patch-size", "12"], [[0, 1, 2]], ""),
    (SelfAttention, ["--amp", "float16"], ONE_BY_ONE, "float16"), (Buffered, [], ONE_BY_ONE, "buffers"),
    (Frozen, [], ONE_BY_ONE, "frozen"), (InPlace, [], ONE_BY_ONE, "vmap")])
def test_stacks(tmp_path, capsys, monkeypatch, attention, flags, expected, why):
    """All seeds are stacked, but on a CPU not those of images of many tokens; a line says why where they cannot be."""
    monkeypatch.setitem(MODELS, "mine", dict(attention=attention))
    args = train.parse_flags(["--seed", "0", "1", "2", "--model", "mine", *flags, "--runs-dir", str(tmp_path)])
    (experiment,) = train.plan_experiments(args, CPU, None)
    assert records.find_stacks(**experiment.request) == expected
    out = capsys.readouterr().out
    assert why in out and ("one after the other" in out) == bool(why)
    assert stack.default_size(10**6, torch.device("cuda")) >= 10**6


# Compiled and captured.

@pytest.mark.parametrize("choice, steps, device, amp, ranks, compiler, expected", [
    ("auto", 5_000, "cpu", "off", 1, "g++", True), ("auto", 4_999, "cpu", "off", 1, "g++", False),
    ("auto", 5_000, "cpu", "off", 1, None, False), ("no", 5_000, "cpu", "off", 1, "g++", False),
    ("yes", 1, "cpu", "float16", 2, None, True), ("auto", 1, "cuda", "off", 1, None, True),
    ("no", 1, "cuda", "off", 1, None, False), ("auto", 1, "cuda", "float16", 1, None, False),
    ("yes", 1, "cuda", "bfloat16", 1, None, True), ("yes", 1, "cuda", "float16", 1, None, "not captured"),
    ("yes", 1, "cuda", "off", 2, None, "not captured")])
def test_when_to_compile(monkeypatch, capsys, choice, steps, device, amp, ranks, compiler, expected):
    """--compile auto compiles on a CPU with a compiler, when all steps of all seeds are many enough; on CUDA it
    captures steps that can be. A line says where what is asked for cannot be."""
    monkeypatch.setattr(stack.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(machine, "world_size", lambda: ranks)
    assert stack.is_compiled(choice, steps, torch.device(device), amp) is (expected is True)
    assert ("not captured" in capsys.readouterr().out) == (expected == "not captured")


@pytest.mark.parametrize("model, backend", [("vit", "inductor"), ("vitbuffered", "eager")])
def test_compiled_losses(tmp_path, monkeypatch, model, backend):
    """Compiled and plain losses agree: of a stack, and of seeds one after the other, more of them than torch compiles
    of one function. The smaller last batch is not compiled for, and the trial that begins each leaves a model's
    buffers as they were. "eager" is a stand-in for the compiler, which takes what torch traces as it is."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setitem(MODELS, "vitbuffered", dict(attention=Buffered))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # An epoch of MNIST has 110 batches of 500; those of a stack are counted for each seed.
    monkeypatch.setattr(stack, "COMPILED_STEPS", 220 if model == "vit" else 110)
    for choice in ("no", "auto"):
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1,
                                         fail_on_recompile_limit_hit=True):
            assert command(*TINY, "--epochs", "1", "--model", model, "--head-hidden-dim", "0", "--seed", "0", "1",
                           "--compile", choice, "--runs-dir", tmp_path / choice) == 0
    for plain in (tmp_path / "no").iterdir():
        compiled = tmp_path / "auto" / plain.name
        assert [records.read_config(run)[1]["compiled"] for run in (plain, compiled)] == [False, True]
        for name in ("train_loss", "val_loss"):
            torch.testing.assert_close(column(compiled, name), column(plain, name), rtol=0, atol=1e-4)
        weights = torch.load(compiled / "best.pt", weights_only=True)
        assert weights.get("blocks.0.attn.calls", STEPS) == STEPS


def test_without_a_compiler(tmp_path, monkeypatch, capsys):
    """Where compiling fails, --compile yes is one line and exit 2, and auto says so in one line and trains without; a
    line says beforehand that it takes long, and torch's own about CUDA and its old functions are not seen."""
    flags = [*TINY, "--epochs", "1", "--model", "vit", "--head-hidden-dim", "0", "--runs-dir"]
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import warnings\nwarnings.warn_explicit('old', FutureWarning, 'a.py', 1, module='torch.a')")
    process = launch("train.py", *flags, tmp_path / "yes", "--compile", "yes", "--plugin", plugin, CXX="/bin/false",
                     CUDA_HOME="/usr", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))

    def fail(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(stack, "COMPILED_STEPS", 1)
    monkeypatch.setattr(stack.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: fail)
    assert command(*flags, tmp_path / "auto") == 0
    out, err = capsys.readouterr()
    assert [line.count("--compile") for line in out.splitlines() if "(no compiler)" in line] == [1] and err == ""
    assert records.read_config(tmp_path / "auto/mnist-vit-seed0")[1]["compiled"] is False
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.count("\n") == 1 and "--compile" in err and "compiling, which" in out, err
    assert not list(tmp_path.glob("yes/*/*"))


class Graph:
    """What stands for a CUDA graph: it repeats what was recorded in it."""
    recording = None

    @contextlib.contextmanager
    def record(self, stream):
        Graph.recording = self
        yield
        Graph.recording = None

    def replay(self):
        self.kernel()


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda with graphs on the CPU."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in dict(Stream=lambda: stream, CUDAGraph=Graph, graph=Graph.record,
                               stream=contextlib.nullcontext, current_stream=lambda: stream).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    stack.capture_stream.cache_clear()
    yield
    stack.capture_stream.cache_clear()


def make_capture(fail=None):
    """A step that is captured, and the list of what it was called for."""
    def step(images, labels, share):
        def kernel():
            losses.copy_(share * images.sum(1))
            correct.copy_(labels.sum(1))

        losses, correct = torch.zeros(2), torch.zeros(2, dtype=torch.long)
        calls.append(kernel)
        if not Graph.recording:
            kernel()
        elif fail:
            raise fail
        else:
            Graph.recording.kernel = kernel
        return losses, correct

    calls, optimizer = [], torch.optim.AdamW([torch.zeros(1)])
    run = stack.capture(step, optimizer)
    assert optimizer.param_groups[0]["capturable"]
    return run, calls


def test_capture(graphs):
    """A captured step runs as it is for the first three batches; then its graph is replayed on each batch's own images
    and labels."""
    run, calls = make_capture()
    for _ in range(6):
        images, labels = torch.rand(2, 3), torch.randint(10, (2, 3))
        losses, correct = run(images, labels, 1 / 3)
        torch.testing.assert_close(losses, images.mean(1))
        assert torch.equal(correct, labels.sum(1))
    assert len(calls) == 4


@pytest.mark.parametrize("error, expected, words", [
    (RuntimeError("not permitted\nwhen capturing"), records.UserError, "(not permitted): give --compile no"),
    (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "memory")])
def test_steps_that_cannot_be_captured(graphs, error, expected, words):
    """What fails in the capture alone is one line that names the flag; too little memory stays what it is."""
    run, _ = make_capture(error)
    with pytest.raises(expected) as raised:
        for _ in range(4):
            run(torch.rand(2, 3), torch.zeros(2, 3), 1 / 3)
    assert words in str(raised.value)


# On CUDA.

CUDA = [*TINY, "--lr", "1e-3", "--muon-lr", "2e-3"]


@pytest.fixture(params=range(max(1, min(2, torch.cuda.device_count()))))
def cuda(request):
    """A card, in the state that train.py puts it into; deterministic algorithms are for this test alone."""
    yield machine.pick_device(f"cuda:{request.param}")
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("model", MODELS)
def test_cuda_losses(cuda, model, seeds, compiled):
    """On CUDA a model, and a stack of it, have the losses of the CPU, plain and captured, and in bfloat16 nearly; in
    that, too, a stack has nearly the losses of single seeds."""
    def losses(amp, seeds, device, compiled=False):
        runs, splits, settings = make_runs(*CUDA, "--no-augment", "--amp", amp, count=4_001, model=model, seeds=seeds,
                                           device=device, compiled=compiled)
        assert (runs.fast_step is not runs.step) == compiled
        return epoch_losses(runs, splits, settings)

    expected, half = losses("off", seeds, CPU), losses("bfloat16", seeds, cuda, compiled)
    torch.testing.assert_close(losses("off", seeds, cuda, compiled), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(half, expected, rtol=0.03, atol=0)
    torch.testing.assert_close(half, torch.cat([losses("bfloat16", [seed], cuda) for seed in seeds]), rtol=0.01, atol=0)


@needs_cuda
@pytest.mark.parametrize("flags", [
    ["--amp", "off"], ["--amp", "bfloat16", "--seed", "0", "1"], ["--amp", "float16"], ["--compile", "yes"],
    ["--compile", "yes", "--seed", "0", "1"], ["--dataset", "clutteredmnist", "--patch-size", "12"]], ids=" ".join)
def test_cuda_repeats_a_record(cuda, tmp_path, monkeypatch, flags):
    """On CUDA the same seed gives the same record, analysis included, captured or not, also where it was interrupted
    and resumed; its checkpoints hold tensors of the CPU, where they have nearly its figures."""
    flags = [*TINY, "--device", cuda, "--epochs", "2", "--dropout", "0.1", "--analysis", *flags]
    assert command(*flags, "--runs-dir", tmp_path / "first") == 0
    with monkeypatch.context() as patch:
        end_at(patch, epoch=2)
        assert command(*flags, "--runs-dir", tmp_path / "second") == 130
    assert command(*flags, "--runs-dir", tmp_path / "second") == 0
    for folder in (tmp_path / "first").iterdir():
        again = tmp_path / "second" / folder.name
        assert_same_run(again, folder)
        for name in records.ANALYSIS:
            assert (again / name).read_bytes() == (folder / name).read_bytes()
        best, settings = torch.load(folder / "best.pt", weights_only=True), records.read_config(folder)[0]
        assert all(weights.device == CPU for weights in best.values())
        if settings["dataset"] == "mnist":
            loss, _ = loss_by_hand(analysis.load_model(folder, settings, CPU), cut(mnist()["test"], 2_001), settings)
            assert read_json(folder / "summary.json")["test_loss"] == pytest.approx(loss, abs=1e-4)


@needs_cuda
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_cuda_captured_dropout(cuda, seeds):
    """Each replay of a captured step drops out anew: losses differ although weights stay and images are equal."""
    runs, splits, settings = make_runs("--dropout", "0.5", "--lr", "0", "--muon-lr", "0", "--no-augment", count=4_000,
                                       seeds=seeds, device=cuda, compiled=True)
    splits["train"] = repeat_image(splits["train"])
    losses = epoch_losses(runs, splits, settings)
    assert losses.shape == (len(seeds), 8) and losses.isfinite().all()
    assert all(len(set(of_seed.tolist())) == 8 for of_seed in losses)
