"""Where the program runs: device and precision, the ranks of torchrun, threads, memory and the terminal."""

import contextlib
import ctypes
import datetime
import itertools
import logging
import os
import platform
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import distributed

import command
from command import UserError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that products on CUDA repeat; read at the first alone
try:  # without a folder for compiled code even the optimizers of torch cannot be imported
    os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or ".", exist_ok=True)
    CACHE_PROBLEM = None
except OSError as error:
    CACHE_PROBLEM = f"{os.environ.pop('TORCHINDUCTOR_CACHE_DIR')} cannot be made ({error.strerror})"
# What torch.compile says on a machine without a card, and what torch says of its own use of its own functions.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda line: "No CUDA runtime is found" not in line.msg)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")


# The device.

def pick_device(name):
    """The torch.device that --device names, or a UserError where this machine does not have it. auto is the first that
    works of CUDA, MPS and the CPU; a line says which does not.

    Of processes that torchrun started, each takes a CUDA device of its own.
    """
    if started_by_torchrun() and name.startswith("cuda:"):
        raise UserError(f"--device {name}: torchrun gives each process a card of its own: give --device cuda")
    present = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    choices = [kind for kind, is_present in present.items() if is_present] if name == "auto" else [name]
    for choice, following in itertools.zip_longest(choices, choices[1:]):
        try:
            device = open_device(choice)
            break
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            problem = command.first_line(error)
        if started_by_torchrun():  # whose processes must all be on the same kind of device
            raise UserError(f"--device {choice} is not available ({problem}): give --device cpu, or start fewer "
                            "processes")
        if not following:
            raise UserError(f"--device {choice} is not available ({problem}): try --device auto")
        print(f"{choice} cannot be used ({problem}): {following} is used in its place", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def open_device(name):
    """The torch.device of this name, once a tensor was made there."""
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK'] if started_by_torchrun() else 0}"
    with warnings.catch_warnings():  # of a card that torch no longer supports, where the tensor decides
        warnings.filterwarnings("ignore", message=r"(?s).*(cuda|compute) capability")
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    return device


def name_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def resolve_amp(name, device):
    """The precision that --amp names, with auto decided for the device."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"  # few CPUs compute in half precision
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"


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
        # The others wait while the first analyses, longer than the default of 10 or 30 minutes.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))


def disconnect_ranks():
    if connected():
        distributed.destroy_process_group()


def connected():
    return distributed.is_available() and distributed.is_initialized()


def rank():
    return distributed.get_rank() if connected() else 0


def world_size():
    return distributed.get_world_size() if connected() else 1


def on_first_rank(function, *arguments):
    """What the function returns in the first rank, which alone calls it, in every rank."""
    box = [function(*arguments) if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(box)
    return box[0]


def say(line):
    if rank() == 0:
        print(line, flush=True)


def part_of_rank(batch):
    """This rank's part of a batch (S, B, ...): (S, about B / world size, ...)."""
    return batch.tensor_split(world_size(), 1)[rank()] if world_size() > 1 else batch


def all_reduce(tensors):
    """Replace each tensor by its sum over the ranks."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


# Threads.

def take_threads(count, device):
    """Have torch take `count` threads, what --threads gives; without it, on a CPU and where OMP_NUM_THREADS does not
    say, as many as there are idle cores, at least one and at most torch's default, with a line where they are fewer.
    Returns their number.

    Threads that wait for one another in every small product make two trainings side by side many times slower.
    """
    default = torch.get_num_threads()
    idle = idle_cores() if device.type == "cpu" and default > 1 and not threads_given(count) else None
    if idle is not None and round(idle) < default:
        count = max(1, round(idle))
        print(f"{count} of {default} threads: other processes leave {idle:.1f} cores idle (--threads decides)",
              file=sys.stderr, flush=True)
    torch.set_num_threads(count or default)
    return count or default


def threads_given(count):
    return bool(count or os.environ.get("OMP_NUM_THREADS"))


def idle_cores(seconds=0.2):
    """How many of the cores that this process may use others leave idle, measured while it sleeps; None where Linux
    does not tell."""
    def read():
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        times = torch.tensor([list(map(int, line[1:9])) for line in lines if line[0] in names])
        return times[:, 3:5].sum().item(), times.sum().item(), len(times)  # idle and waiting for a disk, all, cores
    try:
        before = read()
        time.sleep(seconds)
        after = read()
    except (OSError, ValueError, AttributeError, IndexError):
        return None
    return after[2] * (after[0] - before[0]) / max(1, after[1] - before[1])


# Memory and the terminal.

def keep_freed_memory():
    """Have glibc keep the memory of one step for the next: to give it back and take it again costs a stack up to
    a fifth of its step in page faults."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def is_out_of_memory(error):
    """Of a CPU, of CUDA and of MPS, which have no type of error in common."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory"))


@contextlib.contextmanager
def enough_memory():
    """A block, or a function, for which too little memory is a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory: choose a smaller --batch-size, --stack, --dim or --depth, a larger "
                        "--patch-size, or --no-analysis, and --overwrite what other settings have begun") from None


def outlive_terminal():
    """Let no terminal that is closed end this process."""
    with contextlib.suppress(AttributeError, ValueError):  # Windows has no SIGHUP, and a thread cannot choose
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
