"""Whole runs that train side by side, step by step in turn, beside one of them as a reference."""

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.frame import Row, fresh, ratio_row
from benchmarks.profiling import show_operations
from benchmarks.setting import (
    Step,
    held_bytes,
    load,
    lora,
    make_batches,
    optimizer_of,
    peak_over,
    resident,
    stepper,
)
from benchmarks.timing import ratio, take_turns

import gradrank as gr

MEMORY_STEPS = 3


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        step: One step of training.
        optimizer: Its optimizer, whose tensors are what training holds.
        facts: Returns plain data about the run (parameters in use, decisions).
        close: Ends the run.
    """

    step: Step
    optimizer: torch.optim.Optimizer
    facts: Callable[[], dict[str, Any]] = dict
    close: Callable[[], Any] = lambda: None


Build = Callable[[str], Variant]
"""Makes a variant by name, ready to train."""


def uniform(args: argparse.Namespace, rank: int) -> Variant:
    """Return plain LoRA.

    Args:
        args: The flags.
        rank: Rank of every target.
    """
    model = lora(args, rank)
    optimizer = optimizer_of(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Variant(stepper(model, optimizer), optimizer, lambda: {"parameters": count})


def train_in_turns(
    build: Build,
    names: Sequence[str],
    args: argparse.Namespace,
    kind: Callable[[int], object] = lambda _step: 0,
) -> dict[str, Row]:
    """Train all variants side by side.

    Args:
        build: Makes them.
        names: Their names; the first is what the others are compared with.
        args: The flags, with ``steps`` and ``repeats``.
        kind: What kind of step the s-th is, from 1; see :func:`benchmarks.timing.ratio`.

    Returns:
        Per variant the mean seconds of a step, the ratio of the sums over whole runs, the bytes
        held at most and in the end, and its facts.
    """
    _warm_up(args)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rows: dict[str, Row] = {}
    for _ in range(args.repeats):
        variants = {name: build(name) for name in names}
        batches = make_batches(args, load(args))
        held = dict.fromkeys(names, 0)

        def turn(name: str, variants: Any = variants, batches: Any = batches) -> Any:
            return lambda number: variants[name].step(batches[number % len(batches)])

        def look(name: str, variants: Any = variants, held: Any = held) -> Any:
            def note(_number: int) -> None:
                held[name] = max(held[name], held_bytes(variants[name].optimizer))

            return note

        turns = {name: turn(name) for name in names}
        taken = take_turns(turns, args.steps, before={name: look(name) for name in names})
        for name, variant in variants.items():
            seconds[name] += taken[name]
            ended = held_bytes(variant.optimizer)
            variant.close()
            rows[name] = {
                **variant.facts(),
                "held_bytes": max(held[name], ended),
                "held_bytes_in_the_end": ended,
            }
        del variants, turns
        gc.collect()
    kinds = [kind(step + 1) for step in range(args.steps)] * args.repeats
    return {name: _row(seconds, names[0], name, kinds) | rows[name] for name in names}


def _row(seconds: dict[str, list[float]], first: str, name: str, kinds: Sequence[object]) -> Row:
    found = ratio(seconds[name], seconds[first], kinds)
    row = ratio_row(found, statistics.mean(seconds[name]), first)
    median = statistics.median(seconds[name]) / statistics.median(seconds[first])
    return row | {"ratio_of_medians": median}


def _warm_up(args: argparse.Namespace) -> None:
    """Take two steps with a model that is thrown away: thread pools, allocator, caches."""
    variant = uniform(args, 8)
    for batch in make_batches(args, load(args))[:2]:
        variant.step(batch)
    del variant
    gc.collect()


def add_memory(
    bench: str, rows: dict[str, Row], names: Sequence[str], args: argparse.Namespace
) -> None:
    """Add the peak memory of a fresh process per variant, and its ratio to the first.

    Args:
        bench: Name of the benchmark, whose parts are these variants.
        rows: The rows, changed.
        names: The variants.
        args: The flags; with ``--no-memory`` nothing is done, with ``--quick`` two variants.
    """
    if args.no_memory:
        return
    for name in names[:2] if args.quick else names:
        rows[name] |= fresh(bench, args, name, exact=True)
        rows[name]["memory_ratio"] = rows[name]["peak_bytes"] / rows[names[0]]["peak_bytes"]


def peak_of_first_steps(build: Build, args: argparse.Namespace, name: str) -> Row:
    """Return the peak memory of this process over the first steps, where ranks are highest.

    Args:
        build: Makes variants.
        args: The flags.
        name: The variant.
    """
    before = resident()
    variant = build(name)
    batches = make_batches(args, load(args))

    def work() -> None:
        for batch in batches[:MEMORY_STEPS]:
            variant.step(batch)

    found = peak_over(work, before)
    with contextlib.suppress(gr.GradrankError):  # too short a run to decide anything
        variant.close()
    return found


def show_profile(build: Build, names: Sequence[str], args: argparse.Namespace) -> None:
    """Print where a step's time goes, and how many operations it takes, for every variant.

    Args:
        build: Makes variants.
        names: The variants.
        args: The flags.
    """
    for name in names:
        variant = build(name)
        batches = make_batches(args, load(args))
        variant.step(batches[0])
        show_operations(f"a step of {name}", lambda v=variant, b=batches: v.step(b[1]))
        with contextlib.suppress(gr.GradrankError):
            variant.close()
