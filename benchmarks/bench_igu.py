"""What pruning while training costs: IGU-LoRA and AdaLoRA beside uniform LoRA, in one run.

Usage: python benchmarks/bench_igu.py [--model smollm2-135m] [--steps 100] [--repeats 2]

The models train side by side on the same batches, step by step in turn (and in an order that moves
on with every step), so that a slow minute of the machine hits all of them. Variants:

- uniform        LoRA of the final budget (baseline)
- igu            ours, estimator unbiased, one scoring pass every 10 steps (--score-every)
- igu-quarter    the same, with scoring passes over a quarter of the batch
- igu-as-code    what the published code does: adapter scaled at random, scored at every step
- adalora        AdaLoRA's rule on our engine
- peft-adalora   PEFT's own, scale matched, driven as PEFT asks

All but uniform begin with twice the rank and fall to its budget (PEFT: to its mean rank) on the
same cubic schedule. Reported are sums over the whole run, scoring and pruning included, as ratios
to uniform, with a 95 % interval: paired bootstrap over blocks of steps (one scoring pass and one
pruning each, all repeats pooled; the ratio's own drift with the ranks widens it). Also the ratios
of each repeat and of each phase, parameters, the bytes that training holds, and the peak memory of
a fresh process per variant that takes the first steps, where ranks are highest.
"""

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import gradrank as gr
from bench_dynamic import Step, load, lora, make_batches, optimizer_of, stepper
from gradrank.core.files import write_json
from gradrank.lab.adalora import adalora_config
from gradrank.lab.adalora_run import AdaLoraDriver
from gradrank.lab.memory import PeakMemory
from gradrank.session import find_targets

SCALING = 2.0  # that of bench_dynamic.lora
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "igu": ("igu", {"estimator": "unbiased"}),
    "igu-quarter": ("igu", {"estimator": "unbiased", "rows": 0.25}),
    "igu-as-code": ("igu", {"estimator": "as-code"}),
    "adalora": ("adalora", {}),
}
VARIANTS = ("uniform", *OURS, "peft-adalora")


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        step: One training step.
        optimizer: Its optimizer, whose tensors are what training holds.
        parameters: Returns the parameters in use, at most and in the end (``d_in + d_out`` per
            direction; λ is not counted).
        decisions: Returns the steps after which ranks were pruned, and their seconds.
        close: Ends the run; raises if nothing was pruned.
    """

    step: Step
    optimizer: torch.optim.Optimizer
    parameters: Callable[[], tuple[int, int]]
    decisions: Callable[[], list[dict[str, Any]]]
    close: Callable[[], Any]


def schedule(args: argparse.Namespace) -> dict[str, int]:
    """Return first and last steps without pruning, and the interval between prunings."""
    # PEFT prunes at multiples of the interval, ours at multiples after the warm-up: make them meet.
    warmup = max(1, round(0.1 * args.steps / args.interval)) * args.interval
    return {"warmup": warmup, "final": round(0.3 * args.steps), "interval": args.interval}


def build(name: str, args: argparse.Namespace) -> Variant:
    """Return a variant, ready to train for ``args.steps`` steps."""
    torch.manual_seed(0)
    if name == "uniform":
        return _uniform(args)
    return _peft(args) if name == "peft-adalora" else _ours(name, args)


def _uniform(args: argparse.Namespace) -> Variant:
    model = lora(args.model, args.rank)
    optimizer = optimizer_of(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Variant(
        stepper(model, optimizer, lambda: None),
        optimizer,
        lambda: (count, count),
        list,
        lambda: None,
    )


def _ours(name: str, args: argparse.Namespace) -> Variant:
    method, options = OURS[name]
    options = options | schedule(args) | {"initial_rank": args.initial_rank}
    if name in {"igu", "igu-quarter"}:  # the others score at every step
        options["score_every"] = args.score_every
    model = lora(args.model, args.rank)
    gr.reserve(model, method, f"uniform:{args.rank}", options=options)
    optimizer = optimizer_of(model)
    controller = gr.Controller(
        model, optimizer, method, f"uniform:{args.rank}", args.steps, options=options
    )
    targets = find_targets(model)

    def parameters() -> tuple[int, int]:
        used = [
            sum(ranks.get(t.name, 0) * t.cost for t in targets)
            for _, ranks in controller.run.ranks_over_time
        ]
        return max(used), used[-1]

    return Variant(
        stepper(model, optimizer, controller.step),
        optimizer,
        parameters,
        lambda: controller.run.decisions,
        controller.close,
    )


def _peft(args: argparse.Namespace) -> Variant:
    base = load(args.model)
    config = adalora_config(
        find_targets(base),
        initial_rank=args.initial_rank,
        target_rank=args.rank,
        total_steps=args.steps,
        scaling=SCALING,
        **schedule(args),
    )
    model: Any = get_peft_model(base, config)
    optimizer = optimizer_of(model)
    driver = AdaLoraDriver(model)
    return Variant(
        stepper(model, optimizer, driver.step),
        optimizer,
        lambda: (driver.peak, driver.finish().total),
        lambda: driver.decisions,
        driver.finish,
    )


def time_run(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Let the variants take turns once; return seconds per step, and what each of them used."""
    variants = {name: build(name, args) for name in args.variants}
    batches = make_batches(load(args.model), args)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    held = dict.fromkeys(variants, 0)
    for number in range(args.steps):
        turn = number % len(variants)
        for name in (*args.variants[turn:], *args.variants[:turn]):
            variant = variants[name]
            _synchronise()
            started = time.perf_counter()
            variant.step(batches[number % len(batches)])
            _synchronise()
            seconds[name].append(time.perf_counter() - started)
            held[name] = max(held[name], held_bytes(variant.optimizer))
    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        variant.close()
        peak, final = variant.parameters()
        found[name] = {
            "parameters_peak": peak,
            "parameters_final": final,
            "held_bytes_peak": held[name],
            "held_bytes_final": held_bytes(variant.optimizer),
            "prunings": [{k: d[k] for k in ("step", "seconds")} for d in variant.decisions()],
        }
    return seconds, found


def warm_up(args: argparse.Namespace) -> None:
    """Take two steps with a model that is thrown away: thread pools, allocator, caches."""
    variant = build("uniform", args)
    for batch in make_batches(load(args.model), args)[:2]:
        variant.step(batch)
    del variant
    gc.collect()


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of what an optimizer trains, and of its moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*parameters, *(v for v in moments if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


def summary(runs: list[dict[str, list[float]]], name: str, args: argparse.Namespace) -> Any:
    """Return times of one variant beside uniform's, over all repeats."""
    mine = [second for run in runs for second in run[name]]
    base = [second for run in runs for second in run["uniform"]]
    plan = schedule(args)
    phases = {
        "warmup": (0, plan["warmup"]),
        "falling": (plan["warmup"], args.steps - plan["final"]),
        "final": (args.steps - plan["final"], args.steps),
    }
    return {
        "seconds": sum(mine) / len(runs),
        "ratio": sum(mine) / sum(base),
        "interval": interval(runs, name, block_length(args)),
        "repeats": [sum(run[name]) / sum(run["uniform"]) for run in runs],
        "median": statistics.median(mine),
        "ratio_median": statistics.median(mine) / statistics.median(base),
        "phases": {
            phase: sum(sum(run[name][start:end]) for run in runs)
            / sum(sum(run["uniform"][start:end]) for run in runs)
            for phase, (start, end) in phases.items()
            if end > start
        },
    }


def block_length(args: argparse.Namespace) -> int:
    """Return the fewest steps with a whole number of scoring passes and of prunings."""
    return math.lcm(args.score_every, args.interval)


def interval(runs: list[dict[str, list[float]]], name: str, block: int) -> list[float] | None:
    """Return a 95 % percentile interval of the ratio of sums, or None for fewer than 5 blocks."""
    pairs = [
        (sum(run[name][start : start + block]), sum(run["uniform"][start : start + block]))
        for run in runs
        for start in range(0, len(run["uniform"]), block)
    ]
    if len(pairs) < 5:
        return None
    generator = random.Random(0)
    ratios = []
    for _ in range(4000):
        drawn = generator.choices(pairs, k=len(pairs))
        ratios.append(sum(mine for mine, _ in drawn) / sum(base for _, base in drawn))
    cuts = statistics.quantiles(ratios, n=40)
    return [cuts[0], cuts[-1]]


def peak_memory(args: argparse.Namespace) -> int:
    """Return the peak memory of this process over the first steps of one variant, in bytes."""
    variant = build(args.variant, args)
    batches = make_batches(load(args.model), args)
    gc.collect()
    device = variant.optimizer.param_groups[0]["params"][0].device
    with PeakMemory(device) as memory:
        for number in range(min(args.memory_steps, args.steps)):
            variant.step(batches[number % len(batches)])
    with contextlib.suppress(gr.GradrankError):  # too short a run to prune
        variant.close()
    return memory.peak


def measure_memory(args: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory of a fresh process per variant, in bytes."""
    peaks = {}
    passed = (
        "model",
        "batch",
        "length",
        "rank",
        "initial_rank",
        "steps",
        "interval",
        "score_every",
    )
    flags = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in passed]
    for name in args.variants:
        command = [sys.executable, __file__, *flags, f"--memory-steps={args.memory_steps}"]
        done = subprocess.run(
            [*command, f"--variant={name}"], check=True, stdout=subprocess.PIPE, text=True
        )
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak"]
    return peaks


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8, help="uniform rank of the final budget")
    parser.add_argument("--initial-rank", type=int, help="default: twice the final one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--interval", type=int, default=10, help="steps between prunings")
    parser.add_argument("--score-every", type=int, default=10, help="steps between igu's passes")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory-steps", type=int, default=12, help="0: do not measure memory")
    parser.add_argument("--variant", choices=VARIANTS, help="internal: memory of one variant")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.initial_rank = args.initial_rank or 2 * args.rank
    if "uniform" not in args.variants:
        args.variants = ["uniform", *args.variants]
    return args


def _print(rows: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    print(
        f"{'variant':<14}{'s/step':>8}{'run':>7}{'95 %':>15}{'repeats':>15}{'warm':>7}{'fall':>7}"
        f"{'final':>7}{'peak':>12}{'end':>12}{'held MiB':>16}{'RSS MiB':>9}"
    )
    for name, row in rows.items():
        ends = "{:.3f}..{:.3f}".format(*row["interval"]) if row["interval"] else "-"
        phases = "".join(f"{row['phases'].get(p, 1):>7.3f}" for p in ("warmup", "falling", "final"))
        held = f"{row['held_bytes_peak'] / 2**20:.1f}..{row['held_bytes_final'] / 2**20:.1f}"
        resident = f"{row['peak_memory'] / 2**20:.0f}" if "peak_memory" in row else "-"
        repeats = f"{min(row['repeats']):.3f}..{max(row['repeats']):.3f}"
        print(
            f"{name:<14}{row['seconds'] / args.steps:>8.3f}{row['ratio']:>7.3f}{ends:>15}"
            f"{repeats:>15}{phases}{row['parameters_peak']:>12,}{row['parameters_final']:>12,}"
            f"{held:>16}{resident:>9}"
        )


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    args = _parse()
    if args.variant:
        print(json.dumps({"peak": peak_memory(args)}))
        return
    peaks = measure_memory(args) if args.memory_steps else {}
    warm_up(args)
    runs, used = [], {}
    for repeat in range(args.repeats):
        seconds, used = time_run(args)
        runs.append(seconds)
        gc.collect()
        shown = " ".join(f"{n} {sum(s) / sum(seconds['uniform']):.3f}" for n, s in seconds.items())
        print(f"repeat {repeat + 1} of {args.repeats}: {shown}", file=sys.stderr, flush=True)
    rows = {name: {**summary(runs, name, args), **used[name]} for name in args.variants}
    for name, peak in peaks.items():
        rows[name]["peak_memory"] = peak
    _print(rows, args)
    if args.out:
        internal = ("out", "variant")
        settings = {k: str(v) for k, v in vars(args).items() if k not in internal}
        found = {"settings": settings, "schedule": schedule(args), "rows": rows, "seconds": runs}
        write_json(args.out, found)


if __name__ == "__main__":
    main()
