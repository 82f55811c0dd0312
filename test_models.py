"""Claims about the models, the data, the training loop and the charts, each against an independent computation.

    python -m pytest

Formulas are written out here in plain loops and float64; the commands are run as a user runs them, on real MNIST.
"""

import csv
import gzip
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.text import Text
from torch.nn import functional as F

import plot
import train
import vit
from diff_attention import DiffAttention, DiffAttentionV2, differential_attention
from vit import MODELS, SelfAttention, ViT, build_model

HERE = Path(__file__).parent
CPU = torch.device("cpu")
BUDGETS = {"vit": 33_802, "vitbalanced": 55_626, "vitdiff": 38_106, "vitdiffpaper": 33_802, "vitdiffv2": 36_000}
TINY = ["--patch-size", "14", "--dim", "8", "--depth", "1", "--mlp-dim", "16", "--head-hidden-dim", "16",
        "--batch-size", "1000", "--device", "cpu", "--no-analysis"]


CANVASES = 2855204916  # of the canvases of the first 1,200 test images
ANALYSIS = {"noise.csv", "attention.csv", "attention.npz"}


def random_(module):
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

def reference_self(weights, x, heads):
    q, k, v = linear(weights, "qkv", x).split(x.shape[-1], -1)
    d = x.shape[-1] // heads
    maps, outs = [], []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        maps.append(softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)))
        outs.append(maps[-1] @ v[..., part])
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1))


def reference_v1(weights, x, heads, d, depth):
    """Equations 1 to 3 of arXiv 2410.05258, where the layer index l counts from 1."""
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
        maps.append(a1 - lam * a2)
        out = maps[-1] @ v[..., h * e:(h + 1) * e]
        out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["sub_norm.weight"]
        outs.append((1 - lambda_init) * out)
    return torch.stack(maps, 1), linear(weights, "proj", torch.cat(outs, -1)), lam


def reference_v2(weights, x, heads):
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
    """(module, its own map and output by the formulas, sum of each map row) on random tokens."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    for heads, bias in [(1, False), (2, True), (3, False)]:
        attn = random_(SelfAttention(24, heads, qkv_bias=bias))
        yield attn, x, *reference_self(attn.state_dict(), x, heads), torch.ones(3, heads, 7).double()
    for heads, d, depth, bias in [(1, None, 0, False), (2, None, 1, True), (2, 12, 3, False), (3, 5, 2, False)]:
        attn = random_(DiffAttention(24, heads, depth=depth, head_dim=d, qkv_bias=bias))
        maps, out, lam = reference_v1(attn.state_dict(), x, heads, d or 24 // heads // 2, depth)
        yield attn, x, maps, out, torch.full((3, heads, 7), 1 - lam, dtype=torch.float64)
    for heads, bias in [(1, True), (2, False), (3, False)]:
        attn = random_(DiffAttentionV2(24, heads, qkv_bias=bias))
        maps, out, lam = reference_v2(attn.state_dict(), x, heads)
        yield attn, x, maps, out, 1 - lam.transpose(1, 2)


@pytest.mark.parametrize("attn, x, maps, out, row_sums", list(attention_cases()))
def test_attention_is_its_formula(attn, x, maps, out, row_sums):
    torch.testing.assert_close(attn(x), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(attn.attention_map(x), maps, rtol=0, atol=1e-12)
    torch.testing.assert_close(attn.attention_map(x).sum(-1), row_sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attn, x, maps, out, row_sums", list(attention_cases()))
def test_map_times_values_through_the_rest_is_the_output(attn, x, maps, out, row_sums):
    heads = attn.attention_map(x) @ attn.qkv(x)[..., -24:].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    if hasattr(attn, "sub_norm"):
        heads = (1 - attn.lambda_init) * attn.sub_norm(heads)
    torch.testing.assert_close(attn.proj(heads.transpose(1, 2).flatten(2)), attn(x), rtol=0, atol=1e-12)


def test_the_functional_core_stands_alone():
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 6, 5, 4).double(), torch.randn(2, 3, 5, 8).double()
    for lam in (0.7, torch.tensor(0.7).double(), torch.rand(2, 3, 5, 1).double()):
        expected = torch.stack([
            (softmax(q[:, 2 * h] @ k[:, 2 * h].transpose(1, 2) / 2)
             - (lam[:, h] if torch.is_tensor(lam) and lam.ndim else lam)
             * softmax(q[:, 2 * h + 1] @ k[:, 2 * h + 1].transpose(1, 2) / 2)) @ v[:, h] for h in range(3)], 1)
        torch.testing.assert_close(differential_attention(q, k, v, lam), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_path_of_cuda_is_the_plain_path(name, monkeypatch):
    """What runs on CUDA, run on the CPU: scaled_dot_product_attention in place of softmax(q k') v."""
    torch.manual_seed(0)
    model, images = random_(build_model(name)), torch.randn(4, 1, 28, 28).double()
    plain = model(images)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(model(images), plain, rtol=0, atol=1e-10)


def test_lambda_is_float32_in_a_half_precision_module():
    attn = DiffAttention(32, 1, depth=1).bfloat16()
    vectors = [getattr(attn, f"lambda_{name}").float() for name in ("q1", "k1", "q2", "k2")]
    expected = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + attn.lambda_init
    assert attn.lam().dtype == torch.float32
    torch.testing.assert_close(attn.lam(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("patch_size", [4, 7])
def test_models_keep_to_their_budgets(name, patch_size):
    parameters = sum(parameter.numel() for parameter in build_model(name, patch_size=patch_size).parameters())
    assert 0.97 * BUDGETS[name] <= parameters <= BUDGETS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_and_every_size_is_a_parameter(name):
    torch.manual_seed(0)
    model = build_model(name, image_size=32, in_channels=3, num_classes=7, patch_size=4, dim=48, depth=3, num_heads=4,
                        mlp_dim=40, head_hidden_dim=24, qkv_bias=True, patch_norm=False, dropout=0.0)
    logits = model(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 7)
    F.cross_entropy(logits, torch.arange(5)).backward()
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        if parameter_name.endswith("qkv.bias"):  # of k's part only rounding is left: no softmax minds a constant
            gradient = gradient[-48:]
        assert gradient is not None and gradient.abs().max() > 1e-9, parameter_name
    assert [tuple(maps.shape) for maps in model.attention_maps(torch.randn(2, 3, 32, 32))] == [(2, 4, 65, 65)] * 3


@pytest.mark.parametrize("name", MODELS)
def test_vit_is_a_prenorm_transformer_with_free_logits(name):
    """The whole model from its state dict, with the blocks' attention as the formulas above have it."""
    torch.manual_seed(0)
    model = random_(build_model(name))
    weights, images = model.state_dict(), torch.randn(4, 1, 28, 28).double()

    def norm(prefix, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], eps=1e-6)

    def mlp(prefix, x):
        hidden = linear(weights, f"{prefix}.fc1", x)
        return linear(weights, f"{prefix}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def attention(i, x):
        own = {key.removeprefix(f"blocks.{i}.attn."): value for key, value in weights.items()}
        heads = model.blocks[i].attn.num_heads
        if name in ("vit", "vitbalanced"):
            return reference_self(own, x, heads)
        return reference_v2(own, x, heads) if name == "vitdiffv2" else reference_v1(own, x, heads, 16, i)

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
    for own, expected in zip(model.attention_maps(images), maps, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    assert logits.min() < 0  # no activation on the logits


@pytest.mark.parametrize("attn", [SelfAttention(24, 2), DiffAttention(24, 3, depth=1), DiffAttentionV2(24, 2)])
def test_fewer_tokens_come_out_as_they_do_among_all(attn):
    torch.manual_seed(0)
    attn, x = random_(attn), torch.randn(3, 7, 24).double()
    torch.testing.assert_close(attn(x, keep=2), attn(x)[:, :2], rtol=0, atol=1e-12)


def test_an_attention_need_not_know_of_keep():
    class Plain(SelfAttention):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    plain, images = random_(ViT(attention=Plain)), torch.randn(4, 1, 28, 28).double()
    clever = random_(ViT())
    clever.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(images), clever(images), rtol=0, atol=1e-12)


def test_state_dict_has_timms_names():
    model = ViT(head_hidden_dim=0, patch_norm=False, depth=1, attention=DiffAttention)
    assert list(model.state_dict()) == [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "blocks.0.norm1.weight", "blocks.0.norm1.bias",
        *(f"blocks.0.attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2")), "blocks.0.attn.qkv.weight",
        "blocks.0.attn.sub_norm.weight", "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias",
        "blocks.0.norm2.weight", "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias",
        "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("dim", [8, 6])
def test_position_embeddings_start_as_sines_and_cosines_of_column_and_row(dim):
    positions = ViT(dim=dim, num_heads=1).pos_embed[0, 1:]
    row, column, slow = 2, 3, 30 ** (-4 / dim)
    expected = [math.sin(column), math.cos(column), math.sin(row), math.cos(row),
                math.sin(slow * column), math.cos(slow * column), math.sin(slow * row), math.cos(slow * row)]
    assert positions[4 * row + column].tolist() == pytest.approx(expected[:dim], abs=1e-6)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    model, images = build_model("vit", dropout=0.5), torch.randn(2, 1, 28, 28)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_readme_shows_how_to_add_an_attention(monkeypatch):
    """The README's own lines, executed: one class and one row of MODELS, and the rest of the program takes it."""
    code = re.search(r"```python\n(class .*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.setattr(vit, "MODELS", MODELS)
    before = set(MODELS)
    exec(code, vars(vit).copy() | {"MODELS": MODELS})
    (name,) = set(MODELS) - before
    try:
        model = build_model(name, dropout=0.0)
        images = torch.randn(2, 1, 28, 28)
        assert model(images).shape == (2, 10)
        assert len(model.attention_maps(images)) == 2
        settings = train.resolve_settings(train.parse_flags(["--model", name]), name, "mnist", 0, CPU)
        assert train.measure_model(settings)["parameters"] == sum(p.numel() for p in model.parameters())
    finally:
        del MODELS[name]


def test_readme_puts_the_published_faults_back(monkeypatch, mnist):
    """The README's own lines, executed: logits that are activated and dropped, and the same order in every epoch."""
    codes = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL))
    assert set(codes) == {"activated", "ordered"}
    model, images = build_model("vit", dropout=0.0), torch.randn(40, 1, 28, 28)
    right = model.eval()(images)
    split = train.Split(mnist["train"].images[:300], mnist["train"].labels[:300])
    settings = train.resolve_settings(train.parse_flags([]), "vit", "mnist", 0, CPU)
    monkeypatch.setattr(vit.ViT, "forward", vit.ViT.forward)  # so that both are as before when the test is over
    monkeypatch.setattr(train, "draw_epoch", train.draw_epoch)
    right_order, right_noise = train.draw_epoch([0, 1], 2, split, settings)
    monkeypatch.setattr(train, "main", lambda: 0)
    for code in codes.values():
        with pytest.raises(SystemExit):
            exec(code, {})
    torch.testing.assert_close(model(images), F.gelu(right))
    dropped = model.train()(images) == 0
    assert 0.05 < dropped.float().mean() < 0.15
    (order, noise), (again, other) = (train.draw_epoch([0, 1], epoch, split, settings) for epoch in (2, 1))
    assert torch.equal(order, again) and not torch.equal(order, right_order) and not torch.equal(order[0], order[1])
    assert torch.equal(noise, right_noise) and not torch.equal(noise, other)


# Data.

def use_archives(folder, name="MNIST"):
    """A data folder of its own with links to the original archives and nothing unpacked."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for archive in (HERE / "data" / name / "raw").glob("*.gz"):
        (raw / archive.name).symlink_to(archive)
    return raw


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network in tests")
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def mnist():
    return train.load_splits("mnist", HERE / "data", CPU)


def rows(images):
    return sorted(hash(image.numpy().tobytes()) for image in images)


def test_archives_unpack_without_a_network_and_split_without_overlap(tmp_path, no_network, mnist):
    raw = use_archives(tmp_path)
    splits = train.load_splits("mnist", tmp_path, CPU)
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    for name in splits:
        assert splits[name].images.dtype == torch.uint8 and splits[name].images.shape[1:] == (1, 28, 28)
        assert torch.equal(splits[name].images, mnist[name].images)  # the same draw on every call
        assert torch.equal(splits[name].labels, mnist[name].labels)
    with gzip.open(raw / "train-images-idx3-ubyte.gz") as file:
        archive = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(60_000, 28, 28)
    assert rows(torch.cat([splits["train"].images, splits["val"].images])) == rows(archive)
    assert splits["val"].labels.bincount().min() > 400  # all ten classes, not the archive's end
    assert zlib.crc32(splits["val"].labels.numpy()) == 982261507  # figures of one year compare with those of the next
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MNIST"]  # no litter


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_pixels_are_normalized_by_the_archives_own_mean_and_deviation(name):
    splits = train.load_splits(name, HERE / "data", CPU)
    pixels = train.normalize(torch.cat([splits["train"].images, splits["val"].images]).float(), name)
    assert abs(pixels.mean().item()) < 1e-3 and abs(pixels.std().item() - 1) < 1e-3


@pytest.mark.parametrize("damage", ["cut short", "empty", "foreign"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"])
def test_damaged_data_is_named_and_left_alone(tmp_path, no_network, mnist, capsys, damage, file):
    raw = use_archives(tmp_path)
    if not file.endswith(".gz"):
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            shutil.copy(HERE / f"data/MNIST/raw/{name}-ubyte", raw)
    whole = (raw / file).read_bytes()
    bad = {"cut short": whole[:-1], "empty": b"", "foreign": bytes(len(whole))}[damage]
    (raw / file).unlink()
    (raw / file).write_bytes(bad)
    before = sorted(path.name for path in raw.iterdir())
    assert command(*TINY, "--epochs", "1", "--data-dir", tmp_path, "--runs-dir", tmp_path / "runs") == 2
    assert_one_line(capsys, str(raw / file), "move it away")
    assert sorted(path.name for path in raw.iterdir()) == before and (raw / file).read_bytes() == bad


def test_unpacking_what_is_missing_leaves_the_rest_alone(tmp_path, no_network, capsys):
    raw = use_archives(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"mine")
    assert command(*TINY, "--epochs", "1", "--data-dir", tmp_path, "--runs-dir", tmp_path / "runs") == 2
    assert_one_line(capsys, str(raw / "t10k-labels-idx1-ubyte"), "move it away")
    assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == b"mine"


@pytest.mark.parametrize("dataset, archive, folder", [
    ("kmnist", "t10k-labels-idx1-ubyte.gz", "KMNIST/raw"), ("cifar10", "cifar-10-python.tar.gz", "")])
def test_missing_data_is_named_with_its_folder(tmp_path, no_network, capsys, dataset, archive, folder):
    assert command("--dataset", dataset, "--data-dir", tmp_path, "--runs-dir", tmp_path / "runs") == 2
    assert_one_line(capsys, archive, str(tmp_path / folder))


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, no_network, monkeypatch):
    packed = tmp_path / "system"
    packed.mkdir()
    for archive in (HERE / "data/FashionMNIST/raw").glob("t*.gz"):
        packed.joinpath(archive.name).write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()), 1))
    monkeypatch.setitem(train.DATASETS["fashionmnist"], "system_folder", str(packed))
    found = train.load_splits("fashionmnist", tmp_path / "data", CPU)
    expected = train.load_splits("fashionmnist", HERE / "data", CPU)
    assert all(torch.equal(found[name].images, expected[name].images) for name in expected)


def test_cifar10_archive_unpacks_and_trains(tmp_path, no_network, monkeypatch, capsys):
    """An archive of random images in CIFAR-10's layout, with torchvision's sums set to its own."""
    from hashlib import md5
    from torchvision.datasets import CIFAR10
    sums, generator = {}, torch.Generator().manual_seed(0)
    staging = tmp_path / "cifar-10-batches-py"
    staging.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content = {"label_names": list("0123456789")} if name == "batches.meta" else {
            "data": torch.randint(256, (10_000, 3072), generator=generator, dtype=torch.uint8).numpy(),
            "labels": torch.randint(10, (10_000,), generator=generator).tolist()}
        staging.joinpath(name).write_bytes(pickle.dumps(content))
        sums[name] = md5(staging.joinpath(name).read_bytes()).hexdigest()
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / CIFAR10.filename, "w:gz", compresslevel=1) as archive:
        archive.add(staging, "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((data / CIFAR10.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    splits = train.load_splits("cifar10", data, CPU)
    assert {name: tuple(split.images.shape) for name, split in splits.items()} == {
        "train": (45_000, 3, 32, 32), "val": (5_000, 3, 32, 32), "test": (10_000, 3, 32, 32)}
    first = torch.from_numpy(pickle.loads((staging / "test_batch").read_bytes())["data"][0]).view(3, 32, 32)
    assert torch.equal(splits["test"].images[0], first)
    assert command("--dataset", "cifar10", *TINY, "--patch-size", "16", "--epochs", "1", "--data-dir", data,
                   "--runs-dir", tmp_path / "runs") == 0
    with open(data / "cifar-10-batches-py/data_batch_3", "r+b") as file:
        file.truncate(100)
    capsys.readouterr()
    assert command("--dataset", "cifar10", "--data-dir", data, "--runs-dir", tmp_path / "more") == 2
    assert_one_line(capsys, "data_batch_3")


# Augmentation.

def augmentation(**strengths):
    return train.NO_AUGMENTATION | strengths


def test_augmentation_of_strength_zero_changes_nothing(mnist):
    pixels, noise = mnist["train"].images[:8].float(), 2 * torch.rand(8, 7) - 1
    assert torch.equal(train.augment(pixels, noise, augmentation()), pixels)
    still = train.augment(pixels, torch.zeros(8, 7), augmentation(rotation=12.0, scale=0.12, shear=0.12, shift=2.5))
    torch.testing.assert_close(still, pixels, rtol=0, atol=1e-3)


def test_each_strength_does_what_it_says(mnist):
    pixels = mnist["train"].images[:3].float()
    extreme = {name: torch.zeros(3, 7) for name in ("rotation", "shift", "flip", "scale", "shear")}
    extreme["rotation"][:, 0] = extreme["shift"][:, 4] = extreme["scale"][:, 1] = extreme["shear"][:, 3] = 1
    extreme["flip"][:, 6] = torch.tensor([-0.5, 0.5, -0.1])

    def augmented(name, strength):
        return train.augment(pixels, extreme[name], augmentation(**{name: strength}))

    torch.testing.assert_close(augmented("rotation", 90.0), pixels.rot90(1, (2, 3)), rtol=0, atol=1e-2)
    torch.testing.assert_close(augmented("shift", 3.0)[..., :-3], pixels[..., 3:], rtol=0, atol=1e-2)
    assert augmented("shift", 3.0)[..., -3:].abs().max() == 0
    flipped = augmented("flip", True)
    assert torch.equal(flipped[0], pixels[0].flip(2)) and torch.equal(flipped[1], pixels[1])
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    ramp = (4 * x + 60).expand(3, 1, 28, 28)  # where a pixel came from; bicubic is off by 0.05 of a pixel, 0.2
    inside = (slice(None), slice(None), slice(6, 22), slice(6, 22))
    wide = train.augment(ramp, extreme["scale"], augmentation(scale=0.12))
    torch.testing.assert_close(wide[inside], (ramp + 0.12 * 4 * (x - 13.5))[inside], rtol=0, atol=0.2)
    slanted = train.augment(ramp, extreme["shear"], augmentation(shear=0.12))
    torch.testing.assert_close(slanted[inside], (ramp + 0.12 * 4 * (y - 13.5))[inside], rtol=0, atol=0.2)


def test_default_augmentation_is_small_and_each_images_own(mnist):
    pixels = mnist["train"].images[:1].float().expand(64, -1, -1, -1)
    settings = augmentation(**{name: train.DIGITS[name] for name in train.NO_AUGMENTATION})
    drawn = train.augment(pixels, 2 * torch.rand(64, 7, generator=torch.Generator().manual_seed(0)) - 1, settings)
    assert len({image.numpy().tobytes() for image in drawn}) == 64
    assert (drawn.sum((1, 2, 3)) / pixels.sum((1, 2, 3)) - 1).abs().max() < 0.35  # ink stays on the canvas


def test_a_shift_by_half_a_pixel_keeps_images_sharp_and_pixels_in_range(mnist):
    """The contrast of neighbours: 0.88 of what it was, where bilinear interpolation leaves 0.79."""
    pixels, noise = mnist["train"].images[:32].float(), torch.ones(32, 7)
    shifted = train.augment(pixels, noise, augmentation(shift=0.5))
    assert shifted.min() == 0 and shifted.max() == 255
    before, after = (image.diff(dim=3).square().mean().sqrt() for image in (pixels, shifted))
    assert after > 0.83 * before


# Clutter and corruption.

def cluttered(dataset="clutteredmnist", **overrides):
    return train.resolve_settings(train.parse_flags(["--dataset", dataset]), "vit", dataset, 0, CPU) | overrides


def coded_split():
    """Six images of one value each, so that a canvas says what it was made of."""
    values = 2 ** torch.arange(6)  # 1, 2, 4, 8, 16, 32
    return train.Split(values.byte().view(6, 1, 1, 1).expand(-1, 1, 28, 28), torch.arange(6))


def rectangle(mask):
    """Row, column, height and width of what is True, which must be a whole rectangle."""
    rows, columns = (mask.any(1 - axis).nonzero().flatten() for axis in (0, 1))
    assert mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
    return [rows[0].item(), columns[0].item(), len(rows), len(columns)]


def test_canvases_hold_the_object_whole_and_fragments_of_other_images_of_the_split():
    split, own = coded_split(), torch.arange(6).repeat(100)
    noise = 2 * torch.rand(600, 2 + 5 * 4, generator=torch.Generator().manual_seed(0)) - 1
    places, sources, spots = set(), set(), set()
    alone = train.clutter(split.images[own].float(), own, noise[:, :2], split, cluttered())
    assert alone.shape == (600, 1, 60, 60)
    one = train.clutter(split.images[own].float(), own, noise[:, :7], split, cluttered())
    four = train.clutter(split.images[own].float(), own, noise, split, cluttered())
    for index, canvas, more in zip(own.tolist(), alone[:, 0], (one - alone)[:, 0]):
        assert canvas.unique().tolist() == [0, 2**index]
        row, column, *size = rectangle(canvas > 0)
        assert size == [28, 28]
        places |= {("row", row), ("column", column)}
        (value,) = set(more.unique().tolist()) - {0}
        row, column, *size = rectangle(more > 0)
        assert size == [8, 8] and value != 2**index  # never of the image itself
        sources.add((2**index, value))
        spots |= {("row", row), ("column", column)}
    assert len(sources) == 6 * 5  # of every other image, and
    assert places == {(axis, place) for axis in ("row", "column") for place in range(33)}  # anywhere
    assert {0, 52} <= {spot for _, spot in spots} and max(spot for _, spot in spots) == 52
    added = (four - alone).sum((1, 2, 3)) / 64  # of four values, each a power of 2 up to 32, not the image's own
    assert ((added >= 4) & (added <= 4 * 32) & (added % 1 == 0)).all()
    white = train.Split(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), torch.zeros(2))
    full = train.clutter(white.images.float(), torch.arange(2), noise[:2], white, cluttered())
    assert full.max() <= 255


def test_a_fragment_is_a_cut_of_its_image(mnist):
    split, own = mnist["val"], torch.arange(20)
    noise = 2 * torch.rand(20, 7, generator=torch.Generator().manual_seed(1)) - 1
    black = torch.zeros(20, 1, 60, 60)
    for index, pasted, draw in zip(own.tolist(), train.add_fragments(black, own, noise[:, 2:], split, 8), noise):
        other, *places = ((draw[2:] + 1) / 2 * torch.tensor([len(split.labels) - 1, 21, 21, 53, 53])).long().tolist()
        top, left, new_top, new_left = places
        image = split.images[(index + 1 + other) % len(split.labels), 0]
        expected = torch.zeros(60, 60)
        expected[new_top:new_top + 8, new_left:new_left + 8] = image[top:top + 8, left:left + 8]
        assert torch.equal(pasted[0], expected)


@pytest.mark.parametrize("count", [1, 2, 33, 9_999, 54_999])
def test_noise_picks_every_number_and_none_beyond(count):
    ends = torch.tensor([-1.0, 2 * torch.tensor(1.0).nextafter(torch.tensor(0.0)).item() - 1, 1.0])
    assert train.pick(ends, count).tolist() == [0, count - 1, count - 1]
    middles = 2 * (torch.arange(count, dtype=torch.double) + 0.5) / count - 1
    assert torch.equal(train.pick(middles, count), torch.arange(count))


def test_evaluated_canvases_are_fixed_and_more_distractors_are_added_to_them(mnist):
    split = train.Split(mnist["test"].images[:1_200], mnist["test"].labels[:1_200])

    def canvases(count):
        indices, pixels = zip(*train.evaluation_pixels(split, cluttered(distractors=count)))
        assert torch.equal(torch.cat(indices), torch.arange(1_200))
        return torch.cat(pixels)

    assert torch.equal(canvases(4), canvases(4))
    by_count = [canvases(count) for count in (0, 4, 8, 16)]
    for fewer, more in zip(by_count, by_count[1:]):
        assert (more >= fewer).all() and (more.sum((1, 2, 3)) > fewer.sum((1, 2, 3))).float().mean() > 0.95
    assert zlib.crc32(by_count[1].byte().numpy()) == CANVASES  # figures of one year compare with those of the next


@pytest.mark.parametrize("name", ["clutteredmnist", "clutteredfashionmnist"])
def test_canvases_are_normalized_by_their_own_mean_and_deviation(name):
    split, settings = train.load_splits(name, HERE / "data", CPU)["train"], cluttered(name)
    order, noise = train.draw_epoch([0], 1, split, settings)
    pixels = train.normalize(train.training_pixels(split, order[0, :10_000], noise[0, :10_000], settings), name)
    assert abs(pixels.mean().item()) < 0.02 and abs(pixels.std().item() - 1) < 0.02


def corrupted(pixels, name, severity, split, first=0):
    return train.corrupt(pixels, name, severity, torch.arange(first, first + len(pixels)), split)


@pytest.mark.parametrize("name", train.CORRUPTIONS)
def test_corruption_is_the_same_at_every_call_and_grows_with_severity_from_none(mnist, name):
    pixels = mnist["test"].images[:200].float()
    assert torch.equal(corrupted(pixels, name, 0, mnist["test"]), pixels)
    before = pixels.clone()
    distances = []
    for severity in range(1, 6):
        result = corrupted(pixels, name, severity, mnist["test"])
        assert result.shape == pixels.shape and result.min() >= 0 and result.max() <= 255
        assert torch.equal(result, corrupted(pixels, name, severity, mnist["test"]))
        distances.append((result - pixels).abs().mean().item())
    assert 0 < distances[0] and distances == sorted(distances)
    assert torch.equal(pixels, before)
    if name != "blur":  # which is the same for all; of the others, other images have other draws
        grey = torch.full((200, 1, 28, 28), 128.0)
        assert not torch.equal(corrupted(grey, name, 3, mnist["test"]),
                               corrupted(grey, name, 3, mnist["test"], first=200))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_each_corruption_does_what_its_table_says(severity):
    split = coded_split()
    amount = {name: amounts[severity - 1] for name, amounts in train.CORRUPTIONS.items()}

    def on(level, name, channels=1):
        return corrupted(torch.full((400, channels, 28, 28), float(level)), name, severity, split)

    noisy = on(128, "gaussian_noise") - 128
    assert noisy.std().item() == pytest.approx(255 * amount["gaussian_noise"], rel=0.03) and abs(noisy.mean()) < 1
    flipped = on(128, "impulse_noise", channels=3)
    for level in (0, 255):
        assert (flipped == level).float().mean().item() == pytest.approx(amount["impulse_noise"] / 2, rel=0.05)
    assert set(flipped.unique().tolist()) == {0, 128, 255}
    photons = on(51, "shot_noise") / 255 * amount["shot_noise"]  # of 0.2 of white
    photons_seen = photons[photons < amount["shot_noise"]]  # the rest is cut off at white
    assert (photons_seen - photons_seen.round()).abs().max() < 1e-4
    rate = 0.2 * amount["shot_noise"]
    assert (photons == 0).float().mean().item() == pytest.approx(math.exp(-rate), abs=0.01)
    assert on(0, "shot_noise").max() == 0
    side = amount["occlusion"]
    hidden = on(255, "occlusion", channels=3)
    assert set(hidden.unique().tolist()) == {0, 255} and torch.equal(hidden[:, 0], hidden[:, 2])
    areas = (hidden[:, 0] == 0).sum((1, 2))
    assert areas.min() >= side**2 and areas.max() == 4 * side**2  # squares may cover each other
    assert (hidden[:, 0] == 0).any(0).float().mean() > 0.95  # and lie anywhere
    distracted = on(0, "distractors")[:, 0]
    side = amount["distractors"]
    assert ((distracted > 0).sum((1, 2)) <= 4 * side**2).all()
    assert (distracted > 0).any(0).float().mean() > 0.95
    assert (distracted.sum((1, 2)) % side**2 == 0).all() and (distracted.sum((1, 2)) >= 4 * side**2).all()
    point = torch.zeros(1, 3, 29, 29)
    point[:, 1, 14, 14] = 255
    spread = corrupted(point, "blur", severity, split)
    assert spread[:, [0, 2]].abs().max() == 0 and spread.sum().item() == pytest.approx(255, rel=0.02)
    distance = torch.arange(29.0) - 14
    variance = (spread[0, 1].sum(0) * distance**2).sum() / 255
    assert variance.item() == pytest.approx(amount["blur"]**2, rel=0.15)
    torch.testing.assert_close(on(77, "blur"), torch.full((400, 1, 28, 28), 77.0), rtol=0, atol=1e-3)


# What is relevant.

def test_attention_figures_by_hand():
    row = torch.tensor([[[0.5, 0.25, -0.5, 0.0, 0.75], [0.2, 0.2, 0.2, 0.2, 0.2]]])  # an image, two heads, 4 patches
    relevant, ink = torch.tensor([[True, False, False, True]]), torch.tensor([[True, True, False, True]])
    figures = {name: figure[0].tolist() for name, figure in train.attention_figures(row, relevant, ink).items()}
    assert figures["irrelevant_share"] == pytest.approx([0.5 / 1.5, 0.5])
    assert figures["uniform_share"] == pytest.approx([0.5, 0.5])
    assert figures["ink_share"] == pytest.approx([1.0, 0.75])
    assert figures["negative_share"] == pytest.approx([0.25, 0.0])
    assert figures["lambda"] == pytest.approx([0.0, 0.0], abs=1e-6)
    weights = [0.25, 0.125, 0.25, 0.375]
    assert figures["entropy"] == pytest.approx([-sum(w * math.log(w) for w in weights), math.log(5)])
    only_relevant = torch.tensor([[[0.1, 0.5, 0.0, 0.0, -0.4]]])
    assert train.attention_figures(only_relevant, relevant, ink)["irrelevant_share"].item() == 0


class Looker(torch.nn.Module):
    """A model whose class token looks as `look` says: images (B, C, H, W) -> weights of the patches (B, P)."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def attention_maps(self, images):
        weights = F.pad(self.look(images), (1, 0))
        return [weights[:, None, None].expand(-1, 2, weights.shape[1], -1)]


def measured(look, split, settings):
    rows = train.measure_attention(Looker(look), split, settings | dict(depth=1))
    assert [(row["block"], row["head"]) for row in rows] == [(0, 0), (0, 1)] * (len(rows) // 2)
    return {row["condition"]: row for row in rows}


def test_a_map_of_relevant_patches_scores_nothing_on_the_irrelevant_and_a_uniform_one_its_share(mnist):
    split = train.Split(mnist["test"].images[:1_500], mnist["test"].labels[:1_500])
    settings = train.resolve_settings(train.parse_flags([]), "vit", "mnist", 0, CPU)
    black = train.normalize(torch.zeros(1, 1, 28, 28), "mnist")[0, 0, 0, 0]
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


def test_on_canvases_the_object_alone_is_relevant_however_many_distractors_there_are(mnist):
    split, settings = train.Split(mnist["test"].images[:1_100], mnist["test"].labels[:1_100]), cluttered()
    black = train.normalize(torch.zeros(1, 1, 1, 1), "clutteredmnist").item()

    def ink(images):
        return F.max_pool2d((images > black + 1e-4).float(), 6).flatten(1)

    rows = measured(ink, split, settings)
    assert list(rows) == ["0_distractors", "4_distractors", "8_distractors", "16_distractors", "gaussian_noise_3"]
    by_count = list(rows.values())[:4]
    assert by_count[0]["irrelevant_share"] == 0
    assert all(more["irrelevant_share"] > fewer["irrelevant_share"] for fewer, more in zip(by_count, by_count[1:]))
    assert len({row["uniform_share"] for row in by_count}) == 1 and 0.7 < by_count[0]["uniform_share"] < 0.9
    assert all(row["ink_share"] == pytest.approx(1) for row in by_count)
    assert "6_distractors" in measured(ink, split, settings | dict(distractors=6))


@pytest.mark.parametrize("name", ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"])
def test_lambda_is_the_weight_of_the_second_map_of_each_head(mnist, name):
    split = train.Split(mnist["test"].images[:1_000], mnist["test"].labels[:1_000])
    settings = train.resolve_settings(train.parse_flags([]), name, "mnist", 0, CPU)
    torch.manual_seed(0)
    model = random_(train.make_model(settings)).float()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 10  # so that maps differ, and by more than lambda
    rows = [row for row in train.measure_attention(model, split, settings) if row["condition"] == "clean"]
    expected = []
    with torch.no_grad():
        for attn, x in model.attention_inputs(train.normalize(split.images.float(), "mnist")):
            if name == "vit":
                expected += [0.0, 0.0]
            elif name == "vitdiffv2":
                expected += attn.lam(x)[:, :, 0, 0].mean(0).tolist()
            else:
                expected += [attn.lam().item()] * attn.num_heads
    assert [row["lambda"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert all((row["negative_share"] > 0.01) == (name != "vit") for row in rows)


# The loop.

def make_run(mnist, *flags, count=2_500, model="vit", seeds=(0,), sizes=TINY):
    """Settings, a stack of untrained models, their training step and a split of `count` images, as train_stack has."""
    settings = train.resolve_settings(train.parse_flags([*sizes, *flags]), model, "mnist", seeds[0], CPU)
    split = train.Split(mnist["train"].images[:count], mnist["train"].labels[:count])
    stack = train.make_stack(settings, seeds, CPU)
    return settings, stack, train.make_step(stack, split, settings), split


def loss_by_hand(model, split, settings):
    """Mean over samples of cross entropy with label smoothing, -(1 - s) log p_y - s mean_c log p_c, and accuracy."""
    with torch.no_grad():
        logits = model.double().eval()((split.images.double() / 255 - 0.1307) / 0.3081)
    model.float()
    log_p, s = logits - logits.logsumexp(1, keepdim=True), settings["label_smoothing"]
    losses = -(1 - s) * log_p[torch.arange(len(logits)), split.labels] - s * log_p.mean(1)
    return losses.mean().item(), (logits.argmax(1) == split.labels).double().mean().item()


def test_loss_and_accuracy_are_over_all_samples_also_of_the_smaller_last_batch(mnist):
    settings, stack, step, split = make_run(mnist, "--lr", "0", "--muon-lr", "0", "--no-augment", count=2_345)
    expected = loss_by_hand(stack.model, split, settings)
    assert train.evaluate(stack.model, split, settings) == pytest.approx(expected, abs=1e-6)
    losses, shares, accuracies, _ = train.train_epoch(stack, step, [0], split, settings, 1)
    assert shares.tolist() == pytest.approx([1000 / 2345, 1000 / 2345, 345 / 2345])
    assert (losses[0].dot(shares).item(), accuracies[0].item()) == pytest.approx(expected, abs=1e-6)


def test_a_step_is_adamw_on_the_clipped_gradient(mnist):
    """One whole step against AdamW (Loshchilov and Hutter 2019) written out; its first step moves by lr * sign."""
    settings, stack, step, split = make_run(
        mnist, "--optimizer", "adamw", "--no-augment", "--warmup", "0", "--decay", "0", "--weight-decay", "0.5",
        "--lr", "0.003", "--clip", "0.01", "--epochs", "1", count=1000)
    model = train.make_model(settings)
    images = (split.images.float() / 255 - 0.1307) / 0.3081  # in any order: one batch is the whole split
    F.cross_entropy(model(images), split.labels, label_smoothing=0.1).backward()
    norm = math.sqrt(sum(parameter.grad.double().pow(2).sum().item() for parameter in model.parameters()))
    assert norm > 0.02  # so that clipping acts
    train.train_epoch(stack, step, [0], split, settings, 1)
    after = dict(stack.model.named_parameters())
    for name, before in model.named_parameters():
        decayed = before.ndim > 1 and name not in ("cls_token", "pos_embed")
        gradient = before.grad * 0.01 / norm
        expected = before * (1 - 0.003 * 0.5 * decayed) - 0.003 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name].detach(), expected.detach(), rtol=0, atol=1e-4, msg=name)


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


def test_muon_on_stacks_is_muon_on_each_matrix():
    torch.manual_seed(0)
    shapes = [(96, 32), (32, 32), (32, 128), (16, 7), (7, 16), (1, 5), (8, 6)]
    sizes = [rows * columns for rows, columns in shapes]
    flat = torch.randn(3, sum(sizes))
    gradients = [scale * torch.randn(3, sum(sizes)) for scale in (1.0, 1e-6, 10.0)]
    expected = [[muon_by_hand(own.view(shape), [gradient[seed].split(sizes)[i].double().view(shape)
                                                for gradient in gradients], 0.02, 0.1)
                 for i, (own, shape) in enumerate(zip(flat[seed].double().split(sizes), shapes))] for seed in range(3)]
    muon = train.Muon([flat], [*shapes[:-1], (8, 1, 2, 3)], lr=torch.tensor(0.02), weight_decay=0.1)  # a convolution
    for flat.grad in gradients:
        muon.step()
    for seed in range(3):
        for own, shape, matrix in zip(flat[seed].split(sizes), shapes, expected[seed]):
            torch.testing.assert_close(own.view(shape).double(), matrix, rtol=0, atol=1e-4)
    flat.grad = torch.zeros_like(flat)
    train.Muon([flat], shapes, lr=torch.tensor(0.02), weight_decay=0.0).step()
    assert flat.isfinite().all()


def test_muon_is_torchs_within_its_half_precision():
    torch.manual_seed(0)
    weights, gradient = torch.randn(64, 32), torch.randn(64, 32)
    flat = weights.flatten()[None].clone()
    flat.grad = gradient.flatten()[None].clone()
    train.Muon([flat], [(64, 32)], lr=torch.tensor(0.1), weight_decay=0.1).step()
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradient
    torch.optim.Muon([parameter], lr=0.1, weight_decay=0.1).step()
    moved, expected = flat.view(64, 32) - 0.99 * weights, parameter.detach() - 0.99 * weights
    assert (moved - expected).norm() < 0.03 * expected.norm()


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [train.rate_factor(step, 100, 0.1, 0.5) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[9:51] == [1.0] * 42
    assert factors[50:] == pytest.approx([1 - i / 50 for i in range(50)])
    assert train.rate_factor(0, 3, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_muon_takes_the_matrices_and_decay_spares_norms_biases_tokens_and_lambda(name, optimizer):
    flags = train.parse_flags(["--weight-decay", "0.3", "--qkv-bias", "--optimizer", optimizer])
    settings = train.resolve_settings(flags, name, "mnist", 0, CPU)
    stack = train.make_stack(settings, [0, 1], CPU)
    owners = {}
    for parameter, weight in stack.weights.items():
        (owners[parameter],) = (i for i, flat in enumerate(stack.flats)
                                if flat.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr())
    assert set(owners) == {parameter for parameter, _ in stack.model.named_parameters()}
    assert sum(flat.numel() for flat in stack.flats) == sum(weight.numel() for weight in stack.weights.values())
    first = stack.optimizers[0]
    assert isinstance(first, train.Muon if optimizer == "muon" else torch.optim.AdamW)
    assert first.param_groups[0]["params"][0] is stack.flats[0]
    decays = {id(group["params"][0]): group["weight_decay"] for o in stack.optimizers for group in o.param_groups}
    assert [decays[id(flat)] for flat in stack.flats] == [0.3, 0.0]
    assert {parameter for parameter, i in owners.items() if i == 0} == {
        "patch_embed.proj.weight", "head.fc1.weight", "head.fc2.weight",
        *(f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}


def test_canvases_depend_on_seed_and_epoch_alone_and_are_new_in_every_epoch(mnist):
    settings = cluttered()
    split = train.Split(mnist["train"].images[:300], mnist["train"].labels[:300])

    def canvases(seeds, epoch, row=0):
        order, noise = train.draw_epoch(seeds, epoch, split, settings)
        pixels = train.training_pixels(split, order[row], noise[row], settings)
        return pixels[order[row].argsort()]  # in the order of the split

    first = canvases([0], 1)
    assert first.shape == (300, 1, 60, 60)
    assert torch.equal(first, canvases([0], 1)) and torch.equal(first, canvases([3, 0], 1, row=1))
    for other in (canvases([0], 2), canvases([1], 1)):
        assert all(not torch.equal(one, another) for one, another in zip(first, other))


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(mnist, monkeypatch):
    seen = []

    def record(pixels, noise, settings):
        seen[-1].append((pixels.sum((1, 2, 3)), noise))
        return pixels

    monkeypatch.setattr(train, "augment", record)
    for seed, epoch in [(0, 1), (0, 1), (0, 2), (4294967295, 1)]:
        settings, stack, step, split = make_run(mnist, seeds=[seed])
        torch.rand(len(seen) + 1)  # whatever the global generator went through before
        seen.append([])
        train.train_epoch(stack, step, [seed], split, settings, epoch)
    first, again, next_epoch, other_seed = ([torch.cat(part) for part in zip(*epoch)] for epoch in seen)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (next_epoch, other_seed):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
        assert torch.equal(first[0].sort().values, other[0].sort().values)  # every image once
    assert first[1].min() >= -1 and first[1].max() < 1 and abs(first[1].mean()) < 0.03


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model_name", ["vit", "vitdiff", "vitdiffv2"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_amp_trains_close_to_float32(mnist, precision, model_name):
    losses = {}
    for amp in ("off", precision):
        settings, stack, step, split = make_run(mnist, "--amp", amp, "--lr", "1e-3", "--muon-lr", "2e-3",
                                                model=model_name)
        losses[amp] = torch.cat([
            train.train_epoch(stack, step, [0], split, settings, epoch)[0][0] for epoch in (1, 2)])
        assert all(flat.dtype == torch.float32 for flat in stack.flats)
    assert not torch.equal(losses["off"], losses[precision])
    torch.testing.assert_close(losses["off"], losses[precision], rtol=0.02, atol=0)


# Many seeds, compiled, and many processes.

@pytest.mark.parametrize("model, optimizer", [
    ("vit", "muon"), ("vitdiff", "muon"), ("vitdiff", "adamw"), ("vitdiffpaper", "muon"), ("vitdiffv2", "muon")])
def test_a_seed_in_a_stack_is_the_seed_alone(mnist, monkeypatch, model, optimizer):
    """At the reference runs' sizes: the same initial weights, the same batches, and the same losses."""
    batches, augment = [], train.augment

    def record(pixels, noise, settings):
        batches[-1].append((pixels.clone(), noise.clone()))
        return augment(pixels, noise, settings)

    monkeypatch.setattr(train, "augment", record)
    seeds, losses = [3, 0, 4294967295], []
    for group in [seeds, *([seed] for seed in seeds)]:
        settings, stack, step, split = make_run(mnist, "--optimizer", optimizer, model=model, seeds=group, sizes=[])
        for row, seed in enumerate(group):
            train.show_seed(stack, row)
            for name, weights in train.make_model(settings | dict(seed=seed)).state_dict().items():
                assert torch.equal(stack.model.state_dict()[name], weights)
        batches.append([])
        losses.append(train.train_epoch(stack, step, group, split, settings, 1)[0])
    assert losses[0].shape == (3, 20)
    for row in range(3):
        torch.testing.assert_close(losses[0][row], losses[1 + row][0], rtol=0, atol=1e-4)
        assert all(torch.equal(a.chunk(3)[row], b) for together, alone in zip(batches[0], batches[1 + row])
                   for a, b in zip(together, alone))
    assert (losses[0][0] - losses[0][1]).abs().max() > 0.01  # and not of one another


def test_seeds_of_a_stack_drop_out_each_on_its_own():
    torch.manual_seed(0)
    model, images = build_model("vit", dropout=0.5), torch.randn(1, 4, 1, 28, 28).expand(2, -1, -1, -1, -1)
    weights = {name: parameter.detach().expand(2, *parameter.shape) for name, parameter in model.named_parameters()}
    first, second = train.map_model(model, weights, images)
    assert not torch.equal(first, second)
    first, second = train.map_model(model.eval(), weights, images)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("model, seeds", [("vit", [0]), ("vitdiff", [0, 1])])
def test_compiled_and_not_the_losses_agree(mnist, model, seeds):
    losses = []
    for flag in ("--compile", "--no-compile"):
        settings, stack, step, split = make_run(mnist, flag, model=model, seeds=seeds)
        losses.append(train.train_epoch(stack, step, seeds, split, settings, 1)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-4)


# The commands.

def command(*flags):
    """train.py's exit status, run in this process."""
    try:
        return train.main([str(flag) for flag in flags])
    except SystemExit as exit_:
        return exit_.code


def assert_one_line(capsys, *words):
    """What went to stderr is a single line that has all these words."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error, error
    for word in words:
        assert word in error, error


def launch(*flags, script="train.py", **options):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, flags)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def untimed(folder):
    """metrics.csv without its timing columns, as text."""
    with open(folder / "metrics.csv") as file:
        return [[value for name, value in row.items() if name not in ("seconds", "images_per_second")]
                for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never broken off: its folder. Dropout is on, so that its state counts too."""
    runs = tmp_path_factory.mktemp("finished")
    assert command(*TINY, "--dropout", "0.1", "--epochs", "3", "--analysis", "--runs-dir", runs) == 0
    return runs / "mnist-vitdiff-seed0"


def copy_run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def test_a_run_leaves_its_records(finished):
    assert {path.name for path in finished.iterdir()} == set(train.RECORDS)
    config, summary = (json.loads((finished / name).read_text()) for name in ("config.json", "summary.json"))
    with open(finished / "metrics.csv") as file:
        reader = csv.DictReader(file)
        metrics = list(reader)
    assert reader.fieldnames == ["epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                                 "seconds", "images_per_second", "lambda_0"]
    assert [(row["epoch"], row["step"]) for row in metrics] == [("1", "55"), ("2", "110"), ("3", "165")]
    best = min(metrics, key=lambda row: float(row["val_loss"]))
    assert summary["best_epoch"] == int(best["epoch"])
    assert summary["val_loss"] == pytest.approx(float(best["val_loss"]), abs=1e-6)
    assert sum(float(row["seconds"]) for row in metrics) == pytest.approx(summary["seconds"], abs=0.01)
    assert summary["train_seconds"] < summary["seconds"]
    assert config["parameters"] == summary["parameters"] == sum(
        weights.numel() for weights in torch.load(finished / "best.pt", weights_only=True).values())
    assert config["amp"] == "off" and config["device"] == "cpu" and config["torch"] == torch.__version__
    tokens, dim = 5, 8  # a product of (a, b) by (b, c) is 2abc FLOPs
    attention = tokens * dim * 5 * dim + 2 * tokens * 2 * 4 + 2 * tokens * 4 + dim * dim  # of the class token alone
    products = 4 * 196 * dim + attention + 2 * dim * 16 + dim * 16 + 16 * 10
    assert config["flops_per_image"] == 2 * products
    assert torch.load(finished / "last.pt", weights_only=True)["rows"][-1]["epoch"] == 3


def test_test_figures_are_those_of_the_best_weights(finished, mnist, capsys):
    config, summary = (json.loads((finished / name).read_text()) for name in ("config.json", "summary.json"))
    model = train.make_model(config)
    model.load_state_dict(torch.load(finished / "best.pt", weights_only=True))
    loss, accuracy = loss_by_hand(model, mnist["test"], config)
    assert summary["test_loss"] == pytest.approx(loss, abs=1e-5) and summary["test_accuracy"] == accuracy
    assert command("--eval", finished) == 0
    again, recorded = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[:2])
    assert again == recorded


def test_the_test_split_is_read_once_with_the_lowest_validation_loss(tmp_path, monkeypatch):
    """Validation losses that fall and rise, with Ctrl-C in between: the second epoch's weights are tested."""
    val_losses, tested = iter([0.9, 0.5, KeyboardInterrupt, 0.7]), []

    def evaluate(model, split, settings):
        if len(split.labels) == 5_000:
            loss = next(val_losses)
            if loss is KeyboardInterrupt:
                raise loss
            return loss, 0.5
        tested.append({name: weights.clone() for name, weights in model.state_dict().items()})
        return 0.6, 0.4

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert command(*TINY, "--epochs", "3", "--runs-dir", tmp_path) == 130
    assert command(*TINY, "--epochs", "3", "--runs-dir", tmp_path) == 0
    (weights,) = tested
    folder = tmp_path / "mnist-vitdiff-seed0"
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert any(not torch.equal(weights[name], last["model"][name]) for name in best)
    assert json.loads((folder / "summary.json").read_text())["best_epoch"] == 2


def test_args_txt_repeats_a_run_and_a_run_killed_and_resumed_is_as_one_never_broken_off(finished, tmp_path):
    process = launch(f"@{finished / 'args.txt'}", "--runs-dir", tmp_path)
    folder = tmp_path / finished.name
    while not (folder / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and not (folder / "summary.json").exists()
    assert 1 <= len(untimed(folder)) < 3
    resumed = launch(f"@{finished / 'args.txt'}", "--runs-dir", tmp_path)
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert "going on after epoch" in out and err == ""  # plain lines and no bar where output is no terminal
    assert untimed(folder) == untimed(finished)
    assert (folder / "args.txt").read_bytes() == (finished / "args.txt").read_bytes()
    best = [torch.load(run / "best.pt", weights_only=True) for run in (folder, finished)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, finished)]
    for name in ("best_epoch", "val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        assert summaries[0][name] == summaries[1][name]


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_analysis_is_of_the_best_weights_and_eval_makes_it_again_to_the_byte(finished, mnist, tmp_path, capsys):
    config, summary = (json.loads((finished / name).read_text()) for name in ("config.json", "summary.json"))
    model = train.make_model(config)
    model.load_state_dict(torch.load(finished / "best.pt", weights_only=True))
    noise = read_table(finished / "noise.csv")
    assert [(row["corruption"], row["severity"]) for row in noise] == [
        (name, str(severity)) for name in train.CORRUPTIONS for severity in range(1, 6)]
    (row,) = [row for row in noise if (row["corruption"], row["severity"]) == ("distractors", "4")]
    damaged = torch.cat([corrupted(part.float(), "distractors", 4, mnist["test"], first=1_000 * i)
                         for i, part in enumerate(mnist["test"].images.split(1_000))])
    loss, accuracy = loss_by_hand(model, train.Split(damaged, mnist["test"].labels), config)
    assert float(row["test_loss"]) == pytest.approx(loss, abs=1e-5)
    assert float(row["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    attention = read_table(finished / "attention.csv")
    assert list(attention[0]) == ["condition", "block", "head", "irrelevant_share", "uniform_share", "ink_share",
                                  "entropy", "negative_share", "lambda", "signal_to_noise"]
    assert [(row["condition"], row["block"], row["head"]) for row in attention] == [
        (condition, "0", str(head)) for condition in ("clean", "gaussian_noise_3", "distractors_3")
        for head in range(2)]
    with numpy.load(finished / "attention.npz") as arrays:
        assert arrays["labels"].tolist() == list(range(8)) and arrays["images"].dtype == numpy.uint8
        for label, image in enumerate(arrays["images"]):
            first = (mnist["test"].labels == label).nonzero()[0].item()
            assert (image == mnist["test"].images[first].numpy()).all()
        with torch.no_grad():
            maps = model.eval().attention_maps(train.normalize(torch.from_numpy(arrays["images"]).float(), "mnist"))
        assert set(arrays) == {"images", "labels", "map_0"} and arrays["map_0"].shape == (8, 2, 5, 5)
        assert abs(arrays["map_0"] - maps[0].numpy()).max() < 1e-3
    folder = copy_run(finished, tmp_path)
    for name in ANALYSIS:
        (folder / name).unlink()
    assert command("--eval", folder, "--no-analysis") == 0
    assert not any((folder / name).exists() for name in ANALYSIS)
    assert command("--eval", folder) == 0
    for name in ANALYSIS:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    assert (folder / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    assert 0 < summary["analysis_seconds"] < 600


def test_a_run_is_finished_only_when_it_is_analysed(tmp_path, monkeypatch, capsys):
    real, folder = train.load_splits, tmp_path / "clutteredmnist-vitdiffv2-seed0"

    def smaller(*args):
        splits = {name: train.Split(split.images[:1_000], split.labels[:1_000])
                  for name, split in real(*args).items()}
        return splits

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_splits", smaller)
    flags = [*TINY, "--model", "vitdiffv2", "--dataset", "clutteredmnist", "--patch-size", "12", "--epochs", "1",
             "--analysis", "--runs-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(train, "measure_attention", interrupt)
        assert command(*flags) == 130
    assert not (folder / "summary.json").exists() and not (folder / "attention.csv").exists()
    assert command(*flags) == 0
    assert "going on after epoch 1 of 1" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == set(train.RECORDS)
    assert json.loads((folder / "config.json").read_text())["distractors"] == 4
    assert "--distractors 4\n" in (folder / "args.txt").read_text()
    assert {row["condition"] for row in read_table(folder / "attention.csv")} == {
        "0_distractors", "4_distractors", "8_distractors", "16_distractors", "gaussian_noise_3"}
    with numpy.load(folder / "attention.npz") as arrays:
        assert arrays["images"].shape == (8, 1, 60, 60) and arrays["map_0"].shape == (8, 2, 26, 26)
    assert command(*flags, "--distractors", "8") == 2
    assert_one_line(capsys, "distractors is 4 there and 8 here")


def test_an_attention_that_shows_no_map_is_refused_before_training_unless_without_analysis(
        tmp_path, monkeypatch, capsys):
    class Mean(torch.nn.Module):
        def __init__(self, dim, num_heads, depth, qkv_bias):
            super().__init__()
            self.proj = torch.nn.Linear(dim, dim)

        def forward(self, x):
            return self.proj(x.mean(1, keepdim=True).expand_as(x))

    monkeypatch.setitem(MODELS, "vitmean", dict(attention=Mean))
    flags = [*TINY, "--model", "vitmean", "--epochs", "1", "--runs-dir", tmp_path / "runs"]
    assert command(*flags, "--analysis") == 2
    assert_one_line(capsys, "vitmean: Mean has no attention_map(x)", "--no-analysis")
    assert not (tmp_path / "runs").exists()
    assert command(*flags) == 0


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    train.write_whole(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail)
        train.write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with open(path) as reader:
        train.write_whole(path, "new")
        assert reader.read() == "old"  # who reads meanwhile has the old file, whole
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_cuda_agrees_with_the_cpu(name):
    torch.manual_seed(0)
    model, images = random_(build_model(name)), torch.randn(8, 1, 28, 28).double()
    expected = model(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp, dataset", [
    ("off", "mnist"), ("bfloat16", "mnist"), ("float16", "mnist"), ("bfloat16", "clutteredmnist")])
def test_cuda_gives_the_same_record_for_the_same_seed(tmp_path, amp, dataset):
    for runs in ("first", "second"):
        assert command(*TINY, "--dataset", dataset, "--patch-size", "14" if dataset == "mnist" else "12", "--device",
                       "cuda", "--amp", amp, "--epochs", "2", "--analysis", "--runs-dir", tmp_path / runs) == 0
    first, second = (tmp_path / runs / f"{dataset}-vitdiff-seed0" for runs in ("first", "second"))
    assert untimed(first) == untimed(second)
    for name in ANALYSIS:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_has_the_canvases_of_the_cpu_and_the_same_corruption_at_every_call(mnist):
    split = train.Split(*(part[:1_000] for part in mnist["test"]))
    there = train.Split(*(part.cuda() for part in split))
    train.pick_device("cuda")  # which asks for deterministic algorithms
    (_, expected), = train.evaluation_pixels(split, cluttered())
    (index, canvases), = train.evaluation_pixels(there, cluttered())
    assert torch.equal(canvases.cpu(), expected)
    for name in train.CORRUPTIONS:
        first, second = (train.corrupt(canvases, name, 3, index, there) for _ in range(2))
        assert first.is_cuda and torch.equal(first, second) and not torch.equal(first, canvases)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("seeds", [["0"], ["0", "1", "2"]])
def test_cuda_graphs_and_compiled_steps_have_the_losses_of_plain_ones(tmp_path, seeds):
    flags = [*TINY, "--device", "cuda", "--amp", "off", "--epochs", "2", "--lr", "1e-3", "--muon-lr", "2e-3"]
    for flag in ("--compile", "--no-compile"):
        assert command(*flags, flag, "--seed", *seeds, "--runs-dir", tmp_path / flag) == 0
    for seed in seeds:
        first, second = (parted(tmp_path / flag / f"mnist-vitdiff-seed{seed}")
                         for flag in ("--compile", "--no-compile"))
        torch.testing.assert_close(first[:, 3], second[:, 3], rtol=0, atol=1e-4)


def test_products_are_trained_once(tmp_path, capsys):
    flags = [*TINY, "--epochs", "1", "--model", "vit", "vitdiffv2", "--seed", "0", "1", "--runs-dir", tmp_path]
    assert command(*flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"mnist-{model}-seed{seed}" for model in ("vit", "vitdiffv2") for seed in (0, 1)}
    assert untimed(tmp_path / "mnist-vit-seed0") != untimed(tmp_path / "mnist-vit-seed1")
    assert capsys.readouterr().out.count(" epoch 1/1 ") == 4
    shutil.rmtree(tmp_path / "mnist-vit-seed1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert command(*flags) == 0
    out = capsys.readouterr().out
    assert out.count(" epoch 1/1 ") == 1 and out.count(" parameters ") == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert command(*flags, "--model", "vit", "--overwrite") == 0
    assert capsys.readouterr().out.count(" epoch 1/1 ") == 2


STACK = [*TINY, "--dropout", "0.1", "--epochs", "3", "--seed", "0", "1", "2"]


@pytest.fixture(scope="module")
def finished_stack(tmp_path_factory):
    """Three seeds trained side by side and never broken off: the folder of their runs."""
    runs = tmp_path_factory.mktemp("stack")
    assert command(*STACK, "--runs-dir", runs) == 0
    return runs


def assert_same_runs(runs, others):
    for run in others.iterdir():
        assert untimed(runs / run.name) == untimed(run)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (runs / run.name, run)]
        for name in ("seed", "best_epoch", "val_loss", "test_loss", "test_accuracy"):
            assert summaries[0][name] == summaries[1][name]
        best = [torch.load(folder / "best.pt", weights_only=True) for folder in (runs / run.name, run)]
        assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


def test_each_seed_of_a_stack_has_records_of_its_own(finished_stack, capsys):
    folders = [finished_stack / f"mnist-vitdiff-seed{seed}" for seed in range(3)]
    assert sorted(finished_stack.iterdir()) == folders
    for seed, folder in enumerate(folders):
        assert {path.name for path in folder.iterdir()} == set(train.RECORDS) - ANALYSIS  # by --no-analysis
        config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
        assert config["seed"] == summary["seed"] == seed and config["stack"] == 3
        assert f"--seed {seed}\n" in (folder / "args.txt").read_text()
        assert (folder / "best.pt").stat().st_size < 3 * 4 * config["parameters"]  # one seed's weights, not all
        capsys.readouterr()
        assert command("--eval", folder, "--no-analysis") == 0
        again, recorded = (line.split()[1:] for line in capsys.readouterr().out.splitlines())
        assert again == recorded
    assert len({tuple(untimed(folder)[-1]) for folder in folders}) == 3


def test_a_stack_killed_and_resumed_is_as_one_never_broken_off(finished_stack, tmp_path):
    process = launch(*STACK, "--runs-dir", tmp_path)
    last = tmp_path / "mnist-vitdiff-seed2"
    while not (last / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and not (last / "summary.json").exists()
    assert command(*STACK, "--runs-dir", tmp_path) == 0
    assert_same_runs(tmp_path, finished_stack)


@pytest.mark.parametrize("renames", [1, 2])
def test_a_stack_killed_between_two_checkpoints_of_an_epoch_goes_on_together(
        finished_stack, tmp_path, monkeypatch, renames):
    replace, done = os.replace, []

    def killed(source, target):
        if Path(target).name == "last.pt" and len(done) == 3 + renames:  # in the second epoch
            raise KeyboardInterrupt
        done.extend([target] if Path(target).name == "last.pt" else [])
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert command(*STACK, "--runs-dir", tmp_path) == 130
    epochs = [len(torch.load(tmp_path / f"mnist-vitdiff-seed{seed}/last.pt", weights_only=True)["rows"])
              for seed in range(3)]
    assert epochs == [2] * renames + [1] * (3 - renames)
    assert command(*STACK, "--runs-dir", tmp_path) == 0
    assert_same_runs(tmp_path, finished_stack)


def test_seeds_that_are_not_equally_far_go_on_as_they_are_and_finished_ones_are_left_out(
        finished_stack, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished_stack / "mnist-vitdiff-seed1", tmp_path / "mnist-vitdiff-seed1")
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_finite", lambda folder, epoch, losses: 1 / (2 - epoch))  # killed in epoch 2
        with pytest.raises(ZeroDivisionError):
            command(*STACK, "--seed", "2", "--runs-dir", tmp_path)
    (tmp_path / "mnist-vitdiff-seed0").mkdir()
    torch.save(dict(rows=[]), tmp_path / "mnist-vitdiff-seed0/.last.pt.partial")  # whole, but of another epoch
    (tmp_path / "mnist-vitdiff-seed2/.last.pt.partial").write_bytes(b"cut off")
    capsys.readouterr()
    assert command(*STACK, "--runs-dir", tmp_path) == 0
    out = capsys.readouterr().out
    assert [out.count(f"seed{seed}  epoch ") for seed in range(3)] == [3, 0, 2]
    assert untimed(tmp_path / "mnist-vitdiff-seed1") == untimed(finished_stack / "mnist-vitdiff-seed1")


def test_seeds_that_cannot_be_stacked_are_trained_one_after_the_other(tmp_path, capsys, monkeypatch):
    class Fixed(SelfAttention):
        def __init__(self, dim, num_heads, **kwargs):
            super().__init__(dim, num_heads, **kwargs)
            self.register_buffer("scale", torch.ones(()))

    class InPlace(SelfAttention):
        def forward(self, x):
            out = torch.zeros(x.shape)
            out += super().forward(x)
            return out

    monkeypatch.setitem(MODELS, "vitfixed", dict(attention=Fixed))
    monkeypatch.setitem(MODELS, "vitinplace", dict(attention=InPlace))
    flags = [*TINY, "--epochs", "1", "--seed", "0", "1"]

    def stack(runs, model="vit"):
        return json.loads((tmp_path / runs / f"mnist-{model}-seed1/config.json").read_text())["stack"]

    for runs, model, more, size, why in [
            ("one", "vit", ["--stack", "1"], 1, ""), ("two", "vit", ["--stack", "2"], 2, ""),
            ("half", "vit", ["--amp", "float16"], 1, "vit: seeds are trained one after the other (they would share"),
            ("buffer", "vitfixed", [], 1, "no trained parameter"), ("inplace", "vitinplace", [], 1, "be mapped")]:
        start = time.perf_counter()
        assert command(*flags, "--model", model, *more, "--runs-dir", tmp_path / runs) == 0
        elapsed, out = time.perf_counter() - start, capsys.readouterr().out
        summaries = [json.loads(path.read_text()) for path in (tmp_path / runs).glob("*/summary.json")]
        assert sum(summary["seconds"] for summary in summaries) < elapsed  # of a stack, each has its share
        for summary in summaries:
            assert summary["train_seconds"] < summary["seconds"]
            assert summary["train_seconds"] == pytest.approx(55_000 / summary["images_per_second"])
        assert stack(runs, model) == size and why in out and ("one after the other" in out) == bool(why)


def torchrun(*flags, **options):
    """train.py in two processes, connected by gloo on loopback."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "train.py",
         *map(str, flags)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def parted(folder):
    return torch.tensor([[float(value) for value in row] for row in untimed(folder)], dtype=torch.double)


def test_two_processes_give_the_losses_of_one_and_a_dead_one_takes_the_run_down_until_it_is_resumed(tmp_path):
    """The last batch is a single image, of which one process has nothing."""
    flags = [*TINY, "--batch-size", "679", "--epochs", "5", "--lr", "1e-3", "--muon-lr", "2e-3", "--seed", "0", "1"]
    process = torchrun(*flags, "--runs-dir", tmp_path / "two")
    while not (tmp_path / "two/mnist-vitdiff-seed1/metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert re.search("process 0 (has lost another one|was stopped).*run the same command again", err)
    assert not (tmp_path / "two/mnist-vitdiff-seed0/summary.json").exists()
    process = torchrun(*flags, "--runs-dir", tmp_path / "two")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("going on after epoch") == 2 and out.count(" parameters ") == 2  # one process writes
    assert command(*flags, "--runs-dir", tmp_path / "one") == 0
    for seed in (0, 1):
        two, one = (tmp_path / runs / f"mnist-vitdiff-seed{seed}" for runs in ("two", "one"))
        assert json.loads((two / "config.json").read_text())["processes"] == 2
        torch.testing.assert_close(parted(two)[:, 3], parted(one)[:, 3], rtol=0, atol=1e-4)  # train_loss
        torch.testing.assert_close(parted(two)[:, 4], parted(one)[:, 4], rtol=0, atol=1e-3)  # train_accuracy
        torch.testing.assert_close(parted(two)[:, 5], parted(one)[:, 5], rtol=0, atol=1e-4)  # val_loss


def test_processes_together_say_what_is_wrong(tmp_path):
    for flags, words in [(["--eval", "nowhere"], "take one process: leave out torchrun"),
                         (["--model", "vitdif", "--runs-dir", tmp_path], "did you mean vitdiff?")]:
        process = torchrun(*flags)
        _, err = process.communicate(timeout=300)
        assert process.returncode != 0 and words in err


# The benchmark.

def test_benchmark_times_whole_steps(tmp_path, monkeypatch, capsys):
    """With a clock that gives every call of a step 20 ms, of an evaluation 500 ms and of the product its own time."""
    clock = iter([[[0.018, 0.02, 0.02, 0.022]] * 4 + [[2 * 2048**3 / 1e11]], [[0.5]] * 4])

    def time_in_turn(functions, device, rounds, calls):
        for function in functions:
            function()
        return next(clock)

    monkeypatch.setattr(train, "time_in_turn", time_in_turn)
    assert command(*TINY, "--benchmark", "--model", "vit", "vitdiff", "--seed", "0", "1", "--runs-dir", tmp_path) == 0
    with open(tmp_path / "benchmark.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["seeds"], row["compiled"]) for row in rows] == [
        ("vit", "1", "False"), ("vit", "2", "False"), ("vitdiff", "1", "False"), ("vitdiff", "2", "False")]
    tokens, dim = 5, 8  # a product of (a, b) by (b, c) is 2abc FLOPs, and twice that again in the backward pass
    attention = tokens * dim * 3 * dim + 2 * 2 * tokens * 4 + dim * dim
    products = 3 * (attention + 2 * dim * 16 + dim * 16 + 16 * 10) + 2 * 4 * 196 * dim  # no gradient of the images
    assert int(rows[0]["training_flops_per_image"]) == 2 * products
    for row in rows:
        images_per_second = int(row["seeds"]) * 1000 / 0.02
        expected = dict(ms_per_step=20, ms_per_seed=20 / int(row["seeds"]), share_of_alone=1 / int(row["seeds"]),
                        images_per_second=images_per_second, epoch_seconds=55_000 / 50_000,
                        evaluation_images_per_second=10_000, peak_gflops=100,
                        share_of_peak=images_per_second * int(row["training_flops_per_image"]) / 1e11)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
        assert float(row["ms_low"]) <= 20 <= float(row["ms_high"])
    out = capsys.readouterr().out
    assert out == (tmp_path / "benchmark.md").read_text() and "| vitdiff, mnist | 2 | no | 20.0 (" in out
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.md"}  # nothing is trained


def test_timing_waits_for_what_it_times():
    slow, quick = lambda: time.sleep(0.02), lambda: None
    first, second = train.time_in_turn([slow, quick], CPU, rounds=2, calls=3)
    assert len(first) == len(second) == 4 and min(first) >= 0.02 > min(second)


def test_peak_memory_is_the_most_that_new_tensors_take_at_a_time():
    old = torch.zeros(2**20)

    def function():
        first = torch.empty(2**18)  # 1 MB
        second = torch.cat([first, first]).view(2, -1)  # 2 MB
        del first
        return second + old[:2].view(2, 1)  # 2 MB

    assert train.peak_memory(function, CPU) == 4 * 2**20


def test_growth_finds_exponents(tmp_path, monkeypatch, capsys):
    """With a clock by which a step takes the square of its batch, and the memory as it is: about linear in it."""
    monkeypatch.setattr(train, "GROWTH", dict(batch_size=[500, 1000, 2000], patch_size=[14, 7, 5]))
    monkeypatch.setattr(train, "time_in_turn", lambda functions, device, rounds, calls: [
        [1e-6 * 500**2], [1e-6 * 1000**2], [1e-6 * 2000**2], [1.0], [10.0]])
    assert command(*TINY, "--benchmark", "growth", "--model", "vit", "--runs-dir", tmp_path) == 0
    with open(tmp_path / "growth.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["value"]) for row in rows] == [
        ("batch_size", "500"), ("batch_size", "1000"), ("batch_size", "2000"), ("tokens", "5"), ("tokens", "17")]
    lines = capsys.readouterr().out.splitlines()
    assert "| batch_size | vit, mnist | 500, 1000, 2000 | 250.0, 1000.0, 4000.0 | 2.00 |" in lines[2]
    assert f"| 1000.0, 10000.0 | {math.log(10) / math.log(17 / 5):.2f} |" in lines[3]
    memory = [float(row["peak_megabytes"]) for row in rows]
    assert memory[1] > 1000 * 28 * 28 * 4 / 2**20 and 0.9 < math.log(memory[2] / memory[0]) / math.log(4) < 1.1


def test_other_settings_in_a_run_folder_are_refused_and_named(finished, tmp_path, capsys):
    folder = copy_run(finished, tmp_path)
    assert command(*TINY, "--epochs", "4", "--lr", "0.01", "--runs-dir", folder.parent) == 2
    assert_one_line(capsys, "epochs is 3 there and 4 here", "lr is 0.006 there and 0.01 here", "--overwrite")
    assert untimed(folder) == untimed(finished)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json", "summary.json"])
def test_damaged_records_are_named(finished, tmp_path, capsys, name):
    folder = copy_run(finished, tmp_path)
    if name.endswith(".pt"):
        (folder / "summary.json").unlink()
    whole = (folder / name).read_bytes()
    for bad in (whole[:len(whole) // 2], b"", b"not a record"):
        (folder / name).write_bytes(bad)
        assert command(*TINY, "--dropout", "0.1", "--epochs", "3", "--runs-dir", folder.parent) == 2
        assert_one_line(capsys, str(folder / name), "damaged", "--overwrite")
        assert (folder / name).read_bytes() == bad
    assert untimed(folder) == untimed(finished)


def test_a_second_process_on_a_run_is_refused(tmp_path, capsys):
    folder = tmp_path / "mnist-vitdiff-seed0"
    with train.locked(folder):
        assert command(*TINY, "--runs-dir", tmp_path) == 2
    assert_one_line(capsys, str(folder), "another process")
    with train.locked(folder):
        pass  # the lock goes with its holder


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_record(tmp_path, monkeypatch, capsys):
    real = train.train_epoch

    def diverge(*args):
        losses, *rest = real(*args)
        losses[:, 7:] = math.nan if args[-1] == 2 else losses[:, 7:]
        return losses, *rest

    monkeypatch.setattr(train, "train_epoch", diverge)
    assert command(*TINY, "--epochs", "3", "--runs-dir", tmp_path) == 2
    assert_one_line(capsys, "loss is nan at epoch 2, step 8 of 55", "--lr")
    folder = tmp_path / "mnist-vitdiff-seed0"
    assert len(untimed(folder)) == 1 and not (folder / "summary.json").exists()
    assert torch.load(folder / "last.pt", weights_only=True)["rows"][-1]["epoch"] == 1


def test_a_rate_that_is_far_too_high_is_such_a_loss(tmp_path, capsys):
    assert command(*TINY, "--optimizer", "adamw", "--lr", "1e38", "--runs-dir", tmp_path) == 2
    assert_one_line(capsys, "the loss is", "at epoch 1, step ")


def test_ctrl_c_says_how_to_go_on(tmp_path):
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    process = launch(*TINY, "--epochs", "100", "--runs-dir", tmp_path, preexec_fn=heed)
    while not (tmp_path / "mnist-vitdiff-seed0/metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "run the same command again" in err
    assert untimed(tmp_path / "mnist-vitdiff-seed0")


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path):
    """A limit on the size of files stands in for the disk: config.json fits, a checkpoint does not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    process = launch(*TINY, "--epochs", "2", "--runs-dir", tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("\n") == 1 and "best.pt" in err and "Traceback" not in err
    assert {path.name for path in (tmp_path / "mnist-vitdiff-seed0").iterdir()} == {"config.json", "args.txt"}


@pytest.mark.parametrize("flags, words", [
    (["--model", "vitdif"], ["unknown model 'vitdif'", "did you mean vitdiff?"]),
    (["--dataset", "fashion-mnist"], ["unknown data set 'fashion-mnist'", "did you mean fashionmnist?"]),
    (["--patch-size", "5"], ["patch size 5 does not divide image size 28", "[1, 2, 4, 7, 14, 28]"]),
    (["--dim", "33"], ["width 33 is not divisible by 2 heads"]),
    (["--model", "vitdiffpaper", "--dim", "18", "--num-heads", "6"], ["18 is not divisible by 6 heads of 2 branches"]),
    (["--dim", "999999999999"], ["vitdiff on mnist: "]),
    (["--epochs", "0"], ["--epochs: '0' is not a whole number of at least 1"]),
    (["--epochs", "2.5"], ["--epochs: '2.5'"]),
    (["--batch-size", "0"], ["--batch-size: '0'"]),
    (["--batch-size", "55001"], ["--batch-size: 55001 is more than the 55000 training images of mnist"]),
    (["--lr", "nan"], ["--lr: 'nan' is not a number of at least 0"]),
    (["--lr=-1e-3"], ["--lr: '-1e-3'"]),
    (["--muon-lr", "inf"], ["--muon-lr: 'inf'"]),
    (["--weight-decay", "x"], ["--weight-decay: 'x'"]),
    (["--dropout", "1"], ["--dropout: '1' is not a number of at least 0 and below 1"]),
    (["--dropout=-0.1"], ["--dropout: '-0.1'"]),
    (["--label-smoothing", "1"], ["--label-smoothing: '1'"]),
    (["--warmup", "1.5"], ["--warmup: '1.5' is not a number from 0 to 1"]),
    (["--seed", "0", "4294967296"], ["--seed: '4294967296'"]),
    (["--optimizer", "sgd"], ["--optimizer", "adamw"]),
    (["--device", "cuda:99"], ["--device cuda:99 is not there", "--device auto"]),
    (["--device", "gpu"], ["--device gpu is not there"]),
    (["--nonsense"], ["--nonsense"]),
    (["--distractors", "4"], ["--distractors: mnist has none", "clutteredmnist or clutteredfashionmnist"]),
    (["--dataset", "clutteredmnist", "--distractors=-1"], ["--distractors: '-1' is not a whole number of at least 0"]),
    (["--stack", "0"], ["--stack: '0' is not a whole number of at least 1"]),
    (["--benchmark", "all"], ["--benchmark", "steps", "growth"]),
    (["@missing.txt"], ["missing.txt", "No such file"]),
    (["@data"], ["data", "directory"]),
    (["@data/MNIST/raw/t10k-labels-idx1-ubyte.gz"], ["an @file does not hold flags"]),
    (["--data-dir", "README.md"], ["--data-dir: README.md is a file"]),
    (["--runs-dir", "README.md"], ["--runs-dir: README.md is a file"]),
    (["--runs-dir", "README.md/runs"], ["README.md"]),
    (["--runs-dir", "/proc/runs"], ["/proc/runs"]),
    (["--eval", "nowhere"], ["nowhere/config.json is not there"]),
    (["--eval", "nowhere", "--epochs", "3"], ["leave out --epochs"]),
])
def test_bad_input_is_one_line_and_exit_2(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    if "--runs-dir" not in flags and "--eval" not in flags:
        flags = [*flags, "--runs-dir", tmp_path / "runs"]
    assert command(*flags) == 2
    assert_one_line(capsys, "train.py: error: ", *words)
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "mnist-vitdiff-seed0").write_text("mine")
    assert command("--runs-dir", tmp_path) == 2
    assert_one_line(capsys, "mnist-vitdiff-seed0 is a file")
    (tmp_path / "mnist-vit-seed0").mkdir()
    (tmp_path / "mnist-vit-seed0/metrics.csv").write_text("mine")
    assert command("--model", "vit", "--runs-dir", tmp_path) == 2
    assert_one_line(capsys, "metrics.csv but no config.json")
    assert (tmp_path / "mnist-vit-seed0/metrics.csv").read_text() == "mine"


def test_help_and_bad_flags_answer_without_torch():
    for flags, status in [(["--help"], 0), (["--epochs", "0"], 2)]:
        process = subprocess.run([sys.executable, "-X", "importtime", HERE / "train.py", *flags],
                                 capture_output=True, text=True)
        assert process.returncode == status
        assert "argparse" in process.stderr and not re.search(r"\| +(torch|numpy|tqdm)\b", process.stderr)
    help_text = subprocess.run([sys.executable, HERE / "train.py", "--help"], capture_output=True, text=True).stdout
    for name in [*MODELS, *train.DATASETS]:
        assert re.search(rf"\b{name}\b", help_text)
    args = train.parse_flags([])
    for dataset, facts in train.DATASETS.items():
        settings = train.resolve_settings(args, "vitbalanced", dataset, 0, CPU)
        assert settings["dim"] == 48 and settings["epochs"] == facts["defaults"]["epochs"]


def test_the_commands_of_the_readme_in_miniature(tmp_path):
    """The three commands as a user types them, on real MNIST, for one epoch."""
    process = launch("--model", "vitdiff", "--dataset", "mnist", "--epochs", "1", "--runs-dir", tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert re.search(r"37,290 parameters  val loss \d.\d{4}  test loss \d.\d{4}  test accuracy \d\d.\d\d%", out), out
    summary = json.loads((tmp_path / "mnist-vitdiff-seed0/summary.json").read_text())
    assert summary["test_accuracy"] > 0.85
    process = launch(tmp_path, script="plot.py")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert f"{summary['test_accuracy']:.2%}" in out
    for name in ("val-loss", "val-accuracy", "lambda", "noise", "relevance", "maps", "blocks"):
        assert (tmp_path / f"mnist-{name}.png").read_bytes().startswith(b"\x89PNG")
    collected = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=HERE,
                               capture_output=True, text=True)
    assert collected.returncode == 0 and "test_the_commands_of_the_readme_in_miniature" in collected.stdout


# Charts and tables.

def record(root, model="vit", seed=0, dataset="mnist", epochs=20, values=None, lambdas=(), test_accuracy=None,
           **settings):
    """The records of a made-up finished run: a folder below root."""
    folder = root / f"{dataset}-{model}-seed{seed}"
    folder.mkdir(parents=True)
    values = values or [0.5 + math.exp(-epoch) + 0.01 * seed for epoch in range(1, epochs + 1)]
    config = dict(model=model, dataset=dataset, seed=seed, epochs=epochs, device="cpu", parameters=33_034) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "val_loss", "val_accuracy", *(f"lambda_{i}" for i in range(len(lambdas)))])
        writer.writerows([epoch, value, 1 - value / 10, *lambdas] for epoch, value in enumerate(values, 1))
    (folder / "summary.json").write_text(json.dumps(dict(
        parameters=config["parameters"], val_loss=values[-1], test_loss=values[-1] - 0.01,
        test_accuracy=0.98 + 0.001 * seed if test_accuracy is None else test_accuracy,
        milliseconds_per_step=7.0)))
    return folder


def analyse(folder, accuracies, share, entropy=2.0, negative=0.0, weight=0.1):
    """Made-up results of an analysis: accuracies {corruption: five}, figures of two blocks and heads, and a map."""
    with open(folder / "noise.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["corruption", "severity", "test_loss", "test_accuracy"])
        writer.writerows([name, severity, 1.0, accuracy] for name, values in accuracies.items()
                         for severity, accuracy in enumerate(values, 1))
    with open(folder / "attention.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["condition", "block", "head", "irrelevant_share", "uniform_share", "ink_share", "entropy",
                         "negative_share", "lambda", "signal_to_noise"])
        writer.writerows([condition, block, head, share + 0.1 * block + 0.02 * head + more, 0.4, 0.6, entropy, negative,
                          0.2 + 0.3 * block, 2.0 + head]
                         for condition, more in [("clean", 0.0), ("gaussian_noise_3", 0.05)]
                         for block in range(2) for head in range(2))
    maps = numpy.zeros((8, 2, 17, 17), dtype=numpy.float16)
    maps[:, :, 0, 1:] = weight
    maps[0, 0, 0, 6] = -3 * weight  # of the second row's second patch; the mean of the heads is -weight
    numpy.savez(folder / "attention.npz", images=numpy.full((8, 1, 28, 28), 9, numpy.uint8), labels=numpy.arange(8),
                map_0=numpy.ones_like(maps), map_1=maps)


def charts(root, dataset="mnist"):
    datasets, _ = plot.group_runs(plot.find_runs(root)[0])
    groups, styles = datasets[dataset], plot.pick_styles(datasets)
    return plot.make_charts(dataset, groups, styles) | plot.draw_analyses(dataset, groups, styles)


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_a_drawn_line_is_the_mean_of_the_records_and_the_band_their_deviation(tmp_path):
    record(tmp_path, "vit", 0, epochs=3, values=[0.9, 0.7, 0.6])
    record(tmp_path, "vit", 1, epochs=3, values=[0.8, 0.7, 0.5])
    record(tmp_path, "vitdiff", 0, epochs=3, values=[0.7, 0.6, 0.55], lambdas=[0.2, 0.35])
    figures = charts(tmp_path)
    lines = lines_of(figures["val-loss"].axes[0])
    assert lines["vit (2 seeds)"].get_xdata().tolist() == [1, 2, 3]
    assert lines["vit (2 seeds)"].get_ydata() == pytest.approx([0.85, 0.7, 0.55])
    assert lines["vitdiff (1 seed)"].get_ydata() == pytest.approx([0.7, 0.6, 0.55])
    (band,) = figures["val-loss"].axes[0].collections
    deviation = 0.1 / math.sqrt(2)  # of two values 0.1 apart, by n - 1
    assert {round(y, 6) for y in band.get_paths()[0].vertices[:, 1]} >= {
        round(0.85 - deviation, 6), round(0.85 + deviation, 6), round(0.55 + deviation, 6), 0.7}
    ends = {text.get_text(): text.xy for text in figures["val-loss"].axes[0].texts}
    assert ends == {"vit 0.550": (3, pytest.approx(0.55)), "vitdiff 0.550": (3, 0.55),
                    "vit, published 0.638": (3, 0.638), "vitdiff, published 0.624": (3, 0.624)}
    assert lines_of(figures["val-accuracy"].axes[0])["vit (2 seeds)"].get_ydata() == pytest.approx([0.915, 0.93, 0.945])
    panels = figures["lambda"].axes
    assert [lines_of(axes)["vitdiff (1 seed)"].get_ydata()[-1] for axes in panels] == [0.2, 0.35]
    assert all("vit (2 seeds)" not in lines_of(axes) for axes in panels)


def test_published_figures_are_marked_where_model_and_data_set_match(tmp_path):
    record(tmp_path, "vitbalanced", dataset="fashionmnist", epochs=30)
    record(tmp_path, "vitdiffv2", dataset="fashionmnist", epochs=30)
    record(tmp_path, "vit", dataset="kmnist")
    axes = charts(tmp_path, "fashionmnist")["val-loss"].axes[0]
    marks = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert marks == [[[30, 0.792]]]
    assert all(line.get_linestyle() != "None" for line in charts(tmp_path, "kmnist")["val-loss"].axes[0].get_lines())


def test_labels_do_not_overlap(tmp_path):
    for i, model in enumerate(plot.MODELS):  # five lines that end within a hair's breadth of each other
        record(tmp_path, model, values=[0.9 - 0.018 * epoch + 0.0001 * i for epoch in range(20)])
    figures = charts(tmp_path)
    for figure in (figures["val-loss"], figures["val-accuracy"]):
        figure.draw_without_rendering()
        width = figure.get_window_extent().width
        for axes in figure.axes:
            boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
            assert len(boxes) >= 5
            assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:]))
            assert all(box.x1 <= width for box in boxes)


def test_spread_moves_no_further_than_it_must():
    assert plot.spread([3.0, 0.0, 10.0], 1.0, 0.0, 10.0) == [3.0, 0.0, 10.0]
    assert plot.spread([1.0, 1.0], 1.0, 0.0, 10.0) == [0.5, 1.5]
    assert plot.spread([0.0, 5.0, 5.5, 5.2], 1.0, 0.0, 10.0) == pytest.approx([0.0, 4.2333, 6.2333, 5.2333], abs=1e-3)
    assert plot.spread([0.1, 0.2, 9.9], 1.0, 0.0, 10.0) == [0.0, 1.0, 9.9]
    assert plot.spread([9.9, 9.8, 4.0], 1.0, 0.0, 10.0) == [10.0, 9.0, 4.0]


def test_runs_of_other_settings_are_lines_of_their_own(tmp_path):
    record(tmp_path / "a", "vit", 0)
    record(tmp_path / "b", "vit", 0, epochs=3)
    record(tmp_path / "c", "vit", 0)  # the same settings and seed once more
    datasets, skipped = plot.group_runs(plot.find_runs(tmp_path)[0])
    assert set(datasets["mnist"]) == {"vit, epochs 20", "vit, epochs 3"}
    assert len(skipped) == 1 and str(tmp_path / "c") in skipped[0] and str(tmp_path / "a") in skipped[0]
    texts = {text.get_text() for text in charts(tmp_path)["val-loss"].axes[0].texts}
    assert texts == {"vit, epochs 20 0.500", "vit, epochs 3 0.550", "vit, published 0.638"}
    record(tmp_path, "vitbalanced", dim=48)  # its own width goes without saying
    record(tmp_path, "vitcosine", epochs=1)
    datasets, _ = plot.group_runs(plot.find_runs(tmp_path)[0])
    assert list(datasets["mnist"]) == [
        "vit, epochs 20", "vit, epochs 3", "vitbalanced, epochs 20", "vitcosine, epochs 1"]
    record(tmp_path, "vitdiff")
    datasets, _ = plot.group_runs(plot.find_runs(tmp_path)[0])
    assert list(datasets["mnist"]) == ["vit", "vit, epochs 3", "vitbalanced", "vitdiff", "vitcosine, epochs 1"]


def test_the_table_has_means_and_confidence_intervals_and_bold_for_the_best(tmp_path):
    for seed, loss in enumerate([0.50, 0.52, 0.54]):
        record(tmp_path, "vit", seed, epochs=1, values=[loss])
    record(tmp_path, "vitdiff", 0, epochs=1, values=[0.51], parameters=37_290)
    record(tmp_path, "vitbalanced", 0, epochs=1)  # with too few parameters to be the one that is published
    (datasets, _) = plot.group_runs(plot.find_runs(tmp_path)[0])
    table = plot.write_table("mnist", datasets["mnist"])
    half = 4.303 * 0.02 / math.sqrt(3)  # Student's t with 2 degrees of freedom; the deviation of 0.50, 0.52, 0.54
    half = f"{half:.4f}"
    assert f"| vit | 33,034 | 3 | 0.5200 ± {half} | 0.5100 ± {half} | **98.10%** ± 0.25% | **7.0** | " in table
    assert "| vitdiff | 37,290 | 1 | **0.5100** | **0.5000** | 98.00% | **7.0** | 0.624, 0.618, 95.75% |" in table
    assert "| vitbalanced | 33,034 | 1 | 0.8679 | 0.8579 | 98.00% | **7.0** |  |" in table
    assert "one run of 20 epochs" in table
    assert plot.confidence([1.0]) is None


def test_intervals_and_p_values_are_those_worked_out_by_hand():
    assert plot.bootstrap_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]
    assert plot.bootstrap_interval([0.0, 2.0]) == [0.0, 2.0]  # a quarter of the resamples have twice the one or other
    # One of five is 1: its count in a resample is binomial (5, 0.2), at most 0, 1, 2, 3 with .328, .737, .942, .993.
    assert plot.bootstrap_interval([0.0, 0.0, 1.0, 0.0, 0.0]) == pytest.approx([0.0, 0.6])
    # Of 1, 2, 4 only their own signs, and all of the others, reach a sum of 7: 2 of 8.
    assert plot.sign_flip_p([1.0, 2.0, 4.0]) == plot.sign_flip_p([-1.0, -2.0, -4.0]) == 2 / 8
    # Of 1, 2, -4 sums are 1, 3, 5, 7 and their opposites; |-1| is reached by all 8. Of 3, -1, 3 they are 1, 1, 5, 7.
    assert plot.sign_flip_p([1.0, 2.0, -4.0]) == 1.0
    assert plot.sign_flip_p([3.0, -1.0, 3.0]) == 4 / 8
    assert plot.sign_flip_p([0.0, 0.0]) == 1.0
    assert plot.sign_flip_p([0.1] * 5) == 2 / 32  # rounding does not keep a sum from reaching itself
    assert plot.sign_flip_p([0.1] * 24) < 1e-4  # of chosen signs, where all would be too many
    assert plot.sign_flip_p([1.0, -1.0] * 11 + [1.0]) > 0.5


def test_a_model_is_compared_with_vit_of_the_same_seed_and_settings(tmp_path):
    for seed, (vit, diff) in enumerate([(0.980, 0.981), (0.970, 0.973), (0.960, 0.964)]):
        record(tmp_path, "vit", seed, test_accuracy=vit)
        record(tmp_path, "vitdiff", seed, test_accuracy=diff)
    record(tmp_path, "vitdiff", 3, test_accuracy=0.1)  # has no partner
    record(tmp_path, "vitbalanced", 0, dim=48)  # nor has a single pair an interval
    record(tmp_path / "short", "vitdiff", 0, epochs=3)
    record(tmp_path / "short", "vitdiff", 1, epochs=3)
    groups = plot.group_runs(plot.find_runs(tmp_path)[0])[0]["mnist"]
    assert {label: [(run["seed"], base["seed"]) for run, base in pairs]
            for label, pairs in plot.pair_with_vit(groups).items()} == {"vitdiff": [(0, 0), (1, 1), (2, 2)]}
    table = plot.write_table("mnist", groups)
    # Differences 0.1, 0.3 and 0.4 points; their extremes are 1 resample in 27 each, more than 2.5%.
    assert ("| vitdiff | +0.27 (+0.10 to +0.40) | 3 of 3 | 0.250 | +0.0000 (+0.0000 to +0.0000) | 0 of 3 | 1.000 |"
            in table)
    assert "sign-flip" in table
    assert plot.comparison_table({"vitdiff": groups["vitdiff"]}, dict(x=(len, 2, True))) == ""
    falling = dict(x=(lambda run: -100 * run["summary"]["test_accuracy"], 1, False))
    assert "| vitdiff | -0.3 (-0.4 to -0.1) | 3 of 3 | 0.250 |" in plot.comparison_table(groups, falling)


def test_the_chart_of_parameters_shows_accuracies_intervals_and_what_is_published(tmp_path):
    for seed, accuracy in enumerate([0.98, 0.99]):
        record(tmp_path, "vit", seed, test_accuracy=accuracy)
    record(tmp_path, "vitdiffv2", 0, test_accuracy=0.97)
    both, alone = charts(tmp_path)["parameters"].axes
    for axes in (both, alone):
        vit, vitdiffv2 = axes.containers
        assert vit.lines[0].get_ydata() == pytest.approx([0.985])
        (interval,) = vit.lines[2][0].get_segments()
        assert interval[1][1] - interval[0][1] == pytest.approx(2 * 12.706 * 0.005)
        assert vitdiffv2.lines[0].get_ydata() == [0.97] and vitdiffv2.lines[2] == ()
    assert [line.get_xydata().tolist() for line in both.get_lines() if line.get_markerfacecolor() == "none"] == [
        [[33_802, 0.9551]]]
    assert all(line.get_markerfacecolor() != "none" for line in alone.get_lines())


def record_analyses(root):
    """Two seeds of `vit` and one of `vitdiff` with made-up analyses, and a run without."""
    for seed in range(2):
        analyse(record(root, "vit", seed), dict(blur=[0.9, 0.8, 0.7, 0.6, 0.5 - 0.1 * seed], shot_noise=[0.6] * 5),
                share=0.2 + 0.02 * seed)
    analyse(record(root, "vitdiff", 0), dict(blur=[0.9, 0.9, 0.8, 0.8, 0.6], shot_noise=[0.4] * 5), share=0.1,
            negative=0.25, weight=0.2)
    record(root, "vitdiffv2", 0)


def test_charts_of_an_analysis_show_its_figures(tmp_path):
    record_analyses(tmp_path)
    figures = charts(tmp_path)
    panels = {axes.get_title(): axes for axes in figures["noise"].axes}
    assert set(panels) == {"blur", "shot noise"}
    lines = lines_of(panels["blur"])
    assert set(lines) == {"vit", "vitdiff"}
    assert lines["vit"].get_ydata() == pytest.approx([0.9805, 0.9, 0.8, 0.7, 0.6, 0.45])  # severity 0 is the clean test
    assert lines["vitdiff"].get_ydata() == pytest.approx([0.98, 0.9, 0.9, 0.8, 0.8, 0.6])
    (band,) = panels["blur"].collections
    heights = {round(y, 6) for y in band.get_paths()[0].vertices[:, 1]}
    assert {round(0.45 - 0.1 / math.sqrt(2), 6), round(0.45 + 0.1 / math.sqrt(2), 6)} <= heights

    for block, axes in enumerate(figures["relevance"].axes):
        assert axes.get_title() == f"block {block}"
        vit, vitdiff = (bars for bars in axes.containers if hasattr(bars, "patches"))
        assert [bar.get_height() for bar in vit.patches] == pytest.approx([0.22 + 0.1 * block, 0.27 + 0.1 * block])
        assert [bar.get_height() for bar in vitdiff.patches] == pytest.approx([0.11 + 0.1 * block, 0.16 + 0.1 * block])
        (interval,) = vit.errorbar.lines[2]
        ends = interval.get_segments()[0][:, 1]
        assert ends[1] - ends[0] == pytest.approx(2 * 12.706 * 0.01)  # Student's t, 1 degree; deviation 0.02 / sqrt 2
        assert vitdiff.errorbar is None  # of one seed there is none
        assert {tuple(line.get_ydata()) for line in axes.get_lines() if line.get_linestyle() == "--"} == {(0.4, 0.4)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "gaussian noise, severity 3"]

    shown = [image for axes in figures["maps"].axes for image in axes.images if image.get_cmap().name == "RdBu_r"]
    assert len(shown) == 16
    for image, weight in zip(shown, [0.1] * 8 + [0.2] * 8):
        assert image.get_clim() == pytest.approx((-weight, weight), rel=1e-3)  # white is zero, one scale a row
        assert image.get_array()[0, 0] == pytest.approx(weight, rel=1e-3)
    assert [image.get_array()[1, 1] for image in shown[::8]] == pytest.approx([-0.1, -0.2], rel=1e-3)

    blocks = {(axes.get_ylabel(), axes.get_title()): axes for axes in figures["blocks"].axes}
    negative = [container.lines[0].get_ydata().tolist()
                for container in blocks["share of negative weight", ""].containers]
    assert negative == [[0, 0], [0.25, 0.25]]
    assert blocks["lambda", ""].containers[0].lines[0].get_ydata() == pytest.approx([0.2, 0.5])


def test_tables_of_an_analysis_are_means_with_intervals_and_ratios_to_vit(tmp_path):
    record_analyses(tmp_path)
    groups = plot.group_runs(plot.find_runs(tmp_path)[0])[0]["mnist"]
    table = plot.noise_table("mnist", plot.with_analysis(groups, "noise"))
    half = 12.706 * 0.01 / math.sqrt(2) / math.sqrt(2)  # of the mean errors 0.35 and 0.36
    assert f"| vit | 2 | 31.0% (1.00) | 40.0% (1.00) | 35.5% ± {half:.1%} (1.00) |" in table
    assert f"| vitdiff | 1 | 20.0% ({0.2 / 0.31:.2f}) | 60.0% (1.50) | 40.0% ({0.4 / 0.355:.2f}) |" in table
    assert "vitdiffv2" not in table and "sign-flip" not in table
    without = plot.noise_table("mnist", {"vitdiff": groups["vitdiff"]})
    assert "| vitdiff | 1 | 20.0% | 60.0% | 40.0% |" in without
    table = plot.attention_table("mnist", plot.with_analysis(groups, "attention"))
    assert "attention to the irrelevant in the last block" in table
    assert "| vit | 2 | 32.0% ± 12.7% (2.50) | 37.0% ± 12.7% (2.50) |" in table
    assert "| uniform attention | | 40.0% (1.00) | 40.0% (1.00) |" in table
    analyse(record(tmp_path, "vitdiff", 1), dict(blur=[0.9, 0.9, 0.8, 0.8, 0.6], shot_noise=[0.4] * 5), share=0.16)
    groups = plot.group_runs(plot.find_runs(tmp_path)[0])[0]["mnist"]
    table = plot.noise_table("mnist", plot.with_analysis(groups, "noise"))
    assert "| vitdiff | +4.50 (+4.00 to +5.00) | 0 of 2 | 0.500 |" in table  # 40% against 35 and 36%
    table = plot.attention_table("mnist", plot.with_analysis(groups, "attention"))
    assert "| vitdiff | -8.00 (-10.00 to -6.00) | 2 of 2 | 0.500 |" in table  # clean, of the last block


def test_analyses_of_other_depths_and_conditions_are_drawn_side_by_side(tmp_path):
    record_analyses(tmp_path)
    other = record(tmp_path / "other", "vit", 0, depth=3, distractors=6)
    analyse(other, dict(blur=[0.9] * 5), share=0.5)
    text = (other / "attention.csv").read_text()
    (other / "attention.csv").write_text(text.replace("clean", "6_distractors").replace("_3,1,", "_3,2,"))
    figures = charts(tmp_path)
    assert [axes.get_title() for axes in figures["relevance"].axes] == ["block 0", "block 1", "block 2"]
    assert [axes.get_title() for axes in figures["noise"].axes] == ["blur"]
    groups = plot.group_runs(plot.find_runs(tmp_path)[0])[0]["mnist"]
    rows = plot.attention_table("mnist", plot.with_analysis(groups, "attention")).splitlines()
    assert rows[2] == "| model | seeds | clean | gaussian noise, severity 3 | 6 distractors |"
    assert "| vit, depth 3, distractors 6 | 1 |  | 66.0% (2.50) |  |" in rows  # what is not there is left out


@pytest.mark.parametrize("name, content", [
    ("noise.csv", b"corruption,severity,test_loss,test_accuracy\nblur,1,0.5,nan\n"), ("noise.csv", b"\xff\x00"),
    ("attention.csv", b"condition,block,head\nclean,0,0\n"), ("attention.csv", b"condition,block\nclean,x\n"),
    ("attention.npz", b""), ("attention.npz", b"PK\x03\x04"), ("attention.npz", b"not an archive")])
def test_a_damaged_analysis_is_named(tmp_path, name, content):
    record_analyses(tmp_path)
    (tmp_path / "mnist-vit-seed1" / name).write_bytes(content)
    runs, skipped = plot.find_runs(tmp_path)
    assert len(runs) == 3
    (line,) = skipped
    assert line.startswith(f"{tmp_path / 'mnist-vit-seed1'}: damaged: {name} (")


def test_plot_names_what_it_skips_and_needs_neither_torch_nor_data(tmp_path):
    record(tmp_path / "reference", "vit")
    (record(tmp_path, "vitdiff") / "summary.json").unlink()
    (record(tmp_path, "vitdiffv2") / "metrics.csv").write_text("epoch,val_loss\n1,0.5\n")
    (record(tmp_path, "vitbalanced") / "config.json").write_text("{")
    (record(tmp_path, "vitdiffpaper") / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    record(tmp_path, "vitnan", lambdas=["nan"])
    (tmp_path / "holiday").mkdir()
    code = ("import sys\nsys.modules.update(torch=None, torchvision=None, train=None, vit=None)\n"
            "import plot\nsys.exit(plot.main(sys.argv[1:]))")
    process = subprocess.run([sys.executable, "-c", code, tmp_path, "--out", tmp_path / "out", "--format", "svg"],
                             cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    skipped = dict(line.removeprefix("skipped ").split(": ", 1) for line in process.stderr.splitlines())
    assert {Path(folder).name: reason.split(":")[0] for folder, reason in skipped.items()} == {
        "mnist-vitdiff-seed0": "unfinished", "mnist-vitdiffv2-seed0": "damaged", "mnist-vitbalanced-seed0": "damaged",
        "mnist-vitdiffpaper-seed0": "damaged", "mnist-vitnan-seed0": "damaged", "holiday": "not a run"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "mnist-val-loss.svg", "mnist-val-accuracy.svg", "mnist-parameters.svg", "mnist-table.md"}
    xml.etree.ElementTree.parse(tmp_path / "out/mnist-val-loss.svg")
    assert (tmp_path / "out/mnist-table.md").read_text() in process.stdout


@pytest.mark.parametrize("name", ["benchmark", "growth"])
def test_readme_has_the_benchmarks_as_they_were_written(name):
    with open(HERE / f"runs/reference/{name}.csv") as file:
        milliseconds = [float(row["ms_per_step"]) for row in csv.DictReader(file)]
    table = (HERE / f"runs/reference/{name}.md").read_text()
    assert table in (HERE / "README.md").read_text()
    shown = [float(value) for line in table.splitlines()[2:]
             for value in re.findall(r"[\d.]+", line.split("|")[4])][::3 if name == "benchmark" else 1]
    assert sorted(shown) == pytest.approx(sorted(milliseconds), abs=0.051)


def blocks_of(table):
    """The tables in a text, without the words around them."""
    return re.findall(r"(?:^\|.*\n)+", table, re.MULTILINE)


def assert_written_and_in_the_readme(table, path):
    """The table is what the file has, and the README has all its rows."""
    assert path.read_text() == table
    readme = (HERE / "README.md").read_text()
    assert all(block in readme for block in blocks_of(table))


def test_readme_tables_are_those_of_the_reference_runs():
    folder = HERE / "runs/reference"
    runs, skipped = plot.find_runs(folder)
    datasets, doubled = plot.group_runs(runs)
    assert set(datasets) == {"mnist", "fashionmnist", "clutteredmnist"} and not skipped and not doubled
    for dataset, groups in datasets.items():
        assert set(groups) == set(MODELS) - ({"vitbalanced"} if dataset == "clutteredmnist" else set())
        for name, make_table in [("table", plot.write_table), ("noise-table", plot.noise_table),
                                 ("attention-table", plot.attention_table)]:
            assert_written_and_in_the_readme(make_table(dataset, groups), folder / f"{dataset}-{name}.md")


@pytest.mark.parametrize("fault, names, seeds, changed", [
    ("activated", {"mnist"}, [0, 1, 2], {}),
    ("ordered", {"mnist"}, [0, 1, 2], {}),
    ("matched", {"mnist", "fashionmnist"}, [0, 1, 2], {"vit": dict(mlp_dim=160)}),
    ("rate", {"mnist"}, [0, 1, 2, 3, 4], {"vit": dict(muon_lr=0.008), "vitdiff": dict(muon_lr=0.008)})])
def test_readme_tables_of_the_published_faults(fault, names, seeds, changed):
    """They are of runs/faults, by the reference recipe but for the fault; changed: {model: its other settings}."""
    folder = HERE / "runs/faults" / fault
    runs, _ = plot.find_runs(folder)
    datasets, _ = plot.group_runs(runs)
    assert set(datasets) == names
    for dataset, groups in datasets.items():
        assert {label: [run["seed"] for run in members] for label, members in groups.items()} == {
            "vit": seeds, "vitdiff": seeds}
        assert_written_and_in_the_readme(plot.write_table(dataset, groups), folder / f"{dataset}-table.md")
    for _, config, *_ in runs:
        unchanged = HERE / f"runs/reference/{config['dataset']}-{config['model']}-seed0"
        reference = json.loads((unchanged / "config.json").read_text())
        flags = train.parse_flags(["--compile"])
        settings = train.resolve_settings(flags, config["model"], config["dataset"], config["seed"], CPU)
        assert {name: config[name] for name in settings} == settings | changed.get(config["model"], {})
        assert config["git_commit"].removesuffix("-dirty") == reference["git_commit"]


def test_the_reference_runs_are_of_all_seeds_and_of_one_commit():
    configs = [config for _, config, *_ in plot.find_runs(HERE / "runs/reference")[0]]
    assert sorted((config["dataset"], config["model"], config["seed"]) for config in configs) == sorted(
        [*itertools.product(["mnist", "fashionmnist"], MODELS, range(5)),
         *itertools.product(["clutteredmnist"], ["vit", "vitdiff", "vitdiffpaper", "vitdiffv2"], range(3))])
    (commit,) = {config["git_commit"] for config in configs}
    assert re.fullmatch("[0-9a-f]{40}", commit)


def test_vit_was_tuned_no_less_than_vitdiff():
    """The trials on record, of MNIST and Fashion-MNIST; in brackets is of how many runs a figure is the mean."""
    text = (HERE / "runs/reference/README.md").read_text().split("## How the recipe was chosen")[1]
    trials = [[], []]
    for line in text[:text.index("Cluttered MNIST, one seed")].splitlines():
        for column, cell in zip(trials, line.split("|")[2:4] if line.startswith("|") else []):
            if re.search(r"\d", cell):
                runs = re.search(r"\((\d+)\)", cell)
                column.append(int(runs[1]) if runs else 1)
    (vit, vit_runs), (vitdiff, vitdiff_runs) = ((len(column), sum(column)) for column in trials)
    assert (f"{vit} figures of `vit`, from {vit_runs} training runs, and {vitdiff} of `vitdiff`, from {vitdiff_runs}"
            in " ".join(text.split()))
    assert vit_runs >= vitdiff_runs


def test_a_flag_left_out_has_the_value_of_the_reference_runs():
    for folder, config, *_ in plot.find_runs(HERE / "runs/reference")[0]:
        flags = train.parse_flags(["--seed", str(config["seed"]), "--compile"])
        settings = train.resolve_settings(flags, config["model"], config["dataset"], config["seed"], CPU)
        assert {name: config[name] for name in settings} == settings


def test_the_reference_weights_give_the_recorded_figures(capsys):
    assert train.main(["--eval", str(HERE / "runs/reference/mnist-vitdiff-seed0"), "--no-analysis", "--device", "cpu",
                       "--data-dir", str(HERE / "data")]) == 0
    again, recorded = (re.search(r"loss ([\d.]+)  test accuracy ([\d.]+)%", line).groups()
                       for line in capsys.readouterr().out.splitlines())
    assert [float(figure) for figure in again] == pytest.approx([float(figure) for figure in recorded], abs=0.02)
    assert float(again[0]) == pytest.approx(float(recorded[0]), abs=1e-4)


def test_the_readme_says_how_far_three_epochs_lead_in_how_many_seconds():
    summary = json.loads((HERE / "runs/three-epochs/mnist-vitdiff-seed0/summary.json").read_text())
    assert summary["epochs"] == 3 and summary["test_accuracy"] > 0.9575  # the best that is published
    readme = (HERE / "README.md").read_text()
    assert f"{summary['test_accuracy']:.2%}" in readme and f"{summary['seconds']:.0f} s" in readme


def test_the_readme_says_how_far_thirty_epochs_of_canvases_lead():
    summary = json.loads((HERE / "runs/thirty-epochs/clutteredmnist-vit-seed0/summary.json").read_text())
    error = 1 - summary["test_accuracy"]
    assert summary["epochs"] == 30 and summary["parameters"] <= 42_000 and error < 0.0404  # that of Mnih et al. 2014
    assert f"errs on {error:.2%}" in (HERE / "README.md").read_text()


@pytest.mark.parametrize("flags, words", [
    (["empty"], "no finished run"), (["nowhere"], "is not a folder"), (["file"], "is not a folder"),
    (["runs", "--out", "file"], "cannot write into"), (["runs", "--format", "gif"], "--format")])
def test_plot_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    record(Path("runs"))
    try:
        status = plot.main(flags)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert_one_line(capsys, "plot.py: error: ", words)
