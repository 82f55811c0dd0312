"""The records of runs: a folder for each, and tables of many; what is finished, and what is to be resumed.

    runs/mnist-vitdiff-seed0/   args.txt, config.json, metrics.csv, noise.csv, attention.csv, attention.npz,
                                response.csv, summary.json, best.pt, last.pt
    runs/runs.csv, ...          a row a run, and the CSV files of all runs in one each, which gather.py writes

A run is finished if and only if its summary.json exists or runs.csv names it. All but the checkpoints is read without
torch. A new analysis is a function and a row in READERS.
"""

import contextlib
import functools
import itertools
import json
import math
import shlex
from collections import namedtuple
from os.path import exists
from pathlib import Path

import numpy

from command import (NAME, Damaged, InUse, UserError, check, check_count, file_checksum, group_by, is_finite,
                     json_checksum, locked, make_folder, need, numbers, parse_csv, read_arrays, read_checkpoint,
                     read_csv, read_json, read_text, reading, say_once, write_arrays, write_checkpoint, write_csv,
                     write_json, write_whole)
from plugins import from_anywhere, keep_plugins

MODEL_SETTINGS = ["patch_size", "dim", "depth", "num_heads", "mlp_dim", "head_hidden_dim", "dropout"]
SHARED_FIGURES = ["model", "dataset", "seed", "epochs", "parameters"]  # of a summary, and settings or facts as well
ATTENTION_FIGURES = ["irrelevant_share", "uniform_share", "ink_share", "entropy", "negative_share", "lambda",
                     "signal_to_noise"]
RESPONSE_FIGURES = ["noise_to_signal_1", "noise_to_signal_2", "noise_to_signal", "common_share_1", "common_share_2",
                    "common_share", "noise_cosine", "signal_cosine"]
OTHER_FOLDERS = ["plugins", "report"]  # which lie beside runs


# The rows of a CSV file of a run, {column: text of a cell that is not empty}, as what is drawn of them.

def metrics_of(rows):
    """metrics.csv as {column: numbers, one an epoch}."""
    check_count(rows, "epoch", 1)
    numbers(rows, "val_loss")
    numbers(rows, "val_accuracy", 0, 1)
    check(all(row.keys() == rows[0].keys() for row in rows), "a cell is empty")
    return {column: numbers(rows, column) for column in rows[0]}


def by_severity(rows, column, *limits):
    """A column of noise.csv as {corruption: numbers at severities 1, 2, ...}."""
    corruptions = group_by(rows, "corruption")
    for severities in corruptions.values():
        check_count(severities, "severity", 1)
    check(len(set(map(len, corruptions.values()))) == 1, "corruptions differ in their severities")
    return {name: numbers(severities, column, *limits) for name, severities in corruptions.items()}


def noise_of(rows):
    return by_severity(rows, "test_accuracy", 0, 1)


def amounts_of(rows):
    return by_severity(rows, "amount") if any("amount" in row for row in rows) else {}


def by_block(rows, figures):
    """Rows of heads as {condition: {block: {figure: its mean over the heads, None where a head has none}}}."""
    conditions = {name: group_by(part, "block") for name, part in group_by(rows, "condition").items()}
    for blocks in conditions.values():
        check(list(blocks) == [str(block) for block in range(len(blocks))], "blocks are not 0, 1, ...")
        for heads in blocks.values():
            check_count(heads, "head", 0)
    check(len({tuple(map(len, blocks.values())) for blocks in conditions.values()}) == 1,
          "conditions differ in their blocks or heads")
    return {name: {int(block): {figure: mean_of(heads, figure) for figure in figures}
                   for block, heads in blocks.items()} for name, blocks in conditions.items()}


def mean_of(heads, figure):
    values = [float(head[figure]) for head in heads if figure in head]
    return sum(values) / len(heads) if len(values) == len(heads) else None


def attention_of(rows):
    for figure in ATTENTION_FIGURES[:-1]:
        numbers(rows, figure)
    # Infinite where no weight is on irrelevant patches, and nan where none is on patches at all.
    numbers([row for row in rows if row.get("signal_to_noise") != "nan"], "signal_to_noise", 0, math.inf)
    return by_block(rows, ATTENTION_FIGURES)


def response_of(rows):
    for figure in RESPONSE_FIGURES:
        numbers([row for row in rows if figure in row], figure)
    return by_block(rows, RESPONSE_FIGURES)


def column_by(rows, name):
    """{number in a column: test accuracy}."""
    return dict(zip(numbers(rows, name, 0), numbers(rows, "test_accuracy", 0, 1)))


def aligned_of(rows):
    """aligned.csv as {condition: {severity: {images: test accuracy}}}."""
    return {condition: {severity: column_by(same, "images") for severity, same in group_by(part, "severity").items()}
            for condition, part in group_by(rows, "condition").items()}


def attack_of(rows):
    """attack.csv as {attack: {epsilon: test accuracy}}."""
    return {attack: column_by(part, "epsilon") for attack, part in group_by(rows, "attack").items()}


READERS = {  # a field of Run: the file, and what makes the field of its rows
    "metrics": ("metrics.csv", metrics_of), "noise": ("noise.csv", noise_of), "amounts": ("noise.csv", amounts_of),
    "attention": ("attention.csv", attention_of), "response": ("response.csv", response_of),
    "aligned": ("aligned.csv", aligned_of), "attack": ("attack.csv", attack_of)}
# The fields of READERS are None where the run has no such file. A run in tables has no maps, and its folder, DIR/NAME,
# does not exist.
Run = namedtuple("Run", ["folder", "settings", "facts", "summary", *READERS, "maps"])
TABLES = list(dict.fromkeys(["runs.csv", *(name for name, _ in READERS.values())]))
ANALYSIS = [*TABLES[2:], "attention.npz"]
CHECKED = ["config.json", "metrics.csv", *ANALYSIS]  # by the checksums in summary.json
FILES = ["summary.json", "last.pt", "best.pt", *CHECKED[1:], "args.txt", "config.json"]  # in the order of deletion


# A run's folder, written.

def run_folder(runs_dir, settings):
    return Path(runs_dir) / "{dataset}-{model}-seed{seed}".format(**settings)


def setting_of(settings, name):
    """A setting, None where it changes nothing: at 0, or absent from a record that is older than the setting."""
    return settings.get(name) or None


def write_config(folder, settings, facts, plugins=()):
    """config.json, and args.txt: the flags that repeat the run, one a line, to be read again as @FILE from any folder.
    The plugins, paths, are kept beside the runs, and their flag names those files."""
    kept = [*map(from_anywhere, keep_plugins(folder.parent, settings.get("plugin"), plugins))]
    write_json(folder / "config.json", dict(settings=settings, facts=facts))
    write_whole(folder / "args.txt", "".join(flag + "\n" for flag in make_flags(
        settings, kept, facts.get("data_path"))))


def make_flags(settings, plugins=None, data_path=None):
    """The flags of train.py that repeat a run with these settings, the plugins of these paths and data of one's own."""
    flags, own = [], dict(dataset=data_path) if data_path else {}
    for name, value in (settings | dict(plugin=plugins, data=None) | own).items():  # what data are is no flag
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (None, []):
            values = value if isinstance(value, list) else [value]
            flags.append(f"--{name} {shlex.join(map(str, values))}")
    return flags


def write_metrics(folder, rows):
    """rows: a dict of numbers for each epoch, with lambda_0, lambda_1, ... of the differential blocks."""
    write_csv(folder / "metrics.csv", rows, lr="{:.8g}", seconds="{:.3f}", images_per_second="{:.0f}")


def write_summary(folder, figures):
    """summary.json, which finishes the run, with a CRC-32 of its figures and of each of the files in CHECKED."""
    sums = {name: file_checksum(folder / name) for name in CHECKED if exists(folder / name)}
    write_json(folder / "summary.json", figures | dict(crc32=sums | {"summary.json": json_checksum(figures)}))


# A run's folder, read.

def run_state(folder):
    """What a folder is: "finished", "gathered" (in the tables beside it; what it still holds was left by a killed
    gather), "begun" or "nothing"."""
    if exists(folder / "summary.json"):
        return "finished"
    if folder.name in read_rows(folder.parent):
        return "gathered"
    return "begun" if exists(folder / "config.json") else "nothing"


def check_settings(settings):
    need(settings, NAME, "model", "dataset")
    need(settings, "a whole number", "seed", "epochs")
    if settings.get("plugin") is not None:
        need(settings, "a name and digits", "plugin")


def check_recordable(settings):
    """Raise a UserError unless a record of these settings can be read again."""
    try:
        check_settings(settings)
    except Damaged as error:
        raise UserError(f"{error}: rename it") from None


def read_config(folder):
    """The settings and the facts of a run: two dicts."""
    path = folder / "config.json"
    if run_state(folder) == "gathered":
        raise UserError(f"{folder} is in the tables of {folder.parent}, which keep no weights: to make them again, run "
                        f"python train.py {read_rows(folder.parent)[folder.name].args} --runs-dir DIR")
    config = read_json(path)
    with reading(path):
        need(config, "an object", "settings", "facts")
        check_settings(config["settings"])
    return config["settings"], config["facts"]


def check_summary(summary):
    need(summary, "a finite number", "val_loss", "test_loss")
    need(summary, "a number from 0 to 1", "test_accuracy")
    need(summary, "a whole number above 0", "parameters")


def read_summary(folder):
    """The figures of a finished run, a dict: those of summary.json or, if it has been gathered, of the table."""
    if run_state(folder) == "gathered":
        return read_rows(folder.parent)[folder.name].summary
    return read_figures(folder, ["config.json", "metrics.csv"])


def read_figures(folder, checked):
    """The figures of summary.json, once its checksums of them and of these files are found right. There are none where
    it was made by hand."""
    path = folder / "summary.json"
    figures = read_json(path)
    with reading(path):
        sums = figures.pop("crc32", None)
        check_summary(figures)
        if sums is None:
            return figures
        check(isinstance(sums, dict) and sums.get("summary.json") == json_checksum(figures), "its checksum is wrong")
    for path in (folder / name for name in checked):
        with reading(path):
            if path.name in sums or exists(path):
                check(file_checksum(path) == sums.get(path.name), "summary.json has another checksum of it")
    return figures


def read_maps(folder):
    """attention.npz: images (8, C, H, W), and the class token's weights on their patches in the last block, head by
    head (8, heads, H / patch, W / patch)."""
    path = folder / "attention.npz"
    arrays = read_arrays(path)
    maps = [array for name, array in arrays.items() if name.startswith("map_")]
    with reading(path):
        check("images" in arrays and maps, "images or maps are missing")
        images, weights = arrays["images"], maps[-1]
        check(images.dtype == numpy.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and images.size,
              "images are not images")
        side = math.isqrt(weights.shape[-1]) if weights.size and weights.ndim == 4 else 0
        check(weights.shape == (len(images), *weights.shape[1:2], side**2 + 1, side**2 + 1),
              "maps are not of these images")
        check(weights.dtype.kind == "f" and numpy.isfinite(weights).all(), "a weight is not a finite number")
    return images, weights[:, :, 0, 1:].reshape(*weights.shape[:2], side, side).astype(float)


def read_run(folder):
    """The finished run in a folder, a Run. A UserError if it is not finished, or a file of it is missing, damaged or
    without amounts of corruption."""
    folder = Path(folder)
    settings, facts = read_config(folder)
    if run_state(folder) != "finished":
        raise UserError(f"{folder} is not finished: run its command again to resume")
    rows = {}
    for path in (folder / name for name in TABLES[1:]):
        if path.name == "metrics.csv" or exists(path):
            _, rows[path.name] = read_csv(path)
    maps = read_maps(folder) if exists(folder / "attention.npz") else None
    summary = read_figures(folder, CHECKED)  # last, as gather deletes it first: if it is there, the rest was whole
    return make_run(folder, settings, facts, summary, rows, folder, maps)


def make_run(folder, settings, facts, summary, rows, place, maps=None):
    """A Run of {file: its rows}, which lie in the files of this name in `place`."""
    facts = dict(parameters=summary["parameters"]) | facts
    both, fields = settings | facts, dict.fromkeys(READERS)
    summary = {name: both[name] for name in SHARED_FIGURES} | summary
    with reading(folder / "summary.json"):
        check(all(summary[name] == both[name] for name in SHARED_FIGURES), "it contradicts config.json")
    for field, (name, make_field) in READERS.items():
        if name in rows:
            with reading(place / name):
                check(rows[name], "it has no rows")
                fields[field] = make_field(rows[name])
    run = Run(folder, settings, facts, summary, **fields, maps=maps)
    with reading(place / "metrics.csv"):
        check(run.metrics and len(run.metrics["epoch"]) == settings["epochs"], "it has not one row an epoch")
    if run.noise and not run.amounts:  # errors under other amounts are not to be compared with these
        raise UserError(f"{place / 'noise.csv'} has no column amount: run python analysis.py "
                        f"{shlex.quote(str(folder))}, which analyses the run again")
    return run


# Tables of many runs.

# A row of runs.csv: the run's name, the flags that repeat it, what its config.json and its summary.json hold, and a
# checksum of its rows in all tables, those of runs.csv being `cells`, without the checksum.
Row = namedtuple("Row", "run args settings facts summary checksum cells")
ORIGINAL = "put the original back, or move the tables away"


def from_cell(text):
    """The value of a cell of runs.csv: JSON, or else a plain string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_table(text):
    """The columns of a table, and {run: its rows, as those of parse_csv}."""
    columns, rows = parse_csv(text)
    check(columns[:1] == ["run"], "its first column is not run")
    runs = group_by(rows, "run")
    for row in rows:
        del row["run"]
    return columns, runs


def read_table(path):
    """A table as {run: its rows}."""
    with reading(path, advice=ORIGINAL):
        return parse_table(read_text(path))[1]


def checksum_of(rows):
    """CRC-32 of the rows of a run, {table: its rows}, whatever the order of columns, as the text of a cell."""
    columns = {table: {column: [row.get(column) for row in part] for column in set().union(*part)}
               for table, part in rows.items()}
    return str(json_checksum(columns))


def read_rows(folder):
    """runs.csv as {run: Row}; nothing where the folder has no tables. The checksums are for read_tables to check."""
    path = folder / "runs.csv"
    if not exists(path):
        return {}
    with reading(path, advice=ORIGINAL):
        return parse_rows(read_text(path))


@functools.lru_cache(maxsize=2)  # train.py asks for each of its runs
def parse_rows(text):
    """Settings are the columns before `parameters`, facts those from there to `val_loss`, and figures the rest; what is
    a figure and a setting or fact as well has one column."""
    columns, table = parse_table(text)
    check({"parameters", "val_loss"} < {*columns} and columns[-1] == "checksum", "a column is missing")
    facts, figures = columns.index("parameters"), columns.index("val_loss")
    parts = columns[2:facts], columns[facts:figures], [*SHARED_FIGURES, *columns[figures:-1]]
    rows = {}
    for run, (cells, *others) in table.items():
        check(not others, f"{run} is in two rows")
        checksum = cells.pop("checksum", None)
        values = {column: from_cell(cell) for column, cell in cells.items()}
        settings, facts_, summary = ({name: values[name] for name in part if name in values} for part in parts)
        if "data_path" in facts_:  # the image size of data of one's own is a setting, and a fact of every run
            settings["image_size"] = facts_["image_size"]
        check_settings(settings)
        check_summary(summary)
        rows[run] = Row(run, values.get("args"), settings, facts_, summary, checksum, cells)
    return rows


def read_tables(folder):
    """The runs in a folder's tables, {name: Run}; none where it has no tables. A UserError if a table is damaged."""
    rows, tables, runs = read_rows(folder), {}, {}  # runs.csv first: gather writes it last
    for path in (folder / name for name in TABLES[1:]):
        if rows and exists(path):
            tables[path.name] = read_table(path)
    for name, row in rows.items():
        found = {table: groups[name] for table, groups in tables.items() if name in groups}
        if row.checksum != checksum_of({"runs.csv": [row.cells]} | found):
            raise UserError(f"{folder / 'runs.csv'} has another checksum of {name} than that of its rows there and in "
                            f"{', '.join(tables)}: {ORIGINAL}")
        runs[name] = make_run(folder / name, row.settings, row.facts, row.summary, found, folder)
    return runs


# Many runs.

def subfolders(folder):
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name a folder of runs") from None


def read_folders(folder):
    """The finished runs in the folders of a folder, {name: Run}, and why the others are left out, {name: line}."""
    runs, problems = {}, {}
    for child in subfolders(folder):
        try:
            state = run_state(child)
            if state in ("begun", "finished"):
                runs[child.name] = read_run(child)
            elif state == "nothing" and not (
                    child.name in OTHER_FOLDERS or exists(child / "runs.csv") or subfolders(child)):
                problems[child.name] = f"{child}: not a run"
        except UserError as error:
            problems[child.name] = str(error)
    return runs, problems


def check_same(run, tabled):
    """Raise a UserError unless a run reads the same from its folder and from the tables, to the last digit."""
    first, second = (json.dumps(each._replace(maps=None), sort_keys=True, default=str) for each in (run, tabled))
    if first != second:
        raise UserError(f"{run.folder} and {run.folder.parent / 'runs.csv'} hold different runs of this name: move one "
                        "of them away")


def find_runs(*folders):
    """The finished runs that lie directly in the folders, [Run], those of their tables first; and a line for each
    folder in them that is left out.

    Raises:
        UserError: if a table is damaged, or a folder and the tables hold different runs of one name.
    """
    runs, skipped = [], []
    for folder in map(Path, folders):
        found, problems = read_folders(folder)
        tabled = read_tables(folder)  # after the folders: those that gather deletes meanwhile are in the tables
        for name in found.keys() & tabled.keys():
            check_same(found[name], tabled[name])
        runs += (tabled | found).values()
        skipped += [line for name, line in problems.items() if name not in tabled]
    return runs, skipped


# Who may train what.

def check_usable(folder, settings, overwrite):
    """Raise a UserError unless the run with these settings may be trained, resumed or left as it is in this folder."""
    state = run_state(folder)
    if exists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file: move it away or give another --runs-dir")
    if overwrite:
        if state == "gathered":
            raise UserError(f"{folder.name} is in the tables of {folder.parent}, which --overwrite does not change: "
                            "give another --runs-dir")
    elif state == "nothing":
        for name in FILES:
            if exists(folder / name):
                raise UserError(f"{folder} has {name} but no config.json, so nothing says what made it: move it away "
                                "or give --overwrite")
    else:
        rows = read_rows(folder.parent)
        recorded = rows[folder.name].settings if state == "gathered" else read_config(folder)[0]
        differing = [f"{name} is {recorded.get(name)} there and {settings.get(name)} here"
                     for name in settings | recorded if setting_of(recorded, name) != setting_of(settings, name)]
        if differing:
            is_other = recorded.get("plugin") != settings.get("plugin")
            kept = keep_plugins(folder.parent, recorded.get("plugin")) if is_other else []
            how = f" (the kept copy: --plugin {shlex.join(map(str, kept))})" if kept and all(map(exists, kept)) else ""
            raise UserError(f"{folder} has other settings ({'; '.join(differing)}): give those{how}, or another "
                            "--runs-dir" + ("" if state == "gathered" else ", or --overwrite to lose that run"))


def interrupted_stack(folder):
    """The seeds that an interrupted run is to be resumed with, its own among them, as its config.json says; none where
    there is nothing to resume, as no epoch was finished."""
    if not exists(folder / "config.json"):
        return []
    settings, facts = read_config(folder)
    with reading(folder / "config.json"):
        need(facts, "a list of whole numbers", "stack")
        check(settings["seed"] in facts["stack"], "the run is not in its own stack")
    first = run_folder(folder.parent, settings | dict(seed=facts["stack"][0]))
    return facts["stack"] if exists(first / "last.pt") else []


def find_stacks(runs_dir, settings, seeds, size, overwrite):
    """Which of the runs with these settings and seeds are still to be trained, as lists of at most `size` seeds to
    train side by side. An interrupted stack, whose checkpoint lies in the folder of its first seed, is resumed or
    overwritten as a whole.

    Raises:
        UserError: if that stack has other seeds, or a folder holds anything else.
    """
    folders = {seed: run_folder(runs_dir, settings | dict(seed=seed)) for seed in seeds}
    interrupted, fresh = [], []
    for seed, folder in folders.items():
        check_usable(folder, settings | dict(seed=seed), overwrite)
        if not overwrite and run_state(folder) in ("finished", "gathered"):
            continue
        stack = []
        with contextlib.suppress(*[UserError] * overwrite):  # what is damaged may be overwritten
            stack = interrupted_stack(folder)
        if not set(stack) <= set(seeds):
            raise UserError(f"{folder} was interrupted in a stack of seeds: give --seed {' '.join(map(str, stack))} to "
                            "resume them together or, with --overwrite, to start them all afresh")
        if overwrite or not stack:
            fresh.append(seed)
        elif any(interrupted_stack(folders[member]) != stack for member in stack):
            raise UserError(f"{folder} was interrupted in a stack of the seeds {' '.join(map(str, stack))}, one of "
                            "which was started afresh since: give --overwrite to start all afresh")
        elif stack not in interrupted:
            interrupted.append(stack)
    return interrupted + [fresh[i:i + size] for i in range(0, len(fresh), size)]


def claim_stacks(locks, runs_dir, settings, seeds, size, overwrite):
    """What find_stacks returns, once the folders are locked, for as long as the ExitStack `locks` is open, and what
    `overwrite` gives up is deleted. Those in use by another process are left out, after a line for each."""
    free = []
    for stack in find_stacks(runs_dir, settings, seeds, 1, overwrite):  # each fresh seed by itself
        try:
            for seed in stack:
                locks.enter_context(locked(run_folder(runs_dir, settings | dict(seed=seed))))
            free += stack
        except InUse as error:
            say_once(f"left out: {error}")
    for seed, name in itertools.product(free, FILES) if overwrite else []:  # once they are locked
        (run_folder(runs_dir, settings | dict(seed=seed)) / name).unlink(missing_ok=True)
    return find_stacks(runs_dir, settings, free, size, overwrite)  # others may have changed them before


def read_threads(folder):
    """How many threads an interrupted run was begun with, or None where there is none to resume or it does not say."""
    if not exists(folder / "last.pt"):
        return None
    _, facts = read_config(folder)
    with reading(folder / "config.json"):
        if facts.get("threads") is not None:
            need(facts, "a whole number above 0", "threads")
    return facts.get("threads")
