"""What every command shares: flags, one clear line for what the user can put right, output that ends no work; files,
written whole or not at all and read with clear errors; folders, locked; the
commit of the program.

    def main(argv=None):
        return command.exit_status("plot.py", parse_flags, plot, argv)

    with command.reading(path):
        command.need(content, "a finite number", "val_loss")

Neither torch nor numpy is needed, but for the files that hold their arrays.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import functools
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes off the same run
    fcntl = None


class UserError(Exception):
    """What the user can put right: a command prints it as one line and exits with status 2."""


def exit_status(prog, parse_flags, command, argv, again="run the same command again"):
    """Run `command(parse_flags(argv))` and return 0, or 2 after one line for a UserError or a wrong flag, or 130 after
    Ctrl-C. What is printed there goes through Output."""
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            command(parse_flags(argv))
        except UserError as error:
            print(f"{prog}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{prog}: interrupted: {again}", file=sys.stderr)
            return 130
        except SystemExit as stop:  # of argparse, after --help or a wrong flag
            return stop.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


class InUse(UserError):
    """Another process has locked a folder."""


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


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


def first_line(error):
    """What an exception says, cut to one line; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


# Flags.

class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag in one line, and reads flags from @FILE where that is allowed."""

    def __init__(self, prog, description, **options):
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def convert_arg_line_to_args(self, line):
        return [os.path.expanduser(word) for word in shlex.split(line, comments=True)]

    def parse_args(self, argv=None):
        try:
            return super().parse_args(argv)
        except (RecursionError, ValueError) as error:
            self.error(f"an @file does not hold flags ({error}): write one flag and its values a line")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


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


RATE = real_number("of at least 0", lambda value: 0 <= value < math.inf)
SHARE = real_number("from 0 to 1", lambda value: 0 <= value <= 1)
PROBABILITY = real_number("of at least 0 and below 1", lambda value: 0 <= value < 1)
SWITCH = dict(action=argparse.BooleanOptionalAction)  # --flip and --no-flip


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


# Writing.

@contextlib.contextmanager
def writing(path):
    """A block that writes or deletes one file or folder: what the system refuses is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): nothing written before is lost; put that right "
                        "and run the same command again") from None


def write_whole(path, content):
    """Write bytes or text whole or not at all: a reader, or a run killed meanwhile, never sees a part.

    Raises:
        UserError: if the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_csv(path, rows, columns=None, number="{:.6f}", **formats):
    """rows: dicts, whose keys are the columns; formats: {column: format} of floats that are not written as `number`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns or rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({
            name: formats.get(name, number if isinstance(value, float) else "{}").format(value)
            for name, value in row.items()})
    write_whole(path, table.getvalue())


def write_arrays(path, arrays):
    """arrays: {name: numpy array}, as a compressed .npz file."""
    import numpy
    content = io.BytesIO()
    numpy.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())


def write_checkpoint(path, content):
    """content: dicts and lists of plain values and tensors, which are saved as CPU tensors of their own memory."""
    import torch
    from torch.utils._pytree import tree_map

    def on_cpu(value):
        return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    archive = io.BytesIO()  # in memory, so that a full disk is an OSError, which torch.save makes another error of
    torch.save(tree_map(on_cpu, content), archive)
    write_whole(path, archive.getvalue())


def make_folder(folder, advice="name another one"):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): {advice}") from None


# Reading.

class Damaged(ValueError):
    """What a file holds wrong; `reading` makes a UserError of it."""


@contextlib.contextmanager
def reading(path, *more, advice="move it away, or train the run afresh with --overwrite"):
    """A block that reads one file: what the file holds wrong is a UserError that names it; a bug keeps its traceback.
    more: errors by which a library that is called there says that the file is damaged."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (Damaged, OSError, EOFError, UnicodeDecodeError, RecursionError, json.JSONDecodeError, csv.Error,
            zipfile.BadZipFile, zlib.error, *more) as error:
        raise UserError(f"{path} is damaged or not of this run ({first_line(error)}): {advice}") from None


def check(condition, complaint):
    if not condition:
        raise Damaged(complaint)


def is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e30


NAME = "a name of letters, digits and . + - _, of which the first is a letter or digit"  # as charts' files have it
KINDS = {
    "a finite number": is_finite,
    "a number from 0 to 1": lambda value: is_finite(value) and 0 <= value <= 1,
    "a whole number": lambda value: type(value) is int,
    "a whole number above 0": lambda value: type(value) is int and 0 < value < 1e30,
    "a list of whole numbers": lambda value: isinstance(value, list) and all(type(part) is int for part in value),
    "an object": lambda value: isinstance(value, dict),
    "a name and digits": lambda value: isinstance(value, str) and re.fullmatch(r".+ \w+", value),
    NAME: lambda value: isinstance(value, str) and re.fullmatch(r"[^\W_][\w .+-]*", value),
}


def need(record, kind, *names):
    """Check that a dict from a file has a value of this kind, one of KINDS, under each of these names."""
    for name in names:
        value = record.get(name)
        if not KINDS[kind](value):
            raise Damaged(f"{name} {value!r:.80} is not {kind}")


def read_text(path):
    return path.read_text("utf-8", "surrogateescape")  # as write_whole writes a path that is not UTF-8


def read_json(path):
    """The object in a JSON file, a dict."""
    with reading(path, ValueError):  # which int raises for thousands of digits
        content = json.loads(path.read_text("utf-8"))
        check(isinstance(content, dict), "it is not an object")
        return content


def parse_csv(text):
    """The columns of a CSV file, and its rows, each {column: text of a cell that is not empty}."""
    columns, *rows = [*csv.reader(io.StringIO(text), strict=True)] or [[]]
    check(len(set(columns)) == len(columns), "two columns have the same name")
    check({len(columns)}.issuperset(map(len, rows)), "a row has not as many cells as the header")
    return columns, [{column: cell for column, cell in zip(columns, row) if cell} for row in rows]


def read_csv(path, **options):
    """What parse_csv makes of a file; options: of `reading`."""
    with reading(path, **options):
        return parse_csv(path.read_text("utf-8"))


def numbers(rows, column, low=-1e30, high=1e30):
    """The numbers in a column, each of which has to be there, and from low to high."""
    try:
        values = [float(row[column]) for row in rows]
    except (KeyError, ValueError):
        raise Damaged(f"a cell of {column} is not a number") from None
    check(all(low <= value <= high for value in values), f"{column} is not a finite number from {low:g} to {high:g}")
    return values


def check_count(rows, column, first):
    count = [str(number) for number in range(first, first + len(rows))]
    check([row.get(column) for row in rows] == count, f"{column} is not {first}, {first + 1}, ...")


def group_by(rows, column):
    """{text in a column: the rows that have it}."""
    check(all(column in row for row in rows), f"a cell of {column} is empty")
    groups = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def read_archive(path, load):
    """load(path) of a .npz or .pt file, once the CRC of each member of the archive is checked."""
    with reading(path, Exception):  # whatever a library says of damaged bytes
        with zipfile.ZipFile(path) as archive:
            check(archive.testzip() is None, "a checksum is wrong")
        return load(path)


def read_arrays(path):
    """What a .npz file holds, {name: numpy array}."""
    import numpy
    return read_archive(path, lambda path: {name: numpy.asarray(array) for name, array in numpy.load(path).items()})


def read_checkpoint(path):
    """What a .pt file holds, with its tensors on the CPU."""
    import torch
    return read_archive(path, lambda path: torch.load(path, map_location="cpu", weights_only=True))


def with_plain_ends(content):
    """The bytes of a text with the line ends that it was written with, which git may change on its way."""
    return content.replace(b"\r\n", b"\n")


def file_checksum(path):
    content = path.read_bytes()
    return zlib.crc32(content if path.suffix == ".npz" else with_plain_ends(content))


def json_checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# Locks.

def take_lock(folder, wait):
    """The file .lock of a folder, open and locked for this process alone, where the file system has locks."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "w")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InUse(f"{folder} is in use by another process: wait for it, or give another --runs-dir") from None
        except OSError as error:  # as on some network file systems
            say_once(f"{folder} cannot be locked ({error.strerror}): start no second command on the same runs")
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process has deleted it before, so that it keeps nobody off


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keep other processes off a folder while the block runs; wait for them, or raise InUse. A folder that was made for
    it and stays empty is deleted."""
    is_new = not folder.exists()
    with take_lock(folder, wait):
        for partial in folder.glob(".*.partial"):  # of a process that was killed while it wrote
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                is_new and folder.rmdir()


# The program.

def git_commit():
    """The commit of this code, with -dirty if a tracked module differs from it; None outside a checkout of its own."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout

    try:
        inside, commit = git("rev-parse", "--show-prefix", "HEAD").splitlines()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # copies of plugins are untracked
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if inside else commit + ("-dirty" if changed else "")  # inside: of another project's checkout
