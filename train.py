"""Train the compact vision transformers of vit.py and leave a record of every epoch.

    python train.py --model vitdiff --dataset mnist
    python train.py --model all --dataset mnist fashionmnist --seed 0 1 2 3 4
    python train.py --plugin my_attention.py --model vitcosine
    torchrun --nproc-per-node 2 train.py --dim 256 --depth 8

A run is a folder, runs/mnist-vitdiff-seed0. The same command run again skips what is finished and resumes, exactly,
what was interrupted. The seeds of a model are trained side by side, as a stack; torchrun divides each batch among
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
import data
import machine
import records
import stack
from records import UserError
from vit import MODELS, ViT


# Flags.

def by_dataset(flag):
    """The default of a flag that depends on the data set, for --help: the most common one, then the exceptions."""
    names = {}
    for name, row in data.DATASETS.items():
        if "load" not in row:  # a plugin's, of an earlier command in this process
            names.setdefault(row["defaults"][flag], []).append(name)
    (common, _), *exceptions = sorted(names.items(), key=lambda item: -len(item[1]))
    parts = [str(common), *(f"{value} for {', '.join(few)}" for value, few in exceptions)]
    return f"(default: {'; '.join(parts)})"


def make_parser(prog="train.py", description=__doc__):
    parser = records.Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@", allow_abbrev=False,
        epilog="@FILE reads flags from FILE, such as the args.txt of a run; a later flag overrides an earlier one.")
    size, count, seed = records.whole_number(1), records.whole_number(0), records.whole_number(0, 2**32 - 1)
    rate = records.real_number("of at least 0", lambda value: 0 <= value < math.inf)
    share = records.real_number("from 0 to 1", lambda value: 0 <= value <= 1)
    probability = records.real_number("of at least 0 and below 1", lambda value: 0 <= value < 1)
    names = dict(nargs="+", metavar="NAME")

    add = parser.add_argument_group("what to train: every combination of").add_argument
    add("--model", **names, default=["vitdiff"],
        help=f"{', '.join(MODELS)} or any other row of MODELS in vit.py; all for every row (default: vitdiff)")
    add("--dataset", **names, default=["mnist"],
        help=f"{', '.join(data.DATASETS)} or one's own, a row that a plugin adds to DATASETS (default: mnist)")
    add("--seed", **seed, nargs="+", default=[0], help="of weights, batch order, augmentation, dropout (default: 0)")
    add("--distractors", **count, help="fragments of other images on each canvas of a cluttered data set (default: 4)")
    add("--plugin", type=records.usable_path, metavar="FILE",
        help="a Python file to execute first: it may add rows to MODELS and DATASETS or change anything else")

    add = parser.add_argument_group("sizes; the model's own where left out").add_argument
    add("--patch-size", **size, help=f"pixels a side {by_dataset('patch_size')}")
    add("--dim", **size, help="width of the tokens (default: 32; vitbalanced 48)")
    add("--depth", **size, help="blocks (default: 2)")
    add("--num-heads", **size, help="heads (default: 2; vitdiffpaper 1)")
    add("--mlp-dim", **size, help="hidden width of a block's MLP (default: 128)")
    add("--head-hidden-dim", **count, help="hidden width of the classifier, 0 for a linear one (default: 128)")

    add = parser.add_argument_group("recipe, the same for every model").add_argument
    add("--epochs", **size, help=by_dataset("epochs"))
    add("--batch-size", **size, help=f"images {by_dataset('batch_size')}")
    add("--optimizer", choices=["adamw", "muon"], default="muon",
        help="muon is Muon for the matrices and AdamW for the rest (default: %(default)s)")
    add("--lr", **rate, help=f"peak learning rate of AdamW {by_dataset('lr')}")
    add("--muon-lr", **rate, help=f"peak learning rate of Muon {by_dataset('muon_lr')}")
    add("--weight-decay", **rate, help=f"decoupled; not on norms, biases, tokens, lambda {by_dataset('weight_decay')}")
    add("--warmup", **share, default=0.05, help="share of the steps in which the rates rise (default: %(default)s)")
    add("--decay", **share, default=1.0,
        help="share of the steps in which they fall to 0 at the end; where both make more than 1 the peak is not quite "
             "reached (default: %(default)s)")
    add("--clip", **rate, default=1.0, help="maximum gradient norm; 0 disables clipping (default: %(default)s)")
    add("--label-smoothing", **probability, default=0.1,
        help="in every loss, validation and test too (default: %(default)s)")
    add("--dropout", **probability,
        help="probability, on the embedded tokens, in the MLPs and on what a block adds, drawn for all seeds side by "
             "side together (default: 0)")

    add = parser.add_argument_group("augmentation, drawn anew for each training image in each epoch").add_argument
    add("--rotation", **rate, help=f"maximum angle in degrees {by_dataset('rotation')}")
    add("--scale", **probability, help=f"width and height are divided by up to 1 +- this {by_dataset('scale')}")
    add("--shear", **probability, help=f"maximum shear {by_dataset('shear')}")
    add("--shift", **rate, help=f"maximum pixels each way {by_dataset('shift')}")
    add("--flip", action=argparse.BooleanOptionalAction,
        help=f"flip horizontally with probability 0.5 {by_dataset('flip')}")
    add("--brightness", **share,
        help=f"maximum that is added, of the way from black to white {by_dataset('brightness')}")
    add("--no-augment", action="store_true", help="none of these")

    group = parser.add_argument_group("where and how")
    analysis.add_place_flags(group)
    add = group.add_argument
    add("--runs-dir", type=records.usable_folder, default=Path("runs"), metavar="DIR",
        help="where the runs' folders are (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh where a run exists")
    add("--analysis", action=argparse.BooleanOptionalAction, default=True,
        help=f"after the test, write {', '.join(records.ANALYSIS)}: what the model does under noise and attends to "
             "(default: yes)")
    add("--amp", choices=["auto", "off", "bfloat16", "float16"], default="auto",
        help="precision of the forward pass; auto is bfloat16 on a CUDA card that computes in it, off elsewhere "
             "(default: %(default)s)")
    add("--compile", choices=["auto", "yes", "no"], default="auto",
        help="on a CPU torch.compile, on CUDA a CUDA graph of the training step; auto is yes on CUDA, and on a CPU "
             f"with a C++ compiler for {stack.COMPILED_STEPS:,} training steps or more, those of seeds side by side "
             "added up (default: %(default)s)")
    add("--stack", **size, help="how many seeds to train side by side, 1 for one after the other (default: all; on a "
        f"CPU 1 for images of more than {stack.STACKED_TOKENS} tokens)")
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
    defaults.update({flag: getattr(args, flag) for flag in defaults})


def check_flags(args):
    """Raise a UserError for flags that contradict each other or the data set."""
    for name in args.model:
        records.check_name("model", name, [*MODELS, "all"], "; a model of a plugin needs --plugin FILE")
    for name in args.dataset:
        records.check_name("data set", name, data.DATASETS, "; a data set of a plugin needs --plugin FILE")
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
    given = [name for name in records.AUGMENTATION if getattr(args, name)]
    if args.no_augment and given:
        raise UserError(f"argument --no-augment: contradicts --{given[0]}: leave one of them out, or set the strengths "
                        "one by one")


def resolve_settings(args, model, dataset, seed, device, plugin=None):
    """All that decides the outcome of a run: the settings of config.json, in their order."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(ViT).parameters.items()}
    defaults |= dict(dropout=0.0) | data.DATASETS[dataset]["defaults"] | MODELS[model]
    if args.no_augment:
        defaults |= dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False, brightness=0.0)
    settings = dict(model=model, dataset=dataset, seed=seed, plugin=plugin)
    for name in [*records.MODEL_SETTINGS, *records.RECIPE_SETTINGS]:
        settings[name] = defaults[name] if getattr(args, name) is None else getattr(args, name)
    return settings | dict(amp=machine.resolve_amp(args.amp, device))


# The step.

def train_step(net, images, labels, share, optimizer, scaler, settings):
    """A training step of every seed: images (S, B, C, H, W), labels (S, B) -> losses (S,), correct answers (S,).

    `share` is what an image counts in the loss of its seed: 1 / size of the batch, of which each rank has a part.
    """
    with torch.autocast(**machine.precision(settings["amp"], images.device)):
        logits = net(images)  # (S, B, classes)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none",
                                 label_smoothing=settings["label_smoothing"])  # (S * B,)
        losses = losses.view_as(labels).sum(1) * share  # (S,)
    scaler.scale(losses.sum()).backward()
    losses, correct = losses.detach(), (logits.argmax(2) == labels).sum(1)
    gradients = [leaf.grad for group in optimizer.param_groups for leaf in group["params"]]  # (S, P) each
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

# Runs that are trained side by side. Of each, in lists: its seed, folder, rows of metrics.csv and best epoch. Of all:
# net, a StackedModel; step(images, labels, share), which is train_step of these runs; fast_step, the same for whole
# batches alone, compiled or captured if that was asked for.
Runs = namedtuple("Runs", "seeds folders metrics best net optimizer scaler step fast_step")


def lr_factor(step, steps, warmup, decay):
    """The share of the peak rate at a step counted from 0: up over warmup * steps, flat, down over decay * steps. Where
    these two overlap it is the lower of both."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


def epoch_batches(split, seeds, epoch, settings):
    """This rank's part of the batches of an epoch: images (S, B, C, H, W), labels (S, B), and the share of an image in
    the whole batch, the last of which may be smaller."""
    parts = (part.split(settings["batch_size"], 1) for part in data.draw_epoch(seeds, epoch, split, settings))
    for index, draws in zip(*parts):
        images, labels = data.get_batch(split, machine.part_of_rank(index), machine.part_of_rank(draws), settings)
        yield images, labels, 1 / index.shape[1]


def train_stack(runs, splits, settings):
    """Train runs side by side to their end, and record each epoch; `splits` is a data set on the device of `runs`."""
    split, seeds, device = splits["train"], runs.seeds, splits["train"].labels.device
    whole_batches, rest = divmod(len(split.labels), settings["batch_size"])
    steps, done = whole_batches + bool(rest), len(runs.metrics[0])
    with tqdm(total=steps * settings["epochs"], initial=steps * done, unit=" steps", leave=False,
              desc=f"{settings['model']} on {settings['dataset']}", disable=machine.rank() > 0 or None) as bar:
        for epoch in range(done + 1, settings["epochs"] + 1):
            start = time.perf_counter()
            torch.manual_seed(data.mix_seed(*seeds, epoch, "dropout") + machine.rank())
            losses = torch.zeros(len(seeds), steps, device=device)
            correct = torch.zeros(len(seeds), dtype=torch.long, device=device)
            for number, (images, labels, share) in enumerate(epoch_batches(split, seeds, epoch, settings)):
                factor = lr_factor((epoch - 1) * steps + number, settings["epochs"] * steps, settings["warmup"],
                                   settings["decay"])
                stack.set_lr(runs.optimizer, factor)
                step = runs.fast_step if number < whole_batches else runs.step  # both are train_step
                losses[:, number], batch_correct = step(images, labels, share)
                correct += batch_correct
                show_progress(bar, losses[:, number])
            if machine.rank() == 0:
                record_epoch(runs, splits, settings, epoch, factor, losses, correct, start)


def show_progress(bar, losses):
    bar.update()
    if not bar.disable and bar.n % 50 == 0:  # reading a loss waits for the device, so not at every step
        bar.set_postfix(loss=f"{losses.mean().item():.3f}")


def record_epoch(runs, splits, settings, epoch, factor, losses, correct, start):
    """Evaluate each seed after an epoch, and write its best weights, its metrics and what is needed to resume.

    losses (S, steps) and correct answers (S,) are those of the epoch, which began at `start` of time.perf_counter.
    """
    losses, correct, count = losses.cpu().double(), correct.cpu(), len(splits["train"].labels)
    images_per_second = len(runs.seeds) * count / (time.perf_counter() - start)
    shares = torch.tensor([len(batch) / count for batch in torch.arange(count).split(settings["batch_size"])],
                          dtype=torch.double)
    models = [analysis.make_model(settings | dict(seed=seed)).to(splits["val"].labels.device) for seed in runs.seeds]
    for i, (folder, model) in enumerate(zip(runs.folders, models)):
        check_finite(folder, "loss", losses[i].tolist(), f"epoch {epoch}, step {{}} of {len(shares)}")
        model.load_state_dict(runs.net.model_state(i))
    figures = list(zip(analysis.evaluate(models, splits["val"], settings),
                       analysis.measure_lambdas(models, splits["val"], settings)))
    for folder, ((val_loss, _), lambdas) in zip(runs.folders, figures):
        for what, values in [("loss", [val_loss]), ("mean lambda", lambdas)]:
            check_finite(folder, what, values, f"epoch {epoch}, validation")
    for i, (folder, ((val_loss, val_accuracy), lambdas)) in enumerate(zip(runs.folders, figures)):
        if val_loss < runs.best[i]["val_loss"]:
            runs.best[i] = dict(epoch=epoch, val_loss=val_loss, val_accuracy=val_accuracy)
            records.write_checkpoint(folder / "best.pt", models[i].state_dict())
        runs.metrics[i].append(dict(
            epoch=epoch, step=epoch * len(shares), lr=factor * settings["lr"], train_loss=losses[i].dot(shares).item(),
            train_accuracy=correct[i].item() / count, val_loss=val_loss, val_accuracy=val_accuracy, seconds=math.nan,
            images_per_second=images_per_second,
            **{f"lambda_{block}": value for block, value in zip(models[i].differential_blocks(), lambdas)}))
    for rows in runs.metrics:  # all seeds of the stack share its time
        rows[-1]["seconds"] = (time.perf_counter() - start) / len(runs.seeds)
    state = stack.get_state(runs.net, runs.optimizer, runs.scaler)
    records.write_checkpoint(runs.folders[0] / "last.pt", dict(
        seeds=runs.seeds, metrics=runs.metrics, best=runs.best, **state))
    for folder, rows in zip(runs.folders, runs.metrics):
        records.write_metrics(folder, rows)
        print_epoch(folder, settings, rows[-1])


def check_finite(folder, what, values, where):
    """Stop the run at a value that its record cannot hold; `where` may have a place for its number."""
    for number, value in enumerate(values, 1):
        if not records.is_finite(value):
            raise UserError(f"{folder}: the {what} is {value} at {where.format(number)}; the record and checkpoints of "
                            "the epochs before are kept: give a lower --lr or --muon-lr, and --overwrite")


def print_epoch(folder, settings, row):
    tqdm.write(f"{folder.name}  epoch {row['epoch']:>{len(str(settings['epochs']))}}/{settings['epochs']}  "
               f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
               f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
               f"{row['images_per_second']:,.0f} images/s")
    sys.stdout.flush()


# The runs.

# Runs that differ in their seed alone: the settings are those of the first of `seeds`; request: the arguments of
# records.find_stacks, which says which of them are still to be trained.
Experiment = namedtuple("Experiment", "settings facts seeds request")


def plan_experiments(args, device, plugin):
    """An Experiment for every combination of data set and model, checked as a whole before the first is trained."""
    models = dict.fromkeys(name for given in args.model for name in (MODELS if given == "all" else [given]))
    where = dict(torch=torch.__version__, device=device.type, device_name=machine.name_device(device),
                 processes=machine.world_size(), git_commit=records.git_commit())
    seeds, experiments = list(dict.fromkeys(args.seed)), []
    for dataset, model in itertools.product(dict.fromkeys(args.dataset), models):
        settings = resolve_settings(args, model, dataset, seeds[0], device, plugin)
        records.check_recordable(settings)
        facts = analysis.measure_model(settings, with_maps=args.analysis)
        analysis.check_lambdas(settings, device)
        size = choose_stack_size(settings, args.stack, len(seeds), device)
        experiments.append(Experiment(settings, facts | where, seeds, dict(
            runs_dir=args.runs_dir, settings=settings, seeds=seeds, size=size, overwrite=args.overwrite)))
    return experiments


def choose_stack_size(settings, wanted, count, device):
    """How many of `count` seeds are trained side by side at most; a line says why where they cannot be."""
    size = wanted or stack.default_size(analysis.count_tokens(settings), device)
    if min(size, count) > 1:
        with torch.device("meta"):
            models, images = [analysis.make_model(settings) for _ in range(2)], analysis.empty_images(settings, 2, 1)
            obstacle = stack.find_obstacle(models, images, settings["amp"])
        if obstacle:
            print(f"{settings['model']}: seeds are trained one after the other ({obstacle})", flush=True)
            return 1
    return size


def make_runs(settings, seeds, runs_dir, device, compiled=False, required=False):
    """The Runs of these seeds from their beginning. Where `compiled` fails, that is a UserError if it is `required`."""
    net = stack.StackedModel([analysis.make_model(settings | dict(seed=seed)).to(device) for seed in seeds])
    optimizer = stack.make_optimizer(net, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "float16")
    step = functools.partial(train_step, optimizer=optimizer, scaler=scaler, settings=settings)
    fast_step = None
    if compiled:
        batch = analysis.empty_images(settings, len(seeds), settings["batch_size"]).zero_().to(device)
        fast_step = stack.accelerate(step, net, optimizer, machine.part_of_rank(batch), settings["amp"], required)
    step = functools.partial(step, net)
    folders = [records.run_folder(runs_dir, settings | dict(seed=seed)) for seed in seeds]
    metrics, best = [[] for _ in seeds], [dict(epoch=0, val_loss=math.inf) for _ in seeds]
    return Runs(seeds, folders, metrics, best, net, optimizer, scaler, step, fast_step or step)


def begin_runs(experiment, seeds, args, device, threads):
    """The Runs of these seeds: from the start, with config.json written for each, or where they were interrupted."""
    settings, facts, *_ = experiment
    if not machine.threads_given(args.threads):  # so that the record of an interrupted run is that of one that was not
        first = records.run_folder(args.runs_dir, settings | dict(seed=seeds[0]))
        torch.set_num_threads(machine.on_first_rank(records.read_threads, first) or threads)
    steps = settings["epochs"] * math.ceil(data.training_size(settings["dataset"]) / settings["batch_size"])
    compiled = stack.is_compiled(args.compile, steps * len(seeds), device, settings["amp"])
    if compiled:
        torch.compiler.reset()  # of what was compiled for the stack before: it counts towards a limit
    runs = make_runs(settings, seeds, args.runs_dir, device, compiled, required=args.compile == "yes")
    path = runs.folders[0] / "last.pt"
    checkpoint = machine.on_first_rank(lambda: records.read_checkpoint(path) if path.exists() else None)
    if checkpoint:
        with records.reading(path):
            records.check(checkpoint["seeds"] == seeds, f"it is of the seeds {checkpoint['seeds']}")
            stack.set_state(runs.net, runs.optimizer, runs.scaler, checkpoint)
            runs.metrics[:], runs.best[:] = checkpoint["metrics"], checkpoint["best"]
    for seed, folder, rows in zip(seeds, runs.folders, runs.metrics) if machine.rank() == 0 else []:
        if rows:
            records.write_metrics(folder, rows)
            print(f"{folder}: resumed after epoch {len(rows)} of {settings['epochs']}", flush=True)
        else:
            own = dict(compiled=runs.fast_step is not runs.step, stack=seeds, threads=torch.get_num_threads())
            records.write_config(folder, settings | dict(seed=seed), facts | own, args.plugin)
    return runs


def finish_runs(runs, settings, facts, splits, with_analysis):
    """Test the best weights of the runs, analyse them if so wanted, write summary.json of each, and delete last.pt."""
    left = [run for run in zip(runs.seeds, runs.folders, runs.metrics, runs.best)
            if not (run[1] / "summary.json").exists()]
    folders, split = [folder for _, folder, *_ in left], splits["test"]
    models = [analysis.load_model(folder, settings | dict(seed=seed), split.labels.device) for seed, folder, *_ in left]
    tests, start = analysis.evaluate(models, split, settings), time.perf_counter()
    if with_analysis:
        analysis.analyse(folders, models, split, settings)
    analysis_seconds = (time.perf_counter() - start) / len(left)
    for (seed, folder, rows, best), (test_loss, test_accuracy) in zip(left, tests):
        epoch_seconds = [len(splits["train"].labels) / row["images_per_second"] for row in rows]
        records.write_summary(folder, dict(
            model=settings["model"], dataset=settings["dataset"], seed=seed, parameters=facts["parameters"],
            epochs=len(rows), best_epoch=best["epoch"], val_loss=best["val_loss"], val_accuracy=best["val_accuracy"],
            test_loss=test_loss, test_accuracy=test_accuracy, seconds=sum(row["seconds"] for row in rows),
            train_seconds=sum(epoch_seconds), analysis_seconds=analysis_seconds,
            milliseconds_per_step=1e3 * statistics.median(epoch_seconds) * len(rows) / rows[-1]["step"],
            images_per_second=statistics.median(row["images_per_second"] for row in rows)))
        print_result(folder)
    (runs.folders[0] / "last.pt").unlink(missing_ok=True)


def print_result(folder, width=0):
    figures = dict(seconds=math.nan) | records.read_summary(folder)
    print(f"{folder.name:{width}}  " + "{parameters:,} parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f} "
          "accuracy {test_accuracy:.2%}  {seconds:.0f} s".format(**figures), flush=True)


def print_results(folders, finished_before, runs_dir):
    """After several runs or none the results of all, and the command to draw them."""
    if len(folders) > 1 or finished_before:
        print()
        for folder in folders:
            print_result(folder, width=max(len(folder.name) for folder in folders))
    if finished_before:
        print(f"\nfinished before this command: {finished_before} of {len(folders)}; --overwrite trains them afresh")
    print(f"\ndraw them: python plot.py {shlex.quote(str(runs_dir))}", flush=True)


@machine.enough_memory()
def train_runs(args):
    """Train, test and analyse every combination of data set, model and seed."""
    plugin = records.execute_plugin(args.plugin) if args.plugin else None
    check_flags(args)
    device = machine.pick_device(args.device)
    machine.connect_ranks(device)
    experiments = machine.on_first_rank(plan_experiments, args, device, plugin)
    unfinished = machine.on_first_rank(lambda: [experiment for experiment in experiments
                                                if records.find_stacks(**experiment.request)])
    folders = [records.run_folder(args.runs_dir, experiment.settings | dict(seed=seed))
               for experiment in experiments for seed in experiment.seeds]
    finished_before = sum(not args.overwrite and records.is_recorded(folder) for folder in folders)
    datasets = {name: data.load_splits(name, args.data_dir, device)
                for name in dict.fromkeys(experiment.settings["dataset"] for experiment in unfinished)}
    threads = machine.take_threads(args.threads, device) if unfinished else None
    for experiment in unfinished:
        settings, splits = experiment.settings, datasets[experiment.settings["dataset"]]
        with contextlib.ExitStack() as locks:
            for seeds in machine.on_first_rank(lambda: records.claim_stacks(locks, **experiment.request)):
                runs = begin_runs(experiment, seeds, args, device, threads)
                train_stack(runs, splits, settings)
                if machine.rank() == 0:
                    finish_runs(runs, settings, experiment.facts, splits, args.analysis)
    if machine.rank() == 0:
        print_results(folders, finished_before, args.runs_dir)
    machine.disconnect_ranks()


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    machine.keep_freed_memory()
    machine.outlive_terminal()
    return records.exit_status("train.py", parse_flags, train_runs, argv,
                               again="run the same command again, without --overwrite, to resume")


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # so that a plugin that imports train changes this very program
    sys.exit(main())
