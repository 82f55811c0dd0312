"""Train the compact vision transformers of vit.py and leave a record of every epoch.

    python train.py --model vitdiff --dataset mnist
    python train.py --model all --dataset mnist fashionmnist --seed 0 1 2 3 4
    python train.py --plugin my_attention.py --model vitcosine
    torchrun --nproc-per-node 2 train.py --dim 256 --depth 8

A run is a folder, such as runs/mnist-vitdiff-seed0. Run the same command again to skip finished runs and to resume
interrupted ones exactly. The seeds of a model are trained side by side, as a stack. torchrun divides each batch among
processes. The way to backward() is main, train_runs (the runs), train_stack (epochs and batches), train_step.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import math
import shlex
import statistics
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import analysis
import command
import data
import machine
import plugins
import records
import stack
from command import UserError
from vit import MODELS, ViT


# Flags.

SIZE = command.whole_number(1)
EPILOG = """@FILE reads flags from FILE, such as the args.txt of a run; a later flag overrides an earlier one.

On a cluster:
    Several jobs can share one --runs-dir, on a file system with locks. Give each job its own model or data set.
    Give one job all seeds of its model: side by side they take less time than one after the other.
    Run the same command again to resume a job that was killed. It skips finished runs.
    A job skips a run that another job is training, and says so.
    Nodes may have no network: put the archives of the data sets into --data-dir beforehand.
    The plugin is copied beside the runs, so you may change the original meanwhile."""
# The flags of what decides the outcome, by their group in --help: {setting: (what it takes, default, help)}. Without a
# default it is the model's, or else the data set's.
FLAGS = {
    "sizes (default: those of the model)": {
        "patch_size": (SIZE, None, "pixels a side"),
        "dim": (SIZE, None, "width of the tokens (default: 32; vitbalanced 48)"),
        "depth": (SIZE, None, "blocks (default: 2)"),
        "num_heads": (SIZE, None, "heads (default: 2; vitboth 4, vitdiffpaper 1)"),
        "mlp_dim": (SIZE, None, "hidden width of a block's MLP (default: 128; vitboth 160)"),
        "head_hidden_dim": (command.whole_number(0), None,
                            "hidden width of the classifier, 0 for a linear one (default: 128)"),
        "dropout": (command.PROBABILITY, 0.0, "probability, for embedded tokens, in the MLPs and for what a block "
                    "adds; seeds that are trained side by side share the draws"),
    },
    "recipe, the same for every model": {
        "epochs": (SIZE, None, ""),
        "batch_size": (SIZE, None, "images"),
        "optimizer": (dict(choices=["adamw", "muon"]), "muon", "muon: Muon for matrices, AdamW for the rest"),
        "lr": (command.RATE, None, "peak learning rate of AdamW"),
        "muon_lr": (command.RATE, None, "peak learning rate of Muon"),
        "weight_decay": (command.RATE, None, "decoupled; norms, biases, tokens and lambda have none"),
        "warmup": (command.SHARE, 0.05, "share of the steps, at the start, in which the rates rise"),
        "decay": (command.SHARE, 1.0, "share of the steps, at the end, in which the rates fall to 0; if --warmup and "
                  "--decay add up to more than 1, they stay below their peaks"),
        "clip": (command.RATE, 1.0, "maximum norm of a gradient; 0 turns clipping off"),
        "label_smoothing": (command.PROBABILITY, 0.1, "in the training, validation and test loss"),
        "distractors": (command.whole_number(0), 0, "fragments of other images on each canvas of a cluttered set "
                        "(default: 0; 4 for clutteredmnist, clutteredfashionmnist)"),
    },
    "augmentation, drawn again for each training image in each epoch": {
        setting: (row.flag, None, row.help) for setting, row in data.AUGMENTATIONS.items()},
}
SETTINGS = {setting: default for group in FLAGS.values() for setting, (_, default, _) in group.items()}


def by_dataset(setting):
    """The default of a setting that depends on the data set, for --help: the most common one, then the exceptions."""
    names = {}
    for name, row in data.DATASETS.items():
        if "load" not in row:  # a plugin's, of an earlier command in this process
            names.setdefault(data.defaults_of(name)[setting], []).append(name)
    (common, _), *exceptions = sorted(names.items(), key=lambda item: -len(item[1]))
    return "; ".join([str(common), *(f"{value} for {', '.join(few)}" for value, few in exceptions)])


def make_parser(prog="train.py", description=__doc__):
    parser = command.Parser(
        prog, description, fromfile_prefix_chars="@", allow_abbrev=False,
        epilog=EPILOG)

    add, names = parser.add_argument_group("what to train: every combination of").add_argument, dict(
        nargs="+", metavar="NAME")
    add("--model", **names, default=["vitdiff"],
        help=f"{', '.join(MODELS)} or another row of MODELS in vit.py; all: every row (default: vitdiff)")
    add("--dataset", **names, default=["mnist"],
        help=f"{', '.join(data.DATASETS)}, or the path of your own data, a folder of pictures or an .npz file, or a "
             "row that a plugin adds to DATASETS (default: mnist)")
    add("--image-size", **command.whole_number(2), help="pixels a side to which your own pictures are resized "
        "(default: their own size if all are square, of one size and at most 64, else 32)")
    add("--seed", **command.whole_number(0, 2**32 - 1), nargs="+", default=[0],
        help="decides the weights, batch order, augmentation and dropout (default: 0)")
    add("--plugin", **plugins.FLAG, nargs="+",
        help="Python files to run first: they may add rows to MODELS and DATASETS or change anything else; they are "
             "copied beside the runs, with the files of their folder that they import or read by __file__")

    for title, group in FLAGS.items():
        add = parser.add_argument_group(title).add_argument
        for setting, (flag, default, text) in group.items():
            if "(default:" not in text:
                text = f"{text} (default: {by_dataset(setting) if default is None else default})".lstrip()
            add(f"--{setting.replace('_', '-')}", **flag, help=text)
    add("--no-augment", action="store_true", help="turn all of these off")

    group = parser.add_argument_group("where and how")
    analysis.add_place_flags(group)
    add = group.add_argument
    add("--runs-dir", type=command.usable_folder, default=Path("runs"), metavar="DIR",
        help="where the runs' folders are (default: %(default)s)")
    add("--overwrite", action="store_true", help="train a run again from the start if it exists")
    add("--analysis", action=argparse.BooleanOptionalAction, default=True,
        help=f"write {', '.join(analysis.by_itself())} after the test: errors under noise, and what the model attends "
             "to (default: yes)")
    add("--amp", choices=["auto", "off", "bfloat16", "float16"], default="auto",
        help="precision of the forward pass; auto: bfloat16 on a GPU that supports it, else off (default: "
             "%(default)s)")
    add("--compile", choices=["auto", "yes", "no"], default="auto",
        help="torch.compile on a CPU, a CUDA graph of the training step on a GPU; auto: yes on a GPU, and on a "
             f"CPU with a C++ compiler if all seeds together take {stack.COMPILED_STEPS:,} training steps or more "
             "(default: %(default)s)")
    add("--stack", **SIZE, help="seeds trained side by side; 1: one after the other (default: all, but 1 on a CPU "
        f"where the tokens of an image times --dim are more than {stack.STACKED_NUMBERS:,})")
    return parser


def parse_flags(argv=None):
    """The command line's flags; a wrong one exits with status 2."""
    return make_parser().parse_args(argv)


def check_defaults(name):
    """Raise a UserError unless the flags take the defaults of a data set of one's own."""
    def refuse(message):
        raise UserError(f"defaults of data set {name}: {message}")

    parser, defaults = make_parser(), data.DATASETS[name]["defaults"]
    parser.error = refuse
    args = parser.parse_args(shlex.split(" ".join(records.make_flags(defaults))))
    defaults.update({setting: getattr(args, setting) for setting in defaults})


def check_flags(args):
    """Raise a UserError for flags that contradict each other or the data set."""
    for name in args.model:
        command.check_name("model", name, [*MODELS, "all"], f"; a model of a plugin needs --plugin "
                           f"{plugins.plugin_with(name)}")
    args.dataset = data.names_of(args.dataset, args.image_size)
    for name in args.dataset:
        command.check_name("data set", name, data.DATASETS, "; a data set of a plugin needs --plugin FILE, and one's "
                           "own its path")
        data.complete_row(name, args.data_dir)
        if "load" in data.DATASETS[name]:
            check_defaults(name)
        count = data.training_size(name)
        if args.batch_size and args.batch_size > count:
            raise UserError(f"argument --batch-size: {args.batch_size} is more than the {count} training images of "
                            f"{name}: choose a smaller one")
        if args.distractors and not data.is_cluttered(name):
            raise UserError(f"argument --distractors: {name} has none: choose "
                            f"{' or '.join(filter(data.is_cluttered, data.DATASETS))}")
    given = [name for name in data.AUGMENTATIONS if getattr(args, name)]
    if args.no_augment and given:
        raise UserError(f"argument --no-augment: contradicts --{given[0]}: leave one of them out, or set the strengths "
                        "one by one")


def resolve_settings(args, model, dataset, seed, device, plugin=None):
    """All that decides the outcome of a run: the settings of config.json, in their order."""
    values = {name: parameter.default for name, parameter in inspect.signature(ViT).parameters.items()}
    values |= {setting: default for setting, default in SETTINGS.items() if default is not None}
    values |= data.defaults_of(dataset) | MODELS[model]
    if args.no_augment:
        values |= data.no_augmentation()
    values |= {setting: value for setting, value in vars(args).items() if value is not None}
    return dict(model=model, dataset=dataset, seed=seed, plugin=plugin) | {name: values[name] for name in SETTINGS} | (
        dict(amp=machine.resolve_amp(args.amp, device)) | data.DATASETS[dataset].get("identity", {}))


# The step.

def forward(net, images, labels, label_smoothing):
    """The sum of the losses of every seed and its correct answers, (S,) each: images (S, B, C, H, W), labels (S, B)."""
    logits = net(images)  # (S, B, classes)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(labels).sum(1), (logits.argmax(2) == labels).sum(1)


def train_step(forward, images, labels, share, net, optimizer, scaler, settings):
    """A training step of every seed -> losses (S,), correct answers (S,), over all ranks. `forward` may be compiled.

    `share` is what an image counts in the loss of its seed: 1 / size of the batch, of which each rank has a part.
    """
    with torch.autocast(**machine.precision(settings["amp"], images.device)):
        losses, correct = forward(net, images, labels, settings["label_smoothing"])
    losses = losses * share
    scaler.scale(losses.sum()).backward()
    losses = losses.detach()
    gradients = [weights.grad for weights in net.parameters()]  # (S, P) each
    machine.all_reduce([*gradients, losses, correct])
    scaler.unscale_(optimizer)
    if settings["clip"]:
        clip_gradients(gradients, settings["clip"])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return losses, correct


def clip_gradients(gradients, max_norm):
    """Scale down the gradient of each seed, a row of every tensor (S, P), to a norm of at most max_norm."""
    norms = torch.linalg.vector_norm(torch.cat(gradients, dim=1), dim=1, keepdim=True)  # (S, 1)
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factors)


# The loop.

# A run: its seed, its folder, the rows of its metrics.csv and its best epoch, a dict.
Run = namedtuple("Run", "seed folder metrics best")
# Runs that are trained side by side: net, a StackedModel; step(images, labels, share), which is train_step of these
# runs; whether it is compiled.
Stack = namedtuple("Stack", "runs net optimizer scaler step compiled")


def lr_factor(step, steps, warmup, decay):
    """The share of the peak rate at a step counted from 0: up over warmup * steps, flat, down over decay * steps. Where
    these two overlap it is the lower of both."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


def train_stack(stacked, splits, settings):
    """Train runs side by side to their end, and record each epoch; `splits` is a data set on the device of the net."""
    split, seeds, done = splits["train"], [run.seed for run in stacked.runs], len(stacked.runs[0].metrics)
    steps = math.ceil(len(split.labels) / settings["batch_size"])  # of an epoch
    with tqdm(total=steps * settings["epochs"], initial=steps * done, unit=" steps", leave=False,
              desc=f"{settings['model']} on {settings['dataset']}", disable=machine.rank() > 0 or None) as bar:
        for epoch in range(done + 1, settings["epochs"] + 1):
            start = time.perf_counter()
            torch.manual_seed(data.mix_seed(*seeds, epoch, "dropout") + machine.rank())
            stacked.net.train()
            losses = torch.zeros(len(seeds), steps, device=split.labels.device)
            correct = torch.zeros(len(seeds), dtype=torch.long, device=split.labels.device)
            for number, (images, labels, share) in enumerate(stack.rank_batches(split, seeds, epoch, settings)):
                factor = lr_factor((epoch - 1) * steps + number, settings["epochs"] * steps, settings["warmup"],
                                   settings["decay"])
                stack.set_lr(stacked.optimizer, factor)
                losses[:, number], batch_correct = stacked.step(images, labels, share)
                correct += batch_correct
                show_progress(bar, losses[:, number])
            if machine.rank() == 0:
                record_epoch(stacked, splits, settings, factor, losses.tolist(), correct.tolist(), start)


def show_progress(bar, losses):
    bar.update()
    if not bar.disable and bar.n % 50 == 0:  # reading a loss waits for the device, so not at every step
        bar.set_postfix(loss=f"{losses.mean().item():.3f}")


def record_epoch(stacked, splits, settings, factor, losses, correct, start):
    """Validate each seed after an epoch, and write its best weights, its metrics and what is needed to resume.

    losses (S, steps) and correct answers (S,) are those of the epoch, which began at `start` of time.perf_counter.
    """
    runs, count, epoch = stacked.runs, len(splits["train"].labels), 1 + len(stacked.runs[0].metrics)
    images_per_second = len(runs) * count / (time.perf_counter() - start)
    sizes = [len(batch) for batch in torch.arange(count).split(settings["batch_size"])]
    for run, of_steps in zip(runs, losses):
        for step, loss in enumerate(of_steps, 1):
            check_finite(run, "loss", loss, f"epoch {epoch}, step {step} of {len(sizes)}")
    validation = stack.evaluate(stacked.net, splits["val"], settings)
    lambdas = stack.measure_lambdas(stacked.net, splits["val"], settings)
    for i, (run, (val_loss, val_accuracy)) in enumerate(zip(runs, validation)):
        row = dict(
            epoch=epoch, step=epoch * len(sizes), lr=factor * settings["lr"],
            train_loss=sum(size / count * loss for size, loss in zip(sizes, losses[i])),
            train_accuracy=correct[i] / count, val_loss=val_loss, val_accuracy=val_accuracy,
            seconds=(time.perf_counter() - start) / len(runs), images_per_second=images_per_second,
            **{f"lambda_{block}": value for block, value in lambdas[i].items()})
        for name, value in row.items():
            check_finite(run, name, value, f"epoch {epoch}")
        run.metrics.append(row)
    for run, model, (val_loss, val_accuracy) in zip(runs, stacked.net.models, validation):
        if val_loss < run.best["val_loss"]:
            run.best.update(epoch=epoch, val_loss=val_loss, val_accuracy=val_accuracy)
            records.write_checkpoint(run.folder / "best.pt", model.state_dict())
    records.write_checkpoint(runs[0].folder / "last.pt", dict(
        seeds=[run.seed for run in runs], metrics=[run.metrics for run in runs], best=[run.best for run in runs],
        **stack.get_state(stacked.net, stacked.optimizer, stacked.scaler)))
    for run in runs:
        records.write_metrics(run.folder, run.metrics)
        print_epoch(run, settings)
    if epoch == 1:
        stack.load_best(runs, splits["val"], settings, stacked.net)


def check_finite(run, what, value, where):
    """Stop the run at a value that its record cannot hold."""
    if not records.is_finite(value):
        raise UserError(f"{run.folder}: the {what} is {value} at {where}; the record and checkpoints of the epochs "
                        "before are kept: give a lower --lr or --muon-lr, and --overwrite")


def print_epoch(run, settings):
    tqdm.write("{}  epoch {epoch:>{width}}/{epochs}  train loss {train_loss:.4f} accuracy {train_accuracy:.2%}  "
               "val loss {val_loss:.4f} accuracy {val_accuracy:.2%}  {images_per_second:,.0f} images/s".format(
                   run.folder.name, width=len(str(settings["epochs"])), epochs=settings["epochs"], **run.metrics[-1]))
    sys.stdout.flush()


# The runs.

# Runs that differ in their seed alone: the settings are those of the first of `seeds`, of which at most `size` are
# trained side by side.
Experiment = namedtuple("Experiment", "settings facts seeds size")


def plan_experiments(args, device, plugin):
    """An Experiment for every combination of data set and model, checked as a whole before the first is trained."""
    models = dict.fromkeys(name for given in args.model for name in (MODELS if given == "all" else [given]))
    where = dict(torch=torch.__version__, device=device.type, device_name=machine.name_device(device),
                 processes=machine.world_size(), git_commit=command.git_commit())
    seeds, experiments = list(dict.fromkeys(args.seed)), []
    for dataset, model in itertools.product(dict.fromkeys(args.dataset), models):
        settings = resolve_settings(args, model, dataset, seeds[0], device, plugin)
        records.check_recordable(settings)
        facts = stack.measure_model(settings) | data.facts_of(dataset)
        size = stack.choose_size(settings, args.stack, len(seeds), device)
        experiments.append(Experiment(settings, facts | where, seeds, size))
    return experiments


def check_untrained(experiments, datasets, with_analysis):
    """Raise a UserError unless the attention of each model is what it says, on two images of its data set."""
    for settings, *_ in experiments:
        split = datasets[settings["dataset"]]["val"]
        model = stack.make_model(settings).to(split.labels.device).eval()
        images = analysis.first_images(split, settings)
        analysis.check_model(model, images, settings["model"], with_analysis)
        if with_analysis:
            analysis.choose_analyses(model, images)  # whose line is said before the training


def make_stack(settings, seeds, runs_dir, device, compiled=False, required=False):
    """The Stack of these seeds from its beginning. Where `compiled` fails, that is a UserError if it is `required`."""
    net = stack.StackedModel([stack.make_model(settings | dict(seed=seed)).to(device) for seed in seeds])
    optimizer = stack.make_optimizer(net, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "float16")
    step = functools.partial(train_step, net=net, optimizer=optimizer, scaler=scaler, settings=settings)
    fast_step = None
    if compiled:
        batch = machine.part_of_rank(stack.empty_images(settings, len(seeds), settings["batch_size"]).zero_())
        fast_step = stack.accelerate(step, forward, net, optimizer, batch.to(device), settings, required)
    runs = [Run(seed, records.run_folder(runs_dir, settings | dict(seed=seed)), [], dict(val_loss=math.inf))
            for seed in seeds]
    return Stack(runs, net, optimizer, scaler, fast_step or functools.partial(step, forward), fast_step is not None)


def begin_stack(experiment, seeds, args, device, threads):
    """The Stack of these seeds: from the start, with config.json written for each, or where it was interrupted."""
    settings, path = experiment.settings, records.run_folder(
        args.runs_dir, experiment.settings | dict(seed=seeds[0])) / "last.pt"
    if not machine.threads_given(args.threads):  # so that the record of an interrupted run is that of one that was not
        torch.set_num_threads(machine.on_first_rank(records.read_threads, path.parent) or threads)
    steps = settings["epochs"] * math.ceil(data.training_size(settings["dataset"]) / settings["batch_size"])
    compiled = stack.is_compiled(args.compile, steps * len(seeds), device, settings["amp"])
    if compiled:
        torch.compiler.reset()  # of what was compiled for the stack before: it counts towards a limit
    stacked = make_stack(settings, seeds, args.runs_dir, device, compiled, required=args.compile == "yes")
    checkpoint = machine.on_first_rank(lambda: records.read_checkpoint(path) if path.exists() else None)
    if checkpoint:
        resume(stacked, path, checkpoint)
    for run in stacked.runs if machine.rank() == 0 else []:
        if run.metrics:
            records.write_metrics(run.folder, run.metrics)
            print(f"{run.folder}: resumed after epoch {len(run.metrics)} of {settings['epochs']}", flush=True)
        else:
            how = dict(compiled=stacked.compiled, stack=seeds, threads=torch.get_num_threads())
            records.write_config(run.folder, settings | dict(seed=run.seed), experiment.facts | how, args.plugin)
    return stacked


def resume(stacked, path, checkpoint):
    """Go back to where the checkpoint was written, which was read from `path`."""
    with records.reading(path, LookupError, RuntimeError, TypeError, ValueError):  # of what torch is to load
        seeds = [run.seed for run in stacked.runs]
        records.check(checkpoint["seeds"] == seeds, f"it is of the seeds {checkpoint['seeds']}")
        stack.set_state(stacked.net, stacked.optimizer, stacked.scaler, checkpoint)
        for run, metrics, best in zip(stacked.runs, checkpoint["metrics"], checkpoint["best"], strict=True):
            run.metrics[:] = metrics
            run.best.update(best)


def finish_stack(stacked, settings, facts, splits, with_analysis):
    """Test the best weights of the runs, analyse them if so wanted, write summary.json of each, and delete last.pt."""
    runs = [run for run in stacked.runs if records.run_state(run.folder) != "finished"]
    folders, split, count = [run.folder for run in runs], splits["test"], len(splits["train"].labels)
    net = stack.load_best(runs, splits["val"], settings, stacked.net)
    tests, start, problem = stack.evaluate(net, split, settings), time.perf_counter(), None
    try:
        if with_analysis:
            analysis.analyse(folders, net, splits, settings)
    except Exception as error:  # which takes nothing from what was trained and tested
        problem = error
    analysis_seconds = (time.perf_counter() - start) / len(runs)
    for (seed, folder, metrics, best), (test_loss, test_accuracy) in zip(runs, tests):
        speeds = [row["images_per_second"] for row in metrics]
        epoch_seconds = [count / speed for speed in speeds]
        records.write_summary(folder, dict(
            model=settings["model"], dataset=settings["dataset"], seed=seed, parameters=facts["parameters"],
            epochs=len(metrics), best_epoch=best["epoch"], val_loss=best["val_loss"], val_accuracy=best["val_accuracy"],
            test_loss=test_loss, test_accuracy=test_accuracy, seconds=sum(row["seconds"] for row in metrics),
            train_seconds=sum(epoch_seconds), analysis_seconds=analysis_seconds,
            milliseconds_per_step=1e3 * statistics.median(epoch_seconds) * len(metrics) / metrics[-1]["step"],
            images_per_second=statistics.median(speeds)))
        print_result(folder)
    (stacked.runs[0].folder / "last.pt").unlink(missing_ok=True)
    if problem or not with_analysis:
        print(f"to analyse: python analysis.py{' --plugin FILE' * bool(problem and settings['plugin'])} "
              f"{shlex.join(map(str, folders))}", flush=True)
    if problem:
        raise problem


def print_result(folder, width=0):
    figures = dict(seconds=math.nan, analysis_seconds=0.0) | records.read_summary(folder)
    print(f"{folder.name:{width}}  " + "{parameters:,} parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f} "
          "accuracy {test_accuracy:.2%}  {seconds:.0f} s, analysis {analysis_seconds:.0f} s".format(**figures),
          flush=True)


def print_results(folders, finished_before, runs_dir):
    """After several runs or none the results of all, and the command to draw them."""
    left = [folder for folder in folders if records.run_state(folder) not in ("finished", "gathered")]
    if left and len(left) == len(folders) - finished_before:
        raise UserError(f"nothing was trained, as other processes use {', '.join(map(str, left))}")
    if len(folders) > 1 or finished_before:
        print()
        for folder in folders:
            if folder not in left:
                print_result(folder, width=max(len(folder.name) for folder in folders))
    if left:
        print(f"\nleft to other processes: {', '.join(folder.name for folder in left)}")
    if finished_before:
        print(f"\nfinished before this command: {finished_before} of {len(folders)}; --overwrite trains them afresh")
    print(f"\ndraw them: python plot.py {shlex.quote(str(runs_dir))}", flush=True)


@machine.enough_memory()
def train_runs(args):
    """Train, test and analyse every combination of data set, model and seed."""
    plugin = plugins.execute_plugins(args.plugin)
    check_flags(args)
    device = machine.pick_device(args.device)
    machine.connect_ranks(device)
    experiments = machine.on_first_rank(plan_experiments, args, device, plugin)
    folders = [records.run_folder(args.runs_dir, experiment.settings | dict(seed=seed))
               for experiment in experiments for seed in experiment.seeds]
    before = machine.on_first_rank(lambda: [find_unfinished(experiment, args) for experiment in experiments])
    finished_before = len(folders) - sum(len(seeds) for stacks in before for seeds in stacks)
    unfinished = [experiment for experiment, stacks in zip(experiments, before) if stacks]
    datasets = {name: data.load_splits(name, args.data_dir, device)
                for name in dict.fromkeys(experiment.settings["dataset"] for experiment in unfinished)}
    machine.on_first_rank(check_untrained, unfinished, datasets, args.analysis)
    threads = machine.take_threads(args.threads, device) if unfinished else None
    for experiment in unfinished:
        settings, splits = experiment.settings, datasets[experiment.settings["dataset"]]
        with contextlib.ExitStack() as locks:
            for seeds in machine.on_first_rank(find_unfinished, experiment, args, locks):
                stacked = begin_stack(experiment, seeds, args, device, threads)
                train_stack(stacked, splits, settings)
                if machine.rank() == 0:
                    finish_stack(stacked, settings, experiment.facts, splits, args.analysis)
    if machine.rank() == 0:
        print_results(folders, finished_before, args.runs_dir)
    machine.disconnect_ranks()


def find_unfinished(experiment, args, locks=None):
    """The stacks of an experiment that are still to be trained, lists of seeds; with `locks`, an ExitStack, their
    folders are locked, and with --overwrite emptied."""
    request = args.runs_dir, experiment.settings, experiment.seeds, experiment.size, args.overwrite
    return records.claim_stacks(locks, *request) if locks else records.find_stacks(*request)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    machine.keep_freed_memory()
    machine.outlive_terminal()
    return command.exit_status("train.py", parse_flags, train_runs, argv,
                               again="run the same command again, without --overwrite, to resume")


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # so that a plugin that imports train changes this very program
    sys.exit(main())
