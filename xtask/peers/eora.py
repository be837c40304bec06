"""EoRA (arXiv 2410.21271) from its mathematics: with H = X X^T = Q L Q^T of the inputs of a compressed linear, the residual is
projected to (W - W_c) Q sqrt(L), cut to rank r by a singular value decomposition and projected back; no other correction of
that rank leaves less error of the outputs. The compressed model is W rounded to the nearest, as a base that takes no
calibration."""

import torch

from common import Walk, arguments, clock, linears, load, report, watch, windows
from gptq import Hessian, grid, rounded


def correction(residual, hessian, rank):
    """The best matrix of this rank in the place of the residual."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = values.clamp(min=1e-12 * values.max()).sqrt()
    projected = residual.double() @ (vectors * root)
    left, size, right = torch.linalg.svd(projected, full_matrices=False)
    b = left[:, :rank] * size[:rank]
    a = right[:rank] @ (vectors / root).T
    return (b @ a).float()


def main():
    flags = arguments(bits=3, rank=32)
    model, tokens = load(flags.model), windows(flags.model, flags.calib, flags.window)
    seconds = clock()
    walk = Walk(model, tokens)
    with torch.no_grad():
        for block in model.model.layers:
            # Inputs within the block are those of its original weights, as in the published program.
            seen = [Hessian() for _ in linears(block)]
            handles = [watch(linear, hessian.see) for linear, hessian in zip(linears(block), seen)]
            walk.through(block, keep=False)
            for handle in handles:
                handle.remove()
            for linear, hessian in zip(linears(block), seen):
                dense = linear.weight.clone()
                scale, zero = (value[:, None] for value in grid(dense, flags.bits))
                linear.weight.copy_(rounded(dense, scale, zero, flags.bits))
                if flags.rank > 0:
                    linear.weight += correction(dense - linear.weight, hessian.sum, flags.rank)
            walk.through(block)
        report(model, flags, seconds(), bits=flags.bits, rank=flags.rank)


if __name__ == "__main__":
    main()
