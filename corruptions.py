"""How test images are corrupted, at severities 1 to 5: CORRUPTIONS has a row for each way, with its function.

The first six are of MNIST-C (Mu and Gilmer 2019, arXiv 1906.02337; all are in its program, shot noise, impulse noise
and brightness also in its test set) and of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261). Unlike in
their published images, pixels are not rounded to bytes; a blur is renormalised at the border, and has both directions.
The others are our own.
"""

import functools
import math
from collections import namedtuple

import torch

import data

LEVELS = torch.arange(256, dtype=torch.double)  # all values of a pixel


# What corrupts: functions of pixels (B, C, H, W), whole numbers from 0 to 255, of an amount and of random numbers, and
# of what else `make` has.

def add(pixels, amount, draws, *_):
    return pixels + 255 * amount * draws


def add_and_clip(pixels, amount, draws, *_):
    return add(pixels, amount, draws).clamp_(0, 255)


def clipped_mean(x, amount):
    """Of x + s z, which is 0 below z = a and 255 above z = b. P is the normal distribution function, p its density."""
    s = 255 * amount
    a, b = -x / s, (255 - x) / s
    P, p = torch.special.ndtr, lambda z: (-z**2 / 2).exp() / math.sqrt(2 * math.pi)
    return x * (P(b) - P(a)) + s * (p(a) - p(b)) + 255 * (1 - P(b))


def count_photons(pixels, white, draws, *_):
    """Poisson counts of mean pixels / 255 * white, white at most, as pixels: the quantiles at `draws`, from 0 to 1.

    A count is how many k < white have P(count <= k) <= draw: found by bisection in the row of a pixel's value, in whole
    numbers so that every device counts the same. (torch.searchsorted takes four times as long.)
    """
    table = photon_table(white, pixels.device)
    step, draws = table.shape[1] // 2, (draws * 2**24).int().flatten()  # torch.rand draws multiples of 2^-24
    before, counts = pixels.int().flatten() * table.shape[1] - 1, torch.zeros_like(draws)
    while step:
        counts.add_(table.view(-1).index_select(0, before + counts + step) <= draws, alpha=step)
        step //= 2
    return (counts * (255 / white)).view_as(pixels)


@functools.cache
def photon_table(white, device):
    """P(count <= k) of a pixel of each value, times 2^24, for k < white and up to a power of 2, where it is never
    reached: (256, 2^n)."""
    table = torch.full((256, 2**white.bit_length()), 2**25, dtype=torch.int)
    table[:, :white] = (poisson_cdf(white) * 2**24).round()
    return table.to(device)


def poisson_cdf(white):
    """P(count <= k) of a pixel of each value, for k < white: (256, white) in float64."""
    return torch.special.gammaincc(torch.arange(1, white + 1, dtype=torch.double), LEVELS[:, None] / 255 * white)


def photon_mean(x, white):
    """The mean of min(count, white) is the sum of P(count > k) over k < white; x are LEVELS."""
    return 255 / white * (1 - poisson_cdf(white)).sum(1)


def make_black_or_white(pixels, amount, draws, *_):
    return torch.where(draws < amount / 2, 0.0, torch.where(draws >= 1 - amount / 2, 255.0, pixels))


def blur(pixels, deviation, *_):
    """A product with a matrix from either side, whose rows are Gaussians."""
    place = torch.arange(pixels.shape[-1], device=pixels.device)
    weights = (-0.5 * ((place - place[:, None]) / deviation) ** 2).softmax(1)
    return weights @ pixels @ weights.T


def reduce_contrast(pixels, amount, *_):
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + amount * (pixels - mean)


def occlude(pixels, side, draws, *_):
    top, left = data.pick(draws, pixels.shape[-1] - side + 1).chunk(2, 1)
    return data.paste(pixels, pixels.new_full((*top.shape, pixels.shape[1], side, side), -255.0), top, left)


def distract(pixels, side, draws, first, split, *_):
    index = torch.arange(first, first + len(pixels), device=pixels.device)
    return data.add_fragments(pixels, index, draws, split, side)


def add_to_patches(pixels, amount, draws, *_):
    side = pixels.shape[-1] // draws.shape[-1]
    return add(pixels, amount, draws.repeat_interleave(side, 2).repeat_interleave(side, 3))


# How many random numbers they take: shapes.

def none(count, *_):
    return count, 0


def one_a_pixel(count, channels, side, patch_size):
    return count, channels, side, side


def one_an_image(count, *_):
    return count, 1, 1, 1


def one_a_patch(count, channels, side, patch_size):
    return count, 1, side // patch_size, side // patch_size


def some_a_square(some):  # of which there are 4 for each 28x28 pixels
    return lambda count, channels, side, patch_size: (count, some * round(4 * side**2 / 28**2))


# A corruption: its amounts at severities 1 to 5 for grey images and for colour images; its function; its random
# numbers, torch.rand or torch.randn of a shape. Of noise that is clipped at black and white, `mean` is the mean of what
# it makes of pixels of value x, a function of x (256,) and the amount; `noise` is the noise that it is, or a part of.
Corruption = namedtuple("Corruption", "grey colour apply draw shape mean noise",
                        defaults=(torch.rand, none, None, None))
CORRUPTIONS = {
    # The amount is the deviation, white being 1;
    "gaussian_noise": Corruption([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.1],
                                 add_and_clip, torch.randn, one_a_pixel, clipped_mean),
    # the photons that a white pixel has on average;
    "shot_noise": Corruption([60, 25, 12, 5, 3], [500, 250, 100, 75, 50],
                             count_photons, torch.rand, one_a_pixel, photon_mean),
    # the share of pixels turned black or white;
    "impulse_noise": Corruption([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07],
                                make_black_or_white, torch.rand, one_a_pixel,
                                lambda x, amount: (1 - amount) * x + amount * 255 / 2),
    # the deviation in pixels;
    "gaussian_blur": Corruption([1, 2, 3, 4, 6], [0.4, 0.6, 0.7, 0.8, 1], blur),
    # what is added to the value of HSV, white being 1;
    "brightness": Corruption([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3],
                             lambda pixels, amount, *_: data.brighten(pixels, amount)),
    # what is left of the contrast, around the mean of each image and channel;
    "contrast": Corruption([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15], reduce_contrast),
    # the pixels a side of black squares, and of fragments of other images of the split;
    "occlusion": Corruption(*2 * [[2, 4, 6, 8, 10]], occlude, torch.rand, some_a_square(2)),
    "distractors": Corruption(*2 * [[2, 4, 6, 8, 10]], distract, torch.rand, some_a_square(5)),
    # the deviation of what is added to all pixels of an image, and of a patch, each patch its own.
    "image_offset": Corruption(*2 * [[0.05, 0.1, 0.15, 0.2, 0.25]], add, torch.randn, one_an_image),
    "patch_offset": Corruption(*2 * [[0.05, 0.1, 0.15, 0.2, 0.25]], add_to_patches, torch.randn, one_a_patch),
}


# Noise that is clipped at black and white changes the mean of a pixel, too. Its shift alone is each pixel replaced by
# the mean of what the noise makes of it; its fluctuation alone is the noise less that. So, to rounding,
# noise - pixels = (shift - pixels) + (fluctuation - pixels). Clipping at black also takes two thirds of the variance:
# of s^2 it leaves s^2 (1/2 - 1 / (2 pi)). All parts have the random numbers of the noise.

def shift(mean, pixels, amount, *_):
    table = mean_table(mean, amount, pixels.device)
    return table.index_select(0, pixels.flatten().int()).view_as(pixels)  # a fifth of the time of indexing


@functools.cache
def mean_table(mean, amount, device):
    return mean(LEVELS, amount).float().to(device)


def fluctuate(noise, pixels, *others):
    return (make(noise, pixels, *others) - make(f"{noise}_shift", pixels, *others)).add_(pixels)


NOISES = [name for name, row in CORRUPTIONS.items() if row.mean]
for noise in NOISES:
    row = CORRUPTIONS[noise] = CORRUPTIONS[noise]._replace(noise=noise)
    CORRUPTIONS[f"{noise}_shift"] = row._replace(apply=functools.partial(shift, row.mean))
    CORRUPTIONS[f"{noise}_fluctuation"] = row._replace(apply=functools.partial(fluctuate, noise))
CORRUPTIONS["gaussian_noise_unclipped"] = CORRUPTIONS["gaussian_noise"]._replace(apply=add)


def is_noise(name):
    """Whether it is a noise, clipped at black and white, or a part of one."""
    return CORRUPTIONS[name].noise is not None


def amount_of(name, severity, channels):
    return CORRUPTIONS[name][channels > 1][severity - 1]


def corruptions_of(dataset):
    """Those that its images can have: less than ten pixels a side have no room for squares."""
    side = data.DATASETS[dataset]["image_size"]
    return [name for name, row in CORRUPTIONS.items() if row.shape is none or all(row.shape(1, 1, side, 1))]


def corrupt(pixels, name, severity, first, split, settings):
    """Corrupt pixels (B, C, H, W), whole numbers from 0 to 255, as CORRUPTIONS says; severity 0 is none.

    first: the number of the first of these images in the split; the others follow it. The random numbers depend on it
    and on the corruption alone, so the result is the same at every call, a higher severity is more of the same, and a
    noise, its shift and its fluctuation belong together.
    """
    if severity == 0:
        return pixels
    draws = draw_numbers(stream_of(name), pixels, first, settings)
    return make(name, pixels, amount_of(name, severity, pixels.shape[1]), draws, first, split, {})


def corrupted_batches(split, settings, names=None, severities=range(1, 6)):
    """A split in its own order under corruptions, all unless some are named: yields (name, severity), normalised images
    (B, C, H, W) and labels (B,). What is random is drawn once for all severities, and for a noise and its parts."""
    names = names or corruptions_of(settings["dataset"])
    for first, pixels in data.evaluation_pixels(split, settings):
        draws = {stream: draw_numbers(stream, pixels, first, settings) for stream in set(map(stream_of, names))}
        batch = pixels, split.labels[first:first + len(pixels)], *(draws[stream_of(name)] for name in names)
        for part, labels, *numbers in data.cache_sized(*batch):
            for severity in severities:
                made = {}
                for name, own_numbers in zip(names, numbers):
                    amount = amount_of(name, severity, part.shape[1])
                    images = make(name, part, amount, own_numbers, first, split, made)
                    yield (name, severity), data.normalize(images, settings["dataset"]), labels
            first += len(part)


def stream_of(name):
    """The corruption that it has its random numbers in common with."""
    return CORRUPTIONS[name].noise or name


def draw_numbers(stream, pixels, first, settings):
    """The random numbers of a corruption of pixels (B, C, H, W), on their device: (B, ...)."""
    row = CORRUPTIONS[stream]
    shape = row.shape(*pixels.shape[:3], settings["patch_size"])
    return row.draw(shape, generator=data.generator_of(stream, first)).to(pixels.device)


def make(name, pixels, amount, draws, first, split, made):
    """Pixels (B, C, H, W) under a corruption. made: {name: pixels}, what was made of these pixels at this severity, to
    which it is added."""
    if name not in made:
        made[name] = CORRUPTIONS[name].apply(pixels, amount, draws, first, split, made)
    return made[name]
