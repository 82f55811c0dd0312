"""Train the compact vision transformers of vit.py and leave a record of every epoch.

    python train.py --model vitdiff --dataset mnist
    python train.py --model all --dataset mnist fashionmnist --seed 0 1 2 3 4
    python train.py --plugin my_attention.py --model vitcosine
    torchrun --nproc-per-node 2 train.py --dim 256 --depth 8

A run is a folder, runs/mnist-vitdiff-seed0. The same command run again skips what is finished and resumes, exactly,
what was interrupted. The seeds of a model are trained side by side, as a stack; torchrun divides each batch among
processes. The loop is train_stack.
"""

import argparse
import contextlib
import ctypes
import inspect
import itertools
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from torch import distributed
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

import analysis
import data
import muon
import records
from records import UserError
from vit import MODELS, ViT

STACKED_TOKENS = 64  # on a CPU, images of more tokens fill the caches by themselves: seeds are trained one by one
COMPILED_STEPS = 5_000  # on a CPU, stacks of fewer training steps, each seed's counted, take less time than compiling


# The command line.

def by_dataset(flag):
    """The default of a flag that depends on the data set, for --help: the most common one, then the exceptions."""
    names = {}
    for name, row in data.DATASETS.items():
        if "load" in row:  # a plugin's, of an earlier command in this process
            continue
        names.setdefault(row["defaults"][flag], []).append(name)
    (common, _), *exceptions = sorted(names.items(), key=lambda item: -len(item[1]))
    parts = [str(common), *(f"{value} for {', '.join(few)}" for value, few in exceptions)]
    return f"(default: {'; '.join(parts)})"


def make_parser(prog="train.py", description=__doc__):
    parser = records.Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@", allow_abbrev=False,
        epilog="@FILE reads flags from FILE, such as the args.txt of a run; a later flag overrides an earlier one.")
    size = records.number(int, "a whole number from 1 to 1000000", lambda value: 1 <= value <= 10**6)
    count = records.number(int, "a whole number from 0 to 1000000", lambda value: 0 <= value <= 10**6)
    seed = records.number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
    rate = records.number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
    share = records.number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    probability = records.number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)

    group = parser.add_argument_group("what to train: every combination of")
    group.add_argument("--model", nargs="+", default=["vitdiff"], metavar="NAME",
                       help=f"{', '.join(MODELS)} or any other row of MODELS in vit.py; all for every row "
                            "(default: vitdiff)")
    group.add_argument("--dataset", nargs="+", default=["mnist"], metavar="NAME",
                       help=f"{', '.join(data.DATASETS)} or one's own, a row that a plugin adds to DATASETS "
                            "(default: mnist)")
    group.add_argument("--seed", nargs="+", default=[0], metavar="N", type=seed,
                       help="of the initial weights, batch order, augmentation and dropout (default: 0)")
    group.add_argument("--distractors", metavar="N", type=count,
                       help="fragments of other images on each canvas of a cluttered data set (default: 4)")
    group.add_argument("--plugin", type=Path, metavar="FILE",
                       help="a Python file to execute first: it may add rows to MODELS and DATASETS or change anything "
                            "else")

    group = parser.add_argument_group("sizes; the model's own where left out")
    group.add_argument("--patch-size", type=size, metavar="N", help=f"pixels a side {by_dataset('patch_size')}")
    group.add_argument("--dim", type=size, metavar="N", help="width of the tokens (default: 32; vitbalanced 48)")
    group.add_argument("--depth", type=size, metavar="N", help="blocks (default: 2)")
    group.add_argument("--num-heads", type=size, metavar="N", help="heads (default: 2; vitdiffpaper 1)")
    group.add_argument("--mlp-dim", type=size, metavar="N", help="hidden width of a block's MLP (default: 128)")
    group.add_argument("--head-hidden-dim", type=count, metavar="N",
                       help="hidden width of the classifier, 0 for a linear one (default: 128)")

    group = parser.add_argument_group("recipe, the same for every model")
    group.add_argument("--epochs", type=size, metavar="N", help=by_dataset("epochs"))
    group.add_argument("--batch-size", type=size, metavar="N", help=f"images {by_dataset('batch_size')}")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="muon",
                       help="muon is Muon for the matrices and AdamW for the rest (default: %(default)s)")
    group.add_argument("--lr", type=rate, metavar="X", help=f"peak learning rate of AdamW {by_dataset('lr')}")
    group.add_argument("--muon-lr", type=rate, metavar="X", help=f"peak learning rate of Muon {by_dataset('muon_lr')}")
    group.add_argument("--weight-decay", type=rate, metavar="X",
                       help=f"decoupled; not on norms, biases, tokens, lambda {by_dataset('weight_decay')}")
    group.add_argument("--warmup", type=share, default=0.05, metavar="X",
                       help="share of the steps in which the learning rate rises (default: %(default)s)")
    group.add_argument("--decay", type=share, default=1.0, metavar="X",
                       help="share of the steps in which it falls to 0 at the end (default: %(default)s)")
    group.add_argument("--clip", type=rate, default=1.0, metavar="X",
                       help="maximum gradient norm; 0 disables clipping (default: %(default)s)")
    group.add_argument("--label-smoothing", type=probability, default=0.1, metavar="X",
                       help="in every loss, validation and test too (default: %(default)s)")
    group.add_argument("--dropout", type=probability, default=0.0, metavar="X",
                       help="probability, on the embedded tokens, in the MLPs and on what a block adds "
                            "(default: %(default)s)")

    group = parser.add_argument_group("augmentation, drawn anew for each training image in each epoch")
    group.add_argument("--rotation", type=rate, metavar="X", help=f"maximum angle in degrees {by_dataset('rotation')}")
    group.add_argument("--scale", type=probability, metavar="X",
                       help=f"maximum change of width and of height, 0.1 for 10%% {by_dataset('scale')}")
    group.add_argument("--shear", type=probability, metavar="X", help=f"maximum shear {by_dataset('shear')}")
    group.add_argument("--shift", type=rate, metavar="X", help=f"maximum pixels each way {by_dataset('shift')}")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help=f"flip horizontally with probability 0.5 {by_dataset('flip')}")
    group.add_argument("--no-augment", action="store_true", help="none of these")

    group = parser.add_argument_group("where and how")
    analysis.add_place_flags(group)
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR",
                       help="where the runs' folders are (default: %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="start afresh where a run exists")
    group.add_argument("--analysis", action=argparse.BooleanOptionalAction, default=True,
                       help=f"after the test, write {', '.join(records.ANALYSIS)}: what the model does under noise and "
                            "attends to (default: yes)")
    group.add_argument("--amp", choices=["auto", "off", "bfloat16", "float16"], default="auto",
                       help="precision of the forward pass; auto is, on CUDA, bfloat16 where the card has it, else "
                            "float16, and off elsewhere (default: %(default)s)")
    group.add_argument("--compile", choices=["auto", "yes", "no"], default="auto",
                       help="on a CPU torch.compile, on CUDA a CUDA graph of the training step; auto is yes on a CPU "
                            f"with a C++ compiler for {COMPILED_STEPS:,} training steps or more, those of seeds side "
                            "by side added up (default: %(default)s)")
    group.add_argument("--stack", type=size, metavar="N",
                       help="how many seeds to train side by side, 1 for one after the other (default: all; on a CPU 1 "
                            f"for images of more than {STACKED_TOKENS} tokens)")
    return parser


def parse_flags(argv=None, parser=None):
    """The command line's flags; a wrong one exits with status 2."""
    parser = parser or make_parser()
    try:
        return parser.parse_args(argv)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        parser.error(f"an @file does not hold flags ({error}): write one flag and its values a line")


def check_flags(args):
    """Raise a UserError for flags that contradict each other, the data set or what exists on disk."""
    for name in args.model:
        records.check_name("model", name, [*MODELS, "all"], "; a model of a plugin needs --plugin FILE")
    for name in args.dataset:
        records.check_name("data set", name, data.DATASETS, "; a data set of a plugin needs --plugin FILE")
        data.complete_row(name, args.data_dir)
        if args.batch_size and args.batch_size > training_size(name):
            raise UserError(f"argument --batch-size: {args.batch_size} is more than the {training_size(name)} training "
                            f"images of {name}: choose a smaller one")
        if args.distractors and not data.is_cluttered(name):
            raise UserError(f"argument --distractors: {name} has none: choose "
                            f"{' or '.join(filter(data.is_cluttered, data.DATASETS))}")
    given = [name for name in records.AUGMENTATION if getattr(args, name)]
    if args.no_augment and given:
        raise UserError(f"argument --no-augment: contradicts --{given[0]}: leave one of them out, or set the strengths "
                        "one by one")
    for flag, path in [("--data-dir", args.data_dir), ("--runs-dir", args.runs_dir)]:
        if path.exists() and not path.is_dir():
            raise UserError(f"argument {flag}: {path} is a file: name a folder")


# What to train.

def training_size(dataset):
    return data.DATASETS[dataset]["sizes"][0] - data.validation_size(dataset)


# Runs that differ in their seed alone: the settings are those of the first of `seeds`.
Experiment = namedtuple("Experiment", "settings facts seeds stack_size")


def plan_experiments(args, device, plugin):
    """An Experiment for every combination of data set and model, checked as a whole before the first is trained."""
    models = dict.fromkeys(name for given in args.model for name in (MODELS if given == "all" else [given]))
    machine = dict(torch=torch.__version__, device=device.type, device_name=analysis.name_device(device),
                   processes=world_size(), git_commit=records.git_commit())
    seeds, experiments = list(dict.fromkeys(args.seed)), []
    for dataset, model in itertools.product(dict.fromkeys(args.dataset), models):
        settings = resolve_settings(args, model, dataset, seeds[0], device, plugin)
        facts = analysis.measure_model(settings, with_maps=args.analysis)
        size = args.stack or default_stack(settings, device)
        obstacle = stacking_obstacle(settings) if min(size, len(seeds)) > 1 else None
        if obstacle:
            print(f"{model}: seeds are trained one after the other ({obstacle})", flush=True)
        experiments.append(Experiment(settings, facts | machine, seeds, 1 if obstacle else size))
    return experiments


def resolve_settings(args, model, dataset, seed, device, plugin=None):
    """All that decides the outcome of a run: the settings of config.json, in their order."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(ViT).parameters.items()}
    defaults |= MODELS[model] | data.DATASETS[dataset]["defaults"]
    if args.no_augment:
        defaults |= dict(rotation=0.0, scale=0.0, shear=0.0, shift=0.0, flip=False)
    settings = dict(model=model, dataset=dataset, seed=seed, plugin=plugin)
    for name in [*records.MODEL_SETTINGS, *records.RECIPE_SETTINGS]:
        settings[name] = defaults[name] if getattr(args, name) is None else getattr(args, name)
    return settings | dict(amp=resolve_amp(args.amp, device))


def resolve_amp(name, device):
    """The precision that --amp names, with auto decided for the device."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"  # on a CPU half precision is slower than float32
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def default_stack(settings, device):
    """How many seeds are trained side by side at most, where --stack does not say."""
    tokens = (data.DATASETS[settings["dataset"]]["image_size"] // settings["patch_size"]) ** 2 + 1
    return 1 if device.type == "cpu" and tokens > STACKED_TOKENS else sys.maxsize


def stacking_obstacle(settings):
    """Why seeds of this model cannot be trained side by side, or None where they can."""
    if settings["amp"] == "float16":
        return "they would share the scale of their float16 gradients"
    with torch.device("meta"):
        model = analysis.make_model(settings)
        if list(model.buffers()) or not all(parameter.requires_grad for parameter in model.parameters()):
            return "they would share buffers or frozen parameters"
        weights = {name: torch.empty(2, *parameter.shape) for name, parameter in model.named_parameters()}
        try:
            stack_logits(model, weights, analysis.empty_images(settings, 2, 1))
        except RuntimeError as error:
            return f"torch.vmap does not take this model: {records.first_line(error)}"


def unfinished_stacks(experiment, args):
    return records.find_stacks(args.runs_dir, experiment.settings, experiment.seeds, experiment.stack_size,
                               args.overwrite)


# Ranks: the processes that torchrun connected. The first alone reads and writes the runs' folders.

def rank():
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size():
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def broadcast(value):
    """The first rank's value, in every rank."""
    box = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(box)
    return box[0]


# A stack of seeds.

class Stack:
    """Models that differ in their seed alone and are trained side by side; a single model is a stack of one.

    seeds, folders: of the S runs. metrics, best: of each, the rows of metrics.csv and the best epoch so far.
    model: the module that is called with the weights of each seed; those of its own are not used.
    forward: images (S, B, C, H, W), labels (S, B), share -> losses (S,), correct answers (S,); see make_forward.
    captured: whether the training step becomes a CUDA graph. precision: the arguments of torch.autocast.
    leaves: {group: (S, P)}, what autograd and the optimizer see; each row has the weights of a seed, one after the
        other, of the names and shapes in shapes: {group: {name: shape}}.
    """

    def __init__(self, settings, seeds, runs_dir, device, captured=False):
        models = [analysis.make_model(settings | dict(seed=seed)) for seed in seeds]
        self.seeds, self.metrics = seeds, [[] for _ in seeds]
        self.best = [dict(epoch=0, val_loss=math.inf) for _ in seeds]
        self.folders = [records.run_folder(runs_dir, settings | dict(seed=seed)) for seed in seeds]
        self.shapes = muon.group_parameters(models[0], settings["optimizer"])
        self.leaves = {group: torch.stack([
            torch.cat([model.get_parameter(name).detach().flatten() for name in shapes]) for model in models]
        ).to(device).requires_grad_() for group, shapes in self.shapes.items()}
        self.model = models[0].to(device).train()
        self.optimizer = muon.make_optimizer(self.leaves, self.shapes, settings, captured)
        self.captured = captured
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "float16")
        self.precision = dict(device_type=device.type, dtype=getattr(torch, settings["amp"], None),
                              enabled=settings["amp"] != "off")
        self.forward = make_forward(self.model, self.leaves, self.shapes, settings["label_smoothing"])

    def state_dict(self, i):
        """The weights of seed i of the stack, and the buffers that the model may have, by name."""
        weights = muon.cut_weights(self.leaves, self.shapes)
        return self.model.state_dict() | {name: weight.detach()[i] for name, weight in weights.items()}

    def checkpoint(self):
        return dict(seeds=self.seeds, metrics=self.metrics, best=self.best, leaves=self.leaves,
                    buffers=dict(self.model.named_buffers()), optimizer=self.optimizer.state_dict()["state"],
                    scaler=self.scaler.state_dict())

    @torch.no_grad()
    def load(self, checkpoint):
        records.check(checkpoint["seeds"] == self.seeds, f"it is of the seeds {checkpoint['seeds']}")
        for group, leaf in self.leaves.items():
            leaf.copy_(checkpoint["leaves"][group])
        self.model.load_state_dict(checkpoint["buffers"], strict=False)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(dict(state=checkpoint["optimizer"], param_groups=groups))
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.metrics, self.best = checkpoint["metrics"], checkpoint["best"]


def stack_logits(model, weights, images):
    """The logits (S, B, num_classes) of the model with each seed's weights, {name: (S, *shape)}, on its own images
    (S, B, C, H, W)."""
    if len(images) == 1:
        return functional_call(model, {name: weight[0] for name, weight in weights.items()}, images[0]).unsqueeze(0)
    return torch.vmap(functional_call, in_dims=(None, 0, 0), randomness="different")(model, weights, images)


def make_forward(model, leaves, shapes, label_smoothing):
    def forward(images, labels, share):
        """The loss: images (S, B, C, H, W), labels (S, B) -> losses (S,), in which each image counts `share`, and the
        numbers of correct answers (S,)."""
        logits = stack_logits(model, muon.cut_weights(leaves, shapes), images)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none",
                                 label_smoothing=label_smoothing).view_as(labels)
        return losses.sum(1) * share, (logits.argmax(2) == labels).sum(1)
    return forward


def is_compiled(choice, stack_steps, device):
    """Whether --compile, with auto decided, asks for compilation; stack_steps: training steps times seeds."""
    if choice != "auto" or device.type != "cpu":
        return choice == "yes"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return stack_steps >= COMPILED_STEPS and shutil.which(compiler) is not None


def compile_forward(stack, settings, size, required):
    """Have torch.compile make stack.forward faster for batches of `size`; whether that worked. The last batch of an
    epoch may be smaller, and is not worth compiling for."""
    plain, compiled = stack.forward, torch.compile(stack.forward, dynamic=False)
    buffers = {name: buffer.clone() for name, buffer in stack.model.named_buffers()}
    device = stack.leaves["rest"].device
    images = analysis.empty_images(settings, len(stack.seeds), size).zero_().to(device)
    labels = torch.zeros(len(stack.seeds), size, dtype=torch.long, device=device)
    try:
        with torch.autocast(**stack.precision):
            losses, _ = compiled(images, labels, 1 / settings["batch_size"])
        losses.sum().backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        problem = f"--compile does not work here ({records.first_line(error)}): it needs a C++ compiler such as g++"
        if required:
            raise UserError(f"{problem}; leave it out") from None
        print(f"{problem}; training goes on without", flush=True)
        return False
    stack.optimizer.zero_grad()
    stack.model.load_state_dict(buffers, strict=False)  # which the trial may have changed
    stack.forward = lambda images, labels, share: (
        compiled if labels.shape[1] == size else plain)(images, labels, share)
    return True


def capture(step, size):
    """The step as one CUDA graph, captured at the fourth batch of `size`. The first three run as they are, on a stream
    of their own, and so does any smaller batch: what is allocated when first needed must exist before the capture."""
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # in those three
    stream, graph, inputs, outputs, batches = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, None, 0

    def run(images, labels, share):
        nonlocal inputs, outputs, batches
        if labels.shape[1] != size:
            return step(images, labels, share)
        batches += 1
        if batches <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = step(images, labels, share)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if inputs is None:
            inputs = images.clone(), labels.clone()
            with torch.cuda.graph(graph, stream=stream):
                outputs = step(*inputs, share)
        inputs[0].copy_(images)
        inputs[1].copy_(labels)
        graph.replay()
        return outputs

    return run


# The loop.

def lr_factor(step, steps, warmup, decay):
    """The share of the peak rate at a step counted from 0: up over warmup * steps, flat, down over decay * steps."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


def set_lr(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"].fill_(factor * group["peak_lr"])


def clip_gradients(leaves, max_norm):
    """Scale down the gradient of each seed, a row of every leaf (S, P), to a norm of at most max_norm."""
    norms = torch.linalg.vector_norm(torch.cat([leaf.grad for leaf in leaves], dim=1), dim=1, keepdim=True)  # (S, 1)
    for leaf in leaves:
        leaf.grad.mul_((max_norm / (norms + 1e-6)).clamp_max(1.0))


def train_stack(stack, splits, settings):
    """Train a stack to the end of its runs, and record each epoch. Yields the losses (S,) of each batch."""
    split, seeds, leaves, scaler = splits["train"], stack.seeds, list(stack.leaves.values()), stack.scaler
    device, count, batch_size = split.labels.device, len(split.labels), settings["batch_size"]
    steps = math.ceil(count / batch_size)
    evaluated = analysis.make_model(settings).to(device)

    def step(images, labels, share):  # (S, B, C, H, W), (S, B), what an image counts in the loss
        with torch.autocast(**stack.precision):
            losses, correct = stack.forward(images, labels, share)  # (S,), (S,)
        scaler.scale(losses.sum()).backward()
        losses = losses.detach()
        if world_size() > 1:  # each rank has a slice of the batch
            for tensor in [*(leaf.grad for leaf in leaves), losses, correct]:
                distributed.all_reduce(tensor)
        scaler.unscale_(stack.optimizer)
        if settings["clip"]:
            clip_gradients(leaves, settings["clip"])
        scaler.step(stack.optimizer)
        scaler.update()
        stack.optimizer.zero_grad()
        return losses, correct

    run_step = capture(step, batch_size) if stack.captured else step
    for epoch in range(len(stack.metrics[0]) + 1, settings["epochs"] + 1):
        start = time.perf_counter()
        order, draws = data.draw_epoch(seeds, epoch, split, settings)
        torch.manual_seed(data.mix_seed(*seeds, epoch, "dropout") + rank())
        losses, correct = torch.zeros(len(seeds), steps, device=device), torch.zeros_like(order[:, 0])
        for number, batch in enumerate(zip(order.split(batch_size, 1), draws.split(batch_size, 1))):
            factor = lr_factor((epoch - 1) * steps + number, settings["epochs"] * steps, settings["warmup"],
                               settings["decay"])
            set_lr(stack.optimizer, factor)
            index, batch_draws = (part.tensor_split(world_size(), 1)[rank()] for part in batch)
            images, labels = data.get_batch(split, index, batch_draws, settings)
            losses[:, number], batch_correct = run_step(images, labels, 1 / batch[0].shape[1])
            correct += batch_correct
            yield losses[:, number]
        losses, correct = losses.cpu().double(), correct.cpu()
        images_per_second = len(seeds) * count / (time.perf_counter() - start)
        if rank() > 0:
            continue

        shares = torch.tensor([part.shape[1] / count for part in order.split(batch_size, 1)], dtype=torch.double)
        for i, folder in enumerate(stack.folders):
            check_finite(folder, epoch, losses[i])
            weights = stack.state_dict(i)
            evaluated.load_state_dict(weights)
            val_loss, val_accuracy = analysis.evaluate(evaluated, splits["val"], settings)
            check_finite(folder, epoch, torch.tensor([val_loss]))
            lambdas = analysis.measure_lambdas(evaluated, splits["val"], settings)
            if val_loss < stack.best[i]["val_loss"]:
                stack.best[i] = dict(epoch=epoch, val_loss=val_loss, val_accuracy=val_accuracy)
                records.write_checkpoint(folder / "best.pt", weights)
            stack.metrics[i].append(dict(
                epoch=epoch, step=epoch * steps, lr=factor * settings["lr"], train_loss=losses[i].dot(shares).item(),
                train_accuracy=correct[i].item() / count, val_loss=val_loss, val_accuracy=val_accuracy,
                seconds=math.nan, images_per_second=images_per_second)
                | {f"lambda_{block}": value for block, value in enumerate(lambdas)})
        for rows in stack.metrics:  # all seeds of the stack share its time
            rows[-1]["seconds"] = (time.perf_counter() - start) / len(seeds)
        records.write_checkpoint(stack.folders[0] / "last.pt", stack.checkpoint())
        for folder, rows in zip(stack.folders, stack.metrics):
            records.write_metrics(folder, rows)
            print_epoch(folder, settings, rows[-1])


def check_finite(folder, epoch, losses):
    """Stop the run if a loss is infinite or not a number; losses: those of the epoch's steps, or of validation."""
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        where = f"step {wrong[0] + 1} of {len(losses)}" if len(losses) > 1 else "validation"
        raise UserError(f"{folder}: the loss is {losses[wrong[0]].item()} at epoch {epoch}, {where}; the record and "
                        "checkpoints of the epochs before are kept: give a lower --lr or --muon-lr, and --overwrite")


def print_epoch(folder, settings, row):
    tqdm.write(f"{folder.name}  epoch {row['epoch']:>{len(str(settings['epochs']))}}/{settings['epochs']}  "
               f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
               f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
               f"{row['images_per_second']:,.0f} images/s")
    sys.stdout.flush()


# Runs, from the first folder to the last figure.

def connect_ranks(device):
    """Connect the processes that torchrun started, if it did."""
    if analysis.started_by_torchrun():
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"torchrun does not work on {device.type}: give --device cpu")
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def claim_stacks(experiment, args, locks):
    """The stacks of an experiment that are still to be trained, after locking their folders and deleting what
    --overwrite gives up."""
    folders = [records.run_folder(args.runs_dir, experiment.settings | dict(seed=seed))
               for stack in unfinished_stacks(experiment, args) for seed in stack]
    for folder in folders:
        locks.enter_context(records.locked(folder))
        for name in records.FILES if args.overwrite else []:
            (folder / name).unlink(missing_ok=True)
    return unfinished_stacks(experiment, args)  # as they were when the locks had been taken


def begin_stack(experiment, seeds, args, device):
    """The Stack of these seeds: from the start, with config.json written for each, or where it was interrupted."""
    settings, batch_size = experiment.settings, experiment.settings["batch_size"]
    steps = settings["epochs"] * math.ceil(training_size(settings["dataset"]) / batch_size)
    compiled = is_compiled(args.compile, steps * len(seeds), device)
    captured = compiled and device.type == "cuda"
    if captured and (world_size() > 1 or settings["amp"] == "float16"):
        print("training steps are not captured: a CUDA graph cannot wait for other ranks or a gradient scaler",
              flush=True)
        compiled = captured = False
    stack = Stack(settings, seeds, args.runs_dir, device, captured)
    if compiled and not captured:
        torch.compiler.reset()  # of what was compiled for the stack before: it counts towards a limit
        compiled = compile_forward(stack, settings, len(range(batch_size)[rank()::world_size()]), args.compile == "yes")
    path = stack.folders[0] / "last.pt"
    checkpoint = broadcast(records.read_checkpoint(path) if rank() == 0 and path.exists() else None)
    if checkpoint:
        with records.reading(path):
            stack.load(checkpoint)
    for seed, folder, rows in zip(seeds, stack.folders, stack.metrics) if rank() == 0 else []:
        if rows:
            records.write_metrics(folder, rows)
            print(f"{folder}: resumed after epoch {len(rows)} of {settings['epochs']}", flush=True)
        else:
            facts = experiment.facts | dict(compiled=compiled, stack=seeds)
            records.write_config(folder, settings | dict(seed=seed), facts, args.plugin)
    return stack


def finish_run(folder, settings, facts, rows, best, splits, device, with_analysis):
    """Test a run's best weights, analyse them if so wanted, and write summary.json."""
    model = analysis.load_model(folder, settings, device)
    test_loss, test_accuracy = analysis.evaluate(model, splits["test"], settings)
    start = time.perf_counter()
    if with_analysis:
        analysis.analyse(folder, model, splits["test"], settings)
    epoch_seconds = [len(splits["train"].labels) / row["images_per_second"] for row in rows]
    records.write_summary(folder, dict(
        model=settings["model"], dataset=settings["dataset"], seed=settings["seed"], parameters=facts["parameters"],
        epochs=len(rows), best_epoch=best["epoch"], val_loss=best["val_loss"], val_accuracy=best["val_accuracy"],
        test_loss=test_loss, test_accuracy=test_accuracy, seconds=sum(row["seconds"] for row in rows),
        train_seconds=sum(epoch_seconds), analysis_seconds=time.perf_counter() - start,
        milliseconds_per_step=1e3 * statistics.median(epoch_seconds) * len(rows) / rows[-1]["step"],
        images_per_second=statistics.median(row["images_per_second"] for row in rows)))


def train_runs(args):
    """Train, test and analyse every combination of data set, model and seed."""
    plugin = records.execute_plugin(args.plugin) if args.plugin else None
    check_flags(args)
    device = analysis.pick_device(args.device)
    connect_ranks(device)
    experiments = broadcast(plan_experiments(args, device, plugin) if rank() == 0 else None)
    unfinished = broadcast([experiment for experiment in experiments
                            if unfinished_stacks(experiment, args)] if rank() == 0 else None)
    folders = [records.run_folder(args.runs_dir, experiment.settings | dict(seed=seed))
               for experiment in experiments for seed in experiment.seeds]
    skipped = sum(not args.overwrite and records.is_recorded(folder) for folder in folders)
    datasets = dict.fromkeys(experiment.settings["dataset"] for experiment in unfinished)
    splits = {name: data.load_splits(name, args.data_dir, device) for name in datasets}
    if unfinished and rank() == 0:
        warn_if_busy(device)
    for experiment in unfinished:
        settings, facts = experiment.settings, experiment.facts
        with contextlib.ExitStack() as locks:
            for seeds in broadcast(claim_stacks(experiment, args, locks) if rank() == 0 else None):
                stack = begin_stack(experiment, seeds, args, device)
                with progress_bar(stack, settings) as bar:
                    for losses in train_stack(stack, splits[settings["dataset"]], settings):
                        show_progress(bar, losses)
                for seed, folder, rows, best in zip(seeds, stack.folders, stack.metrics, stack.best):
                    if rank() == 0 and not (folder / "summary.json").exists():
                        finish_run(folder, settings | dict(seed=seed), facts, rows, best, splits[settings["dataset"]],
                                   device, args.analysis)
                        print(result_line(folder), flush=True)
    if rank() == 0:
        print_results(folders, skipped, args.runs_dir)
    if world_size() > 1:
        distributed.destroy_process_group()


def progress_bar(stack, settings):
    steps = math.ceil(training_size(settings["dataset"]) / settings["batch_size"])
    return tqdm(total=steps * settings["epochs"], initial=steps * len(stack.metrics[0]), unit=" steps", leave=False,
                desc=f"{settings['model']} on {settings['dataset']}", disable=None if rank() == 0 else True)


def show_progress(bar, losses):
    bar.update()
    if not bar.disable and bar.n % 50 == 0:  # reading a loss waits for the device, so not at every step
        bar.set_postfix(loss=f"{losses.mean().item():.3f}")


def result_line(folder):
    summary = records.read_summary(folder)
    return ("{parameters:,} parameters  val loss {val_loss:.4f}  test loss {test_loss:.4f}  test accuracy "
            "{test_accuracy:.2%}  ").format(**summary) + f"{summary.get('seconds', math.nan):.0f} s  {folder}"


def print_results(folders, skipped, runs_dir):
    """After several runs or none a table of them all, and the command to draw them."""
    summaries = [records.read_summary(folder) for folder in folders]
    if len(folders) > 1 or skipped:
        width = max(len(folder.name) for folder in folders)
        print(f"\n{'run':{width}}  parameters  val loss  test loss  test accuracy")
        for folder, summary in zip(folders, summaries):
            print(f"{folder.name:{width}}  {summary['parameters']:10,}  {summary['val_loss']:8.4f}  "
                  f"{summary['test_loss']:9.4f}  {summary['test_accuracy']:13.2%}")
    if skipped:
        print(f"\nfinished before this command: {skipped} of {len(folders)}; --overwrite trains them afresh")
    print(f"\ndraw them: python plot.py {runs_dir}", flush=True)


# The machine.

def warn_if_busy(device):
    """Say so if other processes leave this machine fewer idle cores than this one has threads: threads that wait for
    one another in every small product make two trainings side by side many times slower."""
    threads = torch.get_num_threads()
    idle = idle_cores() if device.type == "cpu" and threads > 1 else None
    if idle is not None and idle < threads - 0.5:
        print(f"other processes leave {idle:.1f} idle cores for {threads} threads, which would slow both down many "
              "times: set OMP_NUM_THREADS=1 for each, or wait for them", file=sys.stderr, flush=True)


def idle_cores(seconds=0.2):
    """How many cores other processes leave idle, measured while this one sleeps; None where Linux does not tell."""
    def read():
        user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return idle + iowait, user + nice + system + idle + iowait + sum(rest[:3])
    try:
        before = read()
        time.sleep(seconds)
        after = read()
    except (OSError, ValueError):
        return None
    return os.cpu_count() * (after[0] - before[0]) / max(1, after[1] - before[1])


def keep_freed_memory():
    """Have glibc keep the memory of one step for the next: to give it back and take it again costs a stack up to
    a fifth of its step in page faults."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    args = parse_flags(argv)
    keep_freed_memory()
    try:
        return records.exit_status("train.py", train_runs, args)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    print("train.py: error: out of memory: choose a smaller --batch-size, --stack, --dim or --depth, or a larger "
          "--patch-size", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # so that a plugin that imports train changes this very program
    sys.exit(main())
