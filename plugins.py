"""Plugins: Python files of the user's, executed before a command, and kept with the runs that they made.

A plugin may be more than its file: what it imports of its folder, and what it names and finds beside `__file__`, are
part of the program that its digits stand for, and are copied with it. Several of them make one setting,
"NAME.py DIGITS / NAME.py DIGITS".
"""

import ast
import contextlib
import hashlib
import re
import sys
import types
from pathlib import Path

from command import UserError, make_folder, reading, say_once, usable_path, with_plain_ends, write_whole

HERE = Path(__file__).resolve().parent
PROGRAM = [f"{name}.py" for name in (  # whoever imports one of these gets the program's
    "align analysis attack benchmark charts command corruptions data diff_attention gather machine muon pictures plot "
    "plugins records report stack stats train vit").split()]
KEPT_BYTES = 2**25  # larger files are not copied
SEPARATOR = " / "  # which no file's name has
SIBLINGS = set()  # files that plugins of this process import


# Paths.

def plugin_path(text):
    """An argparse type: the path of a plugin, which may be one in the program's folder, as from_anywhere has it."""
    path = usable_path(text)
    return HERE / path if (HERE / path).exists() and not path.exists() else path


def from_anywhere(path):
    """A path for a command in any folder: absolute or, in the program's folder, from there, as others have that
    elsewhere."""
    path = path.absolute()
    return path.relative_to(HERE) if path.is_relative_to(HERE) else path


FLAG = dict(type=plugin_path, action="extend", default=[], metavar="FILE")  # arguments of add_argument


def plugin_with(name):
    """The project's own plugin that has a model of this name, as a value of --plugin; FILE where none has."""
    return next((path.relative_to(HERE) for path in sorted(HERE.glob("runs/**/plugin.py"))
                 if re.search(rf"\b{re.escape(name)}\b", path.read_text("utf-8"))), "FILE")


# The program that a plugin is.

def plugin_setting(path):
    """What stands for a plugin: its name and the first digits of its SHA-256 or, of several files, of all of theirs.

    Raises:
        UserError: if it cannot be read or is not named *.py.
    """
    with reading(path, advice="name a Python file"):
        sums = [hashlib.sha256(with_plain_ends(file.read_bytes())).hexdigest() for file in files_of(path)]
    if path.suffix != ".py":
        raise UserError(f"the plugin {path} is not a Python file: name one that ends in .py")
    digits = (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:12]
    return f"{path.name.replace(f'-{digits}.py', '.py')} {digits}"  # a kept copy stands for what it is a copy of


def digits_of(setting):
    return setting.rsplit(" ", 1)[1]


def files_of(path):
    """The files of a plugin: itself, and those of its folder that it or another of them names."""
    files, names, found = [], set(), [path]
    while found:
        files += found
        names.update(*map(names_in, found))
        beside = [entry for entry in path.parent.iterdir() if entry.name not in PROGRAM]
        found = [file for file in find_named(beside, names) if file not in files]
    return files


def names_in(path):
    """What a Python file may name of its folder: the parts of its imports and, if it has `__file__`, of its strings."""
    source, names = path.read_bytes() if path.suffix == ".py" else b"", set()
    fields = {ast.alias: "name", ast.ImportFrom: "module"} | ({ast.Constant: "value"} if b"__file__" in source else {})
    with contextlib.suppress(SyntaxError, ValueError):  # which are raised when it is executed
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, fields.get(type(node), ""), None)
            if isinstance(name, str):
                names.update(name.split("."), name.split("/"))
    return names


def find_named(entries, names):
    """Of files and folders, and in such folders, the files with these names, with an ending or without."""
    for entry in sorted(entries):
        if names & {entry.name, entry.name.split(".")[0]}:
            if entry.is_dir():
                yield from find_named(entry.iterdir(), names | {"__init__"})
            elif entry.stat().st_size <= KEPT_BYTES:
                yield entry


# Executed.

def execute_plugins(paths):
    """Execute plugins in this order, each once, and return the setting that stands for them, None without any. What
    the code raises keeps its traceback."""
    plugins = {plugin_setting(path): path.absolute() for path in paths}
    for setting, path in plugins.items():
        execute(path, f"plugin_{digits_of(setting)}")
    return SEPARATOR.join(plugins) or None


def execute(path, name):
    SIBLINGS.update(map(str, files_of(path)[1:]))
    for other in [key for key, module in sys.modules.items() if getattr(module, "__file__", None) in SIBLINGS]:
        del sys.modules[other]  # of a plugin executed before
    sys.path[:0] = [str(HERE), str(path.parent)]  # which stay, for what its functions import when they are called
    sys.dont_write_bytecode = True  # Python would take it for that of a file changed within the same second
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))


# Kept.

def find_plugins(runs_dir, setting):
    """Where the plugins of a setting are beside runs or in plugins/ there: {part of the setting: path or None}."""
    found = {}
    for place in ("plugins/*/*.py", "plugins/*.py", "*.py") if setting else []:
        found |= {digits_of(plugin_setting(path)): path for path in sorted(runs_dir.glob(place))}
    return {part: found.get(digits_of(part)) for part in setting.split(SEPARATOR)} if setting else {}


def keep_plugins(runs_dir, setting, paths=()):
    """The paths of the plugins of a setting among the runs. Those that are not there are copied from `paths`, and a
    line names those that are not among these either."""
    sources = {plugin_setting(path): path for path in paths}
    return [path or keep_plugin(runs_dir / "plugins", part, sources.get(part))
            for part, path in find_plugins(runs_dir, setting).items()]


def keep_plugin(folder, setting, source):
    """Copy a plugin as NAME-DIGITS.py or, where it is several files, into a folder NAME-DIGITS."""
    name, digits = setting.rsplit(" ", 1)
    kept = folder / f"{name.removesuffix('.py')}-{digits}.py"
    if not source:
        say_once(f"the plugin {setting} is not beside the runs, which cannot be repeated without it")
        return kept
    files = files_of(source)
    if len(files) > 1:
        kept = kept.with_suffix("") / name
    for file in files:
        copy = kept if file == source else kept.parent / file.relative_to(source.parent)
        make_folder(copy.parent)
        write_whole(copy, file.read_bytes())
    return kept
