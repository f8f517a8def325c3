"""What neuron partitions cost: a step of each stage of PiLoRA beside a step of plain LoRA.

Usage: python -m benchmarks.bench_pilora [--steps 20] [--quick] [--profile]

Variants:

- lora           PEFT LoRA of rank r (reference)
- again          the same once more: what two equal variants differ by on this machine
- wide           PEFT LoRA of rank r + r' (by ``--variants``)
- partition      rank r for a share of the rows, r' for the others, stored compactly (stage 2)
- fixed          the same at a fixed shape, as DistributedDataParallel needs it (by ``--variants``)
- scoring        LoRA of rank r with the looks of stage 1, every ``--interval`` steps
"""

import argparse
import contextlib
from functools import partial

import torch
from benchmarks.frame import Bench, Found, Goal, Row, main
from benchmarks.setting import lora, optimizer_of, stepper
from benchmarks.training import (
    Variant,
    add_memory,
    peak_of_first_steps,
    show_profile,
    train_in_turns,
    uniform,
)

import gradrank as gr
from gradrank.adapters.neurons import reserve_neurons
from gradrank.adapters.view import lora_sites
from gradrank.core.partition import NeuronPartition

VARIANTS = ("lora", "again", "wide", "partition", "fixed", "scoring")
DEFAULT = ("lora", "again", "partition", "scoring")
GOALS = (
    Goal("PiLoRA, a step of stage 2", "partition", "ratio", 1.02, "LoRA of rank r"),
    Goal("PiLoRA, stage 1 with a look every 10 steps", "scoring", "ratio", 1.02, "LoRA of rank r"),
)


def build(args: argparse.Namespace, name: str) -> Variant:
    """Return a variant, ready to train for ``args.steps`` steps."""
    if name in {"lora", "again", "wide"}:
        return uniform(args, args.rank + (args.rest if name == "wide" else 0))
    return _scoring(args) if name == "scoring" else _split(args, fixed=name == "fixed")


def _split(args: argparse.Namespace, fixed: bool) -> Variant:
    model = lora(args, args.rank)
    names = lora_sites(model, "default")
    ranks = {name: int(args.rank) for name in names}
    more = {name: int(args.rest) for name in names}
    reserve_neurons(model, ranks, more, fixed=fixed)
    gr.edit(model, partitions(model, args))
    optimizer = optimizer_of(model)
    used = sum(site.parameters for site in lora_sites(model, "default").values())
    return Variant(stepper(model, optimizer), optimizer, lambda: {"parameters": used})


def partitions(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, gr.Partition]:
    """Return a random partition of every target, with the asked share of dominant rows."""
    generator = torch.Generator().manual_seed(0)
    edits = {}
    for name, site in lora_sites(model, "default").items():
        count = site.linear("B").out_features
        order = torch.randperm(count, generator=generator)
        mask = (order < round(args.share * count)).tolist()
        edits[name] = gr.Partition(NeuronPartition.of(mask, args.rank, args.rest))
    return edits


def _scoring(args: argparse.Namespace) -> Variant:
    model = lora(args, args.rank)
    optimizer = optimizer_of(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The decision falls due after the run, so that only looks are timed.
    options = {
        "rank": args.rank,
        "supplementary_rank": args.rest,
        "interval": args.interval,
        "initial_steps": 10 * args.steps,
    }
    budget = f"uniform:{args.rank}"
    controller = gr.Controller(model, optimizer, "pilora", budget, 20 * args.steps, options=options)

    def close() -> None:
        with contextlib.suppress(gr.GradrankError):  # no decision was meant to fall due
            controller.close()

    step = stepper(model, optimizer, controller.step)
    return Variant(step, optimizer, lambda: {"parameters": count}, close)


def run(args: argparse.Namespace) -> Found:
    """Time the variants side by side, and measure the memory of each."""
    names = list(dict.fromkeys(["lora", *args.variants]))
    kind = lambda step: step % args.interval == 0  # noqa: E731 - whether a look falls due
    rows = train_in_turns(partial(build, args), names, args, kind)
    add_memory("pilora", rows, names, args)
    return Found(rows)


def part(args: argparse.Namespace, name: str) -> Row:
    """Return the peak memory of one variant."""
    return peak_of_first_steps(partial(build, args), args, name)


def show(args: argparse.Namespace) -> None:
    """Print the profile of a step of stage 2 beside one of LoRA."""
    show_profile(partial(build, args), ["lora", "partition"], args)


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rank", type=int, default=8, help="rank r of dominant rows")
    parser.add_argument("--rest", type=int, default=1, help="rank r' of the others")
    parser.add_argument("--share", type=float, default=0.42, help="share of dominant rows")
    parser.add_argument("--interval", type=int, default=10, help="steps between looks (K)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT))


BENCH = Bench(
    name="pilora",
    about="Cost of neuron partitions (PiLoRA), both stages, beside plain LoRA.",
    minutes=5,
    run=run,
    flags=flags,
    quick={"steps": 10, "rank": 4, "interval": 5},
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
        "peak_bytes",
        "memory_ratio",
    ),
)

if __name__ == "__main__":
    main(BENCH)
