"""Many seeds as one module: made, loaded, trained, evaluated; torch.compile and the CUDA graph.

A model of 38 thousand parameters is many small matrix multiplications, and to launch one takes as long as to compute
it. So the models of S seeds are trained side by side: their weights are rows of one tensor, multiplied all at once.

    net = StackedModel(models)
    net.matrices, net.rest      (S, P) each     row s has the weights of seed s, one after the other
    net(images)                 (S, B, C, H, W) -> logits (S, B, classes): each seed has images and dropout of its own
    net.map(function, images)   function(model, images) of each seed on the same images, in evaluation and analysis
    losses                      (S,)            row s of the gradient of their sum is the gradient of loss s

The optimizer sees two tensors in place of forty. A single model is a stack of one; nothing asks how many it holds.
"""

import contextlib
import functools
import itertools
import math
import numbers
import os
import shutil
import sys
import warnings

import numpy
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import machine
import muon
import records
from command import UserError, first_line
from diff_attention import SizeError
from machine import CACHE_PROBLEM
from vit import ViT, build_model

# On a CPU, seeds are trained side by side if an image's tokens times their width are at most this: with more, a seed
# fills the caches by itself, and three side by side take as long as one by one, or longer.
# runs/trials/checks/stacking.csv has the times, by one thread and two.
STACKED_NUMBERS = 1_500
NUMBERS_AT_ONCE = 2**20  # of the batches that are cut and augmented at once; more do not fit the caches of a CPU
COMPILED_STEPS = 5_000  # on a CPU, stacks of fewer training steps, each seed's counted, take less time than compiling


# The model of a run.

def make_model(settings):
    """The untrained model of a run, on the CPU, its weights drawn from the run's seed."""
    dataset = data.DATASETS[settings["dataset"]]
    torch.manual_seed(settings["seed"])
    return build_model(settings["model"], image_size=dataset["image_size"], in_channels=dataset["in_channels"],
                       num_classes=dataset["num_classes"], **{name: settings[name] for name in records.MODEL_SETTINGS})


def load_model(folder, settings):
    """The model of a run with its best weights, on the CPU."""
    return load_weights(make_model(settings), folder)


def load_weights(model, folder):
    """The model, with the best weights of a run."""
    weights = records.read_checkpoint(folder / "best.pt")
    with records.reading(folder / "best.pt", RuntimeError):
        model.load_state_dict(weights)
    return model


def empty_images(settings, *batch):
    """Images (*batch, C, H, W) of the run's data set, of no content."""
    dataset = data.DATASETS[settings["dataset"]]
    return torch.empty(*batch, dataset["in_channels"], dataset["image_size"], dataset["image_size"])


def count_tokens(settings):
    """Tokens of an image, the class token among them."""
    return (data.DATASETS[settings["dataset"]]["image_size"] // settings["patch_size"]) ** 2 + 1


def measure_model(settings, backward=False):
    """The model's parameters and, unless it cannot be called without memory, the FLOPs of its forward pass for an image
    (of its backward pass, too).

    Raises:
        UserError: if the sizes do not fit together, or a parameter cannot be one of a stack.
    """
    try:
        model = make_model(settings)
    except SizeError as error:
        raise UserError(f"{settings['model']} on {settings['dataset']}: {error}") from None
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"{settings['model']}: the parameter {name} is {parameter.dtype}: make it float32")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"{settings['model']}: a hook on the parameter {name} would not be called: leave it out")
    facts = dict(parameters=sum(parameter.numel() for parameter in model.parameters()))
    with contextlib.suppress(Exception), torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = make_model(settings)(empty_images(settings, 1))
        if backward:
            logits.sum().backward()
        facts["flops_per_image"] = counter.get_total_flops()
    return facts


# The models of many seeds.

class Caller(nn.Module):
    """function(model, *tensors) as the forward pass of a module, which can be called with other weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *tensors):
        return function(self.model, *tensors)


def logits_of(model, images):
    return [model(images)]


class StackedModel(nn.Module):
    """S models of one architecture as one module: images (S, B, C, H, W) -> logits (S, B, classes).

    Its parameters are `matrices` and `rest` (S, P), as group_parameters divides the weights: copies of the weights of
    `models`, whose parameters become views of them, so that training the stack trains each model. `shapes` is
    {"matrices": {name: shape}, "rest": {name: shape}}, in the order of the columns. The models are no submodules, or
    their weights would be among the parameters; side by side they share the buffers and frozen parameters of the first.
    """

    def __init__(self, models):
        super().__init__()
        self.shapes = group_parameters(models[0])
        for group, names in self.shapes.items():
            rows = [torch.cat([model.get_parameter(name).detach().flatten() for name in names]) for model in models]
            self.register_parameter(group, nn.Parameter(torch.stack(rows)))
        for name, weight in self.weights().items():
            for i, model in enumerate(models):
                model.get_parameter(name).data = weight.data[i]
        self.places = parameter_places(models[0])
        for name, module in [("models", models), ("caller", Caller(models[0]))]:
            object.__setattr__(self, name, module)  # self.caller = ... would make a submodule

    def train(self, mode=True):
        for model in self.models:
            model.train(mode)
        return super().train(mode)

    def weights(self):
        """{name: (S, *shape)}, views of the parameters."""
        weights = {}
        for group, shapes in self.shapes.items():
            pieces = getattr(self, group).split([shape.numel() for shape in shapes.values()], dim=1)
            weights |= {name: piece.view(-1, *shape) for (name, shape), piece in zip(shapes.items(), pieces)}
        return weights

    def forward(self, images):
        (logits,) = self.map_weights(logits_of, (images,), in_dim=0)
        return logits

    def map(self, function, *tensors):
        """What function(model, *tensors), which returns a list of tensors, makes of each model: a list of (S, ...)."""
        # On a GPU to start an operation takes longer than to compute it; on a CPU large batches fill the caches.
        if len(self.models) > 1 and next(self.parameters()).is_cuda:
            with contextlib.suppress(RuntimeError):  # too little memory for all, or an attention cannot be mapped
                return self.map_weights(function, tensors, in_dim=None)
        results = [function(model, *tensors) for model in self.models]
        return [torch.stack(parts) for parts in zip(*results)]

    def map_weights(self, function, tensors, in_dim):
        """The same, as a function of the stacked weights, to which gradients go. in_dim: 0 if each model has tensors of
        its own (S, ...), None if all have the same."""
        weights = self.weights()
        weights = {f"model.{place}": weights[name] for place, name in self.places.items() if name in weights}
        # torch's own tie_weights leaves a module of two names with the weights of the call.
        call = functools.partial(functional_call, tie_weights=False)
        if len(self.models) == 1:
            weights = {place: weight.squeeze(0) for place, weight in weights.items()}
            results = call(self.caller, weights, (function, *(tensor[0] for tensor in tensors)))
            return [result.unsqueeze(0) for result in results]
        return torch.vmap(call, in_dims=(None, 0, (None, *(in_dim for _ in tensors))),
                          randomness="different")(self.caller, weights, (function, *tensors))


def parameter_places(model):
    """{where each parameter lies: its name}. One that two modules share lies in two places, and has one name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {place: names[parameter] for prefix, module in model.named_modules()
            for place, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False)}


def group_parameters(model):
    """The trained parameters by how they are trained: {"matrices": {name: shape}, "rest": {name: shape}}, so ordered.

    Muon and weight decay are for the matrices; the rest are norms, biases, tokens and lambda.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_rest = parameter.ndim < 2 or name in ("cls_token", "pos_embed") or "lambda" in name
            groups.setdefault("rest" if is_rest else "matrices", {})[name] = parameter.shape
    return dict(sorted(groups.items()))


def choose_size(settings, wanted, count, device):
    """How many of `count` seeds are trained side by side at most, --stack being `wanted` or None; a line says why where
    they cannot be."""
    size = wanted or default_size(count_tokens(settings) * settings["dim"], device)
    obstacle = find_obstacle(settings) if min(size, count) > 1 else None
    if obstacle:
        print(f"{settings['model']}: seeds are trained one after the other ({obstacle})", flush=True)
    return 1 if obstacle else size


def default_size(numbers, device):
    """How many seeds are trained side by side at most, where --stack does not say; numbers: an image's tokens times
    their width."""
    return 1 if device.type == "cpu" and numbers > STACKED_NUMBERS else sys.maxsize


def find_obstacle(settings):
    """Why models with these settings cannot be trained side by side, or None where they can."""
    if settings["amp"] == "float16":
        return "they would share the scale of their float16 gradients"
    models = [make_model(settings | dict(seed=seed)) for seed in (0, 1)]
    if list(models[0].buffers()) or not all(parameter.requires_grad for parameter in models[0].parameters()):
        return "they would share buffers or frozen parameters"
    states = [plain_state(model) for model in models]
    try:
        StackedModel(models).train()(torch.zeros_like(empty_images(settings, 2, 2)))
    except Exception as error:
        return f"torch.vmap does not take this model: {first_line(error)}"
    for other in (states[1], plain_state(models[0])):  # another seed's, and that after a step
        for name in differing(states[0], other):
            return f"they would share {name}"


def plain_state(model):
    """What the modules of a model have besides parameters and buffers, as texts: {name: repr}."""
    return {f"{path}.{name}": repr(value.tolist() if hasattr(value, "tolist") else value)
            for path, module in model.named_modules() for name, value in vars(module).items()
            if name != "training" and isinstance(value, (torch.Tensor, numpy.ndarray, numbers.Number, str, list, dict))
            and name not in vars(nn.Module())}


def differing(state, other):
    """The names of what two states do not have in common."""
    return [name for name in {**state, **other} if state.get(name) != other.get(name)]


def find_lost(model, loaded):
    """The names of what a trained model has and its state dict has not, by the model that was loaded from it."""
    kept = model.state_dict()
    buffers = [{name: repr(buffer.tolist()) for name, buffer in either.named_buffers() if name not in kept}
               for either in (model, loaded)]
    return differing(*buffers) + differing(plain_state(model), plain_state(loaded))


# Batches.

def rank_batches(split, seeds, epoch, settings):
    """This rank's part of the batches of an epoch: images (S, B, C, H, W), labels (S, B), and the share of an image in
    the whole batch, the last of which may be smaller."""
    batches = data.epoch_batches(split, seeds, epoch, settings)
    numbers = len(seeds) * settings["batch_size"] * split.images[0].numel()  # of a batch
    while some := list(itertools.islice(batches, max(1, min(8, NUMBERS_AT_ONCE // numbers)))):
        yield from cut_batches(some, split, settings)


def cut_batches(batches, split, settings):
    """The same of several batches of data.epoch_batches, which are cut and augmented at once, by fewer operations."""
    parts = [machine.part_of_rank(index) for index, _ in batches]  # (S, B) each
    sizes = [part.numel() for part in parts]
    index = torch.cat([part.flatten() for part in parts]).unsqueeze(0)
    numbers = {name: torch.cat([machine.part_of_rank(drawn[name]).flatten(0, 1) for _, drawn in batches]).unsqueeze(0)
               for name in batches[0][1]}
    images, labels = (tensor[0].split(sizes) for tensor in data.get_batch(split, index, numbers, settings))
    for (whole, _), part, *batch in zip(batches, parts, images, labels):
        yield *(tensor.view(*part.shape, *tensor.shape[1:]) for tensor in batch), 1 / whole.shape[1]


# Loss, accuracy and lambda.

def evaluate_batch(model, images, labels, label_smoothing):
    """The sum of the losses of a batch, and the number of correct answers: images (B, C, H, W), labels (B,)."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    return [loss, (logits.argmax(1) == labels).type_as(loss).sum()]


def evaluate_images(net, images, labels, settings):
    """Sums of loss and of correct answers over a batch (2, S)."""
    function = functools.partial(evaluate_batch, label_smoothing=settings["label_smoothing"])
    return torch.stack(net.map(function, images, labels))


def total(batches):
    """The sum of tensors over the batches, as a CPU tensor in float64: one copy from the device."""
    return torch.stack(batches).cpu().double().sum(0)


@torch.no_grad()
def evaluate(net, split, settings):
    """Loss and accuracy of each model, means over all images of a split, in float32: a list of pairs."""
    net.eval()
    sums = [evaluate_images(net, *batch, settings) for batch in data.evaluation_batches(split, settings)]
    return (total(sums) / len(split.labels)).T.tolist()


@torch.no_grad()
def measure_lambdas(net, split, settings):
    """The mean weight of the second branch over the images of a split: of each model {block: number} of the
    differential blocks."""
    net.eval()
    blocks = net.models[0].differential_blocks()
    sums = [torch.stack(net.map(ViT.mean_lambdas, images)) * len(labels)  # (blocks, S)
            for images, labels in data.evaluation_batches(split, settings) if blocks]
    means = (total(sums) / len(split.labels)).T.tolist() if blocks else [[] for _ in net.models]
    return [dict(zip(blocks, values)) for values in means]


def load_best(runs, split, settings, trained):
    """The best models of runs as a StackedModel, by config.json and best.pt.

    Raises:
        UserError: if they have not the validation loss on record, as what was trained is not in the state dict.
    """
    net = StackedModel([load_model(run.folder, settings | dict(seed=run.seed)).to(split.labels.device) for run in runs])
    for i, (run, (val_loss, _)) in enumerate(zip(runs, evaluate(net, split, settings))):
        # Validation is in float32 whatever --amp says, so that nothing but another order of sums may differ.
        if not math.isclose(val_loss, run.best["val_loss"], rel_tol=1e-5):
            lost = ", ".join(find_lost(trained.models[0], net.models[i])) or "what it has"
            raise UserError(
                f"{run.folder}: best.pt gives a validation loss of {val_loss:.6f}, and the model that was trained had "
                f"{run.best['val_loss']:.6f}: not in the state dict is {lost}; make it a persistent buffer "
                "(register_buffer), and train with --overwrite")
    return net


# The optimizer.

def make_optimizer(net, settings):
    """One optimizer of all the weights of a StackedModel: Muon for the matrices and AdamW for the rest, or AdamW alone.

    Each of its groups has its peak learning rate as `peak_lr`; `lr` is a tensor, as a CUDA graph would take a number
    for a constant.
    """
    def group(name, peak_lr):
        leaf, weight_decay = net.get_parameter(name), settings["weight_decay"] if name == "matrices" else 0.0
        lr = torch.tensor(peak_lr, dtype=leaf.dtype, device=leaf.device)
        return dict(params=[leaf], lr=lr, peak_lr=peak_lr, weight_decay=weight_decay)

    with_muon = settings["optimizer"] == "muon" and "matrices" in net.shapes
    names = ["rest"] if with_muon else net.shapes
    adamw = torch.optim.AdamW([group(name, settings["lr"]) for name in names], fused=True)
    if not with_muon:
        return adamw
    matrices = group("matrices", settings["muon_lr"])
    optimizer = muon.Muon(net.matrices, net.shapes["matrices"].values(), matrices["lr"], matrices["weight_decay"],
                          adamw=adamw)
    optimizer.param_groups[0]["peak_lr"] = matrices["peak_lr"]
    return optimizer


def set_lr(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"].fill_(factor * group["peak_lr"])


# What last.pt holds of a stack, as plain tensors.

def get_state(net, optimizer, scaler):
    return dict(leaves=dict(net.named_parameters()), buffers=dict(net.models[0].named_buffers()),
                optimizer=optimizer.state_dict()["state"], scaler=scaler.state_dict())


@torch.no_grad()
def set_buffers(net, buffers):
    for name, buffer in net.models[0].named_buffers():  # those that no state dict has, too
        buffer.copy_(buffers[name])


@torch.no_grad()
def set_state(net, optimizer, scaler, state):
    for leaf, saved in zip(net.parameters(), state["leaves"].values(), strict=True):
        leaf.copy_(saved)
    set_buffers(net, state["buffers"])
    optimizer.load_state_dict(dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
    scaler.load_state_dict(state["scaler"])


# Compiled and captured.

def is_compiled(choice, stack_steps, device, amp):
    """Whether --compile, with auto decided, asks for compilation; stack_steps: training steps times seeds."""
    if device.type == "cuda":
        possible = machine.world_size() == 1 and amp != "float16"
        if choice == "yes" and not possible:
            machine.say("steps are not captured: a CUDA graph cannot wait for other ranks or a gradient scaler")
        return choice != "no" and possible
    if choice != "auto" or device.type != "cpu":
        return choice == "yes"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return stack_steps >= COMPILED_STEPS and shutil.which(compiler) is not None


def accelerate(step, forward, net, optimizer, images, settings, required):
    """step(forward, images, labels, share) made faster for batches of exactly the shape of `images` (S, B, C, H, W): on
    a CPU `forward` and Muon are compiled, on CUDA the step is captured. Returns a function of any batch, or None, after
    a line that says why, where that cannot be.

    Raises:
        UserError: if compiling fails and is `required`; the function itself, if capturing the step does.
    """
    plain = functools.partial(step, forward)
    if images.device.type == "cuda":
        fast = capture(plain, optimizer)
    else:
        compiled = compile_step(forward, net, optimizer, images, settings, required)
        if compiled is None:
            return None
        fast = functools.partial(step, compiled)
    return lambda batch, labels, share: (fast if batch.shape == images.shape else plain)(batch, labels, share)


def compile_step(forward, net, optimizer, images, settings, required):
    """forward(net, images, labels, label_smoothing) compiled for this shape, tried with the backward pass; so is Muon.
    None where that fails."""
    if CACHE_PROBLEM:
        machine.say(f"{CACHE_PROBLEM}: torch keeps what it compiles in its own folder")
    machine.say("compiling, which takes up to two minutes on a slow machine the first time")
    compiled = torch.compile(forward, dynamic=False)
    buffers = {name: buffer.clone() for name, buffer in net.models[0].named_buffers()}
    try:
        labels = torch.zeros(images.shape[:2], dtype=torch.long, device=images.device)
        with torch.autocast(**machine.precision(settings["amp"], images.device)):
            losses, _ = compiled(net, images, labels, settings["label_smoothing"])
        losses.sum().backward()
        if isinstance(optimizer, muon.Muon):
            optimizer.compile()
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
        problem = (f"--compile does not work here ({first_line(error)}): it needs a C++ compiler such as g++, and "
                   "TORCHINDUCTOR_CACHE_DIR, if set, to be a folder that can be written to")
        if required:
            raise UserError(f"{problem}; give --compile no") from None
        machine.say(f"{problem}; training goes on without")
        return None
    finally:
        net.zero_grad()
        set_buffers(net, buffers)  # which the trial may have changed
    return compiled


@functools.cache  # torch keeps a workspace for each stream that products were started on
def capture_stream():
    return torch.cuda.Stream()


def capture(step, optimizer):
    """The step as one CUDA graph, captured at the fourth batch. The first three run as they are, on the stream of the
    capture: what is allocated when first needed must exist before it. All batches have the same shape."""
    for group in optimizer.param_groups:
        group["capturable"] = True  # without which AdamW refuses to be captured
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # in those three
    stream, graph, inputs, outputs, batches = capture_stream(), torch.cuda.CUDAGraph(), None, None, 0

    def run(images, labels, share):
        nonlocal inputs, outputs, batches
        batches += 1
        if batches <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = step(images, labels, share)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if inputs is None:
            inputs = images.clone(), labels.clone()
            with refusing_capture(), torch.cuda.graph(graph, stream=stream):
                outputs = step(*inputs, share)
        inputs[0].copy_(images)
        inputs[1].copy_(labels)
        graph.replay()
        return outputs

    return run


@contextlib.contextmanager
def refusing_capture():
    """A block that captures a step which has run before: what fails is what a CUDA graph cannot do."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__ or error  # to end a capture that has failed is an error, too
        if machine.is_out_of_memory(cause):
            raise cause from None
        raise UserError(f"the training step cannot be captured ({first_line(cause)}): give --compile no") from None
