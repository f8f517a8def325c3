"""Slow twin of PiLoRA: Algorithm 1 as the paper prints it, in float64, loops and all.

:class:`TwoStages` trains a small network through both stages by hand: its own forward pass with
explicit masks, its own clipping, its own AdamW. ``broken`` names a mistake to make; the tests show
that each one is told apart.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rows = list[float]
Batch = tuple[Tensor, Tensor]

MISTAKES = ("median", "at least the mean", "without G^B A", "clipped", "one micro-batch")

# --- stage 1: importance, hits, mask -------------------------------------------------------------


def implied_gradient(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> list[Rows]:
    """Equation 7, ``B G^A + G^B A``, entry by entry."""
    (r, n), m = A.shape, B.shape[0]
    a, b, ga, gb = (t.double().tolist() for t in (A, B, grad_A, grad_B))
    return [
        [math.fsum(b[i][k] * ga[k][j] + gb[i][k] * a[k][j] for k in range(r)) for j in range(n)]
        for i in range(m)
    ]


def row_sums(gradient: Sequence[Rows]) -> Rows:
    """Algorithm 1, line 9 (equation 8)."""
    return [math.fsum(abs(entry) for entry in row) for row in gradient]


def is_hit(importance: Rows) -> list[bool]:
    """Algorithm 1, line 11: ``S_i > mean(S)``."""
    mean = math.fsum(importance) / len(importance)
    return [entry > mean for entry in importance]


def majority(hits: Sequence[int], looks: int) -> list[int]:
    """Line 14: the mask M. A neuron is dominant if more than half of the looks hit it."""
    return [1 if count > looks / 2 else 0 for count in hits]


# --- stage 2: two groups of rows -----------------------------------------------------------------


def expanded(mask: Sequence[int], B: Tensor) -> Tensor:
    """Equation 9, ``M ⊛ B``: row i is ``M_i`` times row ``k(i) = sum_{j <= i} M_j`` of B.

    The paper counts rows of B from 1.
    """
    rows = []
    for i, chosen in enumerate(mask):
        k = sum(mask[: i + 1])
        rows.append(B[k - 1] if chosen else torch.zeros(B.shape[1], dtype=B.dtype))
    return torch.stack(rows)


@dataclass
class Groups:
    """Both adapters of one target: compact B, one row for each row of their group."""

    mask: list[int]
    A_d: Tensor
    B_d: Tensor
    A_s: Tensor
    B_s: Tensor

    def factors(self) -> list[Tensor]:
        return [self.A_d, self.B_d, self.A_s, self.B_s]

    def update(self) -> Tensor:
        """Equation 11 without ``W_0``: ``(M ⊛ B_d) A_d + (1 - M ⊛ B_s) A_s``."""
        rest = [1 - chosen for chosen in self.mask]
        return expanded(self.mask, self.B_d) @ self.A_d + expanded(rest, self.B_s) @ self.A_s


@dataclass
class Layer:
    """A frozen linear layer and, in stage 1, its standard LoRA."""

    W: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    scaling: float
    groups: Groups | None = None

    def factors(self) -> list[Tensor]:
        return [self.A, self.B] if self.groups is None else self.groups.factors()

    def __call__(self, x: Tensor) -> Tensor:
        if self.groups is None:
            return x @ self.W.T + self.bias + self.scaling * (x @ self.A.T) @ self.B.T
        groups = self.groups
        rest = [1 - chosen for chosen in groups.mask]
        dominant = (x @ groups.A_d.T) @ expanded(groups.mask, groups.B_d).T
        supplementary = (x @ groups.A_s.T) @ expanded(rest, groups.B_s).T
        return x @ self.W.T + self.bias + self.scaling * (dominant + supplementary)


# --- both stages ---------------------------------------------------------------------------------


@dataclass
class AdamW:
    """AdamW on plain tensors, one after the other."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    steps: int = 0

    def step(self, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.steps += 1
        for place, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            m, v = self.memory.get(place, (torch.zeros_like(grad), torch.zeros_like(grad)))
            m = self.beta1 * m + (1 - self.beta1) * grad
            v = self.beta2 * v + (1 - self.beta2) * grad * grad
            self.memory[place] = m, v
            m_hat = m / (1 - self.beta1**self.steps)
            v_hat = v / (1 - self.beta2**self.steps)
            with torch.no_grad():
                parameter.mul_(1 - self.lr * self.weight_decay)
                parameter.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))


@dataclass
class TwoStages:
    """A whole run on a chain of linear layers with tanh between them and a squared loss.

    A step is a list of micro-batches of equal size, whose gradients are averaged. ``max_norm``
    clips the norm of all gradients before an update, and a look does not see it.
    """

    layers: dict[str, Layer]
    interval: int
    lr: float
    weight_decay: float = 0.01
    max_norm: float | None = None
    broken: str | None = None
    hits: dict[str, list[int]] = field(init=False)
    importance: list[dict[str, Rows]] = field(init=False, default_factory=list)
    losses: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert self.broken is None or self.broken in MISTAKES
        self.hits = {name: [0] * len(layer.W) for name, layer in self.layers.items()}

    @property
    def looks(self) -> int:
        return len(self.importance)

    def masks(self) -> dict[str, list[int]]:
        return {name: majority(hits, self.looks) for name, hits in self.hits.items()}

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        *first, last = self.layers.values()
        for layer in first:
            x = torch.tanh(layer(x))
        return ((last(x) - y) ** 2).mean()

    def first_stage(self, steps: Sequence[Sequence[Batch]]) -> None:
        """Lines 3 to 13."""
        optimizer = AdamW(self.lr, weight_decay=self.weight_decay)
        for t, micro_batches in enumerate(steps, start=1):
            grads = self._gradients(micro_batches)
            if t % self.interval == 0:
                self._look(grads, micro_batches)
            self._update(optimizer, grads)

    def second_stage(self, steps: Sequence[Sequence[Batch]], start: Mapping[str, Groups]) -> None:
        """Lines 14 to 24, from given factors; a new optimizer remembers nothing."""
        for name, layer in self.layers.items():
            assert start[name].mask == self.masks()[name]
            layer.groups = start[name]
        optimizer = AdamW(self.lr, weight_decay=self.weight_decay)
        for micro_batches in steps:
            self._update(optimizer, self._gradients(micro_batches))

    def _factors(self) -> list[Tensor]:
        return [factor for layer in self.layers.values() for factor in layer.factors()]

    def _gradients(self, micro_batches: Sequence[Batch], record: bool = True) -> list[Tensor]:
        factors = [factor.requires_grad_(True) for factor in self._factors()]
        total = [torch.zeros_like(factor) for factor in factors]
        mean = 0.0
        for batch in micro_batches:
            loss = self.loss(batch)
            mean += loss.item() / len(micro_batches)
            # A group without rows takes no part.
            found = torch.autograd.grad(loss, factors, materialize_grads=True)
            total = [t + f / len(micro_batches) for t, f in zip(total, found, strict=True)]
        if record:
            self.losses.append(mean)
        return total

    def _look(self, grads: Sequence[Tensor], micro_batches: Sequence[Batch]) -> None:
        """Lines 8 to 12."""
        if self.broken == "one micro-batch":
            grads = self._gradients(micro_batches[-1:], record=False)
        if self.broken == "clipped":
            limit = statistics.median(float(g.abs().median()) for g in grads)
            grads = [g.clamp(-limit, limit) for g in grads]
        found: dict[str, Rows] = {}
        pairs = zip(grads[::2], grads[1::2], strict=True)
        for (name, layer), (grad_A, grad_B) in zip(self.layers.items(), pairs, strict=True):
            part = 0.0 if self.broken == "without G^B A" else 1.0
            gradient = implied_gradient(layer.A, layer.B, grad_A, part * grad_B)
            found[name] = row_sums(gradient)
            for i, hit in enumerate(self._hit(found[name])):
                if hit:
                    self.hits[name][i] += 1
        self.importance.append(found)

    def _hit(self, importance: Rows) -> list[bool]:
        if self.broken == "median":
            return [entry > statistics.median(importance) for entry in importance]
        if self.broken == "at least the mean":
            return [entry >= math.fsum(importance) / len(importance) for entry in importance]
        return is_hit(importance)

    def _update(self, optimizer: AdamW, grads: Sequence[Tensor]) -> None:
        if self.max_norm is not None:
            norm = math.sqrt(math.fsum(float((g * g).sum()) for g in grads))
            # The small number is torch's.
            factor = min(1.0, self.max_norm / (norm + 1e-6))
            grads = [g * factor for g in grads]
        optimizer.step(self._factors(), grads)
