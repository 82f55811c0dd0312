"""Records: what gather moves into tables reads the same from there, nothing is lost on the way, damage is said."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import os
import random
import shutil

import numpy
import pytest

import plot
import records

ODD = {"plugin": None, "flip": True, "note": 'a "b", c', "number": "0.10", "empty": "", "list": [0, [1.5, None]],
       "tiny": 1e-300, "third": 1 / 3, "word": "null", "infinite": "inf", "lines": "a\r\nb", "letters": "π"}


def write_run(runs_dir, model="vit", seed=0, dataset="mnist", lambdas=False, settings=(), facts=(), analysed=True,
              **summary):
    """A finished run of three epochs, its figures drawn from a generator; returns its folder."""
    draw = random.Random(f"{model} {seed} {dataset}").random
    settings = dict(model=model, dataset=dataset, seed=seed, plugin=None, epochs=3, lr=0.006) | dict(settings)
    folder = records.run_folder(runs_dir, settings)
    folder.mkdir(parents=True)
    records.write_config(folder, settings, dict(parameters=33_034, stack=[seed], compiled=False) | dict(facts))
    records.write_metrics(folder, [
        dict(epoch=epoch, lr=draw() / 1e3, train_loss=draw(), val_loss=draw(), val_accuracy=draw(), seconds=draw())
        | (dict(lambda_0=draw()) if lambdas else {}) for epoch in (1, 2, 3)])
    if analysed:
        records.write_csv(folder / "noise.csv", [
            dict(corruption=name, severity=severity, amount=0.1 * severity, test_loss=draw(), test_accuracy=draw())
            for name in ("gaussian_noise", "blur") for severity in (1, 2)])
        records.write_csv(folder / "attention.csv", [
            dict(condition="clean", block=0, head=head) | dict.fromkeys(records.ATTENTION_FIGURES[:-1], draw())
            | dict(signal_to_noise=numpy.inf if head else 1.5) for head in (0, 1)])
        records.write_csv(folder / "response.csv", [
            dict(condition="shot_noise_3", block=0, head=head)
            | {name: draw() if lambdas or name[-2:] != "_2" else "" for name in records.RESPONSE_FIGURES}
            for head in (0, 1)])
    (folder / "best.pt").write_bytes(b"weights")
    records.write_summary(folder, dict(
        model=model, dataset=dataset, seed=seed, parameters=33_034, epochs=3, best_epoch=2, val_loss=draw(),
        test_loss=draw(), test_accuracy=draw(), seconds=1 / 3) | summary)
    return folder


def write_runs(runs_dir, seeds=(0, 1, 2)):
    for model in ("vit", "vitdiff"):
        for seed in seeds:
            write_run(runs_dir, model, seed, lambdas=model == "vitdiff", analysed=seed != 1)


def contents(runs):
    """What runs say, by name, without what tables do not keep."""
    def sort(values):
        return sorted((name, value) for name, value in values.items() if name != "crc32")

    return {run.folder.name: repr([*map(sort, [run.settings, run.facts, run.metrics, run.summary]), run.noise,
                                   run.attention, run.response, run.amounts]) for run in runs}


def read(folder):
    runs, skipped = records.find_runs(folder)
    assert not skipped
    return contents(runs)


def test_gathered_runs_read_the_same(tmp_path):
    """Settings, facts and figures of any type come back equal from the tables, and every seed that is kept stays."""
    write_runs(tmp_path)
    write_run(tmp_path, "vit", 3, settings=ODD, facts={f"{name} fact": value for name, value in ODD.items()})
    before = read(tmp_path)
    assert records.main(["gather", str(tmp_path), "--keep-seed", "0", "1"]) == 0
    assert sorted(path.name for path in records.subfolders(tmp_path)) == [
        f"mnist-{model}-seed{seed}" for model in ("vit", "vitdiff") for seed in (0, 1)]
    assert read(tmp_path) == before
    write_run(tmp_path, "vit", 4)  # gathering again adds to the tables
    before = read(tmp_path)
    assert records.main(["gather", str(tmp_path)]) == 0
    assert not records.subfolders(tmp_path) and read(tmp_path) == before


def test_tables_are_plain(tmp_path):
    """Any reader of CSV finds a row a run, numbers that are the recorded ones, and the checksums of sha256sum."""
    write_runs(tmp_path)
    summaries = {run.folder.name: run.summary for run in records.find_runs(tmp_path)[0]}
    records.gather(tmp_path)
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][:5] == ["run", "args", "model", "dataset", "seed"] and len(rows[0]) == len(set(rows[0]))
    for row in rows:
        assert float(row["test_loss"]) == summaries[row["run"]]["test_loss"]
        assert row["args"].startswith(f"--model {row['model']} --dataset mnist --seed {row['seed']}")
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / records.SUMS).read_text().splitlines())
    assert sums == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in records.TABLES}


@contextlib.contextmanager
def killed_at(call, monkeypatch):
    """A block in which the system call of this number, of those that change files, does not happen, nor any later."""
    left = call

    def counted(function):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        return run

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(KeyboardInterrupt):
            yield


def test_gather_killed_at_any_write(tmp_path, monkeypatch):
    """Killed at any moment, each run is in its folder or in the tables, and the same command goes on."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of the time
    write_runs(tmp_path / "first", seeds=(0, 1))
    write_runs(tmp_path / "more", seeds=(2,))
    expected = read(tmp_path / "first") | read(tmp_path / "more")
    random.seed(0)
    for trial in range(200):
        folder = tmp_path / "runs"
        shutil.copytree(tmp_path / "first", folder)
        records.gather(folder, [0])
        shutil.copytree(tmp_path / "more", folder, dirs_exist_ok=True)
        for _ in range(random.choice([1, 1, 2, 3])):
            with killed_at(random.randrange(70), monkeypatch):
                records.gather(folder)
            tabled = contents(records.read_tables(folder))
            in_folders = {child.name: contents([records.read_run(child)])[child.name]
                          for child in records.subfolders(folder)}
            assert tabled | in_folders == in_folders | tabled == expected, trial
        records.gather(folder)
        assert contents(records.read_tables(folder)) == expected
        assert sorted(path.name for path in folder.iterdir()) == sorted([*records.TABLES, records.SUMS])
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil, complaint", [
    (lambda run: (run / "summary.json").unlink(), "mnist-vit-seed1 is not finished"),
    (lambda run: (run / "noise.csv").write_text("a,b\n1,2\n"), "mnist-vit-seed1/noise.csv is damaged"),
    (lambda run: (run / "metrics.csv").unlink(), "mnist-vit-seed1/metrics.csv is damaged|missing"),
    (lambda run: (run / ".thoughts").write_text("mine"), "mnist-vit-seed1 holds .thoughts"),
    (lambda run: (run / "my.py").write_text("an edited plugin"), "mnist-vit-seed1 holds my.py"),
    (lambda run: run.rename(run.parent / ".away").parent.joinpath(run.name).symlink_to(".away"), "seed1 is a link"),
    (lambda run: (run.parent / "metrics.csv").write_text("mine"), "metrics.csv is not a table of SHA256SUMS"),
    (lambda run: records.write_summary(run, records.read_summary(run) | dict(epochs=4)), "seed1 would not be the same"),
])
def test_gather_refuses(spoil, complaint, tmp_path):
    """What is unfinished, damaged or of the user's own stops the whole command, by name, and nothing changes."""
    for seed in (0, 1, 2):
        write_run(tmp_path, seed=seed)
    spoil(tmp_path / "mnist-vit-seed1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(records.UserError, match=complaint):
        records.gather(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(records.UserError, match="no run of seed 7 to keep"):
        records.gather(write_run(tmp_path / "other").parent, [7])


def test_a_run_in_both_places(tmp_path, capsys):
    """A run in the tables and in a folder: plot.py names both, gather deletes the folder only if it is the same run."""
    write_run(tmp_path / "runs")
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    records.gather(tmp_path / "runs")
    shutil.copytree(tmp_path / "copy", tmp_path / "runs", dirs_exist_ok=True)
    assert plot.main([str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "mnist-vit-seed0" in error and "runs.csv" in error and error.count("\n") == 1
    other = write_run(tmp_path / "other", test_loss=1.0)
    shutil.copytree(other, tmp_path / "runs" / other.name, dirs_exist_ok=True)
    with pytest.raises(records.UserError, match="seed0 is in the tables as another run"):
        records.gather(tmp_path / "runs")
    shutil.copytree(tmp_path / "copy", tmp_path / "runs", dirs_exist_ok=True)
    records.gather(tmp_path / "runs")
    assert not records.subfolders(tmp_path / "runs") and len(read(tmp_path / "runs")) == 1


def test_damaged_tables(tmp_path):
    """A damaged or missing table is one line that names it: no traceback, no figure changed without a word."""
    write_runs(tmp_path)
    records.gather(tmp_path)
    right, tables = read(tmp_path), [*records.TABLES, records.SUMS]
    random.seed(1)
    originals = {name: (tmp_path / name).read_bytes() for name in tables}
    for trial in range(200):
        name, signed = random.choice(tables), trial % 2
        content = bytearray(originals[name])
        for _ in range(random.choice([1, 1, 5])):
            place = random.randrange(len(content))
            content[place:place + random.randrange(3)] = bytes(
                random.choices([*b'0,\n"[{nx-\xff', 0], k=random.randrange(3)))
        (tmp_path / name).write_bytes(content[:random.choice([None, random.randrange(len(content))])])
        if signed and name != records.SUMS:
            (tmp_path / records.SUMS).write_text("".join(  # as after a change on purpose: any answer but a traceback
                f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in records.TABLES))
        try:
            assert read(tmp_path) == right or signed
        except records.UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        for name, content in originals.items():
            (tmp_path / name).write_bytes(content)
    for name in tables:
        (tmp_path / name).unlink()
        with pytest.raises(records.UserError, match=f"{name} is missing"):
            records.find_runs(tmp_path)
        (tmp_path / name).write_bytes(originals[name])


def test_line_ends_do_not_matter(tmp_path):
    """A clone with the line ends of Windows reads the same, folders and tables."""
    write_runs(tmp_path)
    records.gather(tmp_path, [0])
    before = read(tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".csv", ".json"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    path = tmp_path / records.SUMS
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(tmp_path) == before


def test_gathered_runs_are_not_trained_again(tmp_path):
    """train.py skips what the tables have, refuses it with other settings or --overwrite, and its weights are gone."""
    settings = records.read_config(write_run(tmp_path))[0]
    records.gather(tmp_path)
    assert records.find_stacks(tmp_path, settings, [0, 1], 2, False) == [[1]]
    assert records.read_summary(tmp_path / "mnist-vit-seed0")["best_epoch"] == 2
    with pytest.raises(records.UserError, match="other settings .lr is 0.006 there and 1 here"):
        records.find_stacks(tmp_path, settings | dict(lr=1), [0], 1, False)
    with pytest.raises(records.UserError, match="which --overwrite does not change"):
        records.find_stacks(tmp_path, settings, [0], 1, True)
    for _ in range(2):
        with pytest.raises(records.UserError, match="keep no weights: .* python train.py --model vit --dataset mnist"):
            records.read_config(tmp_path / "mnist-vit-seed0")
        (tmp_path / "mnist-vit-seed0").mkdir(exist_ok=True)  # an empty folder is no run
    assert records.read_summary(tmp_path / "mnist-vit-seed0")["best_epoch"] == 2


def test_overwriting_what_is_in_use(tmp_path):
    """Where one of several runs is in use, --overwrite deletes none."""
    folders = [write_run(tmp_path, seed=seed) for seed in (0, 1)]
    settings, before = records.read_config(folders[0])[0], sorted(tmp_path.rglob("*.*"))
    with open(folders[1] / ".lock", "w") as lock, contextlib.ExitStack() as locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(records.UserError, match="seed1 is in use"):
            records.claim_stacks(locks, tmp_path, settings, [0, 1], 2, True)
    assert sorted(path for path in tmp_path.rglob("*.*") if path.name != ".lock") == before


def test_interrupted_stacks(tmp_path):
    """A stack is resumed as it was, unless it finished no epoch; never where one of its runs was started afresh."""
    settings = records.read_config(write_run(tmp_path / "finished"))[0]
    folders = [records.run_folder(tmp_path, settings | dict(seed=seed)) for seed in range(2)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        records.write_config(folder, settings | dict(seed=seed), dict(stack=[0, 1]), None)
    assert records.find_stacks(tmp_path, settings, [0, 1], 1, False) == [[0], [1]]
    (folders[0] / "last.pt").touch()
    assert records.find_stacks(tmp_path, settings, [0, 1], 1, False) == [[0, 1]]
    with pytest.raises(records.UserError, match="with --seed 0 1, or give --overwrite"):
        records.find_stacks(tmp_path, settings, [1], 1, False)
    assert records.find_stacks(tmp_path, settings, [1], 1, True) == [[1]]
    with pytest.raises(records.UserError, match="resumed from: resume them first, or give --seed 0 1 to start all"):
        records.find_stacks(tmp_path, settings, [0], 1, True)
    assert records.find_stacks(tmp_path, settings, [1, 0], 1, True) == [[1], [0]]
    records.write_config(folders[1], settings | dict(seed=1), dict(stack=[1]), None)
    with pytest.raises(records.UserError, match="seed0 was interrupted beside .*seed1, which was started afresh"):
        records.find_stacks(tmp_path, settings, [0, 1], 1, False)


def test_plugin_is_kept_once(tmp_path):
    """Runs of one plugin share its copy, unless it lies beside them; it is found by its content, not by its name."""
    source, setting = tmp_path / "mine.py", None
    source.write_text("WIDTH = 1\n")
    setting = records.execute_plugin(source)
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"mnist-vit-seed{seed}"
        folder.mkdir(parents=True)
        records.write_config(folder, dict(model="vit", plugin=setting), {}, source)
        assert records.find_run_plugin(folder, setting).read_text() == "WIDTH = 1\n"
    kept = tmp_path / "runs" / "plugins" / f"mine-{setting.split()[1]}.py"
    assert [*(tmp_path / "runs").rglob("*.py")] == [kept]
    assert f"--plugin {kept}\n" in (folder / "args.txt").read_text()
    assert records.keep_plugin(tmp_path, setting, source) == source
    kept.rename(kept.with_name("renamed.py"))
    assert records.find_run_plugin(folder, setting).name == "renamed.py"
    kept.with_name("renamed.py").write_text("WIDTH = 2\n")
    with pytest.raises(records.UserError, match="no copy lies in"):
        records.find_run_plugin(folder, setting)


def test_paths_of_any_bytes(tmp_path):
    """Runs and a plugin in folders named in Latin-1 are gathered as others are."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    source = folder / os.fsdecode(b"pl\xe9.py")
    try:
        folder.mkdir()
        source.write_text("")
    except OSError:
        pytest.skip("this file system has no such names")
    runs = [write_run(folder, seed=seed, settings=dict(plugin=records.execute_plugin(source))) for seed in (0, 1)]
    before = contents(map(records.read_run, runs))
    records.gather(folder)
    assert contents(records.find_runs(folder)[0]) == before


def test_printing_ends_no_work(monkeypatch):
    """A closed pipe, a full disk, a closed stream or one of another encoding end the printing alone."""
    reader, writer = os.pipe()
    os.close(reader)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (open(writer, "w"), open("/dev/full", "w"), narrow, None):
        monkeypatch.setattr("sys.stdout", stream)
        assert records.exit_status("command", str, lambda text: print(text, flush=True), "vité ±") == 0
        assert stream is not narrow or stream.buffer.getvalue() == b"vit? ?\n"
        if stream:
            stream.close()  # which flushes what is left
            assert records.exit_status("command", str, print, "closed") == 0


def test_noise_without_amounts(tmp_path, monkeypatch):
    """A run that does not say by which amounts its images were corrupted is skipped, in a folder or in tables, with
    what to do; gather refuses it."""
    for seed in (0, 1):
        folder = write_run(tmp_path, seed=seed)
    records.write_csv(folder / "noise.csv", [dict(corruption="blur", severity=1, test_accuracy=0.5)])
    records.write_summary(folder, records.read_summary(folder))
    advice = f"{folder}/noise.csv has no column amount: run python analysis.py {folder}"
    with pytest.raises(records.UserError, match=advice):
        records.gather(tmp_path)
    for place in ("folders", "tables"):
        runs, (line,) = records.find_runs(tmp_path)
        assert [run.folder.name for run in runs] == ["mnist-vit-seed0"] and line.startswith(advice), place
        with monkeypatch.context() as patch:
            patch.setattr(records, "check_amounts", lambda run: run)
            records.gather(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(number, tmp_path, monkeypatch, capsys):
    """Where the file system has no locks the work goes on, and that is said once."""
    if records.fcntl is None:
        pytest.skip("this system has no locks at all")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records.fcntl, "flock", refuse)
    for _ in range(2):
        with records.locked(tmp_path):
            pass
    assert capsys.readouterr().err.count("without locks") == 1
    records.say_once.cache_clear()


def test_a_deleted_lock_is_none(tmp_path, monkeypatch):
    """A lock whose file another process deletes before it is taken is taken anew."""
    if records.fcntl is None:
        pytest.skip("this system has no locks at all")
    taken = []

    def flock(file, how, flock=records.fcntl.flock):
        flock(file, how)
        taken.append(file)
        if len(taken) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(records.fcntl, "flock", flock)
    with records.locked(tmp_path):
        assert len(taken) == 2 and taken[0].closed and (tmp_path / ".lock").exists()


def test_a_held_lock_refuses(tmp_path):
    """A lock that somebody holds refuses at once, and a killed process's partial files are cleaned up."""
    (tmp_path / ".last.pt.1.partial").touch()
    with records.locked(tmp_path), pytest.raises(records.UserError, match="in use by another process"):
        with records.locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
