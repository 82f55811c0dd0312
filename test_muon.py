"""Claims about Muon, against its author's formula in float64."""

import math

import torch

from muon import Muon, orthogonalize, orthogonalize_in_batches


def muon_by_hand(weights, gradients, lr, weight_decay):
    """Muon as its author has it, on one matrix in float64: the singular values of the averaged gradient go through
    the polynomial five times, and its singular vectors stay."""
    average = torch.zeros_like(weights)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        u, s, v = torch.linalg.svd(0.05 * gradient + 0.95 * average, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = weights.shape
        weights = (1 - lr * weight_decay) * weights - lr * math.sqrt(max(1, rows / columns)) * (u * s) @ v
    return weights


def test_muon_by_hand():
    """Muon on the matrices of three seeds at once is Muon on each of them, and a gradient of zero moves nothing."""
    torch.manual_seed(0)
    shapes = [(96, 32), (32, 32), (32, 128), (16, 7), (7, 16), (1, 5), (8, 6)]
    sizes = [rows * columns for rows, columns in shapes]
    leaf = torch.randn(3, sum(sizes))
    gradients = [scale * torch.randn(3, sum(sizes)) for scale in (1.0, 1e-6, 10.0)]
    expected = [[muon_by_hand(weights.view(shape), [gradient[seed].split(sizes)[i].double().view(shape)
                                                    for gradient in gradients], 0.02, 0.1)
                 for i, (weights, shape) in enumerate(zip(leaf[seed].double().split(sizes), shapes))]
                for seed in range(3)]
    optimizer = Muon(leaf, [*shapes[:-1], (8, 1, 2, 3)], lr=torch.tensor(0.02), weight_decay=0.1)  # a convolution
    for leaf.grad in gradients:
        optimizer.step()
    for seed in range(3):
        for weights, shape, matrix in zip(leaf[seed].split(sizes), shapes, expected[seed]):
            torch.testing.assert_close(weights.view(shape).double(), matrix, rtol=0, atol=1e-4)
    before, leaf.grad = leaf.clone(), torch.zeros_like(leaf)
    Muon(leaf, shapes, lr=torch.tensor(0.02), weight_decay=0.0).step()
    assert torch.equal(leaf, before)


def test_muon_in_batches():
    """As CUDA has it, padded and one batch a shape, a step has the same numbers, and half as many products."""
    torch.manual_seed(0)
    shapes = [(32, 49), *[(96, 32), (32, 32), (128, 32), (32, 128)] * 2, (128, 32), (10, 128), (1, 5)]
    matrices, results, products = [torch.randn(3, *shape) for shape in shapes], [], []
    for function in (orthogonalize, orthogonalize_in_batches):
        with torch.profiler.profile() as profile:
            results.append(function(matrices))
        products.append(sum(event.count for event in profile.key_averages() if event.key.endswith("bmm")))
    for plain, batched in zip(*results, strict=True):
        torch.testing.assert_close(batched, plain, rtol=0, atol=1e-6)
    assert 2 * products[1] < products[0]
