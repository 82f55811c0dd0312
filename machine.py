"""Where the program runs: device and precision, the ranks of torchrun, threads and memory."""

import contextlib
import ctypes
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import distributed

import records
from records import UserError


# The device.

def pick_device(name):
    """The torch.device that --device names, or a UserError where this machine does not have it.

    Of processes that torchrun started, each takes a CUDA device of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK'] if started_by_torchrun() else 0}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not available ({records.first_line(error)}): try --device auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that the same seed gives the same record
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def name_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def resolve_amp(name, device):
    """The precision that --amp names, with auto decided for the device."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"  # on a CPU half precision is slower than float32
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def precision(amp, device):
    """The arguments of torch.autocast for the precision `amp`: off, bfloat16 or float16."""
    return dict(device_type=device.type, dtype=getattr(torch, amp, None), enabled=amp != "off")


# Ranks: the processes that torchrun connected. The first alone reads and writes the runs' folders.

def started_by_torchrun():
    return distributed.is_available() and distributed.is_torchelastic_launched()


def connect_ranks(device):
    """Connect the processes that torchrun started, if it did."""
    if started_by_torchrun():
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"torchrun does not work on {device.type}: give --device cpu")
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def disconnect_ranks():
    if world_size() > 1:
        distributed.destroy_process_group()


def rank():
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size():
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def on_first_rank(function, *arguments):
    """What the function returns in the first rank, which alone calls it, in every rank."""
    box = [function(*arguments) if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(box)
    return box[0]


def part_of_rank(batch):
    """This rank's part of a batch (S, B, ...): (S, about B / world size, ...)."""
    return batch.tensor_split(world_size(), 1)[rank()] if world_size() > 1 else batch


def all_reduce(tensors):
    """Replace each tensor by its sum over the ranks."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


# Threads and memory.

def warn_if_busy(device):
    """Say so if other processes leave this machine fewer idle cores than this one has threads: threads that wait for
    one another in every small product make two trainings side by side many times slower."""
    threads = torch.get_num_threads()
    idle = idle_cores() if device.type == "cpu" and threads > 1 else None
    if idle is not None and idle < threads - 0.5:
        print(f"other processes leave {idle:.1f} idle cores for {threads} threads, which would slow both down many "
              "times: set OMP_NUM_THREADS=1 for each, or wait for them", file=sys.stderr, flush=True)


def idle_cores(seconds=0.2):
    """How many cores other processes leave idle, measured while this one sleeps; None where Linux does not tell."""
    def read():
        user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return idle + iowait, user + nice + system + idle + iowait + sum(rest[:3])
    try:
        before = read()
        time.sleep(seconds)
        after = read()
    except (OSError, ValueError):
        return None
    return os.cpu_count() * (after[0] - before[0]) / max(1, after[1] - before[1])


def keep_freed_memory():
    """Have glibc keep the memory of one step for the next: to give it back and take it again costs a stack up to
    a fifth of its step in page faults."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
