"""What pruning while training costs: IGU-LoRA and AdaLoRA beside uniform LoRA, in one run.

Usage: python -m benchmarks.bench_igu [--steps 30] [--variants igu adalora] [--quick] [--profile]

Variants:

- uniform        LoRA of the final budget (reference)
- igu            ours, estimator unbiased, one scoring pass every 10 steps (--score-every)
- igu-quarter    the same, with scoring passes over a quarter of the batch (by ``--variants``)
- igu-as-code    what the published code does: adapter scaled at random, scored at every step (by
                 ``--variants``)
- adalora        AdaLoRA's rule on our engine (by ``--variants``)
- peft-adalora   PEFT's own, scale matched, driven as PEFT asks

All but uniform begin with twice the rank and fall to its budget (PEFT: to its mean rank) on the
same cubic schedule. Reported are whole runs, scoring and pruning included, as ratios to uniform.
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

import gradrank as gr
from gradrank.lab.adalora import adalora_config
from gradrank.lab.adalora_model import attach_adalora
from gradrank.lab.adalora_run import AdaLoraDriver
from gradrank.signals.facts import find_targets

SCALING = 2.0  # that of setting.lora
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "igu": ("igu", {"estimator": "unbiased"}),
    "igu-quarter": ("igu", {"estimator": "unbiased", "rows": 0.25}),
    "igu-as-code": ("igu", {"estimator": "as-code"}),
    "adalora": ("adalora", {}),
}
VARIANTS = ("uniform", *OURS, "peft-adalora")
DEFAULT = ("uniform", "igu", "peft-adalora")
GOALS = (
    Goal(
        "IGU-LoRA, whole run, a pass every 10 steps",
        "igu",
        "ratio",
        1.15,
        "uniform LoRA of the final budget",
    ),
)


def schedule(args: argparse.Namespace) -> dict[str, int]:
    """Return first and last steps without pruning, and the interval between prunings."""
    # PEFT prunes at multiples of the interval, ours at multiples after the warm-up: make them meet.
    warmup = max(1, round(0.1 * args.steps / args.interval)) * args.interval
    return {"warmup": warmup, "final": round(0.3 * args.steps), "interval": args.interval}


def build(args: argparse.Namespace, name: str) -> Variant:
    """Return a variant, ready to train for ``args.steps`` steps."""
    if name == "uniform":
        return uniform(args, args.rank)
    return _peft(args) if name == "peft-adalora" else _ours(args, name)


def _ours(args: argparse.Namespace, name: str) -> Variant:
    method, options = OURS[name]
    options = options | schedule(args) | {"initial_rank": 2 * args.rank}
    if name in {"igu", "igu-quarter"}:  # the others score at every step
        options["score_every"] = args.score_every
    budget = f"uniform:{args.rank}"
    model = lora(args, args.rank)
    gr.reserve(model, method, budget, options=options)
    optimizer = optimizer_of(model)
    controller = gr.Controller(model, optimizer, method, budget, args.steps, options=options)
    targets = find_targets(model)

    def facts() -> dict[str, Any]:
        used = [
            sum(ranks.get(t.name, 0) * t.cost for t in targets)
            for _, ranks in controller.run.ranks_over_time
        ]
        made = [{k: d[k] for k in ("step", "seconds")} for d in controller.run.decisions]
        return {"parameters_peak": max(used), "parameters": used[-1], "decisions": made}

    return Variant(stepper(model, optimizer, controller.step), optimizer, facts, controller.close)


def _peft(args: argparse.Namespace) -> Variant:
    base = load(args)
    config = adalora_config(
        find_targets(base),
        initial_rank=2 * args.rank,
        target_rank=args.rank,
        total_steps=args.steps,
        scaling=SCALING,
        **schedule(args),
    )
    model = attach_adalora(base, config)
    optimizer = optimizer_of(model)
    driver = AdaLoraDriver(model)

    def facts() -> dict[str, Any]:
        made = [{k: d[k] for k in ("step", "seconds")} for d in driver.decisions]
        used = driver.finish().total
        return {"parameters_peak": driver.peak, "parameters": used, "decisions": made}

    return Variant(stepper(model, optimizer, driver.step), optimizer, facts, driver.finish)


def kinds(args: argparse.Namespace) -> Callable[[int], object]:
    """Return what kind of step the s-th is: its phase, with a scoring pass or a pruning or not."""
    plan = schedule(args)

    def kind(step: int) -> object:
        falling = plan["warmup"] < step <= args.steps - plan["final"]
        phase = "falling" if falling else "before" if step <= plan["warmup"] else "after"
        return phase, step % args.score_every == 0, step % args.interval == 0

    return kind


def run(args: argparse.Namespace) -> Found:
    """Time the variants side by side, and measure the memory of each."""
    names = list(dict.fromkeys(["uniform", *args.variants]))
    rows = train_in_turns(partial(build, args), names, args, kinds(args))
    add_memory("igu", rows, names, args)
    note = (
        "PEFT's AdaLoRA counts ranks, so that its final parameters follow from where ranks went, "
        "and holds its full tensors to the end."
    )
    return Found(rows, notes=[note], more={"schedule": schedule(args)})


def part(args: argparse.Namespace, name: str) -> Row:
    """Return the peak memory of one variant, a scoring pass among its steps."""
    args.score_every = min(args.score_every, 2)
    return peak_of_first_steps(partial(build, args), args, name)


def show(args: argparse.Namespace) -> None:
    """Print the profile of a step with a scoring pass beside one of uniform LoRA."""
    args.score_every = 1
    show_profile(partial(build, args), ["uniform", "igu"], args)


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rank", type=int, default=8, help="uniform rank of the final budget")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--interval", type=int, default=10, help="steps between prunings")
    parser.add_argument("--score-every", type=int, default=10, help="steps between igu's passes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT))


BENCH = Bench(
    name="igu",
    about="Cost of pruning while training (IGU-LoRA) beside uniform LoRA and PEFT's AdaLoRA.",
    minutes=5,
    run=run,
    flags=flags,
    quick={"steps": 20, "rank": 4, "interval": 5, "score_every": 5},
    part=part,
    profile=show,
    goals=GOALS,
    columns=(
        "seconds",
        "ratio",
        "interval",
        "ratio_of_medians",
        "parameters_peak",
        "parameters",
        "held_bytes",
        "held_bytes_in_the_end",
        "peak_bytes",
        "memory_ratio",
    ),
)

if __name__ == "__main__":
    main(BENCH)
