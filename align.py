"""What a corruption adds to the outputs of the heads in all images, estimated without labels and taken out again.

    python analysis.py runs/mnist-vit-seed0 --analysis aligned

The offset of a block is the mean of each head's output at each token over some corrupted validation images, less the
same mean over the clean validation split. It is subtracted at the test, before any norm of the head. Controls, at
severity 3, by the end of the condition's name, are what else is subtracted: _random, vectors of the same norm at each
token; _class_token, the offset at this token alone; _by_contrast, the offset of contrast; _pixels, from the images what
the corruption adds to the mean of each pixel.
Related: the statistics of batch norms, estimated again at the test (Schneider et al. 2020, arXiv 2006.16971; Nado et
al. 2020, arXiv 2006.10963). Here nothing is rescaled, and an offset is one of a head and a token, as layer norms have
no statistics.
"""

import contextlib
import functools
import itertools

import torch
from torch.nn import functional as F

import corruptions
import data
import stack
from command import UserError
from diff_attention import merge_heads

ALIGNED = ["gaussian_noise", "shot_noise", "impulse_noise", "gaussian_blur", "contrast", "brightness"]
ALIGNED_SEVERITIES = [1, 3, 5]
ALIGNED_IMAGES = [10, 100, 1_000]


def random_like(offset, *key):
    """A random vector of the same norm at each token: (H, N, e)."""
    draws = torch.randn(offset.shape, generator=data.generator_of("random offset", *key)).to(offset.device)
    return draws * offset.norm(dim=(0, 2), keepdim=True) / draws.norm(dim=(0, 2), keepdim=True)


def at_class_token(offset):
    """The offset (H, N, e) at the class token, and 0 at the others."""
    return F.pad(offset[:, :1], (0, 0, 0, offset.shape[1] - 1))


def find_joint(attn, x):
    """The module of an attention that is given what its heads add up, (B, H, N, e) or merged, or None."""
    heads, given = sum(attn.branches(x)), []
    hooks = [module.register_forward_pre_hook(lambda module, inputs: given.append((module, *inputs)))
             for module in attn.children()]
    attn(x)
    for hook in hooks:
        hook.remove()
    return next((module for module, tensor, *_ in given for expected in (heads, merge_heads(heads))
                 if tensor.shape == expected.shape and torch.allclose(tensor, expected, rtol=1e-3, atol=1e-5)), None)


@contextlib.contextmanager
def subtracted(modules, offsets):
    """A block in which each of these modules is given its input less an offset: of the outputs of heads (H, N, e)."""
    def subtract(offset, module, inputs):
        fitting = offset if inputs[0].ndim == 4 else merge_heads(offset[None])[0]
        return inputs[0] - fitting[..., :inputs[0].shape[-2], :]  # the last block may compute the class token alone

    hooks = [module.register_forward_pre_hook(functools.partial(subtract, offset))
             for module, offset in zip(modules, offsets, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_offsets(model, joints, images, means, change=lambda offset: offset):
    """What a corruption adds to the outputs of the heads, in the mean over corrupted images (B, C, H, W), for each
    block (H, N, e): block after block, each with the offsets of those before it subtracted. means: of clean images.
    change: what is done to each offset."""
    offsets = []
    with contextlib.ExitStack() as mended:
        for (attn, x), joint, mean in zip(model.attention_inputs(images), joints, means):
            offsets.append(change(sum(attn.branches(x)).mean(0) - mean))
            mended.enter_context(subtracted([joint], offsets[-1:]))
    return offsets


def pixel_and_head_means(model, images):
    """The means over images (B, C, H, W) of the pixels, (C, H, W), and of what each head adds up: for each block
    (H, N, e)."""
    return [images.mean(0), *(sum(terms).mean(0) for terms in model.attention_branches(images))]


def aligned_offsets(model, joints, split, settings):
    """What is to be subtracted under each condition, by images of the validation split: {(condition, severity, images):
    (the corruption to be tested on, modules, offsets)}. Controls at severity 3."""
    sums = [[len(images) * mean for mean in pixel_and_head_means(model, images)]
            for images, _ in data.evaluation_batches(split, settings)]
    pixel_mean, *means = [sum(part) / len(split.labels) for part in zip(*sums)]
    clean = next(data.evaluation_pixels(split, settings))[1][:ALIGNED_IMAGES[-1]]
    counts, found = sorted({min(count, len(clean)) for count in ALIGNED_IMAGES}), {}
    for name, severity in [("clean", 0), *itertools.product(ALIGNED, ALIGNED_SEVERITIES)]:
        # The random numbers are those of no image of the test split.
        images = data.normalize(corruptions.corrupt(clean, name, severity, 10**9, split, settings), settings["dataset"])
        found[name, severity, 0] = name, [], []
        for count in counts:
            offsets = find_offsets(model, joints, images[:count], means)
            found[name, severity, count] = name, joints, offsets
        for control, modules, others in [
                ("random", joints, [random_like(offset, name, block) for block, offset in enumerate(offsets)]),
                ("class_token", joints, find_offsets(model, joints, images, means, at_class_token)),
                ("pixels", [model], [images.mean(0) - pixel_mean])] if severity == 3 else []:
            found[f"{name}_{control}", 3, counts[-1]] = name, modules, others
    for name, other in zip(ALIGNED, ALIGNED[3:] + ALIGNED[:3]):
        found[f"{name}_by_{other}", 3, counts[-1]] = name, *found[other, 3, counts[-1]][1:]
    return found


@torch.no_grad()
def measure_aligned(net, split, validation, settings):
    """The rows of aligned.csv of each model: loss and accuracy on a split under corruptions, after an offset, by images
    of the split `validation`, was subtracted from the outputs of the heads; 0 images: nothing was."""
    images, _ = next(data.evaluation_batches(split, settings))
    joints = [[find_joint(attn, x) for attn, x in model.attention_inputs(images[:2])] for model in net.models]
    if None in joints[0]:
        raise UserError(f"{settings['model']}: no module of its attention is given the sum of its branches, so that no "
                        "offset can be subtracted from it: leave --analysis aligned out")
    offsets = [aligned_offsets(model, own, validation, settings) for model, own in zip(net.models, joints)]
    sums = [{key: [] for key in of_model} for of_model in offsets]

    def add(name, severity, images, labels):
        for model, of_model, own_sums in zip(net.models, offsets, sums):
            for key, (tested, modules, own_offsets) in of_model.items():
                if (tested, key[1]) == (name, severity):
                    with subtracted(modules, own_offsets):
                        own_sums[key].append(torch.stack(stack.evaluate_batch(
                            model, images, labels, settings["label_smoothing"])))

    for images, labels in data.evaluation_batches(split, settings):
        add("clean", 0, images, labels)
    for key, images, labels in corruptions.corrupted_batches(split, settings, ALIGNED, ALIGNED_SEVERITIES):
        add(*key, images, labels)
    return [[dict(zip(("condition", "severity", "images"), key)) | dict(zip(
        ("test_loss", "test_accuracy"), (stack.total(batches) / len(split.labels)).tolist()))
        for key, batches in own_sums.items()] for own_sums in sums]
