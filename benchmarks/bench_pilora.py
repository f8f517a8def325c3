"""What neuron partitions cost: a step of each stage of PiLoRA beside a step of plain LoRA.

Usage: python benchmarks/bench_pilora.py [--model smollm2-135m] [--steps 60] [--repeats 3] [--quick]

The models train side by side on the same batches, step by step in turn (and in an order that moves
on with every step), so that a slow minute of the machine hits all of them. Variants:

- lora           PEFT LoRA of rank r (baseline)
- again          the same once more: what two equal variants differ by on this machine
- wide           PEFT LoRA of rank r + r'
- partition      rank r for a share of the rows, r' for the others, stored compactly (stage 2)
- fixed          the same at a fixed shape, as DistributedDataParallel needs it
- scoring        LoRA of rank r with the looks of stage 1, every ``--interval`` steps

Reported are sums over the run as ratios to lora, with a 95 % interval (paired bootstrap over
blocks of steps, all repeats pooled), the ratio of medians, the ratios of each repeat, parameters,
the bytes that training holds, and the peak memory of a fresh process per variant.
"""

import argparse
import contextlib
import gc
import json
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

import gradrank as gr
from bench_dynamic import Step, load, lora, make_batches, optimizer_of, stepper
from gradrank.adapters.neurons import reserve_neurons
from gradrank.adapters.view import lora_sites
from gradrank.core.files import write_json
from gradrank.core.partition import NeuronPartition
from gradrank.lab.memory import PeakMemory

VARIANTS = ("lora", "again", "wide", "partition", "fixed", "scoring")


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        step: One training step.
        optimizer: Its optimizer, whose tensors are what training holds.
        parameters: Adapter parameters in use.
        close: Ends the run.
    """

    step: Step
    optimizer: torch.optim.Optimizer
    parameters: int
    close: Callable[[], Any]


def build(name: str, args: argparse.Namespace) -> Variant:
    """Return a variant, ready to train for ``args.steps`` steps."""
    torch.manual_seed(0)
    model = lora(args.model, args.rank + (args.rest if name == "wide" else 0))
    split = name in {"partition", "fixed"}
    if split:
        names = lora_sites(model, "default")
        ranks, more = dict.fromkeys(names, args.rank), dict.fromkeys(names, args.rest)
        reserve_neurons(model, ranks, more, fixed=name == "fixed")
        gr.edit(model, partitions(model, args))
    optimizer = optimizer_of(model)
    after, close = _scoring(model, optimizer, args) if name == "scoring" else (_nothing, _nothing)
    used = sum(site.parameters for site in lora_sites(model, "default").values())
    return Variant(stepper(model, optimizer, after), optimizer, used, close)


def partitions(model: Any, args: argparse.Namespace) -> dict[str, gr.Partition]:
    """Return a random partition of every target, with the asked share of dominant rows."""
    generator = torch.Generator().manual_seed(0)
    edits = {}
    for name, site in lora_sites(model, "default").items():
        count = site.linear("B").out_features
        order = torch.randperm(count, generator=generator)
        mask = (order < round(args.share * count)).tolist()
        edits[name] = gr.Partition(NeuronPartition.of(mask, args.rank, args.rest))
    return edits


def _scoring(model: Any, optimizer: Any, args: argparse.Namespace) -> Any:
    """Return what is done after a step of stage 1, and how it ends."""
    # The decision falls due after the run, so that only looks are timed.
    options = {
        "rank": args.rank,
        "supplementary_rank": args.rest,
        "interval": args.interval,
        "initial_steps": 10 * args.steps,
    }
    controller = gr.Controller(
        model, optimizer, "pilora", f"uniform:{args.rank}", 20 * args.steps, options=options
    )
    return controller.step, controller.close


def _nothing() -> None:
    """Stand for a variant that does nothing after its steps."""


def time_run(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Let the variants take turns once; return seconds per step, and what each of them used."""
    variants = {name: build(name, args) for name in args.variants}
    batches = make_batches(load(args.model), args)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(args.warmup + args.steps):
        turn = number % len(variants)
        for name in (*args.variants[turn:], *args.variants[:turn]):
            _synchronise()
            started = time.perf_counter()
            variants[name].step(batches[number % len(batches)])
            _synchronise()
            if number >= args.warmup:
                seconds[name].append(time.perf_counter() - started)
    found = {
        name: {"parameters": variant.parameters, "held_bytes": held_bytes(variant.optimizer)}
        for name, variant in variants.items()
    }
    for variant in variants.values():
        with contextlib.suppress(gr.GradrankError):  # no decision was meant to fall due
            variant.close()
    return seconds, found


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of what an optimizer trains, and of its moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*parameters, *(v for v in moments if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


def summary(runs: list[dict[str, list[float]]], name: str, block: int) -> dict[str, Any]:
    """Return times of one variant beside those of lora, over all repeats."""
    mine = [second for run in runs for second in run[name]]
    base = [second for run in runs for second in run["lora"]]
    return {
        "seconds": statistics.mean(mine),
        "ratio": sum(mine) / sum(base),
        "interval": interval(runs, name, block),
        "ratio_median": statistics.median(mine) / statistics.median(base),
        "repeats": [sum(run[name]) / sum(run["lora"]) for run in runs],
    }


def interval(runs: list[dict[str, list[float]]], name: str, block: int) -> list[float] | None:
    """Return a 95 % percentile interval of the ratio of sums, or None for fewer than 5 blocks."""
    pairs = [
        (sum(run[name][start : start + block]), sum(run["lora"][start : start + block]))
        for run in runs
        for start in range(0, len(run["lora"]), block)
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
    with PeakMemory(variant.optimizer.param_groups[0]["params"][0].device) as memory:
        for number in range(args.memory_steps):
            variant.step(batches[number % len(batches)])
    with contextlib.suppress(gr.GradrankError):
        variant.close()
    return memory.peak


def measure_memory(args: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory of a fresh process per variant, in bytes."""
    passed = ("model", "batch", "length", "rank", "rest", "share", "steps", "interval")
    flags = [f"--{key}={getattr(args, key)}" for key in (*passed, "memory_steps")]
    flags = [flag.replace("_", "-", 1) if "memory_steps" in flag else flag for flag in flags]
    peaks = {}
    for name in args.variants:
        command = [sys.executable, __file__, *flags, f"--variant={name}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
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
    parser.add_argument("--rank", type=int, default=8, help="rank r of dominant rows")
    parser.add_argument("--rest", type=int, default=1, help="rank r' of the others")
    parser.add_argument("--share", type=float, default=0.42, help="share of dominant rows")
    parser.add_argument("--interval", type=int, default=10, help="steps between looks (K)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory-steps", type=int, default=3, help="0: do not measure memory")
    parser.add_argument("--quick", action="store_true", help="few steps, one repeat, no memory")
    parser.add_argument("--variant", choices=VARIANTS, help="internal: memory of one variant")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats, args.memory_steps = 20, 1, 0
    if "scoring" in args.variants and "pilora" not in gr.METHODS:
        print("method 'pilora' is not there; stage 1 is left out", file=sys.stderr)
        args.variants = [name for name in args.variants if name != "scoring"]
    if "lora" not in args.variants:
        args.variants = ["lora", *args.variants]
    return args


def _print(rows: Mapping[str, Mapping[str, Any]]) -> None:
    print(
        f"{'variant':<11}{'s/step':>8}{'ratio':>8}{'95 %':>15}{'median':>8}{'repeats':>15}"
        f"{'parameters':>12}{'held MiB':>10}{'peak MiB':>10}"
    )
    for name, row in rows.items():
        ends = "{:.3f}..{:.3f}".format(*row["interval"]) if row["interval"] else "-"
        repeats = f"{min(row['repeats']):.3f}..{max(row['repeats']):.3f}"
        peak = f"{row['peak_memory'] / 2**20:.0f}" if "peak_memory" in row else "-"
        print(
            f"{name:<11}{row['seconds']:>8.3f}{row['ratio']:>8.3f}{ends:>15}"
            f"{row['ratio_median']:>8.3f}{repeats:>15}{row['parameters']:>12,}"
            f"{row['held_bytes'] / 2**20:>10.1f}{peak:>10}"
        )


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    args = _parse()
    if args.variant:
        print(json.dumps({"peak": peak_memory(args)}))
        return
    peaks = measure_memory(args) if args.memory_steps else {}
    runs, used = [], {}
    for _ in range(args.repeats):
        seconds, used = time_run(args)
        runs.append(seconds)
        gc.collect()
    block = args.interval if "scoring" in args.variants else 2
    rows = {name: {**summary(runs, name, block), **used[name]} for name in args.variants}
    for name, peak in peaks.items():
        rows[name]["peak_memory"] = peak
    _print(rows)
    if args.out:
        settings = {k: str(v) for k, v in vars(args).items() if k not in {"out", "variant"}}
        write_json(args.out, {"settings": settings, "rows": rows, "seconds": runs})


if __name__ == "__main__":
    main()
