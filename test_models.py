"""Claims about the attentions and the models, each against an independent computation.

    python -m pytest

Formulas are written out here in plain loops and float64.
"""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import records
import vit
from diff_attention import DiffAttention, DiffAttentionV2, SizeError, differential_attention
from vit import MODELS, SelfAttention, ViT, build_model

BUDGETS = {"vit": 33_802, "vitbalanced": 55_626, "vitdiff": 38_106, "vitdiffpaper": 33_802, "vitdiffv2": 36_000}


def randomize(module):
    """The module in float64 with all parameters random, so that no norm scale of 1 or zero bias hides a mistake."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def softmax(scores):
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


# The formulas, head by head.

def self_by_hand(weights, x, heads):
    q, k, v = linear(weights, "qkv", x).split(x.shape[-1], -1)
    d = x.shape[-1] // heads
    maps, outs = [], []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        maps.append(softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)))
        outs.append(maps[-1] @ v[..., part])
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1))


def v1_by_hand(weights, x, heads, d, depth, sign=-1):
    """Equations 1 to 3 of arXiv 2410.05258, where the layer index l counts from 1 and the sign of lambda is -."""
    dim = x.shape[-1]
    q, k, v = linear(weights, "qkv", x).split([2 * heads * d, 2 * heads * d, dim], -1)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * ((depth + 1) - 1))
    dots = [sum(a * b for a, b in zip(weights[f"lambda_q{i}"].tolist(), weights[f"lambda_k{i}"].tolist()))
            for i in (1, 2)]
    lam = math.exp(dots[0]) - math.exp(dots[1]) + lambda_init
    e = dim // heads
    maps, outs = [], []
    for h in range(heads):
        a1, a2 = (softmax(q[..., b * d:(b + 1) * d] @ k[..., b * d:(b + 1) * d].transpose(1, 2) / math.sqrt(d))
                  for b in (2 * h, 2 * h + 1))
        maps.append(a1 + sign * lam * a2)
        out = maps[-1] @ v[..., h * e:(h + 1) * e]
        out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["sub_norm.weight"]
        outs.append((1 - lambda_init) * out)
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1)), lam


def v2_by_hand(weights, x, heads):
    dim = x.shape[-1]
    d = dim // heads
    q, k, v = linear(weights, "qkv", x).split([2 * dim, dim, dim], -1)
    lam = 1 / (1 + (-linear(weights, "lambda_proj", x)).exp())  # (B, N, heads)
    maps, outs = [], []
    for h in range(heads):
        key = k[..., h * d:(h + 1) * d].transpose(1, 2)
        a1, a2 = (softmax(q[..., b * d:(b + 1) * d] @ key / math.sqrt(d)) for b in (2 * h, 2 * h + 1))
        maps.append(a1 - lam[..., h, None] * a2)
        outs.append(maps[-1] @ v[..., h * d:(h + 1) * d])
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1)), lam


def attention_cases():
    """(module, tokens, its map and output by the formulas, sum of each map row)."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    for heads, bias in [(1, False), (2, True), (3, False)]:
        attn = randomize(SelfAttention(24, heads, qkv_bias=bias))
        yield attn, x, *self_by_hand(attn.state_dict(), x, heads), torch.ones(3, heads, 7).double()
    for heads, d, depth, bias in [(1, None, 0, False), (2, None, 1, True), (2, 12, 3, False), (3, 5, 2, False)]:
        attn = randomize(DiffAttention(24, heads, depth=depth, head_dim=d, qkv_bias=bias))
        maps, out, lam = v1_by_hand(attn.state_dict(), x, heads, d or 24 // heads // 2, depth)
        yield attn, x, maps, out, torch.full((3, heads, 7), 1 - lam, dtype=torch.float64)
    for heads, bias in [(1, True), (2, False), (3, False)]:
        attn = randomize(DiffAttentionV2(24, heads, qkv_bias=bias))
        maps, out, lam = v2_by_hand(attn.state_dict(), x, heads)
        yield attn, x, maps, out, 1 - lam.transpose(1, 2)


@pytest.mark.parametrize("attn, x, maps, out, row_sums", list(attention_cases()))
def test_formula(attn, x, maps, out, row_sums):
    """Each attention, its map and the sums of the map's rows are those of the papers to 1e-12."""
    torch.testing.assert_close(attn(x), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(attn.attention_map(x), maps, rtol=0, atol=1e-12)
    torch.testing.assert_close(attn.attention_map(x).sum(-1), row_sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attn, x, maps, out, row_sums", list(attention_cases()))
def test_map_times_values(attn, x, maps, out, row_sums):
    """The map times the values, through what follows in the module, is the module's output."""
    heads = attn.attention_map(x) @ attn.qkv(x)[..., -24:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    if hasattr(attn, "sub_norm"):
        heads = (1 - attn.lambda_init) * attn.sub_norm(heads)
    torch.testing.assert_close(attn.proj(heads.transpose(1, 2).flatten(2)), attn(x), rtol=0, atol=1e-12)


def test_functional_core():
    """differential_attention is equation 1 for a lambda that is a number, a tensor, or one for each token and head."""
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 6, 5, 4).double(), torch.randn(2, 3, 5, 8).double()
    for lam in (0.7, torch.tensor(0.7).double(), torch.rand(2, 3, 5, 1).double()):
        expected = torch.stack([
            (softmax(q[:, 2 * h] @ k[:, 2 * h].transpose(1, 2) / 2)
             - (lam[:, h] if torch.is_tensor(lam) and lam.ndim else lam)
             * softmax(q[:, 2 * h + 1] @ k[:, 2 * h + 1].transpose(1, 2) / 2)) @ v[:, h] for h in range(3)], 1)
        torch.testing.assert_close(differential_attention(q, k, v, lam), expected, rtol=0, atol=1e-12)


def test_lambda_is_float32():
    """The lambda of a half-precision module is computed in float32."""
    attn = DiffAttention(32, 1, depth=1).bfloat16()
    vectors = [getattr(attn, f"lambda_{name}").float() for name in ("q1", "k1", "q2", "k2")]
    expected = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + attn.lambda_init
    assert attn.lam().dtype == torch.float32
    torch.testing.assert_close(attn.lam(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("attn", [SelfAttention(24, 2), DiffAttention(24, 3, depth=1), DiffAttentionV2(24, 2)])
def test_keep(attn):
    """The first tokens computed alone are what they are among all."""
    torch.manual_seed(0)
    attn, x = randomize(attn), torch.randn(3, 7, 24).double()
    torch.testing.assert_close(attn(x, keep=2), attn(x)[:, :2], rtol=0, atol=1e-12)


def test_keep_is_optional():
    """An attention whose forward has no `keep` makes the same model."""
    class Plain(SelfAttention):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    plain, images = randomize(ViT(attention=Plain)), torch.randn(4, 1, 28, 28).double()
    keeping = randomize(ViT())
    keeping.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(images), keeping(images), rtol=0, atol=1e-12)


# The controls, each one change away from one of these.

CONTROLS = {  # {plugin: {name: parameters}}
    "plugin.py": {"vitheads": 33_034, "vitmatched": 37_194, "vitsum": 35_210, "vitcentered": 33_162,
                  "vitheadnorm": 33_066, "vitdiffnonorm": 37_258},
    "sums/plugin.py": {"vitdiffsum": 37_290, "vitsumscaled": 35_210},
    "sums/kept.py": {"vitdiffabs": 37_290}}


def control_by_hand(name, weights, x, depth):
    """The maps and the output of a control's attention with tokens x (B, N, 32), from its state dict."""
    heads = 4 if name == "vitheads" else 2
    maps, out = self_by_hand(weights, x, heads) if weights["qkv.weight"].shape[0] == 96 else (None, None)
    if name in ("vitheads", "vitmatched"):
        return maps, out
    if name in ("vitdiffsum", "vitdiffabs"):
        sign = math.copysign(1, v1_by_hand(weights, x, 2, 16, depth)[2]) if name == "vitdiffabs" else 1
        return v1_by_hand(weights, x, 2, 16, depth, sign)[:2]
    if "lambda_proj.weight" in weights:
        s = torch.sigmoid(x @ weights["lambda_proj.weight"].T).transpose(1, 2)[..., None]
    if name in ("vitsum", "vitsumscaled"):
        q, k, _ = weights["qkv.weight"].split([64, 32, 32])
        branches = [self_by_hand(weights | {"qkv.weight": torch.cat([
            torch.cat([q[32 * h + 16 * b:32 * h + 16 * (b + 1)] for h in (0, 1)]), k, k])}, x, 2)[0] for b in (0, 1)]
        maps = branches[0] + s * branches[1]
    if name == "vitsumscaled":
        maps = maps * (1 - s) / maps.sum(-1, keepdim=True)
    if name == "vitcentered":
        maps = maps - s / x.shape[1]
    if name == "vitdiffnonorm":
        maps = v1_by_hand(weights | {"sub_norm.weight": torch.ones(16)}, x, 2, 16, depth)[0]
    values = [(x @ weights["qkv.weight"][-32:].T)[..., 16 * h:16 * (h + 1)] for h in (0, 1)]
    outs = [maps[:, h] @ values[h] for h in (0, 1)]
    if name == "vitheadnorm":
        outs = [out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["sub_norm.weight"] for out in outs]
    return maps, linear(weights, "proj", torch.cat(outs, -1))


@pytest.mark.parametrize("plugin, name", [(plugin, name) for plugin in CONTROLS for name in CONTROLS[plugin]])
def test_controls(monkeypatch, plugin, name):
    """Each control has the parameters that its file says, and its attention, map and first tokens are its formula's."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    records.execute_plugin(Path(__file__).parent / "runs/controls" / plugin)
    assert set(vit.MODELS) - set(MODELS) == set(CONTROLS[plugin])
    model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == CONTROLS[plugin][name]
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).double()
    for depth, block in enumerate(model.blocks):
        attn = randomize(block.attn)
        if name == "vitdiffabs":
            assert (DiffAttention.lam(attn) < 0) == (depth == 0)  # lambda has both signs
        maps, out = control_by_hand(name, attn.state_dict(), x, depth)
        torch.testing.assert_close(attn(x), out, rtol=0, atol=1e-12)
        torch.testing.assert_close(attn(x, keep=2), out[:, :2], rtol=0, atol=1e-12)
        torch.testing.assert_close(attn.attention_map(x), maps, rtol=0, atol=1e-12)
        if hasattr(attn, "mean_lambda"):
            torch.testing.assert_close(attn.mean_lambda(x), 1 - maps.sum(-1).mean(), rtol=0, atol=1e-12)


def faulty_by_hand(weights, x, depth, november):
    """The output of a faulty attention with tokens x (B, N, 32): 2 heads of 2 branches of 16, groups of 8 channels."""
    if november:
        lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (depth - 1))
        lambdas = [math.exp(weights["lambda_q1"][h] * weights["lambda_k1"][h])
                   - math.exp(weights["lambda_q2"][h] * weights["lambda_k2"][h]) + lambda_init for h in (0, 1)]
    else:
        lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        lambdas = [v1_by_hand(weights | {"sub_norm.weight": torch.ones(16)}, x, 2, 16, depth)[2]] * 2
    q, k, v = linear(weights, "qkv", x).split([64, 64, 32], -1)
    outs = []
    for h, lam in enumerate(lambdas):
        first, second = (softmax(q[..., 16 * b:16 * (b + 1)] @ k[..., 16 * b:16 * (b + 1)].transpose(1, 2) / 4)
                         for b in (2 * h, 2 * h + 1))
        outs.append((first - lam * second) @ v[..., 16 * h:16 * (h + 1)])
    groups = torch.cat(outs, -1).split(8, -1)
    normed = torch.cat([(group - group.mean((1, 2), keepdim=True))
                        / (group.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt() for group in groups], -1)
    normed = normed * weights["sub_norm.weight"] + weights["sub_norm.bias"]
    return linear(weights, "proj", normed if november else (1 - lambda_init) * normed)


@pytest.mark.parametrize("name, parameters", [("vitdifftokennorm", 37_386), ("vitdiffnovember", 37_274)])
def test_faulty_attentions(monkeypatch, name, parameters):
    """They have the parameters that their file says, and compute what it says."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    records.execute_plugin(Path(__file__).parent / "runs/faults/attention/plugin.py")
    model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).double()
    for depth, block in enumerate(model.blocks):
        attn = randomize(block.attn)
        out = faulty_by_hand(attn.state_dict(), x, depth, november=name == "vitdiffnovember")
        torch.testing.assert_close(attn(x), out, rtol=0, atol=1e-12)
        torch.testing.assert_close(attn.mean_lambda(x), 1 - attn.attention_map(x).sum(-1).mean(), rtol=0, atol=1e-12)
    if name == "vitdiffnovember":
        many = vit.MODELS[name]["attention"](512, num_heads=256, depth=0)
        assert many.lambda_q1.std().item() == pytest.approx(1, abs=0.2)


# The models.

@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("patch_size", [4, 7])
def test_budgets(name, patch_size):
    """Each model has from 97% to 100% of the parameters of its budget."""
    parameters = sum(parameter.numel() for parameter in build_model(name, patch_size=patch_size).parameters())
    assert 0.97 * BUDGETS[name] <= parameters <= BUDGETS[name]


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
        gradient = parameter.grad
        if parameter_name.endswith("qkv.bias"):  # of k's part only rounding is left: a softmax ignores a constant
            gradient = gradient[-48:]
        assert gradient is not None and gradient.abs().max() > 1e-9, parameter_name
    assert [tuple(maps.shape) for maps in model.attention_maps(torch.randn(2, 3, 32, 32))] == [(2, 4, 65, 65)] * 3


@pytest.mark.parametrize("sizes, words", [
    (dict(patch_size=5), ["patch size 5", "28"]), (dict(dim=33), ["33", "2 heads"]), (dict(depth=0), ["depth is 0"]),
    (dict(attention=DiffAttention, dim=18, num_heads=6), ["18", "6 heads of 2 branches"]),
    (dict(attention=DiffAttentionV2, num_heads=0), ["num_heads is 0"])])
def test_sizes_that_do_not_fit(sizes, words):
    """Sizes that do not fit together are a SizeError that names them."""
    with pytest.raises(SizeError) as error:
        ViT(**sizes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", MODELS)
def test_vit(name):
    """A model is a pre-norm transformer with free logits, computed here from its state dict, and shows its maps."""
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


@pytest.mark.parametrize("name", MODELS)
def test_mean_lambdas(name):
    """mean_lambdas has, for each differential block, 1 minus the mean sum of its maps' rows, and of others nothing."""
    torch.manual_seed(0)
    model, images = randomize(build_model(name)), torch.randn(4, 1, 28, 28).double()
    expected = [1 - maps.sum(3).mean() for maps in model.attention_maps(images)] if "diff" in name else []
    torch.testing.assert_close(model.mean_lambdas(images), expected, rtol=0, atol=1e-12)


def test_state_dict_has_timms_names():
    """The keys of the state dict are timm's, in timm's order."""
    model = ViT(head_hidden_dim=0, patch_norm=False, depth=1, attention=DiffAttention)
    assert list(model.state_dict()) == [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
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
    """Dropout acts in training alone: on the tokens, in the blocks' MLPs and on what each half of a block adds."""
    torch.manual_seed(0)
    model, images, calls = build_model("vit", dropout=0.5), torch.randn(2, 1, 28, 28), []
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    model(images)
    assert calls == ["dropout", *(
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("dropout", "mlp.dropout", "dropout"))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_cuda_agrees(name):
    """On CUDA every model gives the logits of the CPU, and a stack of two the logits of each, forward and backward."""
    torch.manual_seed(0)
    model, images = randomize(build_model(name)), torch.randn(8, 1, 28, 28).double()
    expected = model(images)
    expected.square().sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model = model.cuda()
    torch.testing.assert_close(model(images.cuda()).cpu(), expected, rtol=0, atol=1e-9)
    weights = {key: torch.stack([value, value]).detach().requires_grad_() for key, value in model.named_parameters()}
    stacked = torch.vmap(torch.func.functional_call, in_dims=(None, 0, None))(model, weights, images.cuda())
    torch.testing.assert_close(stacked.cpu(), torch.stack([expected, expected]), rtol=0, atol=1e-9)
    stacked.square().sum().backward()
    for key, gradient in gradients.items():
        torch.testing.assert_close(weights[key].grad.cpu(), torch.stack([gradient, gradient]), rtol=1e-6, atol=1e-8)


# Branches.

@pytest.mark.parametrize("attn, x, maps, out, row_sums", list(attention_cases()))
def test_branches(attn, x, maps, out, row_sums):
    """The branches are [A1 v, -lambda A2 v], or of self-attention [A v], and their sum is the map times the values."""
    branches, values = attn.branches(x), attn.qkv(x)[..., -24:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    torch.testing.assert_close(sum(branches), maps @ values, rtol=0, atol=1e-12)
    count, (q, k, _) = len(branches), attn.project(x)
    assert count == (1 if isinstance(attn, SelfAttention) else 2)
    first = softmax(q[:, ::count] @ k[:, ::count].mT / math.sqrt(q.shape[-1]))
    torch.testing.assert_close(branches[0], first @ values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plugin", CONTROLS)
def test_branches_of_controls(monkeypatch, plugin):
    """Branches that a control inherits are used where their sum is its map times the values, and not elsewhere."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    records.execute_plugin(Path(__file__).parent / "runs/controls" / plugin)
    torch.manual_seed(0)
    for name in CONTROLS[plugin]:
        model, images = randomize(build_model(name)), torch.randn(2, 1, 28, 28).double()
        branches = model.attention_branches(images)
        assert (branches is None) == (name in ("vitcentered", "vitsumscaled"))
        for terms, (attn, x) in zip(branches or [], model.attention_inputs(images)):
            values = attn.qkv(x)[..., -32:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            torch.testing.assert_close(sum(terms), attn.attention_map(x) @ values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_lambda_needs_no_tokens(monkeypatch, name):
    """Lambda is read without a forward pass where it does not depend on the images: in version 1."""
    passes = []
    monkeypatch.setattr(vit.ViT, "embed", lambda model, images, embed=vit.ViT.embed: passes.append(1) or embed(
        model, images))
    model = build_model(name)
    assert len(model.mean_lambdas(torch.zeros(1, 1, 28, 28))) == (2 if "diff" in name else 0)
    assert bool(passes) == (name == "vitdiffv2")


def test_vitboth(monkeypatch):
    """vitboth has four softmax maps a block, as vitdiff has, and as many parameters within 0.3%."""
    monkeypatch.setattr(vit, "MODELS", dict(MODELS))
    records.execute_plugin(Path(__file__).parent / "runs/controls/more.py")
    counts = [sum(weights.numel() for weights in build_model(name).parameters()) for name in ("vitboth", "vitdiff")]
    assert counts == [37_194, 37_290]
    attn, x = randomize(build_model("vitboth")).blocks[1].attn, torch.randn(3, 7, 32).double()
    torch.testing.assert_close(attn(x), self_by_hand(attn.state_dict(), x, heads=4)[1], rtol=0, atol=1e-12)
