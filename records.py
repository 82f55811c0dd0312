"""The records of runs: a folder for each, written whole, read with clear errors, locked; and tables of many.

    runs/mnist-vitdiff-seed0/   args.txt, config.json, metrics.csv, noise.csv, attention.csv, attention.npz,
                                response.csv, summary.json, best.pt, last.pt
    runs/runs.csv, ...          a row a run, and the CSV files of all runs in one each, with SHA256SUMS

    python records.py gather runs/ --keep-seed 0

moves the finished runs of a folder into its tables; weights and maps are kept by the runs that stay folders. A run is
finished if and only if its summary.json exists or a table has it. All but the checkpoints is read without torch.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
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
SUMS = "SHA256SUMS"  # which tables are those of a folder: what it does not name is not read
TABLES = ["runs.csv", "metrics.csv", "noise.csv", "attention.csv", "response.csv"]
MODEL_SETTINGS = ["patch_size", "dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "dropout"]
AUGMENTATION = ["rotation", "scale", "shear", "shift", "flip", "brightness"]
RECIPE_SETTINGS = ["epochs", "batch_size", "optimizer", "lr", "muon_lr", "weight_decay", "warmup", "decay", "clip",
                   "label_smoothing", "distractors", *AUGMENTATION, "amp"]
# All that decides the outcome of a run. Whatever else config.json holds is a fact, which sets no run apart.
SETTINGS = ["model", "dataset", "seed", "plugin", *MODEL_SETTINGS, *RECIPE_SETTINGS]
YOUNGER = dict(brightness=0.0)  # settings that early records do not have
SHARED_FIGURES = ["model", "dataset", "seed", "epochs", "parameters"]  # of a summary, and settings or facts as well
ATTENTION_FIGURES = ["irrelevant_share", "uniform_share", "ink_share", "entropy", "negative_share", "lambda",
                     "signal_to_noise"]
RESPONSE_FIGURES = ["noise_to_signal_1", "noise_to_signal_2", "noise_to_signal", "common_share_1", "common_share_2",
                    "common_share", "noise_cosine", "signal_cosine"]


class UserError(Exception):
    """What the user can put right: a command prints it as one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag in one line, and reads flags from @FILE where that is allowed."""

    def convert_arg_line_to_args(self, line):
        return [os.path.expanduser(word) for word in shlex.split(line, comments=True)]

    def parse_args(self, argv=None):
        try:
            return super().parse_args(argv)
        except (RecursionError, ValueError) as error:
            self.error(f"an @file does not hold flags ({error}): write one flag and its values a line")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Output:
    """A stream that takes what it can of what is printed: no closed pipe or terminal, full disk or narrow encoding ends
    the work of whoever prints, be it tqdm, argparse or a warning."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None if it was closed before Python was started
        if hasattr(stream, "reconfigure"):
            self.attempt(functools.partial(stream.reconfigure, errors="replace"))

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            return function(*args)
        except (OSError, ValueError):
            # What is left in the buffer is flushed again when Python ends.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def exit_status(prog, parse_flags, command, argv, again="run the same command again"):
    """Run `command(parse_flags(argv))`: 0, or 2 after one line for a UserError, or 130 after Ctrl-C. What is printed
    there goes through Output."""
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            command(parse_flags(argv))
        except UserError as error:
            print(f"{prog}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{prog}: interrupted: {again}", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
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


def whole_number(low, high=10**6):
    """The arguments of add_argument for a flag that takes a whole number from low to high."""
    what = f"a whole number from {low} to {high}"
    return dict(metavar="N", type=number(int, what, lambda value: low <= value <= high))


def real_number(what, is_right):
    """The arguments of add_argument for a flag that takes a number for which `is_right` holds."""
    return dict(metavar="X", type=number(float, f"a number {what}", is_right))


def usable_path(text):
    """An argparse type: a Path, which need not exist, but which the system takes and the user may look into."""
    try:
        path = Path(text).expanduser()
        if path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a ~ without a home folder
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be used ({getattr(error, 'strerror', error)}): name "
                                         "another path") from None
    return path


def usable_folder(text):
    """The same of a folder."""
    path = usable_path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: name a folder")
    return path


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            with open(partial, "wb") as file:
                file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except UserError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path):
    """A block that writes, moves or deletes one file or folder: what the system refuses is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): nothing written before is lost; put that right "
                        "and run the same command again") from None


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_csv(path, rows, number="{:.6f}", **formats):
    """rows: dicts whose keys are the columns; formats: {column: format} of floats that are not written as `number`."""
    write_whole(path, format_csv([
        {name: formats.get(name, number if isinstance(value, float) else "{}").format(value)
         for name, value in row.items()} for row in rows], rows[0]))


def write_config(folder, settings, facts, plugin=None):
    """config.json, and args.txt: the flags that repeat the run, one a line, to be read again as @FILE. The plugin, a
    path, is kept beside the runs, and its flag names that file."""
    kept = keep_plugin(folder.parent, settings["plugin"], plugin) if plugin else None
    write_json(folder / "config.json", dict(settings=settings, facts=facts))
    write_whole(folder / "args.txt", "".join(flag + "\n" for flag in make_flags(settings, kept)))


def make_flags(settings, plugin=None):
    """The flags of train.py that repeat a run with these settings and the plugin of this path."""
    flags = []
    for name, value in (settings | dict(plugin=plugin)).items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name} {shlex.quote(str(value))}")
    return flags


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
    sums = {name: file_checksum(folder / name) for name in CHARTED if (folder / name).exists()}
    return sums | {"summary.json": figures_checksum(figures)}


def file_checksum(path):
    content = path.read_bytes()
    return zlib.crc32(content if path.suffix == ".npz" else with_plain_ends(content))


def with_plain_ends(content):
    """The bytes of a text with the line ends that it was written with, which git may change on its way."""
    return content.replace(b"\r\n", b"\n")


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
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (OSError, EOFError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, MemoryError,
            RecursionError, NotImplementedError, RuntimeError, csv.Error, pickle.UnpicklingError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{path} is damaged or not of this run ({first_line(error)}): move it away, or train the run "
                        "afresh with --overwrite") from None


def check(condition, complaint):
    if not condition:
        raise ValueError(complaint)


def read_text(path):
    return with_plain_ends(path.read_bytes()).decode()


def is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e30


def check_finite(values, what):
    check(all(map(is_finite, values)), f"{what} is not a finite number")


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


def check_settings(settings):
    """A ValueError, or another that `reading` knows, unless a record of these settings can be read."""
    for name in ("model", "dataset"):
        check(re.fullmatch(r"[^\W_][\w .+-]*", settings[name]), f"{name} {settings[name]!r} is not a name of letters, "
              "digits and . + - _, of which the first is a letter or digit")  # as charts' files have it
    check(type(settings["seed"]) is int, "seed is not a whole number")
    check(type(settings["epochs"]) is int, "epochs is not a whole number")
    check(settings.get("plugin") is None or re.fullmatch(r".+ \w+", settings["plugin"]),
          "plugin is not a name and digits")


def complete(settings):
    """Settings with those that are younger than their record, at the value that they had then."""
    return settings | {name: value for name, value in YOUNGER.items() if name not in settings}


def check_recordable(settings):
    """Raise a UserError unless a record of these settings can be read again."""
    try:
        check_settings(settings)
    except ValueError as error:
        raise UserError(f"{error}: rename it") from None


def check_summary(summary):
    check_finite([summary[name] for name in ("val_loss", "test_loss")], "a loss")
    check_shares([summary["test_accuracy"]], "test_accuracy")
    check(type(summary["parameters"]) is int and 0 < summary["parameters"] < 1e30, "parameters is not a number")


def read_config(folder):
    """The settings and the facts of a run: two dicts."""
    if not is_run(folder) and (row := read_rows(folder.parent).get(folder.name)):
        raise UserError(f"{folder} is in the tables of {folder.parent}, which keep no weights: to make them again, run "
                        f"python train.py {row.args} --runs-dir DIR")
    with reading(folder / "config.json"):
        config = json.loads(read_text(folder / "config.json"))
        settings, facts = config["settings"], config["facts"]
        check(isinstance(settings, dict) and isinstance(facts, dict), "settings and facts are not objects")
        check_settings(settings)
        return complete(settings), facts


def read_summary(folder):
    """The figures of a finished run, a dict: those of summary.json, with the checksums as crc32 unless it was made by
    hand; of a run that has been gathered, those of the table."""
    if not is_run(folder) and (row := read_rows(folder.parent).get(folder.name)):
        return row.summary
    with reading(folder / "summary.json"):
        summary = json.loads(read_text(folder / "summary.json"))
        check_summary(summary)
        if "crc32" in summary:
            check(summary["crc32"]["summary.json"] == figures_checksum(summary), "its checksum is wrong")
        return summary


def to_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def parse_csv(text, value=to_number):
    """The rows of a CSV file as dicts of value(cell), a number wherever a cell is one; empty cells are left out."""
    header, *rows = csv.reader(io.StringIO(text), strict=True)
    check(rows, "it has no rows")
    check(len(set(header)) == len(header), "two columns have the same name")
    check(all(len(row) == len(header) for row in rows), "a row has not as many cells as the header")
    return [{column: cell if column == "run" else value(cell) for column, cell in zip(header, row) if cell}
            for row in rows]


def metrics_of(rows):
    """The rows of metrics.csv as {column: numbers, one an epoch}."""
    metrics = {column: [row[column] for row in rows] for column in rows[0]}
    check(all(row.keys() == metrics.keys() for row in rows), "a cell is empty")
    for column, values in metrics.items():
        check_finite(values, column)
    check_shares(metrics["val_accuracy"], "val_accuracy")
    check("val_loss" in metrics, "val_loss is missing")
    check(metrics["epoch"] == list(range(1, len(rows) + 1)), "epochs are not 1, 2, ...")
    return metrics


def noise_of(rows):
    """The rows of noise.csv as {corruption: test accuracies at severities 1, 2, ...}."""
    noise = {}
    for row in rows:
        check_shares([row["test_accuracy"]], "test_accuracy")
        check(isinstance(row["corruption"], str), "a corruption is not a name")
        accuracies = noise.setdefault(row["corruption"], [])
        accuracies.append(row["test_accuracy"])
        check(row["severity"] == len(accuracies), "severities are not 1, 2, ...")
    check(len(set(map(len, noise.values()))) == 1, "corruptions differ in their severities")
    return noise


def amounts_of(rows):
    """The amounts of noise.csv as {corruption: amounts at severities 1, 2, ...}; nothing without that column."""
    amounts = {}
    for row in rows if any("amount" in row for row in rows) else []:
        check_finite([row["amount"]], "an amount")
        amounts.setdefault(row["corruption"], []).append(row["amount"])
    return amounts


def attention_of(rows):
    """The rows of attention.csv as {condition: {block: {figure: its mean over the heads}}}."""
    heads = {}
    for row in rows:
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
    """attention.npz: images (8, C, H, W), and the class token's weights on their patches in the last block, head by
    head (8, heads, H / patch, W / patch)."""
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
        return images, last[:, :, 0, 1:].reshape(*last.shape[:2], side, side).astype(float)


def response_of(rows):
    """The rows of response.csv as {condition: {block: {figure: its mean over the heads, None where it is empty}}}."""
    heads = {}
    for row in rows:
        check(isinstance(row["condition"], str), "a condition is not a name")
        check_finite([row[name] for name in RESPONSE_FIGURES if name in row], "a figure")
        found = heads.setdefault(row["condition"], {}).setdefault(row["block"], [])
        check(row["head"] == len(found), "heads are not 0, 1, ...")
        found.append(row)
    check(all(list(blocks) == list(range(len(blocks))) for blocks in heads.values()), "blocks are not 0, 1, ...")
    return {condition: {int(block): {name: sum(row[name] for row in rows) / len(rows) if all(
        name in row for row in rows) else None for name in RESPONSE_FIGURES} for block, rows in blocks.items()}
        for condition, blocks in heads.items()}


# metrics: {column: list}. noise, attention, response and maps are as their readers return them, None where the run was
# not analysed; amounts: those of the corruptions. A run in tables has no maps, and its folder DIR/NAME does not exist.
Run = namedtuple("Run", "folder settings facts metrics summary noise attention response amounts maps")


def check_files(folder, sums, names=CHARTED):
    """Raise a UserError that names the first file that is not the one whose checksum summary.json has."""
    for path in (folder / name for name in names):
        with reading(path):
            if path.name in sums or path.exists():
                check(file_checksum(path) == sums.get(path.name), "summary.json has another checksum of it")


def read_run(folder):
    """The finished run in a folder, a Run.

    Raises:
        UserError: if it is not finished, or a file of it is missing, damaged or without amounts of corruption.
    """
    folder = Path(folder)
    settings, facts = read_config(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} is not finished: run its command again to resume")
    summary, rows = read_summary(folder), {}
    if "crc32" in summary:
        check_files(folder, summary["crc32"])
    for name in TABLES[1:]:
        with reading(folder / name):
            if name == "metrics.csv" or (folder / name).exists():
                rows[name] = parse_csv(read_text(folder / name))
    maps = read_maps(folder) if (folder / "attention.npz").exists() else None
    return check_amounts(make_run(folder, settings, facts, summary, rows, folder, maps))


def make_run(folder, settings, facts, summary, rows, place, maps=None):
    """A Run of {file: its rows}, which lie in the files of this name in `place`."""
    parsed = []
    for name, parse in zip(TABLES[1:], [metrics_of, noise_of, attention_of, response_of]):
        with reading(place / name):
            parsed.append(parse(rows[name]) if name in rows else None)
    with reading(place / "noise.csv"):
        amounts = amounts_of(rows.get("noise.csv", []))
    with reading(place / "metrics.csv"):
        check(parsed[0] and len(parsed[0]["epoch"]) == settings["epochs"], f"{folder.name} has not one row an epoch")
    return Run(folder, settings, facts, parsed[0], summary, *parsed[1:], amounts, maps)


def check_amounts(run):
    """The run, or a UserError if it does not say by which amounts its images were corrupted: errors under others are
    not to be compared with it."""
    if run.noise and not run.amounts:
        raise UserError(f"{run.folder / 'noise.csv'} has no column amount: run python analysis.py "
                        f"{shlex.quote(str(run.folder))}, which analyses the run again")
    return run


def subfolders(folder):
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name a folder of runs") from None


def is_run(folder):
    """Whether a folder is of a run, finished or not; one of tables has a metrics.csv, too."""
    return not os.path.exists(folder / "runs.csv") and any(
        os.path.exists(folder / name) for name in ("config.json", "metrics.csv", "summary.json"))


def find_runs(*folders):
    """The finished runs that lie directly in the folders, [Run], those of their tables first; and a line for each
    folder in them that is left out.

    Raises:
        UserError: if a table is damaged, or a run is in the tables and in a folder as well.
    """
    runs, skipped = [], []
    for folder in map(Path, folders):
        while True:
            sums, found = read_sums(folder), look_into(folder)
            if read_sums(folder) == sums:  # else a gather has moved runs meanwhile, which may be in neither list
                break
        runs += found[0]
        skipped += found[1]
    return runs, skipped


def look_into(folder):
    children, tabled, runs, skipped = subfolders(folder), read_tables(folder), [], []
    names = {run.folder.name for run in tabled}
    for run in tabled:
        try:
            runs.append(check_amounts(run))
        except UserError as error:
            skipped.append(str(error))
    for child in children:
        if child.name in names and is_run(child):
            raise UserError(f"{child} and {folder / 'runs.csv'} hold the same run: run python records.py gather "
                            f"{shlex.quote(str(folder))} again if it was interrupted, or move the folder away")
        try:
            if is_run(child):
                runs.append(read_run(child))
            elif not (child.name in names or subfolders(child) or (child / "runs.csv").exists()
                      or child.name == "plugins"):
                skipped.append(f"{child}: not a run")
        except UserError as error:
            skipped.append(str(error))
    return runs, skipped


# Tables of many runs.

def to_cell(value):
    """A value of JSON as the text of a cell: a number by repr, a plain string as it is, anything else as JSON."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and value and value.isprintable() and from_cell(value) == value:
        return value
    return json.dumps(value)


def from_cell(text):
    if text in ("nan", "inf", "-inf"):
        return float(text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def sha256(content):
    return hashlib.sha256(with_plain_ends(content)).hexdigest()


def staged(folder, name):
    """Where gather puts a new table before it takes the place of the old one."""
    return folder / f".{name}.new"


def read_sums(folder):
    """SHA256SUMS as {table: SHA-256}; nothing where the folder has no tables."""
    path = folder / SUMS
    if not path.exists() and not (folder / "runs.csv").exists():
        return {}
    with reading(path):
        lines = [re.fullmatch(r"([0-9a-fA-F]{64}) [ *](\S+)", line) for line in read_text(path).splitlines()]
        check(all(lines), "a line is not a checksum and a name")
        sums = {line[2]: line[1].lower() for line in lines}
        there = {name for name in TABLES if (folder / name).exists()}
        check({"runs.csv", "metrics.csv"} | there <= sums.keys() <= {*TABLES}, "it does not name the tables")
    return sums


def read_table(folder, name, sums):
    """The text of a table. While gather puts new tables in place, SHA256SUMS says which are valid."""
    found = [path for path in (folder / name, staged(folder, name)) if path.exists()]
    for path in found:
        with reading(path):
            content = path.read_bytes()
            if sha256(content) == sums[name]:
                return content.decode(errors="surrogateescape")  # as write_whole writes a path that is not UTF-8
    problem = f"not what {SUMS} says" if found else "missing"
    raise UserError(f"{folder / name} is {problem}: put the original back, or move the tables and {SUMS} away")


# A row of runs.csv: the run's name, the flags that repeat it, and what its config.json and its summary.json hold.
Row = namedtuple("Row", "run args settings facts summary")


def read_rows(folder, sums=None):
    """runs.csv as {run: Row}; nothing where the folder has no tables."""
    sums = sums or read_sums(folder)
    return parse_rows(folder / "runs.csv", read_table(folder, "runs.csv", sums)) if sums else {}


@functools.lru_cache(maxsize=2)  # train.py asks for each of its runs
def parse_rows(path, text):
    """Settings end with the last that this program knows, figures begin with val_loss; what is a figure and a setting
    or fact as well has one column."""
    with reading(path):
        cells, rows = parse_csv(text, from_cell), {}
        header = next(csv.reader(io.StringIO(text)))
        facts = 1 + max(i for i, column in enumerate(header) if column in SETTINGS)
        figures = header.index("val_loss")
        parts = header[2:facts], header[facts:figures], [*SHARED_FIGURES, *header[figures:]]
        for row in cells:
            check(row["run"] not in rows, f"{row['run']} is in two rows")
            settings, facts_, summary = ({column: row[column] for column in part if column in row} for part in parts)
            check_settings(settings)
            check_summary(summary)
            rows[row["run"]] = Row(row["run"], row["args"], complete(settings), facts_, summary)
        return rows


def group_by_run(path, text, names, value=to_number):
    """The rows of a table of many runs as {run: rows without the name}."""
    with reading(path):
        groups = {}
        for row in parse_csv(text, value):
            groups.setdefault(row.pop("run"), []).append(row)
        check(groups.keys() <= names, "it has runs that runs.csv has not")
        return groups


def read_tables(folder, sums=None):
    """The runs in a folder's tables, [Run]; none where it has no tables. sums: those of SHA256SUMS, or of new tables.

    Raises:
        UserError: if a table is not the one whose SHA-256 SHA256SUMS has, or does not fit the others.
    """
    sums = sums or read_sums(folder)
    rows = read_rows(folder, sums)
    groups = {name: group_by_run(folder / name, read_table(folder, name, sums), rows.keys())
              for name in sums if name != "runs.csv"}

    return [make_run(folder / run, row.settings, row.facts, row.summary,
                     {name: group[run] for name, group in groups.items() if run in group}, folder)
            for run, row in rows.items()]


# Gathering.

def gather(folder, keep_seeds=()):
    """Move the finished runs of a folder into its tables, but for those of the seeds to keep. Weights and maps of what
    is gathered are deleted. Killed at any moment it leaves each run in its folder or in the tables, and goes on when
    called again.

    Raises:
        UserError: if a run is not finished, damaged or in use, or would not be the same in a table; nothing is changed.
    """
    subfolders(folder)  # a folder that is not there is not made
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(folder))
        settle(folder)
        runs = [read_run(child) for child in subfolders(folder) if is_run(child)]
        moved = [run for run in runs if run.settings["seed"] not in keep_seeds]
        if keep_seeds and runs and moved == runs:
            raise UserError(f"{folder} has no run of seed {', '.join(map(str, keep_seeds))} to keep: leave --keep-seed "
                            "out to gather all, and lose their weights")
        allow_open_files(len(moved) + 64)
        for run in moved:
            check_movable(run)
            locks.enter_context(locked(run.folder))
        old = read_tables(folder)
        check_same(moved, old, "is in the tables as another run: move one of them away")
        if moved:
            new_sums = stage_tables(folder, moved)
            try:
                check_same(old + moved, read_tables(folder, new_sums), "would not be the same in a table: its "
                           "config.json, summary.json and CSV files contradict each other")
            except UserError:
                settle(folder)  # which deletes the tables that were staged
                raise
            write_whole(folder / SUMS, "".join(f"{digits}  {name}\n" for name, digits in new_sums.items()))
            settle(folder)
        for run in moved:
            hidden = run.folder.with_name(f".{run.folder.name}.gathered")
            with writing(run.folder):
                os.replace(run.folder, hidden)
                shutil.rmtree(hidden)
    kept = f"; {len(runs) - len(moved)} stay folders" if len(runs) > len(moved) else ""
    print(f"{len(moved)} runs gathered, {len(read_rows(folder))} in the tables of {folder}{kept}")


def allow_open_files(count):
    """Let this process hold so many files open: a lock is one, and macOS allows 256 unless asked."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count and soft != resource.RLIM_INFINITY:
            wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def settle(folder):
    """Finish what a killed gather left: put the tables that SHA256SUMS names in place, delete gathered folders."""
    sums, rows = read_sums(folder), read_rows(folder)
    for name in TABLES:
        path = staged(folder, name)
        with writing(path):
            if path.exists() and sha256(path.read_bytes()) == sums.get(name):
                os.replace(path, folder / name)
            path.unlink(missing_ok=True)
    for hidden in folder.glob(".*.gathered"):
        name = hidden.name.removeprefix(".").removesuffix(".gathered")
        with writing(hidden):
            if name in rows:
                shutil.rmtree(hidden)
            else:
                os.replace(hidden, folder / name)


def check_movable(run):
    """Raise a UserError if the folder of a run holds anything that gather would delete and nobody could make again."""
    if run.folder.is_symlink():
        raise UserError(f"{run.folder} is a link: put the folder itself there, or move the link away")
    plugin = find_plugin(run.settings["plugin"], run.folder) if run.settings.get("plugin") else None
    strays = sorted(path.name for path in run.folder.iterdir() if path.name not in [*FILES, ".lock"]
                    and path != plugin and not re.fullmatch(r"\..*\.partial", path.name))
    if strays:
        raise UserError(f"{run.folder} holds {', '.join(strays)}, which tables do not keep: move it away")


def stage_tables(folder, runs):
    """Write the tables of a folder with these runs added, each beside the old one: {table: SHA-256}."""
    old_sums = read_sums(folder)
    rows = read_rows(folder) | {run.folder.name: make_row(run) for run in runs}
    order = sorted(rows, key=lambda name: [rows[name].settings[key] for key in ("dataset", "model", "seed")])
    texts = {"runs.csv": format_rows([rows[name] for name in order])}
    for table in TABLES[1:]:
        groups = {}
        if table in old_sums:
            groups = group_by_run(folder / table, read_table(folder, table, old_sums), rows.keys(), str)
        for run in runs:
            path = run.folder / table
            groups.pop(run.folder.name, None)
            if path.exists():
                groups[run.folder.name] = parse_csv(read_text(path), lambda cell: to_cell(from_cell(cell)))
        if groups:
            texts[table] = format_csv([dict(run=name) | row for name in order for row in groups.get(name, [])])
    for table in texts:
        if table not in old_sums and (folder / table).exists():
            raise UserError(f"{folder / table} is not a table of {SUMS}: move it away; nothing was gathered")
    for table, text in texts.items():
        write_whole(staged(folder, table), text)
    return {table: sha256(text.encode(errors="surrogateescape")) for table, text in texts.items()}


def make_row(run):
    setting, kept = run.settings.get("plugin"), None
    if setting:
        runs_dir = run.folder.parent
        source = find_plugin(setting, run.folder, runs_dir, runs_dir / "plugins")
        if not source:
            say_once(f"the plugin {setting} is not beside the runs, which cannot be repeated without it")
        kept = keep_plugin(runs_dir, setting, source)
    return Row(run.folder.name, " ".join(make_flags(run.settings, kept)), run.settings, run.facts,
               {name: value for name, value in run.summary.items() if name != "crc32"})


def format_rows(rows):
    """runs.csv of [Row]; its columns are in the order that parse_rows relies on."""
    def columns(part, first):
        found = dict.fromkeys(column for row in rows for column in getattr(row, part))
        return sorted(found, key=first)

    order = [*columns("settings", lambda name: name in SETTINGS), *columns("facts", lambda name: False),
             *columns("summary", lambda name: name != "val_loss")]
    cells = [row.summary | row.facts | row.settings for row in rows]
    return format_csv([dict(run=row.run, args=row.args) | {
        name: to_cell(values[name]) for name in dict.fromkeys(order) if name in values}
        for row, values in zip(rows, cells)], ["run", "args", *dict.fromkeys(order)])


def format_csv(rows, columns=None):
    table = io.StringIO()
    writer = csv.DictWriter(table, columns or dict.fromkeys(column for row in rows for column in row),
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def check_same(runs, tabled, complaint):
    """Raise a UserError unless each run that is in the tables reads from them as from its folder, to the last digit."""
    def content(run, shared):
        summary = {name: value for name, value in run.summary.items() if name != "crc32"}
        return json.dumps([run.settings, run.facts, shared | summary, run.metrics, run.noise, run.attention,
                           run.response, run.amounts], sort_keys=True)

    found = {run.folder.name: run for run in tabled}
    for run in runs:
        both = run.facts | run.settings
        shared = {name: both[name] for name in SHARED_FIGURES if name in both}
        if run.folder.name in found and content(run, shared) != content(found[run.folder.name], {}):
            raise UserError(f"{run.folder} {complaint}; nothing was gathered")


# Who may train what.

def is_recorded(folder):
    """Whether there is a finished run of this folder, in it or in the tables beside it."""
    return (folder / "summary.json").exists() or folder.name in read_rows(folder.parent)


def is_finished(folder, settings):
    """Whether the run with these settings is finished; a UserError if the folder holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: move it away or give another --runs-dir")
    row = read_rows(folder.parent).get(folder.name)
    if not row and not (folder / "config.json").exists():
        strays = [name for name in FILES if (folder / name).exists()]
        if strays:
            raise UserError(f"{folder} has {strays[0]} but no config.json, so nothing says what made it: move it away "
                            "or give --overwrite")
        return False
    recorded = row.settings if row else read_config(folder)[0]
    differing = [f"{name} is {recorded.get(name)} there and {value} here"
                 for name, value in settings.items() if recorded.get(name) != value]
    if differing:
        raise UserError(f"{folder} has other settings ({'; '.join(differing)}): give those, or another --runs-dir"
                        + (", or --overwrite to lose that run" if not row else ""))
    return row is not None or (folder / "summary.json").exists()


def read_stack(folder):
    """The seeds that a run is trained side by side with, its own among them; none where there is nothing to resume, as
    no epoch was finished."""
    if not (folder / "config.json").exists():
        return []
    settings, facts = read_config(folder)
    with reading(folder / "config.json"):
        stack = facts["stack"]
        check(type(stack) is list and all(type(seed) is int for seed in stack), "stack is not a list of seeds")
        check(settings["seed"] in stack, "the run is not in its own stack")
    first = run_folder(folder.parent, settings | dict(seed=stack[0]))
    return stack if (first / "last.pt").exists() else []


def check_nobody_resumes_from(folder, seed, seeds):
    """Raise a UserError if the folder holds the checkpoint of a stack that has other seeds than `seeds`."""
    stack = []
    with contextlib.suppress(UserError):  # what is damaged may be overwritten
        stack = read_stack(folder)
    if stack[:1] == [seed] and not set(stack) <= set(seeds):
        raise UserError(f"{folder} holds what others of its stack are resumed from: resume them first, or give --seed "
                        f"{' '.join(map(str, stack))} to start all afresh")


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
            if folder.name in read_rows(folder.parent):
                raise UserError(f"{folder.name} is in the tables of {folder.parent}, which --overwrite does not "
                                "change: give another --runs-dir")
            check_nobody_resumes_from(folder, seed, seeds)
            fresh.append(seed)
        elif not is_finished(folder, settings | dict(seed=seed)):
            stack = read_stack(folder)
            if not set(stack) <= set(seeds):
                raise UserError(f"{folder} was interrupted in a stack of seeds: resume them together, with --seed "
                                f"{' '.join(map(str, stack))}, or give --overwrite to start it afresh")
            if not stack:
                fresh.append(seed)
            elif stack not in interrupted:
                for member in (run_folder(runs_dir, settings | dict(seed=other)) for other in stack):
                    if read_stack(member) != stack:
                        raise UserError(f"{folder} was interrupted beside {member}, which was started afresh since: "
                                        "give --overwrite to start it afresh, too")
                interrupted.append(stack)
    fresh = [seed for seed in fresh if not any(seed in stack for stack in interrupted)]
    return interrupted + [fresh[i:i + size] for i in range(0, len(fresh), size)]


def claim_stacks(locks, runs_dir, settings, seeds, size, overwrite):
    """What find_stacks returns, once the folders are locked, for as long as the ExitStack `locks` is open, and what
    `overwrite` gives up is deleted."""
    request = runs_dir, settings, seeds, size, overwrite
    folders = [run_folder(runs_dir, settings | dict(seed=seed)) for part in find_stacks(*request) for seed in part]
    for folder in folders:
        locks.enter_context(locked(folder))
    for folder, name in itertools.product(folders, FILES) if overwrite else []:  # once all are locked
        (folder / name).unlink(missing_ok=True)
    return find_stacks(*request)  # another process may have changed them before they were locked


def read_threads(folder):
    """How many threads an interrupted run was begun with, or None where there is none to resume or it does not say."""
    if not (folder / "last.pt").exists():
        return None
    _, facts = read_config(folder)
    with reading(folder / "config.json"):
        threads = facts.get("threads")
        check(threads is None or type(threads) is int and threads > 0, "threads is not a number")
        return threads


NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # of some network file systems


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


def take_lock(file, folder, wait):
    """Lock the open file of a folder for this process alone, where the file system has locks. False where another
    process has deleted it before, so that the lock keeps nobody off."""
    if not fcntl:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.fstat(file.fileno()).st_nlink > 0
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it, or give another --runs-dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{folder} cannot be locked ({error.strerror}): name another folder") from None
        say_once(f"{folder} is on a file system without locks: start no second command on the same runs")
        return True


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keep other processes off a folder while the block runs; wait for them, or raise a UserError."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "w")
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror}): name another folder") from None
        with file:
            if not take_lock(file, folder, wait):
                continue
            for partial in folder.glob(".*.partial"):  # of a process that was killed while it wrote
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            try:
                yield
            finally:
                (folder / ".lock").unlink(missing_ok=True)
            return


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
    digits = sha256(source)[:12]
    return f"{path.name.replace(f'-{digits}.py', '.py')} {digits}"  # a kept copy stands for what it is a copy of


def find_plugin(setting, *places):
    """The first Python file in these folders that the `plugin` setting of a run stands for, by its SHA-256, or None."""
    for path in [path for place in places for path in sorted(place.glob("*.py"))]:
        with reading(path):
            if sha256(path.read_bytes()).startswith(setting.rsplit(" ", 1)[1]):
                return path


def find_run_plugin(folder, setting):
    """The plugin that the run in a folder was trained with, kept in that folder or beside it.

    Raises:
        UserError: if it is not there.
    """
    found = find_plugin(setting, folder, folder.parent, folder.parent / "plugins")
    if not found:
        raise UserError(f"{folder} was trained with the plugin {setting}, of which no copy lies in {folder.parent} or "
                        "its plugins/: put it there")
    return found


def keep_plugin(runs_dir, setting, source):
    """The path of a plugin among the runs: its copy in plugins/, unless it lies beside them already."""
    found = find_plugin(setting, runs_dir, runs_dir / "plugins")
    if found:
        return found
    name, digits = setting.rsplit(" ", 1)
    kept = runs_dir / "plugins" / f"{name.removesuffix('.py')}-{digits}.py"
    if source:
        make_folder(kept.parent)
        write_whole(kept, source.read_bytes())
    return kept


def make_folder(folder, advice="name another one"):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): {advice}") from None


def git_commit():
    """The commit of this code, with -dirty if a tracked module differs from it; None outside a checkout of its own."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None  # this code was unpacked inside another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # copies of plugins are untracked
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# The command.

def parse_flags(argv):
    parser = Parser(prog="records.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["gather"], help="move finished runs into the tables of their folder, whole "
                                                            "or not at all; their weights and maps are deleted")
    parser.add_argument("folder", type=usable_folder, metavar="FOLDER", help="the folder that the runs lie in")
    parser.add_argument("--keep-seed", nargs="+", type=int, default=[], metavar="N", dest="keep_seeds",
                        help="leave the runs of these seeds as folders, with weights and maps")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    return exit_status("records.py", parse_flags, lambda args: gather(args.folder, args.keep_seeds), argv)


if __name__ == "__main__":
    sys.exit(main())
