"""What one resize of all targets costs, beside one step of training and building the model anew.

Usage: python -m benchmarks.bench_resize [--rounds 6] [--quick]

- step       one step of training, rank 8 (reference)
- resize     one edit of every target: half of them one rank down, the others one up; then back
- rebuild    ``get_peft_model`` on a base model that is loaded already

and the bytes of factors, gradients and moments, and what the process holds, before and after every
target's rank falls from 64 to 8.
"""

import argparse
import ctypes
import statistics
from typing import Any

from benchmarks.frame import Bench, Found, Goal, Row, fresh, main, ratio_row
from benchmarks.setting import (
    held_bytes,
    load,
    lora,
    make_batches,
    optimizer_of,
    resident,
    stepper,
)
from benchmarks.timing import ratio, take_turns
from peft import LoraConfig, get_peft_model

import gradrank as gr
from gradrank.adapters.apply import adapter_ranks

GOALS = (Goal("one resize of all targets", "resize", "ratio", 1, "one training step"),)


def run(args: argparse.Namespace) -> Found:
    """Time steps, resizes and rebuilds in turns, and look at the memory of a shrink."""
    model = lora(args, args.rank)
    optimizer = optimizer_of(model)
    step = stepper(model, optimizer)
    batches = make_batches(args, model)
    names = list(adapter_ranks(model))
    base: list[Any] = [load(args)]

    def resize(number: int) -> None:
        there = number % 2 == 0
        edits: dict[str, Any] = {}
        for place, name in enumerate(names):
            other = args.rank - 1 if place % 2 == 0 else args.rank + 1
            wanted = other if there else args.rank
            edits[name] = (gr.Shrink if (place % 2 == 0) == there else gr.Grow)(wanted)
        gr.edit(model, edits, optimizer)

    def unwrap(_number: int) -> None:
        if hasattr(base[0], "peft_config"):
            base[0] = base[0].unload()

    def rebuild(_number: int) -> None:
        base[0] = get_peft_model(base[0], LoraConfig(r=args.rank, target_modules="all-linear"))

    turns = {
        "step": lambda number: step(batches[number % len(batches)]),
        "resize": resize,
        "rebuild": rebuild,
    }
    seconds = take_turns(turns, args.rounds, warmup=2, before={"rebuild": unwrap})
    rows: dict[str, Row] = {
        name: ratio_row(ratio(taken, seconds["step"]), statistics.mean(taken), "step")
        for name, taken in seconds.items()
    }
    if not args.no_memory:
        rows |= fresh("resize", args, "shrink", exact=True)
    return Found(rows)


def part(args: argparse.Namespace, _name: str) -> Row:
    """Return what training holds at rank 64, and after shrinking to 8."""
    high, low = args.high, args.rank
    model = lora(args, high)
    optimizer = optimizer_of(model)
    step = stepper(model, optimizer)
    batch = make_batches(args, model, 1)[0]
    step(batch)
    rows = {f"rank {high}": _held(optimizer)}
    gr.edit(model, {name: gr.Shrink(low) for name in adapter_ranks(model)}, optimizer)
    rows[f"rank {low}"] = _held(optimizer)
    step(batch)
    rows[f"rank {low}, one step later"] = _held(optimizer)
    return rows


def _held(optimizer: Any) -> Row:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    held = held_bytes(optimizer)
    return {"parameters": count, "held_bytes": held, "resident_bytes": resident()}


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--high", type=int, default=64, help="rank before the shrink")
    parser.add_argument("--rounds", type=int, default=6)


BENCH = Bench(
    name="resize",
    about="Cost of one resize of all targets beside a step and a rebuild.",
    minutes=0.8,
    run=run,
    flags=flags,
    quick={"rank": 4, "high": 8, "rounds": 5},
    part=part,
    goals=GOALS,
    columns=("seconds", "ratio", "interval", "parameters", "held_bytes", "resident_bytes"),
)

if __name__ == "__main__":
    main(BENCH)
