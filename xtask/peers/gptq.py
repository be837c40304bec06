"""GPTQ (arXiv 2210.17323) written plainly: columns are rounded one after the other, and the columns to come take over each
error by the inverse Hessian of the calibration inputs. Asymmetric grids, one for each output; blocks see the outputs of the
quantised blocks before them."""

import torch

from common import Walk, arguments, clock, linears, load, report, watch, windows


class Hessian:
    """The sum of the outer products of inputs."""

    def __init__(self):
        self.sum = 0.0

    def see(self, x):
        self.sum = self.sum + x.T @ x


def grid(weight, bits):
    """Scales and zero points of the rows; the range of each contains zero."""
    low, high = weight.min(1).values.clamp(max=0), weight.max(1).values.clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / (2**bits - 1)
    # As packed files have them.
    scale = scale.half().float()
    return scale, (-low / scale).round()


def rounded(column, scale, zero, bits):
    return ((column / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def quantise(weight, hessian, bits, damping=0.01, width=128):
    """The quantised weight, `[outputs, inputs]`."""
    weight, hessian = weight.clone(), hessian.clone()
    scale, zero = grid(weight, bits)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        errors = torch.zeros(weight.shape[0], end - start)
        for i in range(start, end):
            result[:, i] = rounded(weight[:, i], scale, zero, bits)
            errors[:, i - start] = (weight[:, i] - result[:, i]) / upper[i, i]
            weight[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return result


def main():
    flags = arguments(bits=4)
    model, tokens = load(flags.model), windows(flags.model, flags.calib, flags.window)
    seconds = clock()
    walk = Walk(model, tokens)
    with torch.no_grad():
        for block in model.model.layers:
            seen = [Hessian() for _ in linears(block)]
            handles = [watch(linear, hessian.see) for linear, hessian in zip(linears(block), seen)]
            walk.through(block, keep=False)
            for handle in handles:
                handle.remove()
            for linear, hessian in zip(linears(block), seen):
                linear.weight.copy_(quantise(linear.weight, hessian.sum, flags.bits))
            walk.through(block)
        report(model, flags, seconds(), bits=flags.bits)


if __name__ == "__main__":
    main()
