"""Claims about where the program runs: device and precision, busy cores, the processes of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machine
import records
from test_data import CPU
from test_train import SMALL, TINY, assert_one_line, column, command, launch, run_plugin, small, untimed

pytestmark = pytest.mark.usefixtures("small")


def test_cuda_device_is_made_current(monkeypatch):
    """--device cuda:1 makes that card the current one."""
    current, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    assert machine.pick_device("cuda:1") == torch.device("cuda:1") == current[0]


def test_precision(monkeypatch):
    """--amp auto is bfloat16 on a card that has it, float16 on another, and off on a CPU."""
    assert machine.resolve_amp("auto", CPU) == "off" and machine.resolve_amp("float16", CPU) == "float16"
    for has_bfloat16, expected in [(True, "bfloat16"), (False, "float16")]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
        assert machine.resolve_amp("auto", torch.device("cuda")) == expected


WARN_IF_BUSY = machine.warn_if_busy  # as it is outside of these tests


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_busy_cores(monkeypatch, capsys):
    """A core that another process keeps busy is not idle; when fewer are idle than threads are used, a line says so."""
    monkeypatch.setattr(torch, "get_num_threads", os.cpu_count)
    with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"],
                          stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        idle = machine.idle_cores()
        process.kill()
    assert 0 <= idle < os.cpu_count() - 0.4
    monkeypatch.setattr(machine, "idle_cores", lambda: idle)
    WARN_IF_BUSY(torch.device("cuda"))
    WARN_IF_BUSY(CPU)
    if os.cpu_count() > 1 and idle < os.cpu_count() - 0.5:
        assert_one_line(capsys, f"{idle:.1f} idle", "OMP_NUM_THREADS=1")
    for cores in (None, os.cpu_count()):
        monkeypatch.setattr(machine, "idle_cores", lambda: cores)
        WARN_IF_BUSY(CPU)
    assert capsys.readouterr().err == ""


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
