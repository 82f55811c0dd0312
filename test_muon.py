"""Claims about Muon, against its author's formula in float64 and against torch's."""

import copy
import math

import torch

from muon import Muon


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


def test_muon_is_torchs():
    """A step of Muon is that of torch.optim.Muon within its half precision."""
    torch.manual_seed(0)
    weights, gradient = torch.randn(64, 32), torch.randn(64, 32)
    leaf = weights.flatten()[None].clone()
    leaf.grad = gradient.flatten()[None].clone()
    Muon(leaf, [(64, 32)], lr=torch.tensor(0.1), weight_decay=0.1).step()
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradient
    torch.optim.Muon([parameter], lr=0.1, weight_decay=0.1).step()
    moved, expected = leaf.view(64, 32) - 0.99 * weights, parameter.detach() - 0.99 * weights
    assert (moved - expected).norm() < 0.03 * expected.norm()


def test_muon_with_adamw_is_one_optimizer():
    """Muon that holds an AdamW steps both, each by its own rule, and its state can be saved and loaded as a whole."""
    torch.manual_seed(0)
    matrix, rest, gradients = torch.randn(2, 12), torch.randn(2, 5), [torch.randn(2, 17) for _ in range(3)]

    def make():
        leaves = [matrix.clone(), rest.clone()]
        adamw = torch.optim.AdamW([leaves[1]], lr=0.01, weight_decay=0.2)
        return leaves, Muon(leaves[0], [(3, 4)], 0.02, 0.1, adamw=adamw)

    def step(leaves, optimizer, gradient):
        leaves[0].grad, leaves[1].grad = gradient.split([12, 5], dim=1)
        optimizer.step()

    leaves, optimizer = make()
    assert all(group["params"][0] is leaf for group, leaf in zip(optimizer.param_groups, leaves, strict=True))
    for gradient in gradients[:2]:
        step(leaves, optimizer, gradient)
    others, resumed = make()
    for leaf, other in zip(leaves, others):
        other.copy_(leaf)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(leaves, optimizer, gradients[2])
    step(others, resumed, gradients[2])
    assert all(torch.equal(leaf, other) for leaf, other in zip(leaves, others))
    alone = rest.clone()
    adamw = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.2)
    for gradient in gradients:
        alone.grad = gradient[:, 12:]
        adamw.step()
    torch.testing.assert_close(leaves[1], alone)
    expected = muon_by_hand(matrix[1].view(3, 4).double(),
                            [gradient[1, :12].view(3, 4).double() for gradient in gradients], 0.02, 0.1)
    torch.testing.assert_close(leaves[0][1].view(3, 4).double(), expected, rtol=0, atol=1e-4)
