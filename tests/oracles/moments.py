"""Slow twins of what becomes of moments: loops in float64, and runs in the new basis."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def carried_by_loops(
    tensor: Tensor,
    matrix: Tensor,
    *,
    axis: int = 0,
    fresh: int = 0,
    blank: int = 0,
    squared: bool = False,
) -> Tensor:
    """One component after the other; ``squared`` for mean squares, whose fresh ones are a mean."""
    old = [component.double() for component in tensor.unbind(axis)]
    new = []
    for row in matrix.double():
        total = torch.zeros_like(old[0])
        for weight, component in zip(row, old, strict=True):
            total = total + (weight**2 if squared else weight) * component
        new.append(total)
    seed = sum(new) / len(new) if squared else torch.zeros_like(old[0])
    new += [seed] * fresh + [torch.zeros_like(old[0])] * blank
    return torch.stack(new, dim=axis)


def selection_matrix(indices: Sequence[int], rank: int) -> Tensor:
    """``[k, r]`` with a one where a component goes."""
    matrix = torch.zeros(len(indices), rank, dtype=torch.float64)
    for row, index in enumerate(indices):
        matrix[row, index] = 1
    return matrix


def momentum_of(gradients: Sequence[Tensor], decay: float) -> Tensor:
    """The buffer of SGD after these gradients: the first, then ``decay * buffer + gradient``."""
    buffer = gradients[0].double()
    for gradient in gradients[1:]:
        buffer = decay * buffer + gradient.double()
    return buffer


def second_moment_of(gradients: Sequence[Tensor], decay: float) -> Tensor:
    """The second moment of Adam after these gradients."""
    moment = torch.zeros_like(gradients[0], dtype=torch.float64)
    for gradient in gradients:
        moment = decay * moment + (1 - decay) * gradient.double() ** 2
    return moment


def factored_estimate(rows: Tensor, columns: Tensor) -> Tensor:
    """``V_ij = R_i C_j / mean(R)``: the second moments that Adafactor's two vectors stand for."""
    rows, columns = rows.double().flatten(), columns.double().flatten()
    return torch.outer(rows, columns) / rows.mean()


def adam_step_length(
    gradient: float,
    second: float,
    step: int,
    *,
    first: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> float:
    """What Adam adds to a weight, in learning rates, with moments from before the step."""
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    return -(first / (1 - betas[0] ** step)) / math.sqrt(second / (1 - betas[1] ** step))


def codes_by_loops(tensor: Tensor, codes: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest code of each element, tried one after the other, and each block's scale."""
    flat = tensor.flatten()
    values, scales = torch.zeros(flat.shape, dtype=torch.uint8), []
    for start in range(0, len(flat), block):
        chunk = flat[start : start + block]
        scales.append(float(chunk.abs().max()))
        for i, value in enumerate(chunk):
            scaled = float(value) / scales[-1] if scales[-1] else 0.0
            values[start + i] = min(range(len(codes)), key=lambda c: abs(float(codes[c]) - scaled))
    return values.view(tensor.shape), torch.tensor(scales)
