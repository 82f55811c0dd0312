"""What every command shares: flags, one clear line for what the user can put right, output that ends no work.

    def main(argv=None):
        return command.exit_status("plot.py", parse_flags, plot, argv)
"""

import argparse
import contextlib
import difflib
import errno
import functools
import math
import os
import shlex
import sys
from pathlib import Path


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
