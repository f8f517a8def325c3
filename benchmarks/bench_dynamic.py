"""What moving capacity costs: dynamic GARD beside uniform LoRA and PEFT's AdaLoRA, in one run.

Usage: python -m benchmarks.bench_dynamic [--steps 50] [--interval 50] [--quick] [--profile]

Reported are whole runs, observing and decisions included, as ratios to uniform LoRA of the same
budget. A step before which nothing is observed, one inside the window before a decision, and one
with a decision are different kinds of steps, and the interval keeps their numbers.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.frame import Bench, Found, Goal, Row, main
from benchmarks.setting import load, lora, optimizer_of, stepper
from benchmarks.training import (
    Variant,
    add_memory,
    peak_of_first_steps,
    show_profile,
    train_in_turns,
    uniform,
)
from peft import AdaLoraConfig, get_peft_model

import gradrank as gr

VARIANTS = ("uniform", "gard-dynamic", "peft-adalora")
GOALS = (
    Goal("dynamic GARD, whole run", "gard-dynamic", "ratio", 1.03, "uniform LoRA, same budget"),
)


def build(args: argparse.Namespace, name: str) -> Variant:
    """Return a variant, ready to train for ``args.steps`` steps."""
    if name == "uniform":
        return uniform(args, args.rank)
    return _dynamic(args) if name == "gard-dynamic" else _adalora(args)


def _dynamic(args: argparse.Namespace) -> Variant:
    model = lora(args, args.rank)
    optimizer = optimizer_of(model)
    method = gr.DynamicGard(interval=args.interval, window=args.window, grow=args.grow)
    # One step more than is taken, so that the last decision falls into the run.
    budget = f"uniform:{args.rank}"
    controller = gr.Controller(model, optimizer, method, budget, args.steps + 1)

    def facts() -> dict[str, Any]:
        keys = ("step", "seconds", "moved", "changed", "parameters")
        made = [{k: d[k] for k in keys} for d in controller.run.decisions]
        return {"decisions": made, "parameters": made[-1]["parameters"]}

    return Variant(stepper(model, optimizer, controller.step), optimizer, facts, controller.close)


def _adalora(args: argparse.Namespace) -> Variant:
    config = AdaLoraConfig(
        init_r=round(1.5 * args.rank),
        target_r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        total_step=args.steps,
        tinit=max(1, args.steps // 10),
        tfinal=max(1, args.steps // 5),
        deltaT=10,
    )
    model: Any = get_peft_model(load(args), config)
    optimizer = optimizer_of(model)
    count = iter(range(1, 10**9))
    after = lambda: model.base_model.update_and_allocate(next(count))  # noqa: E731
    return Variant(stepper(model, optimizer, after), optimizer)


def kinds(args: argparse.Namespace) -> Callable[[int], object]:
    """Return what kind of step the s-th is."""

    def kind(step: int) -> str:
        left = -step % args.interval
        if left == 0:
            return "decision"
        return "observed" if left < args.window else "plain"

    return kind


def run(args: argparse.Namespace) -> Found:
    """Time the variants side by side, and measure the memory of each."""
    rows = train_in_turns(partial(build, args), VARIANTS, args, kinds(args))
    add_memory("dynamic", rows, VARIANTS, args)
    note = (
        "PEFT's AdaLoRA begins at 1.5 times the rank, ends at a mean rank and not at a budget of "
        "parameters, and holds its full tensors to the end."
    )
    return Found(rows, notes=[note])


def part(args: argparse.Namespace, name: str) -> Row:
    """Return the peak memory of one variant."""
    # The window lies before the first decision: observe from the first step.
    args.interval = args.window = min(args.window, args.interval)
    return peak_of_first_steps(partial(build, args), args, name)


def show(args: argparse.Namespace) -> None:
    """Print the profile of a step that is observed beside one of uniform LoRA."""
    args.interval = args.window
    show_profile(partial(build, args), VARIANTS[:2], args)


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--interval", type=int, default=50, help="steps between decisions (τ)")
    parser.add_argument("--window", type=int, default=16, help="mini-batches of a decision")
    parser.add_argument("--grow", choices=("random", "gradient"), default="random")


BENCH = Bench(
    name="dynamic",
    about="Cost of moving capacity (dynamic GARD) beside uniform LoRA and PEFT's AdaLoRA.",
    minutes=7.5,
    run=run,
    flags=flags,
    quick={"steps": 10, "rank": 4, "interval": 5, "window": 3},
    part=part,
    profile=show,
    goals=GOALS,
    columns=(
        "seconds",
        "ratio",
        "interval",
        "ratio_of_medians",
        "parameters",
        "held_bytes",
        "held_bytes_in_the_end",
        "peak_bytes",
        "memory_ratio",
    ),
)

if __name__ == "__main__":
    main(BENCH)
