"""Looks at gradients made by hand, for tests of what methods remember of them."""

import torch
from torch import Tensor

import gradrank as gr
from gradrank.signals.sensitivity import Observation

# Grouped-query shapes: a query and a key of half its width.
TARGETS = [gr.Target("q", 6, 6), gr.Target("k", 6, 3)]
RANKS = {"q": 4, "k": 3}
Factors = dict[str, Tensor]


def drawn(name: str, rank: int, generator: torch.Generator) -> Factors:
    target = next(t for t in TARGETS if t.name == name)
    shapes = {"A": (rank, target.d_in), "B": (target.d_out, rank), "lam": (rank,)}
    return {f: torch.randn(shape, generator=generator) for f, shape in shapes.items()}


def observations(count: int, seed: int = 0, passes: int = 1) -> list[Observation]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Observation(
            {n: drawn(n, r, generator) for n, r in RANKS.items()},
            {n: drawn(n, r, generator) for n, r in RANKS.items()},
            passes,
            loss_change=-0.5 - i,
        )
        for i in range(count)
    ]


def element_scores(
    looks: list[Observation], name: str, aggregate: int = 1, signed: bool = False
) -> list[Factors]:
    """``|mean over M looks of |w| g|``, per block of M looks."""
    found = []
    for start in range(0, len(looks) - aggregate + 1, aggregate):
        block = looks[start : start + aggregate]
        mean = {
            f: sum(look.weights[name][f].abs() * look.gradients[name][f] for look in block)
            / aggregate
            for f in ("A", "B", "lam")
        }
        found.append(mean if signed else {f: t.abs() for f, t in mean.items()})
    return found


def lams(seed: int = 9) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rank, generator=generator) for name, rank in RANKS.items()}


def without(looks: list[Observation], keep: dict[str, tuple[int, ...]]) -> list[Observation]:
    """The same looks at the kept components alone, as after pruning."""

    def cut(factors: Factors, kept: tuple[int, ...]) -> Factors:
        return {f: t[:, list(kept)] if f == "B" else t[list(kept)] for f, t in factors.items()}

    return [
        Observation(
            {n: cut(look.gradients[n], kept) for n, kept in keep.items() if kept},
            {n: cut(look.weights[n], kept) for n, kept in keep.items() if kept},
            look.passes,
            look.loss_change,
        )
        for look in looks
    ]
