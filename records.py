"""A run's folder: settings and facts, metrics, analyses, checkpoints; written whole, read with clear errors, locked.

    runs/mnist-vitdiff-seed0/   args.txt, config.json, metrics.csv, noise.csv, attention.csv, attention.npz,
                                summary.json, best.pt, last.pt

A run is finished if and only if summary.json exists. Everything but the checkpoints is read without torch.
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import types
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes off the same run
    fcntl = None

ANALYSIS = ["noise.csv", "attention.csv", "attention.npz", "response.csv"]
CHARTED = ["config.json", "metrics.csv", *ANALYSIS]  # read by plot.py, besides summary.json, which has their checksums
FILES = ["summary.json", "config.json", "args.txt", "metrics.csv", *ANALYSIS, "best.pt", "last.pt"]
MODEL_SETTINGS = ["patch_size", "dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "dropout"]
AUGMENTATION = ["rotation", "scale", "shear", "shift", "flip", "brightness"]
RECIPE_SETTINGS = ["epochs", "batch_size", "optimizer", "lr", "muon_lr", "weight_decay", "warmup", "decay", "clip",
                   "label_smoothing", "distractors", *AUGMENTATION, "amp"]
# All that decides the outcome of a run. Whatever else config.json holds is a fact, which sets no run apart.
SETTINGS = ["model", "dataset", "seed", "plugin", *MODEL_SETTINGS, *RECIPE_SETTINGS]
SUMMARY_FIGURES = ["parameters", "epochs", "best_epoch", "val_loss", "val_accuracy", "test_loss", "test_accuracy"]
# Corruptions in noise.csv, besides those of whole images: {part of the image: name}.
PARTIAL_NOISE = {part: f"gaussian_noise_on_{part}_patches" for part in ("relevant", "irrelevant")}
ATTENTION_FIGURES = ["irrelevant_share", "uniform_share", "ink_share", "entropy", "negative_share", "lambda",
                     "signal_to_noise"]
RESPONSE_FIGURES = ["noise_to_signal_1", "noise_to_signal_2", "noise_to_signal", "common_share_1", "common_share_2",
                    "common_share", "noise_cosine", "signal_cosine"]


class UserError(Exception):
    """What the user can put right: a command prints it as one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag in one line, and reads flags from @FILE where that is allowed."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def exit_status(prog, command, *args):
    """Run `command(*args)`: 0, or 2 after one line for a UserError, or 130 after Ctrl-C."""
    try:
        command(*args)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted: run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def number(kind, what, is_right):
    """An argparse type: a `kind` (int or float) for which `is_right` holds, described by `what`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if is_right(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return parse


def check_name(kind, name, names, advice=""):
    """Raise a UserError that suggests the nearest of `names` unless `name` is one of them."""
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise UserError(f"unknown {kind} {name!r}: {hint} are {', '.join(names)}{advice}")


def first_line(error):
    """What an exception says, cut to one line; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def run_folder(runs_dir, settings):
    return Path(runs_dir) / "{dataset}-{model}-seed{seed}".format(**settings)


# Writing.

def write_whole(path, content):
    """Write bytes or text whole or not at all: a reader, or a run killed meanwhile, never sees a part.

    Raises:
        UserError: if the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): nothing written before is lost; put that right "
                        "and run the same command again") from None


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_csv(path, rows, number="{:.6f}", **formats):
    """rows: dicts whose keys are the columns; formats: {column: format} of floats that are not written as `number`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: formats.get(name, number if isinstance(value, float) else "{}").format(value)
                         for name, value in row.items()})
    write_whole(path, table.getvalue())


def write_config(folder, settings, facts, plugin=None):
    """config.json, and args.txt: the flags that repeat the run, one a line, to be read again as @FILE. A plugin is
    copied, and the flag names the copy."""
    def flag(name, value):
        name = name.replace("_", "-")
        return (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name} {value}"

    flags = dict(settings)
    if plugin:
        flags["plugin"] = shlex.quote(str(folder / plugin.name))
        write_whole(folder / plugin.name, plugin.read_bytes())
    write_json(folder / "config.json", dict(settings=settings, facts=facts))
    write_whole(folder / "args.txt", "".join(
        flag(name, value) + "\n" for name, value in flags.items() if value is not None))


def write_metrics(folder, rows):
    """rows: a dict of numbers for each epoch, with lambda_0, lambda_1, ... of the differential blocks."""
    write_csv(folder / "metrics.csv", rows, lr="{:.8g}", seconds="{:.3f}", images_per_second="{:.0f}")


def write_arrays(path, arrays):
    """arrays: {name: numpy array}, as a compressed .npz file."""
    content = io.BytesIO()
    numpy.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())


def write_summary(folder, figures):
    """summary.json, which finishes the run, with a checksum of each file that the charts are drawn from."""
    write_json(folder / "summary.json", figures | dict(crc32=checksums(folder, figures)))


def checksums(folder, figures):
    """CRC-32 of the figures of summary.json and of the files that plot.py reads, where they exist: {name: number}."""
    sums = {name: zlib.crc32((folder / name).read_bytes()) for name in CHARTED if (folder / name).exists()}
    return sums | {"summary.json": figures_checksum(figures)}


def figures_checksum(summary):
    figures = {name: value for name, value in summary.items() if name != "crc32"}
    return zlib.crc32(json.dumps(figures, sort_keys=True).encode())


def write_checkpoint(path, content):
    """content: dicts and lists of plain values and tensors, which are saved as CPU tensors of their own memory."""
    import torch

    def on_cpu(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: on_cpu(part) for key, part in value.items()}
        return [on_cpu(part) for part in value] if isinstance(value, list) else value

    archive = io.BytesIO()  # in memory, so that a full disk is an OSError, which torch.save makes another error of
    torch.save(on_cpu(content), archive)
    write_whole(path, archive.getvalue())


# Reading.

@contextlib.contextmanager
def reading(path):
    """A block that reads one file and checks what it holds: what fails there is a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, EOFError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, MemoryError,
            RecursionError, NotImplementedError, RuntimeError, csv.Error, pickle.UnpicklingError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{path} is damaged or not of this run ({first_line(error)}): move it away, or train the run "
                        "afresh with --overwrite") from None


def check(condition, complaint):
    if not condition:
        raise ValueError(complaint)


def check_finite(values, what):
    check(all(type(value) in (int, float) and abs(value) < 1e30 for value in values), f"{what} is not a finite number")


def check_shares(values, what):
    check_finite(values, what)
    check(all(0 <= value <= 1 for value in values), f"{what} is not from 0 to 1")


def read_checkpoint(path):
    """What a .pt file holds, with its tensors on the CPU, after the CRC of each member of the archive is checked."""
    import torch
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            check(archive.testzip() is None, "a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_config(folder):
    """The settings and the facts of a run: two dicts."""
    with reading(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
        settings, facts = config["settings"], config["facts"]
        check(isinstance(settings, dict) and isinstance(facts, dict), "settings and facts are not objects")
        for name in ("model", "dataset"):
            check(re.fullmatch(r"[^\W_][\w .+-]*", settings[name]), f"{name} is not a name")  # charts' files have it
        check(type(settings["seed"]) is int, "seed is not a whole number")
        check(type(settings["epochs"]) is int, "epochs is not a whole number")
        settings.setdefault("brightness", 0.0)  # of runs that were trained before there was such a setting
        return settings, facts


def read_summary(folder):
    """summary.json, a dict: the figures of a finished run, and as crc32 the checksums, unless it was made by hand."""
    with reading(folder / "summary.json"):
        summary = json.loads((folder / "summary.json").read_text())
        check_finite([summary[name] for name in ("val_loss", "test_loss")], "a loss")
        check_shares([summary["test_accuracy"]], "test_accuracy")
        check(type(summary["parameters"]) is int and 0 < summary["parameters"] < 1e30, "parameters is not a number")
        if "crc32" in summary:
            check(summary["crc32"]["summary.json"] == figures_checksum(summary), "its checksum is wrong")
        return summary


def read_csv(path):
    """The rows of a CSV file as dicts, a number wherever a cell is one."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="") as file:
        rows = [{column: number(text) for column, text in row.items()} for row in csv.DictReader(file, strict=True)]
    check(rows, "it has no rows")
    return rows


def read_metrics(folder, epochs):
    """metrics.csv as {column: numbers, one an epoch}."""
    with reading(folder / "metrics.csv"):
        rows = read_csv(folder / "metrics.csv")
        metrics = {column: [row[column] for row in rows] for column in rows[0]}
        for column, values in metrics.items():
            check_finite(values, column)
        check_shares(metrics["val_accuracy"], "val_accuracy")
        check("val_loss" in metrics, "val_loss is missing")
        check(len(rows) == epochs and metrics["epoch"] == list(range(1, len(rows) + 1)), "it has not one row an epoch")
        return metrics


def read_noise(folder):
    """noise.csv as {corruption: test accuracies at severities 1, 2, ...}."""
    with reading(folder / "noise.csv"):
        noise = {}
        for row in read_csv(folder / "noise.csv"):
            check_shares([row["test_accuracy"]], "test_accuracy")
            check(isinstance(row["corruption"], str), "a corruption is not a name")
            accuracies = noise.setdefault(row["corruption"], [])
            accuracies.append(row["test_accuracy"])
            check(row["severity"] == len(accuracies), "severities are not 1, 2, ...")
        check(len(set(map(len, noise.values()))) == 1, "corruptions differ in their severities")
        return noise


def read_attention(folder):
    """attention.csv as {condition: {block: {figure: its mean over the heads}}}."""
    with reading(folder / "attention.csv"):
        heads = {}
        for row in read_csv(folder / "attention.csv"):
            check(isinstance(row["condition"], str), "a condition is not a name")
            check_finite([row[name] for name in ATTENTION_FIGURES[:-1]], "a figure")
            check(isinstance(row["signal_to_noise"], float) and not row["signal_to_noise"] < 0,
                  "signal_to_noise is not a number")
            blocks = heads.setdefault(row["condition"], {})
            blocks.setdefault(row["block"], []).append(row)
            check(list(blocks) == list(range(len(blocks))), "blocks are not 0, 1, ...")
            check(row["head"] == len(blocks[row["block"]]) - 1, "heads are not 0, 1, ...")
        counts = [[len(rows) for rows in blocks.values()] for blocks in heads.values()]
        check(all(count == counts[0] for count in counts), "conditions differ in their blocks or heads")
        return {condition: {int(block): {name: sum(row[name] for row in rows) / len(rows) for name in ATTENTION_FIGURES}
                            for block, rows in blocks.items()} for condition, blocks in heads.items()}


def read_maps(folder):
    """attention.npz: images (8, C, H, W), and the class token's weights on their patches in the last block, the mean
    of the heads (8, H / patch, W / patch)."""
    with reading(folder / "attention.npz"):
        with zipfile.ZipFile(folder / "attention.npz") as archive:
            check(archive.testzip() is None, "a checksum is wrong")
        with numpy.load(folder / "attention.npz") as arrays:
            blocks = [name for name in arrays if re.fullmatch(r"map_\d+", name)]
            images, last = arrays["images"], arrays[max(blocks, key=lambda name: int(name[4:]))]
        check(images.dtype == numpy.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and images.size,
              "images are not images")
        side = math.isqrt(last.shape[-1] - 1)
        check(last.shape == (len(images), last.shape[1], side**2 + 1, side**2 + 1) and last.size and side,
              "maps are not of these images")
        check(last.dtype.kind == "f" and numpy.isfinite(last).all(), "a weight is not a finite number")
        return images, last[:, :, 0, 1:].mean(1, dtype=float).reshape(-1, side, side)


def read_response(folder):
    """response.csv as {condition: {block: {figure: its mean over the heads, or None where it is empty}}}."""
    with reading(folder / "response.csv"):
        heads = {}
        for row in read_csv(folder / "response.csv"):
            check(isinstance(row["condition"], str), "a condition is not a name")
            check_finite([row[name] for name in RESPONSE_FIGURES if row[name] != ""], "a figure")
            rows = heads.setdefault(row["condition"], {}).setdefault(row["block"], [])
            check(row["head"] == len(rows), "heads are not 0, 1, ...")
            rows.append(row)
        for blocks in heads.values():
            check(list(blocks) == list(range(len(blocks))), "blocks are not 0, 1, ...")
        return {condition: {int(block): {name: None if any(row[name] == "" for row in rows)
                                         else sum(row[name] for row in rows) / len(rows) for name in RESPONSE_FIGURES}
                            for block, rows in blocks.items()} for condition, blocks in heads.items()}


# metrics: {column: list}. noise, attention, maps and response are as their readers return them, None where the run was
# not analysed.
Run = namedtuple("Run", "folder settings facts metrics summary noise attention maps response")


def check_files(folder, sums, names=CHARTED):
    """Raise a UserError that names the first file that is not the one whose checksum summary.json has."""
    for path in (folder / name for name in names):
        with reading(path):
            if path.name in sums or path.exists():
                check(zlib.crc32(path.read_bytes()) == sums.get(path.name), "summary.json has another checksum of it")


def read_run(folder):
    """The finished run in a folder, a Run.

    Raises:
        UserError: if it is not finished, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    settings, facts = read_config(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} is not finished: run its command again to resume")
    summary = read_summary(folder)
    if "crc32" in summary:
        check_files(folder, summary["crc32"])
    metrics = read_metrics(folder, settings["epochs"])
    analyses = [read(folder) if (folder / name).exists() else None
                for name, read in zip(ANALYSIS, [read_noise, read_attention, read_maps, read_response])]
    return Run(folder, settings, facts, metrics, summary, *analyses)


# Who may train what.

def is_finished(folder, settings):
    """Whether the run with these settings is finished; a UserError if the folder holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: move it away or give another --runs-dir")
    if not (folder / "config.json").exists():
        strays = [name for name in FILES if (folder / name).exists()]
        if strays:
            raise UserError(f"{folder} has {strays[0]} but no config.json, so nothing says what made it: move it away "
                            "or give --overwrite")
        return False
    recorded, _ = read_config(folder)
    differing = [f"{name} is {recorded.get(name)} there and {value} here"
                 for name, value in settings.items() if recorded.get(name) != value]
    if differing:
        raise UserError(f"{folder} has other settings ({'; '.join(differing)}): give those, another --runs-dir, "
                        "or --overwrite to lose that run")
    return (folder / "summary.json").exists()


def read_stack(folder):
    """The seeds that an unfinished run is trained side by side with, its own among them."""
    settings, facts = read_config(folder)
    with reading(folder / "config.json"):
        stack = facts["stack"]
        check(type(stack) is list and all(type(seed) is int for seed in stack), "stack is not a list of seeds")
        check(settings["seed"] in stack, "the run is not in its own stack")
        return stack


def find_stacks(runs_dir, settings, seeds, size, overwrite):
    """Which of the runs with these settings and seeds are still to be trained, as lists of at most `size` seeds to
    train side by side. What was interrupted is resumed in the stack that it was in.

    Raises:
        UserError: if that stack has other seeds, or a folder holds anything else.
    """
    interrupted, fresh = [], []
    for seed in seeds:
        folder = run_folder(runs_dir, settings | dict(seed=seed))
        if overwrite:
            fresh.append(seed)
        elif not is_finished(folder, settings | dict(seed=seed)):
            stack = read_stack(folder) if (folder / "config.json").exists() else []
            if not set(stack) <= set(seeds):
                raise UserError(f"{folder} was interrupted in a stack of seeds: resume them together, with --seed "
                                f"{' '.join(map(str, stack))}, or give --overwrite to start it afresh")
            interrupted += [stack] if stack and stack not in interrupted else []
            fresh += [] if stack else [seed]
    fresh = [seed for seed in fresh if not any(seed in stack for stack in interrupted)]
    return interrupted + [fresh[i:i + size] for i in range(0, len(fresh), size)]


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keep other processes off a folder while the block runs; wait for them, or raise a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): name another folder") from None
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"{folder} is in use by another process: wait for it, or give another --runs-dir"
                                ) from None
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


# Plugins.

def execute_plugin(path):
    """Execute a file of the user's as the module `plugin`, and return the setting that stands for it: its name and the
    first digits of its SHA-256. Errors of the code itself keep their traceback.

    Raises:
        UserError: if the file cannot be read or is not named *.py.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"the plugin {path} cannot be read ({error.strerror}): name a Python file") from None
    if path.suffix != ".py":
        raise UserError(f"the plugin {path} is not a Python file: name one that ends in .py")
    module = sys.modules["plugin"] = types.ModuleType("plugin")
    module.__file__ = str(path)
    exec(compile(source, path, "exec"), vars(module))
    return f"{path.name} {hashlib.sha256(source).hexdigest()[:12]}"


def plugin_name(settings):
    """The name of the plugin's copy in the folder of a run that was trained with one."""
    return settings["plugin"].rsplit(" ", 1)[0]


def git_commit():
    """The commit of this code, with -dirty if a tracked module differs from it; None outside a git checkout."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # copies of plugins are untracked
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
