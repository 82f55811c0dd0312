"""Many seeds as one module: the stacked weights, the forward pass, torch.compile and the CUDA graph.

A model of 38 thousand parameters is many small matrix multiplications, and to launch one takes as long as to compute
it. So the models of S seeds are trained side by side: their weights are rows of one tensor, multiplied all at once.

    net.matrices, net.rest      (S, P) each             row s has the weights of seed s, one after the other
    net.weights()["head.fc1.weight"]    (S, 128, 32)    a view of some columns, so gradients arrive in the rows
    images -> net(images)       (S, B, C, H, W) -> (S, B, classes)      each seed has images and dropout of its own
    losses                      (S,)                    row s of the gradient of their sum is the gradient of loss s

torch.vmap calls one model with each row's weights, all rows at once; the optimizer sees two tensors in place of forty.
A single model is a stack of one, for which vmap is left out; the loop does not ask how many it holds.
"""

import contextlib
import functools
import os
import shutil
import sys
import warnings

import torch
from torch import nn
from torch.func import functional_call

import machine
import muon
import records
from records import UserError

# On a CPU, images of more tokens fill the caches by themselves: seeds are trained one by one. Compiled, five seeds side
# by side take 0.8 of the time at 17 tokens, as long at 37, and 1.1 at 50 (vit, one thread).
STACKED_TOKENS = 40
COMPILED_STEPS = 5_000  # on a CPU, stacks of fewer training steps, each seed's counted, take less time than compiling


class StackedModel(nn.Module):
    """S models of one architecture as one module: images (S, B, C, H, W) -> logits (S, B, classes).

    Its parameters are `matrices` and `rest` (S, P), as group_parameters divides the weights; each model's weights are
    copied. `shapes` is {"matrices": {name: shape}, "rest": {name: shape}}, in the order of the columns.
    `template` is the first model, which is called with the weights of each seed and holds buffers and frozen
    parameters. It is no submodule: its own weights are not used, and are not among the parameters.
    """

    def __init__(self, models):
        super().__init__()
        self.shapes = group_parameters(models[0])
        for group, names in self.shapes.items():
            rows = [torch.cat([model.get_parameter(name).detach().flatten() for name in names]) for model in models]
            self.register_parameter(group, nn.Parameter(torch.stack(rows)))
        object.__setattr__(self, "template", models[0].train())  # which self.template = ... would make a submodule

    def weights(self):
        """{name: (S, *shape)}, views of the parameters."""
        weights = {}
        for group, shapes in self.shapes.items():
            pieces = getattr(self, group).split([shape.numel() for shape in shapes.values()], dim=1)
            weights |= {name: piece.view(-1, *shape) for (name, shape), piece in zip(shapes.items(), pieces)}
        return weights

    def forward(self, images):
        weights = self.weights()
        if len(images) == 1:
            weights = {name: weight.squeeze(0) for name, weight in weights.items()}
            return functional_call(self.template, weights, images[0]).unsqueeze(0)
        return torch.vmap(functional_call, in_dims=(None, 0, 0), randomness="different")(
            self.template, weights, images)

    def model_state(self, i):
        """The state dict of model i: its weights, and the buffers and frozen parameters of the template."""
        return self.template.state_dict() | {name: weight.detach()[i] for name, weight in self.weights().items()}


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
    own = group("matrices", settings["muon_lr"])
    optimizer = muon.Muon(net.matrices, net.shapes["matrices"].values(), own["lr"], own["weight_decay"], adamw=adamw)
    optimizer.param_groups[0]["peak_lr"] = own["peak_lr"]
    return optimizer


def set_lr(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"].fill_(factor * group["peak_lr"])


# What last.pt holds of a stack, as plain tensors.

def get_state(net, optimizer, scaler):
    return dict(leaves=dict(net.named_parameters()), buffers=dict(net.template.named_buffers()),
                optimizer=optimizer.state_dict()["state"], scaler=scaler.state_dict())


@torch.no_grad()
def set_buffers(net, buffers):
    for name, buffer in net.template.named_buffers():  # those that no state dict has, too
        buffer.copy_(buffers[name])


@torch.no_grad()
def set_state(net, optimizer, scaler, state):
    for leaf, saved in zip(net.parameters(), state["leaves"].values(), strict=True):
        leaf.copy_(saved)
    set_buffers(net, state["buffers"])
    optimizer.load_state_dict(dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
    scaler.load_state_dict(state["scaler"])


# How many seeds side by side.

def default_size(tokens, device):
    """How many seeds are trained side by side at most, where --stack does not say; tokens: of an image."""
    return 1 if device.type == "cpu" and tokens > STACKED_TOKENS else sys.maxsize


def find_obstacle(models, images, amp):
    """Why these models cannot be trained side by side, or None where they can.

    They may be on meta, and so may images (S, B, C, H, W). Plain tensors that a module has drawn for itself are not
    found: those of the first seed serve all.
    """
    if amp == "float16":
        return "they would share the scale of their float16 gradients"
    if list(models[0].buffers()) or not all(parameter.requires_grad for parameter in models[0].parameters()):
        return "they would share buffers or frozen parameters"
    try:
        StackedModel(models)(images)
    except RuntimeError as error:
        return f"torch.vmap does not take this model: {records.first_line(error)}"


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


def accelerate(step, net, optimizer, images, amp, required):
    """A faster function for batches of the size of `images` (S, B, C, H, W) alone, which does what step(net, ...) does:
    on a CPU `net` is compiled, on CUDA the step is captured. None, after a line that says why, where that cannot be.

    Raises:
        UserError: if compiling fails and is `required`; the function itself, if capturing the step does.
    """
    if images.device.type == "cuda":
        return capture(functools.partial(step, net), optimizer)
    compiled = compile_model(net, images, amp, required)
    return None if compiled is None else functools.partial(step, compiled)


def compile_model(net, images, amp, required):
    """The net compiled for images of this shape, tried forward and backward; None where that fails."""
    machine.say("compiling, which takes up to two minutes on a slow machine the first time")
    compiled = torch.compile(net, dynamic=False)
    buffers = {name: buffer.clone() for name, buffer in net.template.named_buffers()}
    try:
        with torch.autocast(**machine.precision(amp, images.device)):
            logits = compiled(images)
        logits.float().sum().backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        problem = f"--compile does not work here ({records.first_line(error)}): it needs a C++ compiler such as g++"
        if required:
            raise UserError(f"{problem}; give --compile no") from None
        machine.say(f"{problem}; training goes on without")
        return None
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
        raise UserError(f"the training step cannot be captured ({records.first_line(cause)}): give --compile no"
                        ) from None
