"""Dense float64 twins of what the baselines' papers define, written out one number at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def dora_weight(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """DoRA's weight: each output row of W + s B A has the norm that m says."""
    rows = []
    for i, row in enumerate(W.double() + scale * B.double() @ A.double()):
        rows.append(m[i].double() * row / row.square().sum().sqrt())
    return torch.stack(rows)


def column_dora_weight(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """A broken twin: the norms of the columns."""
    whole = W.double() + scale * B.double() @ A.double()
    return m.double()[:, None] * whole / whole.square().sum(0).sqrt()


def principal_part(W: Tensor, rank: int) -> Tensor:
    """The sum of the first singular components: what PiSSA trains."""
    left, values, right = torch.linalg.svd(W.double(), full_matrices=False)
    total = torch.zeros_like(W, dtype=torch.float64)
    for i in range(rank):
        total += values[i] * torch.outer(left[:, i], right[i])
    return total


def minor_part(W: Tensor, rank: int) -> Tensor:
    """A broken twin: the last components (MiLoRA's)."""
    return W.double() - principal_part(W, min(W.shape) - rank)


def gram_schmidt(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q_r and R_r of W = Q R, column after column, up to the signs of the pairs."""
    columns: list[Tensor] = []
    for column in W.double().T:
        rest = column.clone()
        for done in columns:
            rest -= (done @ column) * done
        if len(columns) < min(W.shape):
            columns.append(rest / rest.norm())
    Q = torch.stack(columns, 1)
    return Q[:, :rank], (Q.T @ W.double())[:rank]


def principal_inputs(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal directions of inputs about their mean, and the share of variance of each."""
    centred = rows.double() - rows.double().mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    return right[:count], (values.square() / values.square().sum())[:count]


def uncentred_inputs(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A broken twin: directions about the origin."""
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return right[:count], (values.square() / values.square().sum())[:count]


def best_directions(
    costs: Mapping[str, int], shares: Mapping[str, Sequence[float]], budget: int
) -> dict[str, int]:
    """Keep the best direction that fits, again and again; a target ends where one does not fit."""
    kept, ended, left = dict.fromkeys(costs, 0), set(), budget
    while True:
        heads = [
            (shares[name][kept[name]], name)
            for name in costs
            if name not in ended and kept[name] < len(shares[name])
        ]
        if not heads:
            return kept
        best = max(share for share, _ in heads)
        name = next(name for share, name in heads if share == best)
        if costs[name] <= left:
            kept[name] += 1
            left -= costs[name]
        else:
            ended.add(name)


def gradient_start(gradient: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """LoRA-GA's first A and B (ArB2r, stable), from the exact SVD; signs are free."""
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    scale = gradient.shape[0] ** 0.25 / gamma**0.5
    A = torch.stack([scale * right[i] for i in range(rank)])
    B = torch.stack([scale * left[:, rank + i] for i in range(rank)], 1)
    return A, B


def gradient_start_by_inputs(gradient: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """A broken twin: scaled by d_in, as PEFT 0.21 does on Conv1D."""
    A, B = gradient_start(gradient, rank, gamma)
    change = (gradient.shape[1] / gradient.shape[0]) ** 0.25
    return change * A, change * B
