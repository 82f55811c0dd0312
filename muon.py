"""Muon (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon), for the matrices of many models at once.

torch.optim.Muon does the same to single matrices, one by one and in bfloat16, and takes several times as long.
"""

import math

import torch
from torch.nn import functional as F


def orthogonalize(matrices, steps=5):
    """Nearly U V' of every matrix U S V' in a list of stacks (B, m, n), by the Newton-Schulz iteration of Muon.

    A step makes (a + b A + c A^2) X of a matrix X, where A = X X'; of one taller than wide X (a + b A + c A^2), where
    A = X' X. These factors are polynomials of the first A, so A alone need be iterated, which is small, and those of
    equal size as one batch. (bmm does what @ does, and starts in half the time.)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    result = list(matrices)
    for side in sorted({min(matrix.shape[1:]) for matrix in matrices}):
        members = [i for i, matrix in enumerate(matrices) if min(matrix.shape[1:]) == side]
        gram = torch.cat([x.bmm(x.mT) if x.shape[1] == side else x.mT.bmm(x) for x in (matrices[i] for i in members)])
        squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-14).view(-1, 1, 1)
        gram, product = gram / squared_norm, squared_norm.rsqrt()
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor.bmm(product) if product.shape[1] > 1 else factor * product
            if step < steps - 1:
                gram = factor.bmm(gram).bmm(factor)
        for i, factor in zip(members, product.split([len(matrices[i]) for i in members])):
            result[i] = factor.bmm(matrices[i]) if matrices[i].shape[1] == side else matrices[i].bmm(factor)
    return result


def orthogonalize_in_batches(matrices):
    """The same within rounding errors, with fewer and larger products, for a GPU, where to start one takes longer than
    to compute it: zeros pad each matrix until all have the same smaller side, and those of one shape are a batch. On a
    CPU it saves a hundredth of a step, and changes the last digits of every record."""
    side, groups, result = max(min(matrix.shape[1:]) for matrix in matrices), {}, list(matrices)
    for i, matrix in enumerate(matrices):
        rows, columns = (max(0, side - size) for size in matrix.shape[1:])
        padded = F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
        groups.setdefault(padded.shape, {})[i] = padded
    batches = orthogonalize([torch.cat(list(group.values())) for group in groups.values()])
    for group, batch in zip(groups.values(), batches):
        for i, matrix in zip(group, batch.chunk(len(group))):
            result[i] = matrix[:, :matrices[i].shape[1], :matrices[i].shape[2]]
    return result


def update_matrices(weights, gradient, average, lr, weight_decay, momentum, shapes):
    """A step of Muon, in place: weights, their gradient and its moving average (S, P); each row has matrices of these
    shapes (m, n), one after the other."""
    average.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(average, momentum)
    pieces = update.split([rows * columns for rows, columns in shapes], dim=1)
    pieces = [piece.view(-1, *shape) for piece, shape in zip(pieces, shapes)]
    updates = (orthogonalize_in_batches if weights.is_cuda else orthogonalize)(pieces)
    update = torch.cat([((m / n) ** 0.5 * matrix if m > n else matrix).flatten(1)
                        for matrix, (m, n) in zip(updates, shapes)], dim=1)
    weights.mul_(1 - lr * weight_decay).sub_(lr * update)


class Muon(torch.optim.Optimizer):
    """Muon for one parameter (S, P), and an AdamW for others.

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * gradient
        weight = (1 - lr * weight_decay) * weight - lr * sqrt(max(1, m / n)) * orthogonalize(
            momentum * momentum_buffer + (1 - momentum) * gradient)          for each matrix (m, n), in float32

    Args:
        matrices: the parameter; each row has the matrices of one seed, one after the other.
        shapes: the shapes of the matrices of a row, in order. A convolution's (m, C, p, p) is a matrix (m, C p p).
        lr: a number, or a tensor on the parameter's device.
        weight_decay: decoupled; momentum: of the moving average of the gradient (Nesterov's).
        adamw: a torch.optim.AdamW that holds the other parameters; its groups and its state become this optimizer's.
    """

    def __init__(self, matrices, shapes, lr, weight_decay, momentum=0.95, adamw=None):
        super().__init__([matrices], dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.shapes = [(rows, math.prod(columns)) for rows, *columns in shapes]
        self.update, self.adamw = update_matrices, adamw
        if adamw:
            self.param_groups += adamw.param_groups
            adamw.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if self.adamw:
            self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def step(self):
        (matrices,) = self.param_groups[0]["params"]
        if "momentum_buffer" not in self.state[matrices]:
            self.state[matrices]["momentum_buffer"] = torch.zeros_like(matrices)
        self.step_matrices(self.update, matrices.detach(), matrices.grad, self.state[matrices]["momentum_buffer"])
        if self.adamw:
            self.adamw.step()

    @torch.no_grad()
    def step_matrices(self, update, *tensors):
        group = self.param_groups[0]
        update(*tensors, group["lr"], group["weight_decay"], group["momentum"], self.shapes)

    def compile(self):
        """Have torch.compile make the update of the matrices faster, tried on zeros; raises what it raises."""
        update = torch.compile(update_matrices, dynamic=False)
        self.step_matrices(update, *(torch.zeros_like(self.param_groups[0]["params"][0]) for _ in range(3)))
        self.update = update
