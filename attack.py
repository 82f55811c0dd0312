"""The noise that hurts most: attacks within epsilon of each pixel, by the gradient of the margin.

    python analysis.py runs/mnist-vit-seed0 --analysis attack

Madry et al. 2018 (arXiv 1706.06083); what keeps such figures honest: Carlini et al. 2019 (arXiv 1902.06705). Pixels are
from 0 to 1, the normalisation is inside of the model, and all is in float32.
"""

import math

import torch
from torch.nn import functional as F

import data
import stack
from command import UserError

ATTACKED_IMAGES, STEPS, TARGETS = 1_000, 20, 9
EPSILONS = [0.01, 0.02, 0.04, 0.08, 0.16], [0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255]  # for grey, for colour


def right_and_wrong(logits, labels):
    """Of logits (S, B, classes) that of the right class, (S, B), and those of the others, with -inf for the right."""
    return logits.gather(2, labels[..., None]).squeeze(2), logits.scatter(2, labels[..., None], -math.inf)


def answer(net, x, labels, settings, targets=None):
    """What each model answers to images x (S, B, C, H, W) from 0 to 1: the loss of each image and its margin, the best
    wrong logit minus the right one, (S, B) each; all wrong logits; and the gradient by x of the margin, or of the logit
    of targets (S, B) minus the right one."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(data.normalize(255 * x, settings["dataset"]))
        right, wrong = right_and_wrong(logits, labels)
        margin = wrong.amax(2) - right
        aim = margin if targets is None else logits.gather(2, targets[..., None]).squeeze(2) - right
        (gradient,) = torch.autograd.grad(aim.sum(), x)
    loss = F.cross_entropy(logits.detach().flatten(0, 1), labels.flatten(), reduction="none",
                           label_smoothing=settings["label_smoothing"]).view_as(labels)
    largest = gradient.flatten(2).abs().amax(2)  # nan where a part is nan
    useless = (~((0 < largest) & (largest < math.inf))).sum().item()
    if useless:
        raise UserError(f"{settings['model']}: the gradient of {useless} of {labels.numel()} images is zero or not "
                        "finite: an attack by gradients says nothing of how robust this model is")
    return loss, margin.detach(), wrong.detach(), gradient


def near(clean, epsilon, x):
    """Images x, moved to within epsilon of each pixel of the clean ones, and to 0 to 1."""
    return torch.minimum(torch.maximum(x, clean - epsilon), clean + epsilon).clamp(0, 1)


def ascend(net, clean, labels, targets, draws, epsilon, settings, steps=STEPS):
    """Projected gradient ascent of the logit of targets (S, B) minus the right one, from a random start, by steps that
    fall from 2 epsilon to 0: yields images (S, B, C, H, W), their loss and their margin, (S, B) each, of the start and
    after each step. draws: uniform numbers from 0 to 1, (B, C, H, W)."""
    x = near(clean, epsilon, clean + epsilon * (2 * draws - 1))
    for step in range(steps + 1):
        loss, margin, _, gradient = answer(net, x, labels, settings, targets)
        yield x, loss, margin
        x = near(clean, epsilon, x + 2 * epsilon * (1 - step / steps) * gradient.sign())


def attack(net, clean, labels, draws, settings, epsilons, steps=STEPS):
    """Attack images (S, B, C, H, W) from 0 to 1 within each epsilon of each pixel: yields, from the largest, an epsilon
    and {attack: loss and margin, (S, B) each}; where the margin is above 0 the answer is wrong. The step of fgsm counts
    for pgd; an image that withstands pgd at an epsilon is taken to withstand more of it at a smaller one."""
    unattacked, margin, wrong, gradient = answer(net, clean, labels, settings)
    targets = wrong.argsort(2, descending=True)[..., :min(TARGETS, wrong.shape[2] - 1)].unbind(2)
    breakable = torch.ones_like(margin, dtype=torch.bool)
    for epsilon in sorted(epsilons, reverse=True):
        found = {name: answer(net, near(clean, epsilon, clean + epsilon * signs), labels, settings)[:2]
                 for name, signs in [("fgsm", gradient.sign()), ("sign_noise", (2 * draws - 1).sign())]}
        larger = found["fgsm"][1] > margin
        worst = [torch.where(larger, new, old) for new, old in zip(found["fgsm"], (unattacked, margin))]
        for target in targets:
            withstands = breakable & (worst[1] <= 0)
            left = withstands.any(0).nonzero().squeeze(1)  # images
            for _, *new in ascend(net, clean[:, left], labels[:, left], target[:, left], draws[left], epsilon, settings,
                                  steps):
                larger = withstands[:, left] & (new[1] > worst[1][:, left])
                for whole, part in zip(worst, new):
                    whole[:, left] = torch.where(larger, part, whole[:, left])
        breakable = worst[1] > 0
        yield epsilon, {"pgd": worst} | found


def measure_attack(net, split, settings):
    """The rows of attack.csv of each model: loss and accuracy on the first images of a split under attack.

        pgd         up the gradient of the logit of each wrong class (the nine likeliest) minus the right one: for each
                    20 steps from a random start
        fgsm        one step of epsilon up the gradient of the margin
        sign_noise  a random sign times epsilon at each pixel, which needs no gradient

    Raises:
        UserError: if a gradient is zero or not finite.
    """
    net.requires_grad_(False)
    _, pixels = next(data.evaluation_pixels(split, settings))
    pixels, sums = pixels[:ATTACKED_IMAGES], {}
    draws = torch.rand(pixels.shape, generator=data.generator_of("attack")).to(pixels.device)
    for images, labels, numbers in data.cache_sized(pixels / 255, split.labels[:len(pixels)], draws):
        clean, labels = (tensor.expand(len(net.models), *tensor.shape) for tensor in (images, labels))
        for epsilon, found in attack(net, clean, labels, numbers, settings, EPSILONS[pixels.shape[1] > 1]):
            for name, (loss, margin) in found.items():
                sums.setdefault((name, epsilon), []).append(torch.stack([loss.sum(1), (margin < 0).sum(1)]))
    means = {key: (stack.total(parts) / len(pixels)).T.tolist() for key, parts in sums.items()}
    return [[dict(attack=name, epsilon=epsilon, test_loss=values[i][0], test_accuracy=values[i][1])
             for (name, epsilon), values in sorted(means.items(), key=lambda item: item[0][1])]
            for i in range(len(net.models))]
