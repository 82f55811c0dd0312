"""Claims of diff_attention.py, vit.py, muon.py and benchmark.py, against formulas in plain loops and float64."""

import functools
import itertools
import math
import re

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import machine
import records
import stack
import train
import vit
from diff_attention import DiffAttention, DiffAttentionV2, SizeError, differential_attention, differential_map
from muon import Muon, orthogonalize, orthogonalize_in_batches
from test_data import CPU, HERE, cut, mnist
from test_train import TINY, assert_one_line, command, needs_cuda, settings_for, small, table
from vit import MODELS, SelfAttention, ViT, build_model, offers

pytestmark = pytest.mark.usefixtures("small")
BUDGETS = dict(vit=33_802, vitbalanced=55_626, vitboth=38_106, vitdiff=38_106, vitdiffpaper=33_802, vitdiffv2=36_000)
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
run_benchmark = functools.partial(command, *TINY, main=benchmark.main)


def randomize(module):
    """The module in float64 with all parameters random, so that no norm scale of 1 or zero bias hides a mistake."""
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module


# The formulas, head by head.

def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def attend(weights, x, d, lambdas=(), norm=lambda outs, weights: outs, scale=1, change=lambda maps: maps, shared=1):
    """The map (B, H, N, N) and the output of an attention with tokens x (B, N, dim), from its state dict: a map
    softmax(q k' / sqrt(d)) of each d columns of q, `shared` of which have those of k in common; with `lambdas`, one a
    head, differences of adjacent maps; `change` of these; what they add up, through `norm`, `scale` and projection."""
    dim, qkv = x.shape[-1], linear(weights, "qkv", x)
    width = (qkv.shape[-1] - dim) // (shared + 1)
    q, k, v = qkv.split([shared * width, width, dim], -1)
    keys = [part for part in k.split(d, -1) for _ in range(shared)]
    maps = [(a @ b.mT / math.sqrt(d)).softmax(-1) for a, b in zip(q.split(d, -1), keys, strict=True)]
    if len(lambdas):
        maps = [first - lam * second for first, second, lam in zip(maps[::2], maps[1::2], lambdas, strict=True)]
    maps = change(maps)
    outs = norm([of_head @ part for of_head, part in zip(maps, v.chunk(len(maps), -1), strict=True)], weights)
    return torch.stack(maps, 1), linear(weights, "proj", scale * torch.cat(outs, -1))


def rms_norm(outs, weights):
    return [out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["sub_norm.weight"] for out in outs]


def group_norm(outs, weights):
    """Of four groups of channels, each over all tokens of an image."""
    return [F.group_norm(torch.cat(outs, -1).mT, 4, weights["sub_norm.weight"], weights["sub_norm.bias"]).mT]


def lambda_by_hand(weights, depth, total=torch.sum):
    """lambda and lambda_init, equations 2 and 3 of arXiv 2410.05258, where depth is l - 1."""
    first, second = (total(weights[f"lambda_q{i}"].double() * weights[f"lambda_k{i}"]).exp() for i in (1, 2))
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
    return first - second + lambda_init, lambda_init


def by_hand(name, weights, x, heads, depth, d=None):
    """The map and the output of the attention of a model of MODELS or CONTROLS, in the block `depth`."""
    d = d or x.shape[-1] // heads // (2 if name == "vitdiffpaper" else 1)
    result = functools.partial(attend, weights, x, d)
    if "lambda_q1" in weights:
        lam, lambda_init = lambda_by_hand(weights, depth)
    if "lambda_proj.weight" in weights:
        gates = (1 / (1 + (-linear(weights, "lambda_proj", x)).exp())).split(1, -1)  # sigmoid(lambda), (B, N, 1) a head
    match name:
        case "vitdiff" | "vitdiffpaper":  # equation 1
            return result(heads * [lam], rms_norm, 1 - lambda_init)
        case "vitdiffabs":
            return result(heads * [-abs(lam)], rms_norm, 1 - lambda_init)
        case "vitdiffnonorm":
            return result(heads * [lam])
        case "vitdifftokennorm":
            return result(heads * [lam], group_norm, 1 - lambda_init)
        case "vitdiffnovember":  # of one number a head in place of the vectors, and for the layer before
            return result(lambda_by_hand(weights, depth - 1, total=torch.clone)[0], group_norm)
        case "vitheadnorm":
            return result(norm=rms_norm)
        case "vitcentered":
            return result(change=lambda maps: [of_head - gate / x.shape[1] for of_head, gate in zip(maps, gates)])
        case "vitdiffv2":
            return result(gates, shared=2)
        case "vitsum":
            return result([-gate for gate in gates], shared=2)
        case "vitsumscaled":  # so that the rows sum to those of version 2
            return result([-gate for gate in gates], shared=2, change=lambda maps: [
                (1 - gate) / (1 + gate) * of_head for of_head, gate in zip(maps, gates)])
    return result()


def assert_computes(attn, x, maps, out):
    """The attention's map and output of tokens x are these, also of the first tokens alone. Its mean lambda is what the
    rows of the map lack of 1, and the branches add up to the map times the values."""
    close(attn(x), out)
    close(attn.attention_map(x), maps)
    if "keep" in offers(attn):
        close(attn(x, keep=2), out[:, :2])
    if "mean_lambda" in offers(attn):
        close(attn.mean_lambda(x), 1 - maps.sum(-1).mean())
    values = attn.qkv(x)[..., -x.shape[-1]:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    close(sum(attn.branches(x)), maps @ values)


@pytest.mark.parametrize("heads, bias", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("name, attention, d", [
    ("vit", SelfAttention, None), ("vitdiffv2", DiffAttentionV2, None), ("vitdiffpaper", DiffAttention, None),
    ("vitdiff", functools.partial(DiffAttention, head_dim=5), 5)])
def test_formula(name, attention, d, heads, bias):
    """Each attention, its map and its branches, [A1 v, -lambda A2 v] or [A v], are those of the papers to 1e-12."""
    torch.manual_seed(0)
    attn, x = randomize(attention(24, heads, depth=heads, qkv_bias=bias)), torch.randn(3, 7, 24, dtype=torch.float64)
    assert_computes(attn, x, *by_hand(name, attn.state_dict(), x, heads, heads, d))
    branches, (q, k, v) = attn.branches(x), attn.project(x)
    assert len(branches) == (1 if name == "vit" else 2)
    q, k = (part[:, ::len(branches)] for part in (q, k))
    close(branches[0], (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)


@pytest.mark.parametrize("leading", [[], [2], [4, 2]])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_functional_core(leading, dtype, atol):
    """differential_attention is equation 1 for any leading dimensions and for a lambda that is a number, a tensor, or
    one for each token and head. Half-precision q, k and v take a float32 lambda and get float32 maps."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(*leading, heads, 5, d).to(dtype) for heads, d in ((6, 4), (6, 4), (3, 8)))
    first, second = (q.double() @ k.double().mT / 2).softmax(-1).unflatten(-3, (3, 2)).unbind(-3)
    for lam in (0.7, torch.tensor(0.7), torch.rand(*leading, 3, 5, 1)):
        out = differential_attention(q, k, v, lam)
        wide = torch.promote_types(dtype, torch.float32)
        assert (out.dtype, differential_map(q, k, lam).dtype) == (dtype, wide)
        close(out.double(), (first - lam * second) @ v.double(), atol=atol)


class Types(TorchDispatchMode):
    """Fills `found`, which is set inside of it: {name of an operation, or "scalar" where it returned one: {dtypes}}."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.found.setdefault(function.overloadpacket.__name__ if out.ndim else "scalar", set()).add(out.dtype)
        return out


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name, wide", [("vit", []), ("vitdiff", ["sub", "exp"]), ("vitdiffv2", ["sub", "sigmoid"])])
def test_precision(name, wide, seeds):
    """Under autocast products are in half precision, and softmax, lambda and the difference of maps in float32, in a
    single model and in a stack, on a device where autocast has no rule for them."""
    net, images = stack.StackedModel([build_model(name) for _ in range(seeds)]), torch.randn(seeds, 2, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), Types() as types:
        types.found = {}
        net(images)
    assert types.found.get("mm", set()) | types.found["bmm"] == {torch.bfloat16}
    for operation in ["_softmax", *wide]:
        assert types.found.get(operation, types.found.get("scalar")) == {torch.float32}, operation


def test_half_precision_lambda():
    """The lambda of a half-precision module is computed in float32."""
    attn, x = DiffAttention(32, 1, depth=1).bfloat16(), torch.randn(2, 5, 32).bfloat16()
    lam, (expected, _) = attn.lam(), lambda_by_hand(attn.state_dict(), depth=1)
    close(lam.double(), expected, atol=1e-6)
    close(sum(attn.branches(x)), differential_attention(*attn.project(x), lam), atol=0.03)
    assert (lam.dtype, attn(x).dtype) == (torch.float32, torch.bfloat16)


CONTROLS = {  # {plugin: {name: parameters}}
    "controls/plugin.py": {
        "vitheads": 33_034, "vitmatched": 37_194, "vitsum": 35_210, "vitsumscaled": 35_210,
        "vitdiffabs": 37_290, "vitdiffnonorm": 37_258, "vitcentered": 33_162, "vitheadnorm": 33_066},
    "faults/attention/plugin.py": {"vitdifftokennorm": 37_386, "vitdiffnovember": 37_274}}


@pytest.mark.parametrize("plugin, name", [(plugin, name) for plugin in CONTROLS for name in CONTROLS[plugin]])
def test_controls(monkeypatch, plugin, name):
    """Each control, and each fault put back, has the parameters that its file says, and computes its formula."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    train.plugins.execute_plugins([HERE / "runs" / plugin])
    assert set(vit.MODELS) - set(MODELS) == set(CONTROLS[plugin])
    model, attention = randomize(build_model(name)), vit.MODELS[name]["attention"]
    assert sum(map(torch.numel, model.parameters())) == CONTROLS[plugin][name]
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).double()
    for depth, block in enumerate(model.blocks):
        attn = randomize(block.attn)
        if name == "vitdiffabs":
            assert (DiffAttention.lam(attn) < 0) == (depth == 0)  # lambda has both signs
        assert_computes(attn, x, *by_hand(name, attn.state_dict(), x, attn.num_heads, depth))
        assert len(attn.branches(x)) == (1 if attention is SelfAttention or name == "vitheadnorm" else 2)
        assert block.attn_keeps == (plugin == "controls/plugin.py")
    if name == "vitdiffnovember":
        assert attention(512, num_heads=256, depth=0).lambda_q1.std().item() == pytest.approx(1, abs=0.2)


def variant(base, **methods):
    return type("Variant", (base,), methods)


EVERYTHING = {"keep", "attention_map", "branches"}
own_map = variant(SelfAttention, attention_map=lambda attn, x: x)


@pytest.mark.parametrize("attention, expected", [
    (SelfAttention, EVERYTHING), (DiffAttention, EVERYTHING | {"mean_lambda"}),
    (DiffAttentionV2, EVERYTHING | {"mean_lambda", "mean_lambda of tokens"}),
    (own_map, EVERYTHING - {"branches"}), (variant(own_map, branches=lambda attn, x: [x]), EVERYTHING),
    (variant(SelfAttention, attention_map=property()), {"keep"}),
    (variant(SelfAttention, forward=lambda attn, x: x), EVERYTHING - {"keep"}), (torch.nn.Identity, set())])
def test_offers(attention, expected):
    """An attention offers what it has, but inherited branches only with the inherited map, which they describe."""
    assert offers(attention(8, 2, depth=0)) == expected


# The models.

@pytest.mark.parametrize("name, budget", BUDGETS.items())
def test_budgets(name, budget):
    """Each model has from 97% to 100% of the parameters of its budget."""
    for patch_size in (4, 7):
        assert 0.97 * budget <= sum(map(torch.numel, build_model(name, patch_size=patch_size).parameters())) <= budget


@pytest.mark.parametrize("name", MODELS)
def test_every_size(name):
    """Every argument of ViT sets the size that it names, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = build_model(name, image_size=32, in_channels=3, num_classes=7, patch_size=4, dim=48, depth=3, num_heads=4,
                        mlp_dim=40, head_hidden_dim=24, qkv_bias=True, patch_norm=False, dropout=0.0)
    logits = model(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 7)
    F.cross_entropy(logits, torch.arange(5)).backward()
    for parameter_name, parameter in model.named_parameters():
        # Of k's part of a bias only rounding is left: a softmax ignores a constant.
        gradient = parameter.grad[-48:] if parameter_name.endswith("qkv.bias") else parameter.grad
        assert gradient.abs().max() > 1e-9, parameter_name
    assert [tuple(maps.shape) for maps in model.attention_maps(torch.randn(2, 3, 32, 32))] == [(2, 4, 65, 65)] * 3


@pytest.mark.parametrize("size", ["depth", "num_heads", "patch_size"])
def test_sizes_that_do_not_fit(size):
    """A size that cannot be is a SizeError that names it; sizes that do not fit together are in BAD_FLAGS."""
    with pytest.raises(SizeError, match=f"{size} is 0"):
        ViT(**{size: 0})


@pytest.mark.parametrize("name", MODELS)
def test_vit(name):
    """A model is a pre-norm transformer with free logits, computed here from its state dict, and shows its maps; its
    mean lambdas, for each differential block 1 minus the mean sum of its maps' rows, need no images in version 1."""
    torch.manual_seed(0)
    model = randomize(build_model(name))
    weights, images, maps = model.state_dict(), torch.randn(4, 1, 28, 28).double(), []

    def norm(prefix, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], eps=1e-6)

    def mlp(prefix, x):
        hidden = linear(weights, f"{prefix}.fc1", x)
        return linear(weights, f"{prefix}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=7)
    x = norm("patch_embed.norm", x.flatten(2).transpose(1, 2))
    x = torch.cat([weights["cls_token"].expand(4, 1, -1), x], 1) + weights["pos_embed"]
    for i, attn in enumerate(block.attn for block in model.blocks):
        shown, out = by_hand(name, attn.state_dict(), norm(f"blocks.{i}.norm1", x), attn.num_heads, i)
        maps.append(shown)
        x = x + out
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", x))
    logits, near = mlp("head", norm("norm", x)[:, 0]), functools.partial(close, atol=1e-10)
    near(model(images), logits)
    near(model.attention_maps(images), maps)
    assert len(maps) == 2 and logits.min() < 0  # no activation on the logits
    lambdas = [1 - shown.sum(3).mean() for shown in maps] if "diff" in name else []
    near(model.mean_lambdas(images if name == "vitdiffv2" else None), lambdas)
    for block in model.blocks:
        block.attn_keeps = False  # as of an attention whose forward has no `keep`
    near(model(images), logits)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_any_batch_size():
    """A model of all attentions that is exported or traced at one batch size has the same logits at others."""
    model = ViT(depth=3, attention=lambda *sizes, depth, **options: (
        [SelfAttention, DiffAttention, DiffAttentionV2][depth](*sizes, depth=depth, **options))).eval()
    images, others = (torch.randn(count, 1, 28, 28) for count in (3, 5))
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
    for copied, batch in itertools.product([program.module(), torch.jit.trace(model, images)], [others, others[:1]]):
        close(copied(batch), model(batch), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 28, 32), (2, 3, 28, 28), (1, 28, 28)])
def test_other_images(shape):
    """Images of another shape than the model's are an error that names both."""
    model = build_model("vitdiff")
    for call, images in [(model, torch.zeros(shape)), (torch.vmap(model.attention_maps), torch.zeros(3, *shape))]:
        with pytest.raises(SizeError, match=re.escape(f"{shape} are not those of this model, (B, 1, 28, 28)")):
            call(images)


def test_state_dict_has_timms_names():
    """The keys of the state dict are timm's, in timm's order."""
    model = ViT(head_hidden_dim=0, patch_norm=False, depth=1, attention=DiffAttention)
    assert " ".join(model.state_dict()) == (
        "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias blocks.0.norm1.weight blocks.0.norm1.bias "
        "blocks.0.attn.lambda_q1 blocks.0.attn.lambda_k1 blocks.0.attn.lambda_q2 blocks.0.attn.lambda_k2 "
        "blocks.0.attn.qkv.weight blocks.0.attn.sub_norm.weight blocks.0.attn.proj.weight blocks.0.attn.proj.bias "
        "blocks.0.norm2.weight blocks.0.norm2.bias blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias "
        "blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias norm.weight norm.bias head.weight head.bias")


@pytest.mark.parametrize("dim", [8, 6])
def test_position_embeddings(dim):
    """Position embeddings start as sines and cosines of column and row."""
    row, column, slow = 2, 3, 30 ** (-4 / dim)
    expected = [wave(speed * place) for speed in (1, slow) for place in (column, row) for wave in (math.sin, math.cos)]
    found = ViT(dim=dim, num_heads=1).pos_embed[0, 1 + 4 * row + column]
    assert found.tolist() == pytest.approx(expected[:dim], abs=1e-6)


def test_dropout():
    """Dropout acts on the tokens, in the blocks' MLPs and on what each half of a block adds."""
    model, calls = build_model("vit", dropout=0.5), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.register_forward_hook(lambda *arguments, name=name: calls.append(name))
    model(torch.randn(2, 1, 28, 28))
    parts = ["dropout", "mlp.dropout", "dropout"]
    assert calls == ["dropout", *(f"blocks.{i}.{part}" for i in (0, 1) for part in parts)]


# Muon.

def muon_by_hand(weights, gradients, lr, weight_decay):
    """Muon as its author has it, on one matrix in float64: the singular values of the averaged gradient go through
    the polynomial five times, and its singular vectors stay."""
    average = torch.zeros_like(weights)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        u, s, v = torch.linalg.svd(0.05 * gradient + 0.95 * average, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = weights.shape
        weights = (1 - lr * weight_decay) * weights - lr * math.sqrt(max(1, rows / columns)) * (u * s) @ v
    return weights


def test_muon_by_hand():
    """Muon on the matrices of three seeds at once is Muon on each of them, and a gradient of zero moves nothing."""
    torch.manual_seed(0)
    shapes = [(96, 32), (32, 32), (32, 128), (16, 7), (7, 16), (1, 5), (8, 6)]
    sizes = list(map(math.prod, shapes))
    leaf, *gradients = (scale * torch.randn(3, sum(sizes)) for scale in (1, 1, 1e-6, 10))
    before, lr = leaf.clone(), torch.tensor(0.02)

    def matrices(leaf):
        return [part.view(shape) for row in leaf.double() for part, shape in zip(row.split(sizes), shapes)]

    optimizer = Muon(leaf, [*shapes[:-1], (8, 1, 2, 3)], lr, weight_decay=0.1)  # the last is a convolution
    for leaf.grad in gradients:
        optimizer.step()
    for found, start, *steps in zip(*map(matrices, (leaf, before, *gradients)), strict=True):
        close(found, muon_by_hand(start, steps, 0.02, 0.1), atol=1e-4)
    before, leaf.grad = leaf.clone(), torch.zeros_like(leaf)
    Muon(leaf, shapes, lr, weight_decay=0.0).step()
    assert torch.equal(leaf, before)


def test_muon_in_batches():
    """As CUDA has it, padded and one batch a shape, a step has the same numbers, and half as many products."""
    torch.manual_seed(0)
    shapes = [(32, 49), *[(96, 32), (32, 32), (128, 32), (32, 128)] * 2, (128, 32), (10, 128), (1, 5)]
    matrices, results, products = [torch.randn(3, *shape) for shape in shapes], [], []
    for function in (orthogonalize, orthogonalize_in_batches):
        with torch.profiler.profile() as profile:
            results.append(function(matrices))
        products.append(sum(event.count for event in profile.key_averages() if event.key.endswith("bmm")))
    for plain, batched in zip(*results, strict=True):
        close(batched, plain, atol=1e-6)
    assert 2 * products[1] < products[0]


# The benchmark.

@pytest.mark.parametrize("size, device, side, dtype", [
    (1, "cpu", 2048, torch.float32), (2, "cpu", 2048, torch.float32),
    pytest.param(2, "cuda", 8192, torch.bfloat16, marks=needs_cuda)])
def test_benchmark(tmp_path, monkeypatch, capsys, size, device, side, dtype):
    """Its figures, by one thread and by all, follow from whole steps, 20 ms each, evaluations of 500 ms and a product;
    nothing is recorded as trained, nor analysed, stacked against --stack or compiled where that cannot be."""
    def time_in_turn(functions, *others, **rounds):
        results.append([function() for function in functions])
        return next(clock)

    threads, results, taken = ("13" if device == "cpu" else "3"), [], [3]
    clock = iter([[[0.018, 0.02, 0.02, 0.022]] * 2 * size + [[2 * side**3 / 1e11]], [[0.5]] * 2 * size] * len(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(machine, "idle_cores", lambda: None)
    monkeypatch.setattr(benchmark, "time_in_turn", time_in_turn)
    monkeypatch.setattr(stack, "is_compiled", lambda choice, *others: choice != "yes")
    monkeypatch.setitem(MODELS, "mapless", dict(attention=variant(SelfAttention, attention_map=property())))
    assert run_benchmark(*f"--model mapless vitdiff --analysis --seed 0 1 --stack {size} --compile yes".split(),
                         *f"--device {device} --amp bfloat16 --runs-dir {tmp_path}".split()) == 0
    assert (results[0][-1].shape, results[0][-1].dtype) == ((side, side), dtype)
    torch.use_deterministic_algorithms(False)
    rows = table(tmp_path / "benchmark.csv")
    assert [(row["threads"], row["model"], row["seeds"], row["compiled"]) for row in rows] == list(
        itertools.product(threads, ["mapless", "vitdiff"], "12"[:size], ["False"]))
    tokens, dim = 5, 8  # a product of (a, b) by (b, c) is 2abc FLOPs, and twice that again in the backward pass
    attention = tokens * dim * 3 * dim + 2 * 2 * tokens * 4 + dim * dim
    products = 3 * (attention + 2 * dim * 16 + dim * 16 + 16 * 10) + 2 * 4 * 196 * dim  # no gradient of the images
    assert int(rows[0]["training_flops_per_image"]) == 2 * products
    for row in rows:
        seeds = int(row["seeds"])
        images_per_second = seeds * 500 / 0.02
        expected = dict(ms_per_step=20, ms_per_seed=20 / seeds, relative_to_one_seed=1 / seeds, peak_gflops=100,
                        images_per_second=images_per_second, epoch_seconds=2.2, evaluation_images_per_second=10_000,
                        share_of_peak=images_per_second * int(row["training_flops_per_image"]) / 1e11)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
        assert float(row["ms_low"]) <= 20 <= float(row["ms_high"])
    out = capsys.readouterr().out
    assert out == (tmp_path / "benchmark.md").read_text() and f"| vitdiff, mnist | 3 | {size} | no | 20.0 (" in out
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.md"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_the_benchmark_is_one_of_training(tmp_path, monkeypatch, compiled):
    """Each call takes one step of train.py with a whole batch of all seeds, more of them than an epoch has, and nothing
    is written. The compiler is a stand-in that takes what torch traces as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batches, weights = [], []

    def train_step(forward, *batch, net, train_step=train.train_step, **others):
        batches.append([part.shape[:2] for part in batch[:2]])
        weights.append(net.matrices.detach().clone())
        return train_step(forward, *batch, net=net, **others)

    monkeypatch.setattr(train, "train_step", train_step)
    step = benchmark.make_step(settings_for(*TINY), [0, 1], cut(mnist()["train"], 1_100), CPU, compiled)
    for _ in range(5):
        step()
    assert all((after != before).any(1).all() for before, after in itertools.pairwise(weights))
    assert batches == [[(2, 500), (2, 500)]] * 5
    assert not list(tmp_path.iterdir())


def test_timing(monkeypatch):
    """What is timed takes turns, each a mean of calls after one that is not counted, which takes longer here."""
    now, calls = [0.0], []

    def spend(name, seconds):
        now[0] += seconds if calls[-1:] == [name] else 10
        calls.append(name)

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    functions = [functools.partial(spend, "slow", 3), functools.partial(spend, "quick", 0.5)]
    assert benchmark.time_in_turn(functions, CPU, rounds=2, calls=3) == [[3, 3], [0.5, 0.5]]
    assert calls == (["slow"] * 4 + ["quick"] * 4) * 2


def test_growth(tmp_path, monkeypatch, capsys):
    """Exponents are slopes of logarithms: by a clock by which a step takes the square of its batch. What does not fit
    the images is left out, and of one value alone there is no slope."""
    flags = ["--growth", "--model", "vit", "--runs-dir", tmp_path]
    monkeypatch.setattr(benchmark, "GROWTH", dict(batch_size=[50, 100, 200, 10**5], patch_size=[14, 7, 5], depth=[1]))
    monkeypatch.setattr(benchmark, "time_in_turn", lambda *arguments, **options: [
        [seconds] for seconds in (0.25, 1, 4, 1, 10, 1)])
    assert run_benchmark(*flags) == 0
    assert [(row["size"], int(row["value"])) for row in table(tmp_path / "growth.csv")] == [
        ("batch_size", 50), ("batch_size", 100), ("batch_size", 200), ("tokens", 5), ("tokens", 17), ("depth", 1)]
    assert "depth" not in (out := capsys.readouterr().out) and out == (tmp_path / "growth.md").read_text()
    assert "| batch_size | vit, mnist | 50, 100, 200 | 250.0, 1000.0, 4000.0 | 2.00 |\n" in out
    assert f"| tokens | vit, mnist | 5, 17 | 1000.0, 10000.0 | {1 / math.log10(17 / 5):.2f} |\n" in out
    monkeypatch.setattr(benchmark, "MOST_TOKENS", 1)
    assert run_benchmark(*flags) == 2
    assert_one_line(capsys, "no image has 1 tokens or fewer", "--patch-size")


@pytest.mark.parametrize("flags, words", [
    (["--model", "vitdif"], ["vitdiff?"]), (["--growth", "3"], ["3"]), ([], ["torchrun"]),
    (["--growth", "--dim", "12", "--num-heads", "3"], ["width 32", "3 heads"]),
    (["--batch-size", "5000"], ["a batch of 5000", "2001 training images of mnist"])])
def test_benchmark_says_what_is_wrong(tmp_path, monkeypatch, capsys, flags, words):
    """The benchmark takes one process, and answers wrong flags as train.py does; it writes nothing."""
    monkeypatch.setattr(machine, "started_by_torchrun", lambda: not flags)
    assert run_benchmark("--runs-dir", tmp_path / "runs", *flags) == 2
    assert_one_line(capsys, "benchmark.py: error: ", *words)
    assert not list(tmp_path.rglob("*"))


@needs_cuda
def test_peak_memory():
    """The peak of a step is the most that new tensors take at a time."""
    device = machine.pick_device("cuda")
    torch.use_deterministic_algorithms(False)
    old = torch.zeros(2**20, device=device)
    # 1 MB, which is freed when a pair of it was made, 2 MB, and its sum with what was there before, 2 MB.
    peak = benchmark.peak_memory(lambda: torch.cat(2 * [torch.empty(2**18, device=device)]) + old[:1], device)
    assert peak == 4 * 2**20
