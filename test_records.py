"""Claims about records.py, gather.py and command.py: what is written reads the same from folders and tables,
nothing is lost on the way, damage is one line and a bug a traceback, and what a user can put right is said."""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy
import pytest
import torch

import analysis
import command
import gather
import plugins
import records
import report
import train
from command import UserError
from test_data import HERE
from test_train import TINY, small

ODD = {"plugin": None, "flip": True, "note": 'a "b", c', "number": "0.10", "empty": "", "list": [0, [1.5, None]],
       "tiny": 1e-300, "third": 1 / 3, "word": "null", "infinite": "inf", "lines": "a\r\nb", "letters": "π"}


def write_run(runs_dir, model="vit", seed=0, settings=(), facts=(), analysed=True, **summary):
    """A finished run of three epochs, its figures drawn from a generator; returns its folder."""
    draw = random.Random(f"{model} {seed}").random
    two = ["lambda_0"] * (model == "vitdiff")
    settings = dict(model=model, dataset="mnist", seed=seed, plugin=None, epochs=3, lr=0.006) | dict(settings)
    folder = records.run_folder(runs_dir, settings)
    folder.mkdir(parents=True)
    records.write_config(folder, settings, dict(parameters=33_034, stack=[seed], compiled=False) | dict(facts))
    records.write_metrics(folder, [dict(epoch=epoch) | {
        name: draw() for name in ("lr", "val_loss", "val_accuracy", "seconds", *two)} for epoch in (1, 2, 3)])
    if analysed:
        records.write_csv(folder / "noise.csv", [
            dict(corruption=name, severity=severity, amount=0.1 * severity, test_accuracy=draw())
            for name in ("gaussian_noise", "blur") for severity in (1, 2)])
        heads = [dict(condition="clean", block=0, head=head) for head in range(3)]
        records.write_csv(folder / "attention.csv", [head | dict.fromkeys(records.ATTENTION_FIGURES, draw()) | dict(
            signal_to_noise=ratio) for head, ratio in zip(heads, (1.5, numpy.inf, numpy.nan))])
        records.write_csv(folder / "response.csv", [head | {
            name: draw() if two or name[-2:] != "_2" else "" for name in records.RESPONSE_FIGURES} for head in heads])
        records.write_csv(folder / "aligned.csv", [dict(condition="fog", severity=3, images=count, test_loss=draw(),
                                                        test_accuracy=draw()) for count in (0, 10)])
        records.write_csv(folder / "attack.csv", [dict(attack=name, epsilon=0.01, test_loss=draw(),
                                                       test_accuracy=draw()) for name in ("pgd", "fgsm")])
        write_maps(folder)
    (folder / "best.pt").touch()
    records.write_summary(folder, dict(parameters=33_034, epochs=3, best_epoch=2, val_loss=draw(), test_loss=draw(),
                                       test_accuracy=draw(), seconds=1 / 3) | summary)
    return folder


def without_checksums(folder):
    """The folder of a run, as of one that was made by hand."""
    records.write_json(folder / "summary.json", records.read_summary(folder))
    return folder


def write_maps(folder, images=(8, 1, 28, 28), maps=(8, 2, 17, 17)):
    arrays = dict(images=numpy.zeros(images, numpy.uint8), map_0=numpy.ones(maps))
    records.write_arrays(folder / "attention.npz", arrays)


def write_runs(runs_dir, seeds=(0, 1, 2)):
    for model, seed in itertools.product(("vit", "vitdiff"), seeds):
        write_run(runs_dir, model, seed, analysed=seed != 1)


def contents(runs):
    """What runs say, by name, without maps, which tables do not keep."""
    return {run.folder.name: json.dumps(run._replace(maps=None, folder=None), sort_keys=True) for run in runs}


def read(folder):
    runs, skipped = records.find_runs(folder)
    assert not skipped
    return contents(runs)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_damage(tmp_path):
    """A damaged run is named and left out, a damaged table is an error that names it, or all is read right: no other
    figure without a word, and no traceback. But whole rows of runs.csv can be lost, and the runs with them."""
    write_runs(tmp_path)
    gather.gather(tmp_path, [0])
    content = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*")) if path.suffix not in (".pt", ".txt")}
    right, chance, named = read(tmp_path), random.Random(16), 0
    for path in chance.choices([*content], k=250):
        old, place, more = content[path], chance.randrange(len(content[path])), chance.choices(b'0,\n"[{nx-\xff\0', k=2)
        path.write_bytes(chance.choice([
            b"", old[:place], old[:place] + bytes([old[place] ^ 1 << chance.randrange(8)]) + old[place + 1:],
            old[:place] + bytes(more) + old[place + chance.randrange(4):],
            content[chance.choice([other for other in content if other.name == path.name])]]))
        try:
            runs, lines = records.find_runs(tmp_path)
        except UserError as error:
            runs, lines = [], [str(error)]
        assert contents(runs).items() <= right.items()
        assert lines or path.name == "runs.csv" or contents(runs) == right
        for line in lines:
            assert line.startswith(str(path.parent)) and path.name in line and "\n" not in line
            assert path.parent != tmp_path or line.endswith(records.ORIGINAL)
        named += len(lines)
        path.write_bytes(old)
    assert named > 150


TEXTS = {  # of files of a run, and what in them is replaced
    "config.json": ('{"settings": {"model": "vit", "dataset": "mnist", "seed": 0, "epochs": 3}, "facts": {}}', [
        ('"vit"', '"../vit"'), ('"vit"', "3"), ("3}", "2000000000}"), ("0", "0.5"), ('"seed": 0, ', ""),
        ("{}", "null"), ("0", "1" * 5000), ("{}", "[" * 200_000), ('"seed"', '"plugin": "mine", "seed"')]),
    "summary.json": ('{"parameters": 33034, "val_loss": 0.5, "test_loss": 0.5, "test_accuracy": 0.98}', [
        ("33034", "0"), ("33034", "0.5"), ("0.5", "NaN"), ("0.98", "1.5"), ("0.98", '"0.98"'), ("0.98", "1e400"),
        ("val_loss", "loss"), ("}", ', "crc32": 3}'), ("}", ', "crc32": {}}'), ("{", "[{")]),
    "metrics.csv": ("epoch,val_loss,val_accuracy\n1,1,0.5\n2,1,0.5\n3,1,0.5\n", [
        ("2,1", "2,1e300"), ("2,1", "1,1"), ("2,1,", "2,"), ("2,1", '2,"1'), ("2,1", "2,"), ("val_loss", "epoch"),
        ("val_loss", "loss"), ("2,1,0.5", "2,1,1.5"), ("\n1,1,0.5\n2,1,0.5\n3,1,0.5", "")]),
    "noise.csv": ("corruption,severity,amount,test_accuracy\nblur,1,2,0.5\n", [
        ("0.5", "nan"), ("0.5", "word"), ("0.5", ""), ("0.5", "1.5"), ("1,2", "2,2"), ("1,2", "1,nan"), ("1,2", "x,2"),
        ("blur", ""), ("blur", "bl\udcff"), ("severity", "amount"), ("0.5", "0.5\nx,1,2,0.5\nx,2,2,0.5")]),
    "attention.csv": (f"condition,block,head,{','.join(records.ATTENTION_FIGURES)}\nclean,0,0,0,0,0,0,0,0,0\n", [
        ("clean,0,0", "clean,1,0"), ("clean,0,0", "clean,0,1"), ("clean,0,0", "clean,x,0"), ("clean", ""),
        ("0,0\n", "0,\n"), ("entropy", "entrop"), ("0,0\n", "0,-1\n"),
        ("0\n", "0\nb,0,0,0,0,0,0,0,0,0\nb,0,1,0,0,0,0,0,0,0\n")]),
    "response.csv": ("condition,block,head,noise_to_signal\nblur_3,0,0,0.5\n", [("3,0", "3,1"), ("0.5", "inf")])}
DAMAGED = [*((name, text.replace(*words)) for name, (text, changes) in TEXTS.items() for words in changes),
           ("attention.npz", "PK\x03\x04"), *(("attention.npz", shapes) for shapes in [
               dict(maps=(8, 2, 18, 18)), dict(maps=(7, 2, 17, 17)), dict(maps=(8, 17, 17)), dict(maps=(8, 0, 17, 17)),
               dict(images=(8, 2, 28, 28)), dict(images=(8, 28, 28))])]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_damage_without_checksums(tmp_path, name, content):
    """Of a run made by hand, which has no checksums, a file of another structure is named, and the run left out."""
    path = without_checksums(write_run(tmp_path)) / name
    if isinstance(content, dict):
        write_maps(path.parent, **content)
    else:
        path.write_text(TEXTS[name][0] if name in TEXTS else "")
        assert name == "attention.npz" or records.read_run(path.parent)
        path.write_bytes(content.encode(errors="surrogateescape"))
    runs, (line,) = records.find_runs(tmp_path)
    assert not runs and line.startswith(str(path.parent)) and "\n" not in line and len(line) < 400
    assert name in line or "metrics.csv is damaged or not of this run (it has not one row an epoch)" in line


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError, RuntimeError, IndexError])
def test_bugs_keep_their_traceback(tmp_path, monkeypatch, error):
    """A bug of the program while it reads a file is no damage of the file."""
    def buggy(rows):
        raise error("mistyped")

    write_run(tmp_path)
    monkeypatch.setitem(records.READERS, "noise", ("noise.csv", buggy))
    with pytest.raises(error, match="mistyped"):
        records.find_runs(tmp_path)


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:-300], lambda old: b"PK" + old,
                                    lambda old: old.replace(b"\0\0\x80?", b"\0\0\x81?"), zlib.compress])
def test_checkpoints(tmp_path, damage):
    """Checkpoints hold CPU tensors of their own memory, and a damaged one is named."""
    path, big = tmp_path / "last.pt", torch.ones(10**6)
    records.write_checkpoint(path, dict(seeds=[0], best=None, parts=[dict(part=big[2:4].requires_grad_())]))
    part = records.read_checkpoint(path)["parts"][0]["part"]
    assert torch.equal(part, big[:2]) and not part.requires_grad and path.stat().st_size < 10_000
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="last.pt is damaged"):
        records.read_checkpoint(path)


def test_gathered_runs_read_the_same(tmp_path):
    """Settings, facts and figures of any type come back equal from the tables, and every seed that is kept stays: also
    in a folder, and with a plugin, of a Latin-1 name, and with the line ends of Windows."""
    name = os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "café"  # not every system has the first
    folder, source = tmp_path / name, tmp_path / f"{name}.py"
    source.write_text("")
    write_runs(folder)
    write_run(folder, "vit", 3, settings=ODD, facts={f"{name} fact": value for name, value in ODD.items()})
    without_checksums(write_run(folder, "vit", 11, settings=dict(plugin=plugins.execute_plugins([source]))))
    before = read(folder)
    assert gather.main([str(folder), "--keep-seed", "0", "1"]) == 0
    assert [path.name for path in records.subfolders(folder)] == [
        f"mnist-{model}-seed{seed}" for model in ("vit", "vitdiff") for seed in (0, 1)]
    for path in [*folder.rglob("*.csv"), *folder.rglob("*.json")]:
        assert read(folder) == before
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(folder) == before
    write_run(folder, "vit", 4)  # gathering again adds to the tables
    before = read(folder)
    assert gather.main([str(folder)]) == 0
    assert names_in(folder) == sorted(records.TABLES) and read(folder) == before
    assert re.findall("^mnist-(.*?),", (folder / "runs.csv").read_text(), re.MULTILINE) == [
        *(f"vit-seed{seed}" for seed in (0, 1, 2, 3, 4, 11)), *(f"vitdiff-seed{seed}" for seed in (0, 1, 2))]


def before_each_change(patch, function):
    """Call `function` before each system call that changes files."""
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        patch.setattr(os, name, lambda *args, change=getattr(os, name), **kwargs: [
            function(), change(*args, **kwargs)][1])


def test_gather_killed_at_any_write(tmp_path, monkeypatch):
    """Killed at any moment, each run reads the same from its folder or the tables, and the same command goes on."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of the time
    write_runs(tmp_path / "first", seeds=(0, 1))
    write_runs(tmp_path / "more", seeds=(2,))
    expected = read(tmp_path / "first") | read(tmp_path / "more")
    random.seed(0)
    for trial in range(30):
        folder = tmp_path / "runs"
        shutil.copytree(tmp_path / "first", folder)
        if trial % 2:
            gather.gather(folder, [0])
        shutil.copytree(tmp_path / "more", folder, dirs_exist_ok=True)
        for _ in range(random.choice([1, 1, 2, 3])):
            left = itertools.chain(range(random.randrange(90), 0, -1), itertools.repeat(0))
            with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch:
                before_each_change(patch, lambda: next(left) or signal.raise_signal(signal.SIGINT))
                gather.gather(folder)
            assert read(folder) == expected, trial
        gather.gather(folder)
        assert contents(records.read_tables(folder).values()) == expected
        assert names_in(folder) == sorted(records.TABLES)
        shutil.rmtree(folder)


def test_reading_while_runs_are_gathered(tmp_path, monkeypatch):
    """Who reads at any moment of a gather finds every run once, and so does who is overtaken by one while he reads."""
    def check():
        assert read(tmp_path / "runs") == expected

    write_runs(tmp_path / "again")
    expected = read(shutil.copytree(tmp_path / "again", tmp_path / "runs"))
    with monkeypatch.context() as patch:
        before_each_change(patch, check)
        gather.gather(tmp_path / "runs", [0])
        gather.gather(tmp_path / "runs")
    for place in range(0, 60, 4):
        calls, folder = itertools.count(-place), shutil.copytree(tmp_path / "again", tmp_path / str(place))

        def overtaken(path, *encoding, read_text=Path.read_text):
            if next(calls) == 0:
                gather.gather(folder)
            return read_text(path, *encoding)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", overtaken)
            assert read(folder) == expected, place


@pytest.mark.parametrize("spoil, complaint", [
    (lambda run: (run / "summary.json").unlink(), "mnist-vit-seed1 is not finished"),
    (lambda run: (run / "noise.csv").write_text("a,b\n1,2\n"), "mnist-vit-seed1/noise.csv is damaged"),
    (lambda run: (run / "metrics.csv").unlink(), "mnist-vit-seed1/metrics.csv is missing"),
    (lambda run: (run / ".thoughts").write_text("mine"), "mnist-vit-seed1 holds .thoughts"),
    (lambda run: (run / "my.py").write_text("an edited plugin"), "mnist-vit-seed1 holds my.py"),
    (lambda run: run.rename(run.parent / ".away").parent.joinpath(run.name).symlink_to(".away"), "seed1 is a link"),
    (lambda run: (run.parent / "metrics.csv").write_text("mine"), "metrics.csv is .*first column is not run"),
    (lambda run: (without_checksums(run) / "noise.csv").write_text("corruption,severity,test_accuracy\nblur,1,0.5\n"),
     "noise.csv has no column amount: run python analysis.py .*mnist-vit-seed1, which analyses the run again"),
    (lambda run: shutil.copytree(run, run.parent / "copy"), "seed1 and .*copy are runs of"),
    (lambda run: records.write_summary(run, records.read_summary(run) | dict(epochs=4)), "it contradicts config.json"),
])
def test_gather_refuses(spoil, complaint, tmp_path):
    """What is unfinished, damaged or of the user's own stops the whole command, by name, and nothing changes; but not
    what desktops, offices and killed processes leave in folders."""
    for seed, litter in enumerate([".DS_Store", "~$noise.csv", ".best.pt.7.partial"]):
        (write_run(tmp_path, seed=seed) / litter).touch()
    spoil(tmp_path / "mnist-vit-seed1")
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".partial"}
    with pytest.raises(UserError, match=complaint):
        gather.gather(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".partial"} == before
    with pytest.raises(UserError, match="no run of seed 7 to keep"):
        gather.gather(write_run(tmp_path / "other").parent, [7])


def test_a_run_in_both_places(tmp_path):
    """A run in the tables and in a folder is read once if it is the same, and named if not; gather deletes the first,
    and nothing of another run, begun or finished, that has the name of one in the tables."""
    folder, runs = write_run(tmp_path / "runs"), tmp_path / "runs"
    expected = read(runs)
    shutil.copytree(folder, tmp_path / "same")
    gather.gather(runs)
    shutil.copytree(tmp_path / "same", folder)
    assert read(runs) == expected and records.find_runs(runs)[0][0].maps
    gather.gather(runs)
    assert not folder.exists() and read(runs) == expected
    write_run(runs, test_loss=1.0)
    for function in (records.find_runs, gather.gather):
        with pytest.raises(UserError, match="mnist-vit-seed0 and .*runs.csv hold different runs of this name"):
            function(runs)
    (folder / "summary.json").unlink()
    config = records.read_json(folder / "config.json")
    for rate, stays in [(0.007, True), (0.006, False)]:
        config["settings"]["lr"] = rate
        records.write_json(folder / "config.json", config)
        assert records.run_state(folder) == "gathered" and read(runs) == expected
        with contextlib.suppress(UserError):
            gather.gather(runs)
        assert folder.exists() == stays


def test_gathered_runs_are_not_trained_again(tmp_path):
    """train.py skips what the tables have, refuses it with other settings or --overwrite, and its weights are gone. A
    setting that either does not have is at the value that changes nothing."""
    settings, folder = records.read_config(write_run(tmp_path))[0], tmp_path / "mnist-vit-seed0"
    gather.gather(tmp_path)
    del settings["plugin"]
    assert records.find_stacks(tmp_path, settings | dict(shift=0.0, flip=False), [0, 1], 2, False) == [[1]]
    with pytest.raises(UserError, match="settings .lr is 0.006 there and 1 here; noise is None there and 0.5 here"):
        records.find_stacks(tmp_path, settings | dict(lr=1, noise=0.5), [0], 1, False)
    with pytest.raises(UserError, match="which --overwrite does not change"):
        records.find_stacks(tmp_path, settings, [0], 1, True)
    for _ in range(2):
        assert records.read_summary(folder)["best_epoch"] == 2
        with pytest.raises(UserError, match="keep no weights: .* python train.py --model vit --dataset mnist"):
            records.read_config(folder)
        folder.mkdir(exist_ok=True)  # an empty folder is no run


def test_overwriting(tmp_path, capsys):
    """--overwrite deletes all that a run has left, and nothing of one that is in use, which is left out."""
    folders = [write_run(tmp_path, seed=seed) for seed in (0, 1)]
    before = sorted(tmp_path.rglob("*.*"))
    request = tmp_path, records.read_config(folders[0])[0], [0, 1], 2, True
    with contextlib.ExitStack() as locks:
        with command.locked(folders[1]):
            assert records.claim_stacks(locks, *request) == [[0]]
            assert capsys.readouterr().err.count(f"left out: {folders[1]} is in use by another process") == 1
        locks.close()
        assert sorted(tmp_path.rglob("*.*")) == [path for path in before if folders[0] not in path.parents]
        assert records.claim_stacks(locks, *request) == [[0, 1]]
        assert [names_in(folder) for folder in folders] == [[".lock"]] * 2


def begin_stack(runs_dir, settings, stack, checkpoint=True):
    for seed in stack:
        folder = records.run_folder(runs_dir, settings | dict(seed=seed))
        folder.mkdir(parents=True, exist_ok=True)
        records.write_config(folder, settings | dict(seed=seed), dict(stack=stack))
    if checkpoint:
        (records.run_folder(runs_dir, settings | dict(seed=stack[0])) / "last.pt").touch()


def test_interrupted_stacks(tmp_path):
    """An interrupted stack is resumed or overwritten as a whole, its finished runs with it, and others begin afresh."""
    settings, folder = records.read_config(write_run(tmp_path / "other"))[0], tmp_path / "mnist-vit-seed0"

    def stacks(*seeds, overwrite=False):
        return records.find_stacks(tmp_path, settings, list(seeds), 2, overwrite)

    begin_stack(tmp_path, settings, [1, 0], checkpoint=False)
    assert stacks(0) == [[0]] and stacks(0, 1) == [[0, 1]]
    begin_stack(tmp_path, settings, [1, 0])
    assert stacks(0, 1, 2, 3, 4) == [[1, 0], [2, 3], [4]] and stacks(2) == [[2]]
    for seed, overwrite in [(0, False), (1, False), (0, True), (1, True)]:
        with pytest.raises(UserError, match="give --seed 1 0 to resume them together or, with --overwrite, to start"):
            stacks(seed, overwrite=overwrite)
    assert stacks(0, 1, overwrite=True) == [[0, 1]]
    shutil.copy(tmp_path / "other/mnist-vit-seed0/summary.json", folder)  # killed while it was finished
    assert stacks(0) == [] and stacks(0, 1) == [[1, 0]]
    with pytest.raises(UserError, match="give --seed 1 0"):
        stacks(0, overwrite=True)
    for facts in ({}, dict(stack=3), dict(stack=[1]), dict(stack=["0"])):
        (folder / "summary.json").unlink(missing_ok=True)
        records.write_config(folder, settings, facts)
        with pytest.raises(UserError, match="config.json is damaged .*stack"):
            stacks(0)
        assert stacks(0, overwrite=True) == [[0]]
    for replace in (lambda: begin_stack(tmp_path, settings, [0], checkpoint=False), lambda: shutil.rmtree(folder)):
        replace()
        with pytest.raises(UserError, match="stack of the seeds 1 0, one of which was started afresh since"):
            stacks(0, 1)
    (tmp_path / "mnist-vit-seed1/config.json").unlink()
    with pytest.raises(UserError, match="has last.pt but no config.json"):
        stacks(1)
    (tmp_path / "mnist-vit-seed5").touch()
    with pytest.raises(UserError, match="seed5 is a file"):
        stacks(5)


def test_a_failed_analysis(tmp_path, monkeypatch, small, capsys):
    """An analysis that fails after the training keeps the test figures, and a line says how to analyse again."""
    monkeypatch.setitem(analysis.ANALYSES, "noise.csv", analysis.Analysis(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main([*TINY, "--epochs", "1", "--analysis", "--runs-dir", str(tmp_path)])
    assert f"to analyse: python analysis.py {tmp_path}" in capsys.readouterr().out
    ((run,), _) = records.find_runs(tmp_path)
    assert 0 < run.summary["test_accuracy"] < 1 and run.noise is None


def test_unwritable_cache():
    """A TORCHINDUCTOR_CACHE_DIR that cannot be made keeps nobody from training."""
    code = "import stack, torch; torch.optim.AdamW([torch.ones(1)]); print(stack.CACHE_PROBLEM)"
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                           env=os.environ | dict(TORCHINDUCTOR_CACHE_DIR=os.devnull + "/x"))
    assert found.stdout == f"{os.devnull}/x cannot be made (Not a directory)\n", found.stderr


def test_git_commit(tmp_path, monkeypatch):
    """A record names the commit, and says that it is dirty when a module has changed, not when a plugin was copied."""
    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=N", "-c", "user.email=e@x.org", *arguments], cwd=tmp_path,
                              capture_output=True, text=True, check=True).stdout.strip()

    def commit_of(folder):
        monkeypatch.setattr(command, "__file__", str(folder / "command.py"))
        return command.git_commit()

    (tmp_path / "records.py").write_text("one = 1\n")
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "first")
    (tmp_path / "plugin.py").write_text("two = 2\n")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "records.py").write_text("one = 2\n")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "inside").mkdir()
    assert commit_of(tmp_path / "inside") is None  # the checkout is another project's


def fail(number):
    """A system call that fails with this error."""
    def call(*_):
        raise OSError(number, os.strerror(number))
    return call


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_writes_are_whole(tmp_path, monkeypatch, function):
    """A file that cannot be written is named and stays as it was, and nothing is left beside it."""
    path = tmp_path / "a.json"
    records.write_json(path, {})
    monkeypatch.setattr(os, function, fail(errno.ENOSPC))
    with pytest.raises(UserError, match="a.json cannot be written .No space left"):
        records.write_json(path, dict(more=1))
    assert records.read_json(path) == {} and names_in(tmp_path) == ["a.json"]


def test_locks(tmp_path, monkeypatch, capsys):
    """A lock that somebody holds refuses at once, one whose file is deleted before it is taken is taken anew, and a
    killed process's partial files are cleaned up. Where there are no locks the work goes on, and that is said once."""
    taken = []

    def flock(file, how, flock=command.fcntl.flock):
        flock(file, how)
        taken.append(file)
        if len(taken) == 1:
            (tmp_path / ".lock").unlink()

    (tmp_path / ".last.pt.1.partial").touch()
    monkeypatch.setattr(command.fcntl, "flock", flock)
    with command.locked(tmp_path):
        assert len(taken) == 2 and taken[0].closed and names_in(tmp_path) == [".lock"]
        with pytest.raises(UserError, match="in use by another process"), command.locked(tmp_path):
            pass
    assert names_in(tmp_path) == []
    monkeypatch.setattr(command.fcntl, "flock", fail(errno.ENOLCK))
    with command.locked(tmp_path), command.locked(tmp_path):
        assert capsys.readouterr().err.count("cannot be locked (No locks available): start no second") == 1
    command.say_once.cache_clear()


def test_printing_ends_no_work(monkeypatch):
    """A closed pipe, a full disk, a closed stream or one of another encoding end the printing alone."""
    reader, writer = os.pipe()
    os.close(reader)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (open(writer, "w"), open("/dev/full", "w"), narrow, None):
        monkeypatch.setattr("sys.stdout", stream)
        assert command.exit_status("command", str, lambda text: print(text, flush=True), "vité ±") == 0
        assert stream is not narrow or stream.buffer.getvalue() == b"vit? ?\n"
        if stream:
            stream.close()  # which flushes what is left
            assert command.exit_status("command", str, print, "closed") == 0


@pytest.mark.parametrize("mark, column, row, end, complaint", [
    ("accuracy", "MNIST, nonsense", "vit", "end of table", "unknown word 'nonsense'"),
    ("accuracy", "brightness", "vit", "end of table", "does not say which dataset"),
    ("accuracy", "MNIST", "vit9 - vit", "end of table", "too few runs of vit9 - vit"),
    ("accuracy", "MNIST", "vit", "end of the table", "<!-- end of table -->")])
def test_wrong_tables(mark, column, row, end, complaint, tmp_path, capsys):
    """What is wrong in a page is one line that names the page, which stays as it is."""
    page = tmp_path / "page.md"
    page.write_text(text := f"<!-- table: {mark} -->\n| | {column} |\n|---|---:|\n| `{row}` | 1 |\n<!-- {end} -->\n")
    assert report.main([str(page)]) == 2 and page.read_text() == text
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report.py: error: {page}: ") and complaint in line


def test_exit_status(tmp_path, monkeypatch, capsys):
    """What the user can put right is one line and status 2, --help is status 0, and Ctrl-C 130."""
    for wrong, said in [(tmp_path / "no", "no"), (__file__, "is a file: name a folder"), ("x" * 300, "too long")]:
        assert gather.main([str(wrong)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("gather.py: error: ") and error.count("\n") == 1
    monkeypatch.setattr(gather, "gather", lambda *_: signal.raise_signal(signal.SIGINT))
    assert gather.main(["."]) == 130 and "interrupted" in capsys.readouterr().err and gather.main(["--help"]) == 0
