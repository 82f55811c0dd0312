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

ATTACKED_IMAGES, STEPS = 1_000, 40
EPSILONS = [0.01, 0.02, 0.04, 0.08, 0.16], [0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255]  # for grey, for colour


def answer(net, x, labels, settings):
    """What each model answers to images x (S, B, C, H, W) from 0 to 1: the loss of each image and its margin, the best
    wrong logit minus the right one, (S, B) each, and the gradient of the margin by x."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(data.normalize(255 * x, settings["dataset"]))
        wrong = logits.scatter(2, labels[..., None], -math.inf).amax(2)
        margin = wrong - logits.gather(2, labels[..., None]).squeeze(2)
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    loss = F.cross_entropy(logits.detach().flatten(0, 1), labels.flatten(), reduction="none",
                           label_smoothing=settings["label_smoothing"]).view_as(labels)
    largest = gradient.flatten(2).abs().amax(2)  # nan where a part is nan
    useless = (~((0 < largest) & (largest < math.inf))).sum().item()
    if useless:
        raise UserError(f"{settings['model']}: the gradient of {useless} of {labels.numel()} images is zero or not "
                        "finite: an attack by gradients says nothing of how robust this model is")
    return loss, margin.detach(), gradient


def near(clean, epsilon, x):
    """Images x, moved to within epsilon of each pixel of the clean ones, and to 0 to 1."""
    return torch.minimum(torch.maximum(x, clean - epsilon), clean + epsilon).clamp(0, 1)


def ascend(net, clean, labels, draws, epsilon, settings, steps=STEPS):
    """Projected gradient ascent of the margin from a random start: yields images (S, B, C, H, W), their loss and their
    margin, (S, B) each, of the start and after each step. draws: uniform numbers from 0 to 1, (B, C, H, W)."""
    x = near(clean, epsilon, clean + epsilon * (2 * draws - 1))
    for _ in range(steps + 1):
        loss, margin, gradient = answer(net, x, labels, settings)
        yield x, loss, margin
        x = near(clean, epsilon, x + 2.5 * epsilon / steps * gradient.sign())


def attack(net, clean, unattacked, labels, draws, epsilon, settings):
    """Attack images (S, B, C, H, W) from 0 to 1 within epsilon of each pixel: {attack: loss and margin, (S, B) each};
    where the margin is above 0 the answer is wrong. unattacked: the answer to the clean images. Of the steps of pgd the
    one with the largest margin counts, and the clean image is one of them."""
    loss, worst, gradient = unattacked
    found = {name: answer(net, near(clean, epsilon, clean + epsilon * signs), labels, settings)[:2] for name, signs in
             [("fgsm", gradient.sign()), ("sign_noise", (2 * draws - 1).sign())]}
    for _, new_loss, margin in ascend(net, clean, labels, draws, epsilon, settings):
        loss, worst = torch.where(margin > worst, new_loss, loss), torch.maximum(margin, worst)
    return {"pgd": (loss, worst)} | found


def measure_attack(net, split, settings):
    """The rows of attack.csv of each model: loss and accuracy on the first images of a split under attack.

        pgd         40 steps of 2.5 epsilon / 40 up the gradient of the margin, from a random start
        fgsm        one step of epsilon
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
        unattacked = answer(net, clean, labels, settings)
        for epsilon in EPSILONS[pixels.shape[1] > 1]:
            found = attack(net, clean, unattacked, labels, numbers, epsilon, settings)
            for name, (loss, margin) in found.items():
                sums.setdefault((name, epsilon), []).append(torch.stack([loss.sum(1), (margin < 0).sum(1)]))
    means = {key: (stack.total(parts) / len(pixels)).T.tolist() for key, parts in sums.items()}
    return [[dict(attack=name, epsilon=epsilon, test_loss=values[i][0], test_accuracy=values[i][1])
             for (name, epsilon), values in means.items()] for i in range(len(net.models))]
