"""Move the finished runs of a folder into its tables: runs.csv, a row a run, and their CSV files in one each.

    python gather.py runs/ --keep-seed 0

Then it deletes the folders of these runs, with their weights and maps, except for the seeds of --keep-seed. If it is
killed, no run is lost: run the same command again. The tables are written before a folder is deleted.
"""

import json
import shutil
import sys

import command
from command import UserError, locked, read_csv, read_json, write_csv, writing
from plugins import keep_plugins
from records import (FILES, TABLES, check_same, checksum_of, from_cell, make_flags, read_rows, read_run, read_table,
                     read_tables, run_state, subfolders)

LITTER = [".DS_Store", "desktop.ini", "Thumbs.db", ".ipynb_checkpoints", "~$*", ".~lock.*", ".lock", ".*.partial"]


# What can be moved.

def read_locked(folder):
    """The run in a folder, into which nobody else writes meanwhile."""
    with locked(folder):
        return read_run(folder)


def check_deletable(folder):
    """Raise a UserError if the folder of a run holds anything that gather would delete and nobody could make again."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link: put the folder itself there, or move the link away")
    strays = sorted(path.name for path in folder.iterdir() if not any(map(path.match, [*FILES, *LITTER])))
    if strays:
        raise UserError(f"{folder} holds {', '.join(strays)}, which tables do not keep: move it away")


def check_unlike(runs):
    """Raise a UserError if two runs differ in their names alone."""
    folders = {}
    for run in runs:
        settings = json.dumps({name: value for name, value in run.settings.items() if value}, sort_keys=True)
        other = folders.setdefault(settings, run.folder)
        if other != run.folder:
            raise UserError(f"{run.folder} and {other} are runs of the same settings and seed: move one of them away")


# Tables.

def to_cell(value):
    """A value of JSON as the text of a cell: a plain string as it is, anything else as JSON."""
    is_plain = isinstance(value, str) and value and value.isprintable() and from_cell(value) == value
    return value if is_plain else json.dumps(value)


def rows_of(run):
    """The rows of a run in the tables: {table: rows}."""
    kept = keep_plugins(run.folder.parent, run.settings.get("plugin"))
    args = " ".join(make_flags(run.settings, kept, run.facts.get("data_path")))
    cells = {name: to_cell(value) for name, value in (
        dict(args=args) | run.summary | run.facts | run.settings).items()}
    rows = {"runs.csv": [cells]}
    for path in (run.folder / table for table in TABLES[1:]):
        if path.exists():
            _, rows[path.name] = read_csv(path)
    cells["checksum"] = checksum_of(rows)
    return rows


def write_tables(folder, runs):
    """Write the tables of a folder with these runs in them, runs.csv last."""
    held = read_rows(folder) | {run.folder.name: run for run in runs}
    settings, facts, figures = ([name for run in held.values() for name in getattr(run, part)]
                                for part in ("settings", "facts", "summary"))
    settings = [name for name in settings if name not in facts]  # as image_size: see records.parse_rows
    first = {"runs.csv": ["args", *settings, "parameters", *facts, "val_loss", *figures]}
    added = {run.folder.name: rows_of(run) for run in runs}
    paths = [folder / table for table in [*TABLES[1:], "runs.csv"]]
    tables = {path: read_table(path) if path.exists() else {} for path in paths}
    for path, groups in tables.items():
        groups |= {name: rows.get(path.name, []) for name, rows in added.items()}  # also for what a killed gather wrote
        names = sorted(groups, key=lambda name: [
            held[name].settings[setting] for setting in ("dataset", "model", "seed") if name in held])
        rows = [dict(run=name) | row for name in names for row in groups[name]]
        if rows or path.exists():
            columns = ["run", *first.get(path.name, []), *(column for row in rows for column in row)]
            write_csv(path, rows, dict.fromkeys(columns))


# The command.

def delete(folder, tabled):
    """Delete the folder of a run that is in the tables, or what a killed gather left of it."""
    with locked(folder):
        check_deletable(folder)
        config = folder / "config.json"
        if run_state(folder) == "finished":
            check_same(read_run(folder), tabled)
        elif config.exists() and read_json(config).get("settings") != tabled.settings:
            raise UserError(f"{folder} is another run than that of this name in the tables: move it away")
        with writing(folder):
            (folder / "summary.json").unlink(missing_ok=True)  # first: a folder without it counts as gathered
            shutil.rmtree(folder)


def gather(folder, keep_seeds=()):
    """Move the finished runs of a folder into its tables, but for those of the seeds to keep. Weights and maps of what
    is gathered are deleted.

    Raises:
        UserError: if a run is not finished, damaged or in use, or would not be the same in a table.
    """
    subfolders(folder)  # a folder that is not there is not made
    with locked(folder):
        runs = [read_locked(child) for child in subfolders(folder) if run_state(child) in ("begun", "finished")]
        moved = {run.folder.name: run for run in runs if run.settings["seed"] not in keep_seeds}
        kept = {run.folder.name for run in runs} - moved.keys()
        if keep_seeds and runs and not kept:
            raise UserError(f"{folder} has no run of seed {', '.join(map(str, keep_seeds))} to keep: leave --keep-seed "
                            "out to gather all, and lose their weights")
        tabled = read_tables(folder)
        check_unlike([*tabled.values(), *runs])
        for name, run in moved.items():
            check_deletable(run.folder)
            if name in tabled:
                check_same(run, tabled[name])
        new = [run for name, run in moved.items() if name not in tabled]
        if new:
            write_tables(folder, new)
            tabled = read_tables(folder)
        for child in subfolders(folder):
            if child.name in tabled and child.name not in kept:
                delete(child, tabled[child.name])
    stay = f"; {len(kept)} stay folders" if kept else ""
    print(f"{len(moved)} runs gathered, {len(tabled)} in the tables of {folder}{stay}")


def parse_flags(argv):
    parser = command.Parser("gather.py", __doc__)
    parser.add_argument("folder", type=command.usable_folder, metavar="FOLDER", help="a folder of runs")
    parser.add_argument("--keep-seed", nargs="+", type=int, default=[], metavar="N", dest="keep_seeds",
                        help="also keep the runs of these seeds as folders, with weights and maps")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    return command.exit_status("gather.py", parse_flags, lambda args: gather(args.folder, args.keep_seeds), argv)


if __name__ == "__main__":
    sys.exit(main())
