"""A fault of the published comparison: every epoch has the order of the first. Augmentation stays as it was."""

import data

draw_epoch = data.draw_epoch


def draw_ordered(seeds, epoch, split, settings):
    order, _ = draw_epoch(seeds, 1, split, settings)
    _, draws = draw_epoch(seeds, epoch, split, settings)
    return order, draws


data.draw_epoch = draw_ordered
