"""Claims about the attentions and the models, each against formulas written out here in plain loops and float64."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import records
import vit
from diff_attention import DiffAttention, DiffAttentionV2, SizeError, differential_attention, differential_map
from vit import MODELS, SelfAttention, ViT, build_model, offers_branches

BUDGETS = {"vit": 33_802, "vitbalanced": 55_626, "vitdiff": 38_106, "vitdiffpaper": 33_802, "vitdiffv2": 36_000}
ATTENTIONS = ["vit", "vitdiff", "vitdiffv2"]  # one model of each
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def randomize(module):
    """The module in float64 with all parameters random, so that no norm scale of 1 or zero bias hides a mistake."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def softmax(scores):
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


# The formulas, head by head.

def softmax_maps(q, k, d):
    """softmax(q k' / sqrt(d)) of each d columns of q and k: (B, N, h d) -> h maps (B, N, N)."""
    return [softmax(a @ b.mT / math.sqrt(d)) for a, b in zip(q.split(d, -1), k.split(d, -1), strict=True)]


def mix(maps, v):
    """What each head adds up: its map times its columns of v (B, N, h e) -> h outputs (B, N, e)."""
    return [of_head @ part for of_head, part in zip(maps, v.chunk(len(maps), -1), strict=True)]


def rms_norm(x, scale):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def self_by_hand(weights, x, heads):
    q, k, v = linear(weights, "qkv", x).chunk(3, -1)
    maps = softmax_maps(q, k, x.shape[-1] // heads)
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(mix(maps, v), -1))


def lambda_by_hand(weights, depth):
    """lambda and lambda_init, equations 2 and 3 of arXiv 2410.05258, where the layer index l counts from 1."""
    dots = [sum(a * b for a, b in zip(weights[f"lambda_q{i}"].tolist(), weights[f"lambda_k{i}"].tolist()))
            for i in (1, 2)]
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * ((depth + 1) - 1))
    return math.exp(dots[0]) - math.exp(dots[1]) + lambda_init, lambda_init


def v1_by_hand(weights, x, heads, d, depth, sign=-1, scale=None):
    """Equation 1 of arXiv 2410.05258, where the sign of lambda is -; scale: of the norm, where it has no weight."""
    q, k, v = linear(weights, "qkv", x).split([2 * heads * d, 2 * heads * d, x.shape[-1]], -1)
    (lam, lambda_init), each = lambda_by_hand(weights, depth), softmax_maps(q, k, d)
    maps = [first + sign * lam * second for first, second in zip(each[::2], each[1::2])]
    outs = [(1 - lambda_init) * rms_norm(out, weights["sub_norm.weight"]) if scale is None else scale * out
            for out in mix(maps, v)]
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1))


def v2_by_hand(weights, x, heads, sign=-1, scaled=False):
    """Version 2, where the sign of sigmoid(lambda) is -; scaled: so that the rows sum to 1 - sigmoid(lambda)."""
    dim = x.shape[-1]
    d = dim // heads
    q, k, v = linear(weights, "qkv", x).split([2 * dim, dim, dim], -1)
    lam = 1 / (1 + (-linear(weights, "lambda_proj", x)).exp())  # (B, N, heads)
    each = softmax_maps(q, torch.cat([part for part in k.split(d, -1) for _ in (1, 2)], -1), d)
    maps = [first + sign * lam[..., h, None] * second for h, (first, second) in enumerate(zip(each[::2], each[1::2]))]
    if scaled:
        maps = [(1 - lam[..., h, None]) * of_head / of_head.sum(-1, keepdim=True) for h, of_head in enumerate(maps)]
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(mix(maps, v), -1))


def attention_cases():
    """(module, tokens, its map and output by the formulas)."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    for heads, bias in [(1, False), (2, True), (3, False)]:
        attn = randomize(SelfAttention(24, heads, qkv_bias=bias))
        yield attn, x, *self_by_hand(attn.state_dict(), x, heads)
        attn = randomize(DiffAttentionV2(24, heads, qkv_bias=bias))
        yield attn, x, *v2_by_hand(attn.state_dict(), x, heads)
    for heads, d, depth, bias in [(1, None, 0, False), (2, None, 1, True), (2, 12, 3, False), (3, 5, 2, False)]:
        attn = randomize(DiffAttention(24, heads, depth=depth, head_dim=d, qkv_bias=bias))
        yield attn, x, *v1_by_hand(attn.state_dict(), x, heads, d or 24 // heads // 2, depth)


def assert_computes(attn, x, out, maps=None):
    """The attention of tokens x is `out`, also of the first tokens alone, and its map `maps`. Its mean lambda is what
    the rows of the map lack of 1, and the branches that it offers add up to the map times the values."""
    close(attn(x), out)
    if maps is not None:
        close(attn(x, keep=2), out[:, :2])
        close(attn.attention_map(x), maps)
    if hasattr(attn, "mean_lambda"):
        close(attn.mean_lambda(x), 1 - attn.attention_map(x).sum(-1).mean())
    if offers_branches(attn):
        values = attn.qkv(x)[..., -x.shape[-1]:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        close(sum(attn.branches(x)), attn.attention_map(x) @ values)


@pytest.mark.parametrize("attn, x, maps, out", list(attention_cases()))
def test_formula(attn, x, maps, out):
    """Each attention, its map and its branches, [A1 v, -lambda A2 v] or [A v], are those of the papers to 1e-12."""
    assert_computes(attn, x, out, maps)
    branches, (q, k, v) = attn.branches(x), attn.project(x)
    count = len(branches)
    assert count == (1 if isinstance(attn, SelfAttention) else 2)
    close(branches[0], softmax(q[:, ::count] @ k[:, ::count].mT / math.sqrt(q.shape[-1])) @ v)


@pytest.mark.parametrize("leading", [[], [2], [4, 2]])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_functional_core(leading, dtype, atol):
    """differential_attention is equation 1 for any leading dimensions and for a lambda that is a number, a tensor, or
    one for each token and head. Half-precision q, k and v take a float32 lambda and get float32 maps."""
    torch.manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (torch.randn(*leading, heads, 5, d).to(dtype) for heads, d in ((6, 4), (6, 4), (3, 8)))
    each = softmax(q.double() @ k.double().mT / 2)
    first, second = each[..., ::2, :, :], each[..., 1::2, :, :]
    for lam in (0.7, torch.tensor(0.7, dtype=wide), torch.rand([*leading, 3, 5, 1], dtype=wide)):
        out = differential_attention(q, k, v, lam)
        assert out.dtype == dtype and differential_map(q, k, lam).dtype == wide
        torch.testing.assert_close(out.double(), (first - lam * second) @ v.double(), rtol=0, atol=atol)


class Types(TorchDispatchMode):
    """What each operation returned, and what was a scalar: {name: {dtypes}}."""

    def __enter__(self):
        self.found = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            for key in (function.overloadpacket.__name__, "scalar")[:1 if out.ndim else 2]:
                self.found.setdefault(key, set()).add(out.dtype)
        return out


def test_half_precision_lambda():
    """The lambda of a half-precision module is computed in float32."""
    attn = DiffAttention(32, 1, depth=1).bfloat16()
    expected, _ = lambda_by_hand(attn.state_dict(), depth=1)
    assert attn.lam().dtype == torch.float32 and attn.lam().item() == pytest.approx(expected, rel=1e-6)
    x = torch.randn(2, 5, 32).bfloat16()
    assert attn(x).dtype == torch.bfloat16
    heads = differential_attention(*attn.project(x), attn.lam())
    torch.testing.assert_close(sum(attn.branches(x)).float(), heads.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("seeds", [1, 3])
def test_precision(name, seeds):
    """Under autocast products are in half precision, and softmax, lambda and the difference of maps in float32, in a
    single model and in a stack, on a device where autocast has no rule for them."""
    model, images = build_model(name), torch.randn(seeds, 2, 1, 28, 28)
    weights = {key: parameter.detach().expand(seeds, *parameter.shape) for key, parameter in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with Types() as types:
            if seeds == 1:
                model(images[0])
            else:
                torch.vmap(functional_call, in_dims=(None, 0, 0), randomness="different")(model, weights, images)
    assert types.found.get("mm", set()) | types.found["bmm"] == {torch.bfloat16}
    of_lambda = ["sigmoid"] if name == "vitdiffv2" else ["exp", "scalar"][:2 if seeds == 1 else 1]
    for operation in ["_softmax", "sub", *of_lambda] if "diff" in name else ["_softmax"]:
        assert types.found[operation] == {torch.float32}, operation


# The controls, each one change away from one of these.

CONTROLS = {  # {plugin: {name: parameters}}
    "plugin.py": {"vitheads": 33_034, "vitmatched": 37_194, "vitboth": 37_194, "vitsum": 35_210, "vitsumscaled": 35_210,
                  "vitdiffabs": 37_290, "vitdiffnonorm": 37_258, "vitcentered": 33_162, "vitheadnorm": 33_066},
    "../faults/attention/plugin.py": {"vitdifftokennorm": 37_386, "vitdiffnovember": 37_274}}


def control_by_hand(name, weights, x, depth):
    """The maps (or None) and the output of a control's attention with tokens x (B, N, 32), from its state dict."""
    if name in ("vitdifftokennorm", "vitdiffnovember"):
        return None, faulty_by_hand(weights, x, depth, november=name == "vitdiffnovember")
    if name in ("vitheads", "vitmatched", "vitboth"):
        return self_by_hand(weights, x, 2 if name == "vitmatched" else 4)
    if name in ("vitdiffabs", "vitdiffnonorm"):
        lam, _ = lambda_by_hand(weights, depth)
        sign = math.copysign(1, lam) if name == "vitdiffabs" else -1
        return v1_by_hand(weights, x, 2, 16, depth, sign, scale=1 if name == "vitdiffnonorm" else None)
    if name in ("vitsum", "vitsumscaled"):
        return v2_by_hand(weights, x, 2, sign=1, scaled=name == "vitsumscaled")
    maps, _ = self_by_hand(weights, x, 2)
    if name == "vitcentered":
        maps = maps - torch.sigmoid(linear(weights, "lambda_proj", x)).transpose(1, 2)[..., None] / x.shape[1]
    outs = mix(maps.unbind(1), linear(weights, "qkv", x)[..., -32:])
    if name == "vitheadnorm":
        outs = [rms_norm(out, weights["sub_norm.weight"]) for out in outs]
    return maps, linear(weights, "proj", torch.cat(outs, -1))


def faulty_by_hand(weights, x, depth, november):
    """The output of a faulty attention with tokens x (B, N, 32): 2 heads of 2 branches of 16, groups of 8 channels."""
    lam, lambda_init = lambda_by_hand(weights, depth - november)
    lambdas = [lam, lam]
    if november:  # each head has its own
        first, second = ((weights[f"lambda_q{i}"] * weights[f"lambda_k{i}"]).exp() for i in (1, 2))
        lambdas = first - second + lambda_init
    q, k, v = linear(weights, "qkv", x).split([64, 64, 32], -1)
    each = softmax_maps(q, k, 16)
    outs = mix([each[2 * h] - lambdas[h] * each[2 * h + 1] for h in (0, 1)], v)
    normed = torch.cat([(group - group.mean((1, 2), keepdim=True))
                        / (group.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
                        for group in torch.cat(outs, -1).split(8, -1)], -1)
    normed = normed * weights["sub_norm.weight"] + weights["sub_norm.bias"]
    return linear(weights, "proj", normed if november else (1 - lambda_init) * normed)


@pytest.mark.parametrize("plugin, name", [(plugin, name) for plugin in CONTROLS for name in CONTROLS[plugin]])
def test_controls(monkeypatch, plugin, name):
    """Each control, and each fault put back, has the parameters that its file says, and its attention, map, first
    tokens and branches are its formula's."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    records.execute_plugin(Path(__file__).parent / "runs/controls" / plugin)
    assert set(vit.MODELS) - set(MODELS) == set(CONTROLS[plugin])
    model = randomize(build_model(name))
    assert count_parameters(model) == CONTROLS[plugin][name]
    branches = model.attention_branches(torch.zeros(1, 1, 28, 28).double())
    assert [len(terms) for terms in branches] == 2 * [1 if vit.MODELS[name]["attention"] is SelfAttention or
                                                      name == "vitheadnorm" else 2]
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).double()
    for depth, block in enumerate(model.blocks):
        attn = randomize(block.attn)
        if name == "vitdiffabs":
            assert (DiffAttention.lam(attn) < 0) == (depth == 0)  # lambda has both signs
        maps, out = control_by_hand(name, attn.state_dict(), x, depth)
        assert_computes(attn, x, out, maps)
        assert block.attn_keeps == (maps is not None)
    if name == "vitdiffnovember":
        many = vit.MODELS[name]["attention"](512, num_heads=256, depth=0)
        assert many.lambda_q1.std().item() == pytest.approx(1, abs=0.2)


# The models.

@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("patch_size", [4, 7])
def test_budgets(name, patch_size):
    """Each model has from 97% to 100% of the parameters of its budget."""
    assert 0.97 * BUDGETS[name] <= count_parameters(build_model(name, patch_size=patch_size)) <= BUDGETS[name]


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
    weights, images = model.state_dict(), torch.randn(4, 1, 28, 28).double()

    def norm(prefix, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], eps=1e-6)

    def mlp(prefix, x):
        hidden = linear(weights, f"{prefix}.fc1", x)
        return linear(weights, f"{prefix}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def attention(i, x):
        of_block = {key.removeprefix(f"blocks.{i}.attn."): value for key, value in weights.items()}
        heads = model.blocks[i].attn.num_heads
        if name in ("vit", "vitbalanced"):
            return self_by_hand(of_block, x, heads)
        return v2_by_hand(of_block, x, heads) if name == "vitdiffv2" else v1_by_hand(of_block, x, heads, 16, i)

    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=7)
    x = norm("patch_embed.norm", x.flatten(2).transpose(1, 2))
    x = torch.cat([weights["cls_token"].expand(4, 1, -1), x], 1) + weights["pos_embed"]
    maps = []
    for i in range(2):
        attended = attention(i, norm(f"blocks.{i}.norm1", x))
        maps.append(attended[0])
        x = x + attended[1]
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", x))
    logits = mlp("head", norm("norm", x)[:, 0])
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-10)
    for shown, expected in zip(model.attention_maps(images), maps, strict=True):
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-10)
    assert logits.min() < 0  # no activation on the logits
    lambdas = [1 - rows.sum(3).mean() for rows in maps] if "diff" in name else []
    torch.testing.assert_close(model.mean_lambdas(images if name == "vitdiffv2" else None), lambdas, rtol=0, atol=1e-10)
    for block in model.blocks:
        block.attn_keeps = False  # as of an attention whose forward has no `keep`
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_any_batch_size():
    """A model, a block of each attention, exported as one graph or traced at one batch size has the same logits at
    others."""
    def attention(*sizes, depth, **options):
        return [SelfAttention, DiffAttention, DiffAttentionV2][depth](*sizes, depth=depth, **options)

    model, images, others = ViT(attention=attention, depth=3).eval(), *(torch.randn(n, 1, 28, 28) for n in (3, 5))
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
    for copied in (program.module(), torch.jit.trace(model, images)):
        for batch in (others, others[:1]):
            torch.testing.assert_close(copied(batch), model(batch), rtol=0, atol=1e-5)


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
    assert list(model.state_dict()) == ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "blocks.0.norm1.weight", "blocks.0.norm1.bias",
        *(f"blocks.0.attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2")), "blocks.0.attn.qkv.weight",
        "blocks.0.attn.sub_norm.weight", "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias",
        "blocks.0.norm2.weight", "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias",
        "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("dim", [8, 6])
def test_position_embeddings(dim):
    """Position embeddings start as sines and cosines of column and row."""
    positions = ViT(dim=dim, num_heads=1).pos_embed[0, 1:]
    row, column, slow = 2, 3, 30 ** (-4 / dim)
    expected = [math.sin(column), math.cos(column), math.sin(row), math.cos(row),
                math.sin(slow * column), math.cos(slow * column), math.sin(slow * row), math.cos(slow * row)]
    assert positions[4 * row + column].tolist() == pytest.approx(expected[:dim], abs=1e-6)


def test_dropout():
    """Dropout acts on the tokens, in the blocks' MLPs and on what each half of a block adds."""
    torch.manual_seed(0)
    model, images, calls = build_model("vit", dropout=0.5), torch.randn(2, 1, 28, 28), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    model(images)
    parts = ("dropout", "mlp.dropout", "dropout")
    assert calls == ["dropout", *(f"blocks.{i}.{part}" for i in (0, 1) for part in parts)]
