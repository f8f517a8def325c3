"""What moving capacity costs: dynamic GARD beside uniform LoRA and PEFT's AdaLoRA, in one run.

Usage: python benchmarks/bench_dynamic.py [--model smollm2-135m] [--steps 101] [--interval 50]

Three models train side by side on the same batches, step by step in turn, so that a slow minute
of the machine hits all of them. Reported are the sums over the whole run (decisions included)
as ratios to uniform LoRA, the medians of single steps, the seconds of each decision, and:

- resize    one edit of every target (half of them one rank down, half of them one up) beside one
            training step and beside building a PeftModel anew
- memory    bytes of factors, gradients and moments, and the resident set, before and after every
            target's rank falls from 64 to 8
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import gradrank as gr
from gradrank.adapters.apply import adapter_ranks
from gradrank.lab.models import resolve_model

# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def load(name: str) -> Any:
    """Return the base model on the best device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve_model(name, "lm", device=device).model


def make_batches(model: Any, args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return seeded random token batches (time does not depend on the tokens)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, args.length)
    device = next(model.parameters()).device
    drawn = [
        torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
        for _ in range(8)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Return AdamW over what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def lora(name: str, rank: int) -> Any:
    """Return a model with uniform LoRA on all linear layers."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(load(name), config)


Step = Callable[[dict[str, torch.Tensor]], Any]


def stepper(model: Any, optimizer: torch.optim.Optimizer, after: Callable[[], Any]) -> Step:
    """Return one training step, with something to do after the optimizer's."""

    def step(batch: dict[str, torch.Tensor]) -> Any:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        done = after()
        optimizer.zero_grad(set_to_none=True)
        return done

    return step


def variants(args: argparse.Namespace) -> tuple[dict[str, Step], Any]:
    """Return a training step per variant, and the controller of the dynamic one."""
    steps: dict[str, Step] = {}
    uniform = lora(args.model, args.rank)
    steps["uniform"] = stepper(uniform, optimizer_of(uniform), lambda: None)
    dynamic = lora(args.model, args.rank)
    optimizer = optimizer_of(dynamic)
    method = gr.DynamicGard(interval=args.interval, window=args.window, grow=args.grow)
    # One step more than is taken, so that the last decision falls into the run.
    controller = gr.Controller(
        dynamic, optimizer, method, f"uniform:{args.rank}", args.steps + args.warmup + 1
    )
    steps["gard-dynamic"] = stepper(dynamic, optimizer, controller.step)
    config = AdaLoraConfig(
        init_r=round(1.5 * args.rank),
        target_r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        total_step=args.steps + args.warmup,
        tinit=max(1, args.steps // 10),
        tfinal=max(1, args.steps // 5),
        deltaT=10,
    )
    adalora: Any = get_peft_model(load(args.model), config)
    count = iter(range(1, 10**9))
    steps["peft-adalora"] = stepper(
        adalora,
        optimizer_of(adalora),
        lambda: adalora.base_model.update_and_allocate(next(count)),
    )
    return steps, controller


def time_runs(args: argparse.Namespace) -> dict[str, Any]:
    """Let the variants take turns; return seconds per step and per decision."""
    steps, controller = variants(args)
    batches = make_batches(load(args.model), args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.warmup + args.steps):
        for name, step in steps.items():
            _synchronise()
            started = time.perf_counter()
            step(batches[number % len(batches)])
            _synchronise()
            if number >= args.warmup:
                seconds[name].append(time.perf_counter() - started)
    controller.close()
    base = seconds["uniform"]
    rows = {
        name: {
            "seconds": sum(taken),
            "ratio": sum(taken) / sum(base),
            "median": statistics.median(taken),
            "ratio_median": statistics.median(taken) / statistics.median(base),
        }
        for name, taken in seconds.items()
    }
    decisions = [
        {key: d[key] for key in ("step", "seconds", "moved", "changed", "parameters", "budget")}
        for d in controller.run.decisions
    ]
    return {"rows": rows, "decisions": decisions}


def time_resize(args: argparse.Namespace) -> dict[str, float]:
    """Time one edit of every target, a training step, and building the PeftModel anew."""
    model = lora(args.model, args.rank)
    optimizer = optimizer_of(model)
    step = stepper(model, optimizer, lambda: None)
    batches = make_batches(model, args)
    taken = []
    for batch in batches[:4]:
        started = time.perf_counter()
        step(batch)
        _synchronise()
        taken.append(time.perf_counter() - started)
    names = list(adapter_ranks(model))
    low, high = names[0::2], names[1::2]
    mixed: dict[str, Any] = {name: gr.Shrink(args.rank - 1) for name in low}
    mixed |= {name: gr.Grow(args.rank + 1) for name in high}
    started = time.perf_counter()
    gr.edit(model, mixed, optimizer)
    edited = time.perf_counter() - started
    started = time.perf_counter()
    gr.edit(model, {name: gr.Shrink(args.rank - 2) for name in names}, optimizer)
    shrunk = time.perf_counter() - started
    base = load(args.model)
    started = time.perf_counter()
    get_peft_model(base, LoraConfig(r=args.rank, target_modules="all-linear"))
    return {
        "step": min(taken[1:]),
        "edit_mixed": edited,
        "edit_all_shrink": shrunk,
        "rebuild": time.perf_counter() - started,
    }


def show_memory(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Return what adapter training holds at rank 64, and after shrinking to 8."""
    model = lora(args.model, 64)
    optimizer = optimizer_of(model)
    step = stepper(model, optimizer, lambda: None)
    batch = make_batches(model, args)[0]
    step(batch)
    rows = {"rank 64": _held(optimizer)}
    gr.edit(model, {name: gr.Shrink(8) for name in adapter_ranks(model)}, optimizer)
    rows["rank 8"] = _held(optimizer)
    step(batch)
    rows["rank 8, one step later"] = _held(optimizer)
    return rows


def _held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*parameters, *(v for v in moments if isinstance(v, torch.Tensor))]
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "resident": psutil.Process().memory_info().rss,
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print the tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--grow", choices=("random", "gradient"), default="random")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = time_runs(args)
    print(f"{'variant':<14}{'s/step':>9}{'whole run':>11}{'median':>9}")
    for name, row in found["rows"].items():
        print(
            f"{name:<14}{row['seconds'] / args.steps:>9.3f}{row['ratio']:>11.3f}"
            f"{row['ratio_median']:>9.3f}"
        )
    for d in found["decisions"]:
        print(
            f"decision after step {d['step']}: {d['seconds']:.2f} s, {d['changed']} targets, "
            f"{d['moved']:,} parameters moved, {d['parameters']:,} of {d['budget']:,} in use"
        )
    found["resize"] = time_resize(args)
    for name, value in found["resize"].items():
        share = value / found["resize"]["step"]
        print(f"{name:<16}{value:>8.3f} s{share:>8.2f} training steps")
    found["memory"] = show_memory(args)
    for name, row in found["memory"].items():
        print(
            f"{name:<26}{row['parameters']:>12,} parameters{row['bytes'] / 2**20:>9.1f} MiB held"
            f"{row['resident'] / 2**20:>9.0f} MiB resident"
        )
    if args.out:
        settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
