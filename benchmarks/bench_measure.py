"""Cost of measuring, beside the same forward and backward passes without it.

Usage: python benchmarks/bench_measure.py [--model smollm2-135m] [--batch 8] [--length 48]

Time: variants alternate batch by batch in one process; the table gives the ratio of the summed
per-batch minima over repeats, and of the medians. Memory: one fresh process per variant, peak
resident set. Variants:

- bare      frozen model, the graph starts at the first target, nothing is gathered (baseline)
- lora      PEFT LoRA of rank 8 on the same targets: what a training step costs before the
            optimizer
- sketch    bare + the two-sided sketch of every target (GARD)
- both      bare + sketch + mean-gradient sketches (GARD and water-filling in one pass)
- dense     bare + the exact gradient of every target, one block of layers at a time
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from gradrank.lab.models import resolve_model
from gradrank.signals.layers import find_sites
from gradrank.signals.mean_gradient import MeanGradientProbe
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import DenseProbe, SketchProbe
from gradrank.signals.untouched import untouched

VARIANTS = ("bare", "lora", "sketch", "both", "dense")


def load(name: str) -> Any:
    """Return the base model on the best device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve_model(name, "lm", device=device).model


def make_batches(model: Any, count: int, batch: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Return seeded random token batches (time does not depend on the tokens)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = [torch.randint(0, vocabulary, (batch, length), generator=generator) for _ in range(count)]
    device = next(model.parameters()).device
    return [{"input_ids": i.to(device), "labels": i.to(device)} for i in ids]


def stepper(variant: str, model: Any, sketch: int) -> Callable[[Any, int], None]:
    """Return a function that takes one batch the way a variant does."""
    if variant == "lora":
        wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))

        def lora(batch: Any, _index: int) -> None:
            wrapped(**batch, use_cache=False).loss.backward()
            wrapped.zero_grad(set_to_none=True)

        return lora
    sites = find_sites(model)
    targets = [site.target for site in sites]
    probes: list[Any] = []
    if variant in {"sketch", "both"}:
        probes.append(SketchProbe(targets, sketch, 0))
    if variant == "both":
        probes.append(MeanGradientProbe(targets, 40, 0))
    blocks = [sites]
    if variant == "dense":
        # Half the layers per pass: what a memory cap of half the gradients would ask for.
        middle = len(sites) // 2
        blocks = [sites[:middle], sites[middle:]]

    def measured(batch: Any, index: int) -> None:
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


def time_variants(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate the variants over the batches and return seconds and ratios."""
    model = load(args.model)
    batches = make_batches(model, args.batches, args.batch, args.length)
    names = [name for name in VARIANTS if name != "lora"]
    steps = {name: stepper(name, model, args.sketch) for name in names}
    times = _alternate(steps, batches, args.repeats)
    lora = load(args.model)
    pair = {"lora": stepper("lora", lora, args.sketch), "bare": steps["bare"]}
    times["lora"] = _alternate(pair, batches, args.repeats)["lora"]
    base = times["bare"]
    rows = {}
    for name, per_batch in times.items():
        least = sum(min(repeats) for repeats in per_batch)
        middle = sum(statistics.median(repeats) for repeats in per_batch)
        rows[name] = {
            "seconds": least,
            "ratio_min": least / sum(min(repeats) for repeats in base),
            "ratio_median": middle / sum(statistics.median(repeats) for repeats in base),
        }
    return rows


def _alternate(
    steps: dict[str, Callable[[Any, int], None]], batches: list[Any], repeats: int
) -> dict[str, list[list[float]]]:
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in steps}
    for step in steps.values():
        step(batches[0], 0)
    for _ in range(repeats):
        for index, batch in enumerate(batches):
            for name, step in steps.items():
                _synchronise()
                started = time.perf_counter()
                step(batch, index)
                _synchronise()
                times[name][index].append(time.perf_counter() - started)
    return times


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(args: argparse.Namespace) -> int:
    """Return the peak memory of this process after all batches of one variant, in bytes."""
    model = load(args.model)
    batches = make_batches(model, args.batches, args.batch, args.length)
    step = stepper(args.variant, model, args.sketch)
    for index, batch in enumerate(batches):
        step(batch, index)
    # The process is fresh, so its peak is that of these batches.
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sketch", type=int, default=64)
    parser.add_argument("--variant", choices=VARIANTS, help="internal: memory of one variant")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps({"peak": peak_memory(args)}))
        return
    rows = time_variants(args)
    if not args.no_memory:
        for name in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[name]["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])["peak"]
    base = rows["bare"].get("peak_bytes")
    print(f"{'variant':<10}{'s/batch':>9}{'time':>8}{'median':>8}{'peak MiB':>10}{'memory':>8}")
    for name in VARIANTS:
        row = rows[name]
        peak = row.get("peak_bytes")
        memory = f"{peak / 2**20:>10.0f}{peak / base:>8.3f}" if peak and base else ""
        print(
            f"{name:<10}{row['seconds'] / args.batches:>9.3f}{row['ratio_min']:>8.3f}"
            f"{row['ratio_median']:>8.3f}{memory}"
        )
    if args.out:
        settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
