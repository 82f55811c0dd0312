"""Claims of stack.py and analysis.py: many seeds as one module, trained, tested and analysed as single models are."""

import contextlib
import copy
import functools
import itertools
import math
import shutil
from unittest.mock import Mock, patch

import numpy
import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import align
import analysis
import attack
import corruptions
import data
import machine
import records
import stack
import train
from command import UserError
from diff_attention import DiffAttention
from test_data import CPU, HERE, cut, mnist
from test_models import close, muon_by_hand, randomize, variant
from test_train import (STEPS, TINY, assert_one_line, assert_same_run, begin, column, command, copy_run, epoch_losses,
                        finished, launch, loss_by_hand, make_runs, needs_cuda, repeat_image, settings_for, small, table)
from vit import MODELS, SelfAttention

QUICK = [*TINY, *"--epochs 1 --model vit --head-hidden-dim 0 --runs-dir".split()]
run_analysis = functools.partial(command, "--device", "cpu", main=analysis.main)
FEW = {name: corruptions.CORRUPTIONS[name] for name in ("gaussian_noise", "gaussian_noise_shift", "distractors")}


def tied(*sizes, **options):
    """Self-attention whose projection has two names."""
    attn = SelfAttention(*sizes, **options)
    attn.again = attn.proj
    return attn


def buffered(*sizes, **options):
    """Self-attention with a buffer that counts the training steps."""
    def count(attn, arguments):
        attn.calls += attn.training

    attn = SelfAttention(*sizes, **options)
    attn.register_buffer("calls", torch.zeros(()))
    attn.register_forward_pre_hook(count)
    return attn


@pytest.fixture(scope="module", autouse=True)
def here(small):
    """Attentions of our own, and a few of the corruptions, so that an analysis takes a moment."""
    attentions = dict(
        tied=tied, buffered=buffered, own_map=variant(SelfAttention, attention_map=SelfAttention.attention_map),
        frozen=lambda *sizes, **options: SelfAttention(*sizes, **options).requires_grad_(False),
        in_place=variant(SelfAttention, forward=lambda attn, x: torch.zeros(x.shape).add_(attn.proj(x))))
    rows = {name: dict(attention=attention) for name, attention in attentions.items()}
    with patch.dict(MODELS, rows), patch.object(corruptions, "CORRUPTIONS", FEW):
        yield


# A stack is its models.

def step_by_hand(model, settings):
    """Take the first step of a single model: Muon by its formula, and torch's AdamW."""
    matrices = [weight for name, weight in model.named_parameters()
                if weight.ndim > 1 and name not in ("cls_token", "pos_embed") and "lambda" not in name]
    rest, decay = set(model.parameters()) - set(matrices), settings["weight_decay"]
    for weight in matrices if settings["optimizer"] == "muon" else []:
        gradient, weight.grad = weight.grad.flatten(1), None  # so that AdamW leaves it alone
        weight.data = muon_by_hand(weight.detach().flatten(1), [gradient], settings["muon_lr"], decay).view_as(weight)
    groups = [dict(params=matrices, weight_decay=decay), dict(params=list(rest), weight_decay=0)]
    torch.optim.AdamW(groups, lr=settings["lr"]).step()


@pytest.mark.parametrize("model, optimizer", [
    *itertools.product([*MODELS, "tied"], ["muon"]), ("vitdiff", "adamw")])
def test_a_stack_is_its_models(model, optimizer):
    """A stack of five equals five single models, to 1e-12 in float64: losses, answers, and weights after a step, for
    which clipping shortens the longer gradients alone. A weight that has two names stays one."""
    settings = settings_for("--optimizer", optimizer, model=model)
    models = [randomize(stack.make_model(settings | dict(seed=seed))).train() for seed in range(5)]
    singles, net = copy.deepcopy(models), stack.StackedModel(models)
    images, labels = torch.randn(5, 6, 1, 28, 28).double(), torch.randint(10, (5, 6))
    logits = torch.stack([single(images[i]) for i, single in enumerate(singles)])
    losses = torch.stack([F.cross_entropy(*pair, label_smoothing=0.1) for pair in zip(logits, labels)])
    losses.sum().backward()
    norms = [torch.nn.utils.clip_grad_norm_(single.parameters(), math.inf) for single in singles]
    settings["clip"] = torch.stack(norms).median().item()
    optimizer, scaler = stack.make_optimizer(net, settings), torch.amp.GradScaler("cpu", enabled=False)
    found, correct = train.train_step(train.forward, images, labels, 1 / 6, net, optimizer, scaler, settings)
    close(found, losses.detach())
    assert torch.equal(correct, (logits.argmax(2) == labels).sum(1))
    for model, single in zip(models, singles):
        torch.nn.utils.clip_grad_norm_(single.parameters(), settings["clip"])
        step_by_hand(single, settings)
        close(model.state_dict(), single.state_dict())


@pytest.mark.parametrize("seeds", [[1], [3, 0, 4294967295]])
def test_training_a_stack_trains_its_models(seeds):
    """Each model of a stack begins with the weights of its seed. After an epoch all have changed, and a model loaded
    from its state dict has its figures in the stack to the last bit."""
    stacked, splits, settings = make_runs(model="tied", seeds=seeds)
    fresh = [stack.make_model(settings | dict(seed=seed)) for seed in seeds]
    close(*([model.state_dict() for model in models] for models in (stacked.net.models, fresh)), atol=0)
    epoch_losses(stacked, splits, settings)
    figures = stack.evaluate(stacked.net, splits["val"], settings)
    for model, trained, of_one in zip(fresh, stacked.net.models, figures):
        before, after = model.state_dict(), trained.state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in after)
        model.load_state_dict(after)
        assert stack.evaluate(stack.StackedModel([model]), splits["val"], settings) == [of_one]


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_dropout_of_a_stack(seeds, device):
    """Each seed of a stack drops out on its own, and anew at each step of each epoch, on CUDA in a captured step."""
    device = machine.pick_device(device)
    stacked, splits, settings = make_runs(*"--dropout 0.5 --lr 0 --muon-lr 0 --no-augment".split(), count=4_000,
                                          seeds=seeds, device=device, compiled=device.type == "cuda")
    net, images = stack.StackedModel(2 * [stack.make_model(settings)]), torch.ones(2, 4, 1, 28, 28)
    assert not torch.equal(*net(images))
    close(*net.eval()(images), atol=1e-6)
    splits["train"] = repeat_image(splits["train"])
    losses = epoch_losses(stacked, splits, settings)
    stacked.runs[0].metrics.append(None)  # as after the first epoch
    losses = torch.cat([losses, epoch_losses(stacked, splits, settings)], 1)
    assert losses.isfinite().all() and [len(of_seed.unique()) for of_seed in losses] == len(seeds) * [16]
    torch.use_deterministic_algorithms(False)


def test_state_is_loaded_whole():
    """A checkpoint brings back buffers and the scale of the gradients, as well as weights and the optimizer's state."""
    (stacked, splits, settings), (other, *_) = (
        make_runs("--amp", "float16", model="buffered", seeds=[seed]) for seed in (0, 1))
    epoch_losses(stacked, splits, settings)
    state = copy.deepcopy(stack.get_state(*stacked[1:4]))  # of net, optimizer and scaler
    state["scaler"]["scale"] = 8.0
    stack.set_state(*other[1:4], state)
    close(stack.get_state(*other[1:4]), state, atol=0)
    assert other.net.models[0].blocks[0].attn.calls == STEPS


@pytest.mark.parametrize("flags, size, why", [
    ("", 3, ""), ("--stack 1", 1, ""), ("--stack 2", 2, ""), ("--dataset cifar10", 1, ""),
    ("--dataset clutteredmnist", 1, ""), ("--dataset clutteredmnist --patch-size 12", 3, ""),  # of 101 and 26 tokens
    ("--amp float16", 1, "float16"), ("--model buffered", 1, "buffers"), ("--model frozen", 1, "frozen"),
    ("--model in_place", 1, "vmap")])
def test_stacks(tmp_path, capsys, flags, size, why):
    """All seeds are stacked, but on a CPU not those of images of many tokens; a line says why where they cannot be."""
    args = train.parse_flags(f"--seed 0 1 2 --runs-dir {tmp_path} {flags}".split())
    (experiment,) = train.plan_experiments(args, CPU, None)
    assert train.find_unfinished(experiment, args)[0] == [0, 1, 2][:size]
    out = capsys.readouterr().out
    assert why in out and ("one after the other" in out) == bool(why)
    assert stack.default_size(10**6, torch.device("cuda")) >= 10**6


# Compiled and captured.

@pytest.mark.parametrize("asked", [
    "auto 5000 cpu off 1 g++ compiled", "auto 4999 cpu off 1 g++ plain", "auto 5000 cpu off 1 none plain",
    "no 5000 cpu off 1 g++ plain", "yes 1 cpu float16 2 none compiled", "auto 1 cuda off 1 none compiled",
    "no 1 cuda off 1 none plain", "auto 1 cuda float16 1 none plain", "yes 1 cuda bfloat16 1 none compiled",
    "yes 1 cuda float16 1 none refused", "yes 1 cuda off 2 none refused"])
def test_when_to_compile(monkeypatch, capsys, asked):
    """--compile auto compiles on a CPU with a compiler, when all steps of all seeds are many enough; on CUDA it
    captures steps that can be. A line says where what is asked for cannot be."""
    flag, steps, device, amp, ranks, compiler, expected = asked.split()
    monkeypatch.setattr(stack.shutil, "which", lambda name: None if compiler == "none" else compiler)
    monkeypatch.setattr(machine, "world_size", lambda: int(ranks))
    assert stack.is_compiled(flag, int(steps), torch.device(device), amp) is (expected == "compiled")
    assert ("not captured" in capsys.readouterr().out) == (expected == "refused")


@pytest.mark.parametrize("model, backend, steps", [("vit", "inductor", 220), ("buffered", "eager", 110)])
def test_compiled_losses(tmp_path, monkeypatch, model, backend, steps):
    """Compiled and plain losses agree, of a stack and of seeds one after the other, more than torch compiles of one
    function. The smaller last batch is not compiled for, and the trial that begins each leaves buffers as they were."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # "eager" takes what torch traces as it is. Of 110 batches an epoch, those of a stack are counted for each seed.
    monkeypatch.setattr(stack, "COMPILED_STEPS", steps)
    for choice in ("no", "auto"):
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1,
                                        fail_on_recompile_limit_hit=True):
            assert command(*QUICK, tmp_path / choice, "--model", model, "--seed", "0", "1", "--compile", choice) == 0
    for plain in (tmp_path / "no").iterdir():
        compiled = tmp_path / "auto" / plain.name
        assert [records.read_config(run)[1]["compiled"] for run in (plain, compiled)] == [False, True]
        for name in ("train_loss", "val_loss"):
            close(column(compiled, name), column(plain, name), atol=1e-4)
        assert records.read_checkpoint(compiled / "best.pt").get("blocks.0.attn.calls", STEPS) == STEPS


def test_without_a_compiler(tmp_path, monkeypatch, capsys):
    """Where compiling fails, --compile yes is one line and exit 2, and auto says so in one line and trains without; a
    line says beforehand that it takes long, and torch's own about CUDA and its old functions are not seen."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import warnings\nwarnings.warn_explicit('old', FutureWarning, 'a.py', 1, module='torch.a')")
    process = launch("train.py", *QUICK, tmp_path / "yes", "--compile", "yes", "--plugin", plugin, CXX="/bin/false",
                     CUDA_HOME="/usr", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    fail = Mock(side_effect=torch._dynamo.exc.TorchDynamoException("no compiler"))
    monkeypatch.setattr(stack, "COMPILED_STEPS", 1)
    monkeypatch.setattr(stack.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", Mock(return_value=fail))
    assert command(*QUICK, tmp_path / "auto") == 0
    out, err = capsys.readouterr()
    assert [line.count("--compile") for line in out.splitlines() if "(no compiler)" in line] == [1] and err == ""
    assert records.read_config(tmp_path / "auto/mnist-vit-seed0")[1]["compiled"] is False
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.count("\n") == 1 and "--compile" in err and "compiling, which" in out, err
    assert not list(tmp_path.glob("yes/*/*"))


@pytest.fixture
def graph(monkeypatch):
    """What stands for a CUDA graph: `replay` calls what was put into `kernels` while it was `capturing`."""
    @contextlib.contextmanager
    def capture(graph, stream):
        graph.capturing = True
        yield
        graph.capturing = False

    graph = Mock(capturing=False, kernels=[], replay=lambda: [kernel() for kernel in graph.kernels])
    for name, stand_in in dict(CUDAGraph=lambda: graph, graph=capture, stream=contextlib.nullcontext,
                               current_stream=Mock()).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(stack, "capture_stream", Mock())
    return graph


def test_capture(graph):
    """A captured step runs as it is for three batches; then its graph is replayed on each batch's own images."""
    def step(images, labels, share):
        sums = torch.zeros(2, 2)
        kernel = lambda: sums.copy_(torch.stack([share * images.sum(1), labels.sum(1)]))
        calls.append(kernel)
        graph.kernels.append(kernel) if graph.capturing else kernel()
        return sums

    calls, group = [], {}
    run = stack.capture(step, Mock(param_groups=[group]))
    for images, labels in torch.rand(6, 2, 2, 3):
        close(run(images, labels, 1 / 3), torch.stack([images.mean(1), labels.sum(1)]), atol=1e-6)
    assert len(calls) == 4 and group["capturable"]


@pytest.mark.parametrize("error, expected, words", [
    (RuntimeError("not permitted\nwhen capturing"), UserError, r"\(not permitted\): give --compile no"),
    (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "memory")])
def test_steps_that_cannot_be_captured(graph, error, expected, words):
    """What fails in the capture alone is one line that names the flag; too little memory stays what it is."""
    def step(*batch):
        if graph.capturing:
            raise error

    run = stack.capture(step, Mock(param_groups=[]))
    with pytest.raises(expected, match=words):
        for _ in range(4):
            run(torch.rand(2, 3), torch.zeros(2, 3), 1 / 3)


# On CUDA.

@pytest.fixture(params=["cuda:0", "cuda:1"][:max(1, torch.cuda.device_count())])
def cuda(request):
    """A card, in the state that train.py puts it into; deterministic algorithms are for this test alone."""
    yield machine.pick_device(request.param)
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("model", MODELS)
def test_cuda_losses(cuda, model, seeds, compiled):
    """On CUDA a model, and a stack of it, have the losses of the CPU, plain and captured, and in bfloat16 nearly; in
    that, too, a stack has nearly the losses of single seeds."""
    def losses(amp, seeds, device, compiled=False):
        stacked, *others = make_runs(*f"--lr 1e-3 --muon-lr 2e-3 --no-augment --amp {amp}".split(), count=4_001,
                                     model=model, seeds=seeds, device=device, compiled=compiled)
        assert stacked.compiled == compiled
        return epoch_losses(stacked, *others)

    expected, half = losses("off", seeds, CPU), losses("bfloat16", seeds, cuda, compiled)
    close(losses("off", seeds, cuda, compiled), expected, atol=1e-3)
    close(half, expected, rtol=0.03, atol=0)
    close(half, torch.cat([losses("bfloat16", [seed], cuda) for seed in seeds]), rtol=0.01, atol=0)


@needs_cuda
@pytest.mark.parametrize("flags", [
    "--amp off", "--amp bfloat16 --seed 0 1", "--amp float16", "--compile yes", "--compile yes --seed 0 1",
    "--dataset clutteredmnist --patch-size 12"])
def test_cuda_repeats_a_record(cuda, tmp_path, flags):
    """On CUDA the same seed gives the same record, analysis included, captured or not, also where it was interrupted
    and resumed; its checkpoints hold tensors of the CPU, where they have nearly its figures."""
    flags = [*TINY, *f"--device {cuda} --epochs 2 --dropout 0.1 --analysis {flags} --runs-dir".split()]
    assert command(*flags, tmp_path / "first") == 0
    begin(*flags, tmp_path / "second")
    assert command(*flags, tmp_path / "second") == 0
    for folder in (tmp_path / "first").iterdir():
        assert_same_run(tmp_path / "second" / folder.name, folder)
        assert {weights.device for weights in torch.load(folder / "best.pt", weights_only=True).values()} == {CPU}
        _, settings, _, summary, *_ = records.read_run(folder)
        net = stack.StackedModel([stack.load_model(folder, settings)])
        ((loss, _),) = stack.evaluate(net, cut(mnist()["test"], 2_001), settings)
        assert summary["test_loss"] == pytest.approx(loss, abs=1e-4)


# What a model attends to, and how its branches respond.

def test_attention_figures():
    """Each figure is that of a row of weights computed by hand; the ratio is weight a relevant patch over weight an
    irrelevant one: of 2 and 6 patches with half of the weight on each kind, 3."""
    row = torch.tensor([[[0.5, 0.25, -0.5, 0.0, 0.5]]])  # an image, a head, itself and 4 patches
    relevant, ink = torch.tensor([[True, False, False, True]]), torch.tensor([[True, False, True, True]])
    figures = analysis.attention_figures(row, relevant, ink)
    entropy = -sum(weight / 1.75 * math.log(weight / 1.75) for weight in (0.5, 0.25, 0.5, 0.5))
    assert list(figures) == records.ATTENTION_FIGURES[:-1]
    assert [figure.item() for figure in figures.values()] == pytest.approx(
        [0.5 / 1.25, 2 / 4, 0.75 / 1.25, entropy, 0.5 / 1.75, 1 - 0.75])
    assert analysis.signal_to_noise(0.5, 6 / 8) == pytest.approx(3)
    assert math.isnan(analysis.signal_to_noise(0.0, 0.0))


@pytest.mark.parametrize("dataset, conditions", [
    ("mnist", ["clean", "gaussian_noise_3", "distractors_3"]),
    ("clutteredmnist", ["0_distractors", "4_distractors", "8_distractors", "16_distractors", "gaussian_noise_3"])])
def test_lookers(dataset, conditions):
    """A model that looks at ink scores nothing on the irrelevant where the object is alone, and the more the more
    distractors there are; one that looks anywhere scores the share of patches without the object."""
    split, settings = cut(mnist()["test"], 1_100), settings_for(dataset=dataset)
    side, black = settings["patch_size"], data.normalize(torch.zeros(1, 1, 1, 1), dataset)
    objects = torch.cat([pixels for _, pixels in data.evaluation_pixels(split, settings | dict(distractors=0))])
    empty = F.max_pool2d(objects, side).flatten(1) == 0

    def measured(look):
        """The row of each condition, of a model whose class token weighs patches (B, P) by their ink as `look` says."""
        model = torch.nn.Linear(1, 1)
        model.attention_maps = lambda images: [
            F.pad(look(F.max_pool2d((images > black + 1e-4).float(), side).flatten(1)), (1, 0))[:, None, None]]
        (rows,) = analysis.measure_attention(stack.StackedModel([model]), split, settings)
        return {row["condition"]: row for row in rows}

    seeing = measured(lambda ink: ink)
    counts = [row["irrelevant_share"] for name, row in seeing.items() if name != "gaussian_noise_3"]
    assert list(seeing) == conditions and counts[0] == 0 and counts == sorted(set(counts))
    assert seeing[conditions[0]]["signal_to_noise"] == math.inf
    assert all(row["ink_share"] > 1 - 1e-6 for name, row in seeing.items() if not name.endswith("_3"))
    for row in measured(torch.ones_like).values():
        assert [row["irrelevant_share"], row["uniform_share"]] == pytest.approx(2 * [empty.float().mean().item()])
        assert row["signal_to_noise"] == pytest.approx(1, abs=1e-4)


def models_of(name, count=1):
    """Settings and models whose maps are far from uniform."""
    settings = settings_for(model=name)
    return settings, [randomize(stack.make_model(settings | dict(seed=seed))).float() for seed in range(count)]


@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
def test_response(name):
    """Each figure is that of the definition, in float64, from what a hook sees: change by the corruption over clean
    outputs around their mean, the share of it that all images have, and cosines of first branch and minus second."""
    split, (settings, (model,)), seen = cut(mnist()["test"], 300), models_of(name), []  # two batches
    rows = iter(*analysis.measure_response(stack.StackedModel([copy.deepcopy(model)]), split, settings))
    for block in model.double().blocks:
        block.attn.register_forward_pre_hook(lambda attn, arguments: seen.append(attn.branches(arguments[0])))

    def outputs(batches):
        """Of each block those of the first branch, of minus the second, and of both."""
        seen.clear()
        with torch.no_grad():
            model(torch.cat([images for *_, images, _ in batches]).double())
        for tokens, (first, *others) in zip((None, 1), seen):  # of the last block the class token is read alone
            yield [kind[:, :, :tokens] for kind in (first, *(-other for other in others), sum(others, first))]

    energy = lambda output: output.square().sum((0, 2, 3))  # of each head
    clean = list(outputs(data.evaluation_batches(split, settings)))
    for corruption in ("gaussian_noise", "gaussian_noise_shift"):
        noisy = outputs(corruptions.corrupted_batches(split, settings, [corruption], [3]))
        for block, kinds in enumerate(zip(clean, noisy)):
            signals, changes = zip(*((before - before.mean(0), after - before) for before, after in zip(*kinds)))
            figures = [energy(change) / energy(signal) for change, signal in zip(changes, signals)]
            figures += [300 * energy(change.mean(0, keepdim=True)) / energy(change) for change in changes]
            if len(changes) > 2:
                figures += [F.cosine_similarity(*kind[:2], dim=3).mean((0, 2)) for kind in (changes, signals)]
            for head, values in enumerate(torch.stack(figures, 1).tolist()):
                assert list((row := next(rows)).values())[:3] == [f"{corruption}_3", block, head]
                assert [row[figure] for figure in records.RESPONSE_FIGURES if row[figure] != ""] == pytest.approx(
                    values, rel=1e-3)
                assert name != "vit" or row["noise_to_signal_2"] == row["noise_cosine"] == ""
    assert not list(rows)


@pytest.mark.parametrize("how", ["one by one", "mapped", "mapping fails"])
@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
@patch.object(corruptions, "draw_numbers", wraps=corruptions.draw_numbers)
@patch.object(torch, "vmap", wraps=torch.vmap)
def test_a_stack_is_analysed_as_single_models(vmap, draw, name, how):
    """The figures of models analysed together, mapped as on CUDA or one after the other, as where mapping fails, are
    those of each alone; what is drawn is drawn once for all of them."""
    vmap.side_effect = RuntimeError("out of memory") if how == "mapping fails" else None
    (settings, models), split = models_of(name, 2), cut(mnist()["test"], 130)

    def measure(models):
        """The values of each model, and how many draws they took."""
        net = stack.StackedModel(copy.deepcopy(models))
        if how != "one by one":
            net.parameters = lambda: iter([Mock(is_cuda=True)])
        draw.reset_mock()
        measures = [analysis.ANALYSES[name].measure for name in analysis.by_itself()]
        functions = [stack.evaluate, stack.measure_lambdas, *measures]
        found = map(tree_leaves, zip(*(function(net, split, settings) for function in functions)))
        return [[leaf for leaf in leaves if not isinstance(leaf, str)] for leaves in found], draw.call_count

    together, draws = measure(models)
    assert together[0][:2] != together[1][:2] and vmap.called == (how != "one by one")
    for model, found in zip(models, together):
        (alone,), draws_alone = measure([model])
        assert draws_alone == draws
        close(found, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model, left_out", [("vit", set()), ("own_map", {"response.csv"})])
def test_what_is_offered_is_written(tmp_path, model, left_out):
    """Each file of ANALYSES is written if the attention offers what it needs."""
    settings, split = settings_for(model=model), cut(mnist()["test"], 20)
    names = analysis.analyse([tmp_path], stack.StackedModel([stack.make_model(settings)]), dict(test=split), settings)
    assert {*names} == {path.name for path in tmp_path.iterdir()} == {*analysis.by_itself()} - left_out


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffv2"])
def test_offsets_are_taken_out(name):
    """What is subtracted from the heads is what the corruption adds in the mean, block after block, so that afterwards
    their mean is that of clean images; subtracting nothing changes nothing."""
    (settings, (model,)), split = models_of(name, 1), mnist()["val"]
    clean = data.normalize(split.images[:50].float(), "mnist")
    noisy, (_, *means) = clean + 0.5, align.pixel_and_head_means(model, clean)
    joints = [align.find_joint(attn, x) for attn, x in model.attention_inputs(clean[:2])]
    offsets = align.find_offsets(model, joints, noisy, means)
    for block, mean in enumerate(means):
        with align.subtracted(joints[:block], offsets[:block]):
            close(align.pixel_and_head_means(model, noisy)[1 + block] - offsets[block], mean, rtol=1e-4, atol=1e-5)
    with align.subtracted(joints, [0 * offset for offset in offsets]):
        close(model(noisy), model(noisy.clone()))
    with align.subtracted(joints, offsets):
        mended = model(noisy)
    assert not torch.allclose(mended, model(noisy))


def test_attack_is_honest():
    """In the mean PGD is never weaker than FGSM, nor that than random signs, nor at a larger epsilon; a stack is attacked
    as each model alone; and a model without a gradient is refused."""
    settings, models = models_of("vit", 2)
    split = cut(mnist()["test"], 30)
    tables = attack.measure_attack(stack.StackedModel(models), split, settings)
    for model, rows in zip(models, tables):
        (alone,) = attack.measure_attack(stack.StackedModel([model]), split, settings)
        close([list(row.values())[1:] for row in rows], [list(row.values())[1:] for row in alone], rtol=1e-3, atol=1e-3)
        for pgd, fgsm, sign_noise in zip(*[iter(rows)] * 3):
            assert pgd["test_accuracy"] <= fgsm["test_accuracy"] <= sign_noise["test_accuracy"] + 0.05
        accuracies = [pgd["test_accuracy"] for pgd in rows[::3]]
        assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < rows[2]["test_accuracy"]

    class Flat(stack.StackedModel):
        def forward(self, images):
            return super().forward(images.round() * 0)

    with pytest.raises(UserError, match="zero or not finite"):
        attack.measure_attack(Flat(models), split, settings)


# The command.

def test_the_analysis_is_of_the_best_weights(finished):
    """noise.csv and attention.npz are those of the best weights on the test split."""
    settings, test = records.read_config(finished)[0], cut(mnist()["test"], 2_001)
    model, rows = stack.load_model(finished, settings).eval(), table(finished / "noise.csv")
    arrays = {name: torch.tensor(array) for name, array in numpy.load(finished / "attention.npz").items()}
    firsts = torch.stack([test.images[test.labels == label][0] for label in range(8)])
    (maps,) = model.attention_maps(data.normalize(firsts.float(), "mnist"))
    close(arrays.pop("map_0"), maps.detach().half(), atol=1e-3)
    close(arrays, dict(images=firsts, labels=torch.arange(8)))
    corrupted = torch.cat([corruptions.corrupt(part.float(), "distractors", 5, 1_000 * i, test, settings)
                           for i, part in enumerate(test.images.split(1_000))])
    name, *numbers = rows[-1].values()  # severity, amount, loss and accuracy
    expected = [5, 10, *loss_by_hand(model, data.Split(corrupted, test.labels), settings)]
    assert name == "distractors" and [*map(float, numbers)] == pytest.approx(expected, abs=1e-5)
    assert len(rows) == 5 * len(FEW)


def test_analysis_again(finished, tmp_path, capsys):
    """analysis.py RUN prints the test figures beside those recorded, equal, and writes the same bytes again."""
    folder = copy_run(finished, tmp_path)
    for name in analysis.by_itself():
        (folder / name).unlink()
    assert run_analysis(folder) == 0
    again, recorded = [line.split() for line in capsys.readouterr().out.splitlines() if "test loss" in line]
    assert again == ["again", *recorded[1:]] and recorded[0] == "recorded"
    assert f"{records.read_summary(finished)['test_loss']:.6f}" in again
    for path in finished.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name, old, new, words", [
    ("summary.json", "", "{}", ""), ("best.pt", "", "mine", ""), ("config.json", "", "{", ""),
    ("config.json", "{", " {", ""), ("metrics.csv", "1", "2", ""),
    ("config.json", '"dim"', '"dam"', ["config.json", "a setting is missing"]),
    ("config.json", '"vitdiff"', '"vitdif"', ["vitdif", "vitdiff?"]),
    ("config.json", '"mnist"', '"mnits"', ["mnits", "mnist?"]), ("config.json", '"dim": 8', '"dim": 16', ["best.pt"])])
def test_damaged_runs(finished, tmp_path, capsys, name, old, new, words):
    """A run that cannot be analysed is one line that names the file at fault, and exit 2; its records stay."""
    folder, summary = copy_run(finished, tmp_path), records.read_summary(finished)
    (folder / name).write_text((folder / name).read_text().replace(old, new) if old else new)
    if words:  # as of a run whose checksums are those of this file
        records.write_summary(folder, summary)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run_analysis(folder) == 2
    assert_one_line(capsys, *(words or [folder / name]))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_wrong_flags(finished, capsys):
    """No run, one that does not exist or is in use, and a flag that does not exist are one line and exit 2."""
    with records.locked(finished):
        for flags, word in [([finished], finished), ([], "RUN"), (["nowhere"], "nowhere/config.json"),
                            ([finished, "--epochs", "3"], "--epochs")]:
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
    net = stack.StackedModel([stack.load_model(run.folder, run.settings)])
    (figures,) = stack.evaluate(net, test, run.settings)
    assert figures == pytest.approx([run.summary["test_loss"], run.summary["test_accuracy"]], abs=2e-4)
    (rows,), names = analysis.measure_attention(net, test, run.settings), records.ATTENTION_FIGURES[:-1]
    expected = [float(row[name]) for row in table(run.folder / "attention.csv")[:len(rows)] for name in names]
    assert [row[name] for row in rows for name in names] == pytest.approx(expected, abs=1e-3)
    (lambdas,) = stack.measure_lambdas(net, test, run.settings)
    assert lambdas == pytest.approx({row["block"]: row["lambda"] for row in rows}, abs=1e-5)
