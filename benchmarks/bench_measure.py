"""What measuring costs, per mini-batch, beside the same passes without it and beside training.

Usage: python -m benchmarks.bench_measure [--rounds 6] [--quick] [--profile]

Variants:

- bare      frozen model, the graph starts at the first target, nothing is gathered
- lora      forward and backward pass of PEFT LoRA of rank 8 on the same targets (reference)
- sketch    bare, and the two-sided sketch of every target (GARD)
- both      bare, and both sketches in one pass (GARD and water-filling)
- both-80   the same with twice the directions of the mean gradient
- dense     bare, and the exact gradient of every target, half of the layers per pass
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.frame import Bench, Found, Goal, Row, fresh, main, ratio_row
from benchmarks.profiling import show_operations
from benchmarks.setting import Batch, load, make_batches, peak_over, resident
from benchmarks.timing import ratio, take_turns
from peft import LoraConfig, get_peft_model

from gradrank.signals.layers import find_sites
from gradrank.signals.mean_gradient import MeanGradientProbe
from gradrank.signals.measure import MeanGradient, Spectrum
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import DenseProbe, SketchProbe
from gradrank.signals.untouched import untouched

VARIANTS = ("lora", "bare", "sketch", "both", "both-80", "dense")
DIRECTIONS = {"both": MeanGradient().directions, "both-80": 2 * MeanGradient().directions}
PEAK_BATCHES = 4
GOALS = (
    Goal("measuring spectra, per batch", "sketch", "ratio", 1.05, "LoRA forward and backward"),
    Goal(
        "measuring spectra, per batch",
        "sketch",
        "ratio_to_bare",
        1.05,
        "the same passes, nothing gathered",
        "interval_to_bare",
    ),
    Goal(
        "memory while measuring spectra",
        "sketch",
        "memory_to_bare",
        1.03,
        "the same passes, nothing gathered",
        "",
    ),
)


def stepper(variant: str, model: Any) -> Callable[[Batch, int], None]:
    """Return a function that takes one batch the way a variant does.

    Args:
        variant: One of ``VARIANTS``.
        model: The base model, wrapped here by ``lora``.
    """
    if variant == "lora":
        wrapped: Any = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))

        def trained(batch: Batch, _index: int) -> None:
            wrapped(**batch, use_cache=False).loss.backward()
            wrapped.zero_grad(set_to_none=True)

        return trained
    sites = find_sites(model)
    targets = [site.target for site in sites]
    probes: list[Any] = []
    if variant in {"sketch", *DIRECTIONS}:
        probes.append(SketchProbe(targets, Spectrum().sketch_dim, 0))
    if variant in DIRECTIONS:
        probes.append(MeanGradientProbe(targets, DIRECTIONS[variant], 0))
    blocks = [sites]
    if variant == "dense":
        # Half the layers per pass: what a memory cap of half the gradients would ask for.
        middle = len(sites) // 2
        blocks = [sites[:middle], sites[middle:]]

    def measured(batch: Batch, index: int) -> None:
        with untouched(model, 0):
            for block in blocks:
                used = list(probes)
                if variant == "dense":
                    used.append(DenseProbe([site.target for site in block]))
                with Observer(block, used):
                    model(**batch).loss.backward()
                for probe in used:
                    probe.end_batch(index)

    return measured


def steps_of(args: argparse.Namespace) -> tuple[dict[str, Callable[[Batch, int], None]], Any]:
    """Return what takes a batch, by variant, and the model that all but ``lora`` share."""
    model = load(args)
    steps = {"lora": stepper("lora", load(args))}
    steps |= {name: stepper(name, model) for name in VARIANTS if name != "lora"}
    return steps, model


def run(args: argparse.Namespace) -> Found:
    """Time the variants batch by batch, and measure the memory of each."""
    steps, model = steps_of(args)
    batches = make_batches(args, model, args.rounds + 1)

    def turn(name: str) -> Callable[[int], None]:
        return lambda number: steps[name](batches[number], number)

    seconds = take_turns({name: turn(name) for name in VARIANTS}, args.rounds, warmup=1)
    rows: dict[str, Row] = {}
    for name in VARIANTS:
        rows[name] = ratio_row(
            ratio(seconds[name], seconds["lora"]), statistics.mean(seconds[name]), "lora"
        )
        bare = ratio(seconds[name], seconds["bare"])
        rows[name] |= {
            "ratio_to_bare": bare.value,
            "interval_to_bare": list(bare.interval) if bare.interval else None,
        }
    if not args.no_memory:
        for name in VARIANTS[:3] if args.quick else VARIANTS:
            rows[name] |= fresh("measure", args, name, exact=True)
            rows[name]["memory_ratio"] = rows[name]["peak_bytes"] / rows["lora"]["peak_bytes"]
        for name in VARIANTS:
            if "peak_bytes" in rows[name]:
                bare_peak = rows["bare"]["peak_bytes"]
                rows[name]["memory_to_bare"] = rows[name]["peak_bytes"] / bare_peak
    return Found(rows)


def part(args: argparse.Namespace, name: str) -> Row:
    """Return the peak memory of one variant over a few batches."""
    before = resident()
    model = load(args)
    step = stepper(name, model)
    batches = make_batches(args, model, PEAK_BATCHES)

    def work() -> None:
        for index, batch in enumerate(batches):
            step(batch, index)

    return peak_over(work, before)


def show(args: argparse.Namespace) -> None:
    """Print where the time of a batch goes, with and without gathering."""
    steps, model = steps_of(args)
    batches = make_batches(args, model, 2)
    for name in ("bare", "sketch", "both"):
        steps[name](batches[0], 0)
        show_operations(f"a batch of {name}", lambda name=name: steps[name](batches[1], 1))


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rounds", type=int, default=6, help="mini-batches that count")


BENCH = Bench(
    name="measure",
    about="Cost of measuring a mini-batch beside plain passes and beside LoRA's.",
    minutes=3,
    run=run,
    flags=flags,
    quick={"rounds": 5},
    part=part,
    profile=show,
    goals=GOALS,
    columns=(
        "seconds",
        "ratio",
        "interval",
        "ratio_to_bare",
        "interval_to_bare",
        "peak_bytes",
        "memory_ratio",
        "memory_to_bare",
    ),
)

if __name__ == "__main__":
    main(BENCH)
