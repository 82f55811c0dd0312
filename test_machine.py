"""Claims about where the program runs: device and precision, threads, the terminal, the processes of torchrun."""

import datetime
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch

import data
import machine
import records
from test_data import CPU, HERE, cut, mnist
from test_train import (SMALL, STACK, TINY, assert_one_line, assert_same_run, column, command, end_at, finished_stack,
                        launch, read_json, run_plugin, small, untimed)

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize("name, expected, line", [
    ("cuda:1", "cuda:1", ""), ("auto", "cuda:0", ""), ("auto", "cpu", "cuda cannot be used (no kernel image): cpu is"),
    ("cuda", None, "--device cuda is not available (no kernel image): try --device auto")])
def test_cuda_device(monkeypatch, capsys, name, expected, line):
    """The card that is asked for becomes the current one. One that torch cannot use gives way to the next device where
    none was named, and a line says so; where it was named, that is an error."""
    current, zeros = [], torch.zeros

    def make(*sizes, device):
        if line and device.type == "cuda":
            raise RuntimeError("no kernel image\nCompile with TORCH_USE_CUDA_DSA")
        return zeros(*sizes)

    monkeypatch.setattr(torch, "zeros", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    if expected:
        assert machine.pick_device(name) == torch.device(expected) and len(current) == expected.startswith("cuda")
    else:
        with pytest.raises(records.UserError) as error:
            machine.pick_device(name)
        assert str(error.value) == line
    assert_one_line(capsys, line) if expected and line else None
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # before any product


def test_card_of_a_rank(monkeypatch):
    """Of processes that torchrun started none takes a card by its number, which all would share."""
    monkeypatch.setattr(machine, "started_by_torchrun", lambda: True)
    with pytest.raises(records.UserError, match="--device cuda:1: torchrun gives each process a card of its own"):
        machine.pick_device("cuda:1")


@pytest.mark.parametrize("has_bfloat16, expected", [(True, "bfloat16"), (False, "off")])
def test_precision(monkeypatch, has_bfloat16, expected):
    """--amp auto is bfloat16 on a card that computes in it, and float32 on another and on a CPU."""
    assert machine.resolve_amp("auto", CPU) == "off" and machine.resolve_amp("float16", CPU) == "float16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert machine.resolve_amp("auto", torch.device("cuda")) == expected


# Threads.

@pytest.fixture
def threads():
    """torch as if it had four threads by default, and no variable that says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        torch.set_num_threads(4)
        yield patch
        torch.set_num_threads(1)


def test_idle_cores(monkeypatch):
    """Of the cores that this process may use those count that are idle, or wait for a disk."""
    texts = iter(["cpu0 50 0 0 50 0 0 0 0\ncpu1 0 0 0 90 0 0 0 0\ncpu2 0 0 10 90 0 0 0 0\nintr 1\n",
                  "cpu0 60 0 5 55 0 0 0 0\ncpu1 20 0 0 90 0 0 0 0\ncpu2 0 0 10 100 10 0 0 0\nintr 2\n"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: next(texts))
    assert machine.idle_cores(0) == pytest.approx(2 * (5 + 20) / 40)


@pytest.mark.parametrize("idle, variable, flag, device, expected", [
    (3.8, None, None, "cpu", 4), (2.4, None, None, "cpu", 2), (0.1, None, None, "cpu", 1), (None, None, None, "cpu", 4),
    (0.1, "4", None, "cpu", 4), (0.1, None, 3, "cpu", 3), (0.1, None, None, "cuda", 4)])
def test_threads(threads, capsys, idle, variable, flag, device, expected):
    """On a CPU there are as many threads as idle cores, and a line says so where they are fewer than torch's own;
    --threads and OMP_NUM_THREADS decide where given."""
    threads.setattr(machine, "idle_cores", lambda: idle)
    if variable:
        threads.setenv("OMP_NUM_THREADS", variable)
    assert machine.take_threads(flag, torch.device(device)) == torch.get_num_threads() == expected
    if expected < 4 and not flag:
        assert_one_line(capsys, f"{expected} of 4 threads", f"{idle} cores idle", "--threads")
    assert capsys.readouterr().err == ""


def test_threads_of_a_resumed_run(threads, tmp_path):
    """A run is resumed with the threads that it began with, however many cores are idle by then, unless --threads says
    otherwise; others beside it have as many as there are idle cores."""
    used, flags = [], [*TINY, "--epochs", "2", "--runs-dir", tmp_path]
    splits = {name: cut(split, 100) for name, split in mnist().items()}
    threads.setattr(data, "load_splits", lambda *arguments: splits)
    threads.setattr(machine, "idle_cores", lambda: 3.0)
    with pytest.MonkeyPatch.context() as patch:
        end_at(patch, epoch=2)
        for seed in ("0", "1"):
            assert command(*flags, "--seed", seed) == 130
    threads.setattr(machine, "idle_cores", lambda: 2.0)
    draw_epoch = data.draw_epoch
    threads.setattr(data, "draw_epoch", lambda *arguments: (
        used.append(torch.get_num_threads()) or draw_epoch(*arguments)))
    for more in (["--seed", "0", "2", "--stack", "1"], ["--seed", "1", "--threads", "1"]):
        torch.set_num_threads(4)
        assert command(*flags, *more) == 0
    facts = [read_json(tmp_path / f"mnist-vitdiff-seed{seed}/config.json")["facts"] for seed in range(3)]
    assert used == [3, 2, 2, 1] and [fact["threads"] for fact in facts] == [3, 3, 2]


# The terminal.

def test_closed_terminal(finished_stack, tmp_path, monkeypatch, capsys):
    """A training outlives the terminal that it was started in, progress bar and all. When it is killed later on and
    started again, it leaves the record of one that was never interrupted."""
    flags = [*STACK, "--plugin", run_plugin(tmp_path, monkeypatch, SMALL), "--runs-dir", tmp_path]
    process, terminal = pty.fork()
    if not process:
        os.chdir(HERE)
        os.execve(sys.executable, [sys.executable, "train.py", *map(str, flags)],
                  os.environ | dict(OMP_NUM_THREADS="1", KILLED="rank 0 epoch 3 batch 3"))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    said = b""
    while b" epoch 1/3 " not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL and b"steps" in said
    assert command(*flags) == 0
    assert capsys.readouterr().out.count("resumed after epoch 2 of 3") == 2
    for folder in finished_stack.iterdir():
        assert_same_run(tmp_path / folder.name, folder)


# Processes.

def test_the_first_process_may_be_slow(monkeypatch):
    """The other processes wait for hours while the first analyses alone."""
    found = {}
    monkeypatch.setattr(machine, "started_by_torchrun", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: found.update(options))
    machine.connect_ranks(CPU)
    assert found["timeout"] > datetime.timedelta(hours=6)


def test_two_processes(tmp_path, monkeypatch):
    """Two processes give the losses of one. When one dies the other ends too, and the same command resumes. The last
    batch is a single image, of which one process has nothing."""
    def torchrun(**environment):  # connected by gloo on loopback
        return launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *flags,
                      "--runs-dir", tmp_path / "two", **environment)

    plugin = run_plugin(tmp_path, monkeypatch, SMALL)
    flags = [*TINY, "--epochs", "3", "--lr", "1e-3", "--muon-lr", "2e-3", "--seed", "0", "1", "--plugin", plugin]
    folders = [tmp_path / f"two/mnist-vitdiff-seed{seed}" for seed in (0, 1)]
    process = torchrun(KILLED="rank 1 epoch 2 batch 3")
    process.communicate(timeout=300)
    assert process.returncode != 0 and [len(untimed(folder)) for folder in folders] == [1, 1]
    process = torchrun()
    assert command(*flags, "--runs-dir", tmp_path / "one") == 0  # meanwhile
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("resumed after epoch 1 of 3") == 2 and out.count(" epoch 3/3 ") == 2  # one process writes
    for two in folders:
        one = tmp_path / "one" / two.name
        assert records.read_config(two)[1]["processes"] == 2
        for name, atol in [("train_loss", 1e-4), ("train_accuracy", 1e-3), ("val_loss", 1e-4)]:
            torch.testing.assert_close(column(two, name), column(one, name), rtol=0, atol=atol)
