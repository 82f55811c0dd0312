"""Claims about the benchmark."""

import functools
import itertools
import math
import types

import pytest
import torch

import benchmark
import machine
import stack
import train
from test_data import CPU, cut, mnist
from test_train import TINY, assert_one_line, command, needs_cuda, settings_for, small, table
from vit import MODELS, SelfAttention

pytestmark = pytest.mark.usefixtures("small")


def run_benchmark(*flags):
    return command(*TINY, *flags, main=benchmark.main)


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Its figures follow from whole steps, by a clock that gives every step 20 ms, every evaluation 500 ms, and the
    product its own time; nothing is trained, nor compiled where that cannot be, as on CUDA in float16."""
    clock = iter([[[0.018, 0.02, 0.02, 0.022]] * 4 + [[2 * 2048**3 / 1e11]], [[0.5]] * 2])

    def time_in_turn(functions, device, rounds, calls):
        for function in functions:
            function()
        return next(clock)

    monkeypatch.setattr(benchmark, "time_in_turn", time_in_turn)
    monkeypatch.setattr(stack, "is_compiled", lambda choice, steps, device, amp, is_compiled=stack.is_compiled: (
        is_compiled(choice, steps, torch.device("cuda"), "float16")))
    assert run_benchmark("--model", "vit", "vitdiff", "--seed", "0", "1", "--compile", "yes", "--runs-dir",
                         tmp_path) == 0
    rows = table(tmp_path / "benchmark.csv")
    assert [(row["model"], row["seeds"], row["compiled"]) for row in rows] == [
        ("vit", "1", "False"), ("vit", "2", "False"), ("vitdiff", "1", "False"), ("vitdiff", "2", "False")]
    tokens, dim = 5, 8  # a product of (a, b) by (b, c) is 2abc FLOPs, and twice that again in the backward pass
    attention = tokens * dim * 3 * dim + 2 * 2 * tokens * 4 + dim * dim
    products = 3 * (attention + 2 * dim * 16 + dim * 16 + 16 * 10) + 2 * 4 * 196 * dim  # no gradient of the images
    assert int(rows[0]["training_flops_per_image"]) == 2 * products
    for row in rows:
        images_per_second = int(row["seeds"]) * 500 / 0.02
        expected = dict(ms_per_step=20, ms_per_seed=20 / int(row["seeds"]), relative_to_one_seed=1 / int(row["seeds"]),
                        images_per_second=images_per_second, epoch_seconds=55_000 / 25_000,
                        evaluation_images_per_second=10_000, peak_gflops=100,
                        share_of_peak=images_per_second * int(row["training_flops_per_image"]) / 1e11)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
        assert float(row["ms_low"]) <= 20 <= float(row["ms_high"])
    out = capsys.readouterr().out
    assert out.endswith((tmp_path / "benchmark.md").read_text()) and "| vitdiff, mnist | 2 | no | 20.0 (" in out
    assert out.startswith("steps are not captured") and out.count("not captured") == 1
    for amp, dtype in dict(off=torch.float32, bfloat16=torch.bfloat16).items():
        assert [benchmark.largest_product(amp, device) for device in (torch.device("cuda"), CPU)] == [
            (8192, dtype), (2048, torch.float32)]
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.md"}


def test_benchmark_of_what_is_not_analysed_or_stacked(tmp_path, monkeypatch):
    """An attention needs no map for it; seeds that train.py would train one after the other are timed as one."""
    class Mapless(SelfAttention):
        attention_map = property()

    monkeypatch.setitem(MODELS, "mapless", dict(attention=Mapless))
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    assert run_benchmark("--model", "mapless", "--seed", "0", "1", "--stack", "1", "--compile", "no", "--runs-dir",
                         tmp_path) == 0
    assert [row["seeds"] for row in table(tmp_path / "benchmark.csv")] == ["1"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_the_benchmark_is_one_of_training(tmp_path, monkeypatch, compiled):
    """Each call takes one step of train.py with a whole batch of all seeds, more of them than an epoch has, and nothing
    is written. The compiler is a stand-in that takes what torch traces as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    calls, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *batch, **others: (
        calls.append(batch) or train_step(*batch, **others)))
    step = benchmark.make_step(settings_for(*TINY), [0, 1], cut(mnist()["train"], 1_100), CPU, compiled)
    weights = []
    for _ in range(5):
        step()
        weights.append(torch.cat([leaf.detach().clone() for leaf in calls[-1][0].parameters()], dim=1))
    assert all((after != before).any(1).all() for before, after in itertools.pairwise(weights))
    assert [tuple(labels.shape) for _, _, labels, _ in calls] == [(2, 500)] * 5
    assert not list(tmp_path.iterdir())


def test_timing(monkeypatch):
    """What is timed takes turns, and the first call of each turn, which takes longer, is not counted: by a clock that
    the timed functions set."""
    now, calls = [0.0], []

    def spend(name, seconds):
        def function():
            now[0] += seconds if calls and calls[-1] == name else 10
            calls.append(name)
        return function

    monkeypatch.setattr(benchmark, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    times = benchmark.time_in_turn([spend("slow", 3), spend("quick", 0.5)], CPU, rounds=2, calls=3)
    assert times == [[3, 3, 3, 3], [0.5, 0.5, 0.5, 0.5]]
    assert calls == (["slow"] * 3 + ["quick"] * 3) * 2


def test_growth(tmp_path, monkeypatch, capsys):
    """Exponents are slopes of logarithms: by a clock by which a step takes the square of its batch. What does not fit
    the images is left out, and of one value alone there is no slope."""
    monkeypatch.setattr(benchmark, "GROWTH", dict(batch_size=[50, 100, 200, 10**5], patch_size=[14, 7, 5], depth=[1]))
    monkeypatch.setattr(benchmark, "time_in_turn", lambda functions, device, rounds, calls: [
        [1e-4 * 50**2], [1e-4 * 100**2], [1e-4 * 200**2], [1.0], [10.0], [1.0]])
    assert run_benchmark("--growth", "--model", "vit", "--runs-dir", tmp_path) == 0
    rows = table(tmp_path / "growth.csv")
    assert [(row["size"], row["value"]) for row in rows] == [
        ("batch_size", "50"), ("batch_size", "100"), ("batch_size", "200"), ("tokens", "5"), ("tokens", "17"),
        ("depth", "1")]
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:] if line[:1] == "|"]
    assert len(lines) == 2
    assert lines[0] == ["batch_size", "vit, mnist", "50, 100, 200", "250.0, 1000.0, 4000.0", "2.00"]
    assert lines[1][3:] == ["1000.0, 10000.0", f"{math.log(10) / math.log(17 / 5):.2f}"]
    assert out == (tmp_path / "growth.md").read_text()
    monkeypatch.setattr(benchmark, "MOST_TOKENS", 1)
    assert run_benchmark("--growth", "--model", "vit", "--runs-dir", tmp_path) == 2
    assert_one_line(capsys, "no image has 1 tokens or fewer", "--patch-size")


def test_benchmark_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """The benchmark takes one process, and answers wrong flags as train.py does."""
    for flags, words in [(["--model", "vitdif"], ["vitdiff?"]), (["--growth", "3"], ["3"]), ([], ["torchrun"])]:
        monkeypatch.setattr(machine, "started_by_torchrun", lambda: not flags)
        assert run_benchmark("--runs-dir", tmp_path / "runs", *flags) == 2
        assert_one_line(capsys, "benchmark.py: error: ", *words)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(machine, "started_by_torchrun", lambda: False)
    for flags, words in [(["--growth", "--dim", "12", "--num-heads", "3"], ["width 32", "3 heads"]),
                         (["--batch-size", "5000"], ["a batch of 5000", "2001 training images of mnist"])]:
        assert run_benchmark("--runs-dir", tmp_path / "runs", *flags) == 2
        assert_one_line(capsys, "benchmark.py: error: ", *words)
        assert not list((tmp_path / "runs").iterdir())


@needs_cuda
def test_peak_memory():
    """The peak of a step is the most that new tensors take at a time."""
    device = machine.pick_device("cuda")
    torch.use_deterministic_algorithms(False)
    old = torch.zeros(2**20, device=device)

    def function():
        first = torch.empty(2**18, device=device)  # 1 MB
        second = torch.cat([first, first]).view(2, -1)  # 2 MB
        del first
        return second + old[:2].view(2, 1)  # 2 MB

    assert benchmark.peak_memory(function, device) == 4 * 2**20
