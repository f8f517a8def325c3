"""``gradrank plan --dry-run``: what a model would take, from its configuration alone."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from gradrank.cli.console import Console
from gradrank.cli.lengths import rehearsed
from gradrank.cli.settings import Settings
from gradrank.cli.tables import table
from gradrank.core.bytesize import parse_bytes
from gradrank.core.bytesize import spoken_bytes as size
from gradrank.core.errors import OptionError
from gradrank.lab.environment import DTYPES
from gradrank.lab.measured import measured_signals
from gradrank.lab.sized import Inquiry, Measuring, Sizes, Training
from gradrank.lab.sizes import seconds
from gradrank.lab.sizing import size_up
from gradrank.methods.registry import create

COUNTED = (
    "Counted: weights, living tensors of one forward and backward pass without padding (autograd's "
    "and the probes' included), statistics, gradients, AdamW's moments."
)
NOT_COUNTED = (
    "Not counted: the allocator's fragmentation and caches, CUDA's context and library workspaces "
    "(on a GPU about 0.5 to 1.5 GiB), masks of padded batches, extra passes of methods that score "
    "while training, loading the weights."
)


def run(chosen: Settings, bits: int | None, tflops: float | None, console: Console) -> None:
    """Size a model up, and tell.

    Args:
        chosen: What was asked for.
        bits: Bits of quantised weights, or None.
        tflops: Throughput that is reached, 10¹² FLOPs per second, or None.
        console: Where it is told.
    """
    asked = inquiry(chosen, bits)
    console.say(f"running {asked.model} on shapes; no weights or data are read")
    found = size_up(asked)
    speed, hint = tflops, False
    if speed is None and not asked.gpu:
        speed, hint = cpu_tflops(), True
    _tell(console, found, speed, hint)
    times = None if speed is None else _times(found, speed)
    console.result(
        {
            **found.to_dict(),
            "tflops": speed,
            "tflops_from": None if speed is None else ("matrix products here" if hint else "flag"),
            "seconds": times,
            "verdict": verdict(found),
            "counted": COUNTED,
            "not_counted": NOT_COUNTED,
        }
    )


def inquiry(chosen: Settings, bits: int | None) -> Inquiry:
    """Return what is to be sized up.

    Args:
        chosen: What was asked for.
        bits: Bits of quantised weights, or None.

    Returns:
        The inquiry. ``auto`` means a GPU where there is one, where weights are quantised, or where
        the dtype is a GPU's.

    Raises:
        OptionError: If the device or dtype makes no sense.
    """
    device = chosen.device.partition(":")[0]
    if device not in {"auto", "cpu", "cuda"}:
        raise OptionError(f"unknown device '{chosen.device}'. Known: auto, cpu, cuda.")
    likely = bits is not None or chosen.dtype in {"bfloat16", "float16"}
    gpu = device == "cuda" or (device == "auto" and (likely or torch.cuda.is_available()))
    dtype = chosen.dtype if chosen.dtype in DTYPES else ("bfloat16" if gpu else "float32")
    if dtype == "float16" and not gpu:
        raise OptionError("dtype 'float16' is not usable for training on a CPU. Use 'float32'.")
    method: Any = create(chosen.method, rehearsed(chosen).options)
    return Inquiry(
        model=str(chosen.model),
        head=chosen.head,
        method=chosen.method,
        options=tuple(sorted((rehearsed(chosen).options or {}).items())),
        budget=chosen.budget,
        targets=chosen.targets,
        signals=measured_signals(method),
        batches=chosen.batches,
        batch_size=chosen.batch_size,
        accumulate=chosen.accumulate,
        length=chosen.max_length,
        dtype=dtype,
        bits=bits,
        gpu=gpu,
        checkpoint=chosen.checkpoint,
        max_memory=None if chosen.max_memory is None else parse_bytes(chosen.max_memory),
    )


def cpu_tflops() -> float:
    """Return the throughput of matrix products on this CPU: a bound, not what models reach."""
    a, best = torch.ones(512, 512), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * 512**3 / best / 1e12


def verdict(found: Sizes) -> str:
    """Return in a line what the peak is and what would lower it.

    Args:
        found: The sizes.

    Returns:
        The line.
    """
    parts: dict[str, Measuring | Training] = {"a training step": found.training}
    if found.measuring is not None:
        parts["measuring"] = found.measuring
    name = max(parts, key=lambda key: parts[key].device)
    part = parts[name]
    advice = []
    if part.activations >= part.device / 3:
        advice.append(
            f"activations ({size(part.activations)}) grow with --batch-size (keep the mini-batch "
            "with --accumulate) and --max-length"
        )
        if found.checkpointed is not None and name == "a training step":
            less = size(found.checkpointed.device)
            advice.append(f"with --gradient-checkpointing it takes {less}")
        if found.measuring_checkpointed is not None and name == "measuring":
            less = size(found.measuring_checkpointed.device)
            advice.append(f"with --checkpoint it takes {less}")
    if part.weights >= part.device / 3:
        bits = found.inquiry.bits
        advice.append(
            "the weights are most of it"
            + ("" if bits else f"; --quantised 4 makes them {size(found.packed)}")
        )
    return f"peak {size(part.device)}, in {name}: " + "; ".join(
        advice or ["lower --budget: the adapter and its optimizer are most of it"]
    )


def _times(found: Sizes, tflops: float) -> dict[str, float | None]:
    part = found.measuring
    work = None if part is None else part.forward + part.backward + part.projections
    again = found.checkpointed
    return {
        "measuring": None if work is None else seconds(work, tflops),
        "training_step": seconds(found.training.flops, tflops),
        "checkpointed_step": None if again is None else seconds(again.flops, tflops),
    }


def _tell(console: Console, found: Sizes, speed: float | None, hint: bool) -> None:
    about, asked, counts = found.outline, found.inquiry, found.parameters
    bits = f", {asked.bits}-bit weights" if asked.bits else ""
    each = f" x {found.length} tokens" if found.length else ""
    console.show(
        f"{about.name} ({about.kind}, shapes {about.source}), {asked.dtype}{bits}, for a "
        f"{'GPU' if asked.gpu else 'CPU'}; {asked.batch_size}{each}, {asked.batches} mini-batches",
        f"parameters: {counts.base:,} in the base model, {counts.targets} targets",
        table(
            "Targets",
            ("type", "number", "parameters"),
            [(kind, number, f"{many:,}") for kind, (number, many) in counts.by_type.items()],
        ),
        f"budget {asked.budget}: {counts.budget:,} adapter parameters ({counts.share:.2%} of the "
        f"base model), uniform LoRA of rank {counts.uniform_rank} "
        f"({counts.rank_one:,} per rank); saved adapter {size(counts.adapter_bytes)}"
        + (f"; a head of {counts.head:,} parameters beside it" if counts.head else ""),
    )
    if counts.peak > counts.budget:
        console.show(f"{asked.method} has up to {counts.peak:,} adapter parameters while training")
    console.show(_memory(found), *_work(found, speed, hint))
    console.show(COUNTED, NOT_COUNTED, verdict(found))


def _memory(found: Sizes) -> Any:
    names = ("weights", "adapter", "gradients", "moments", "activations", "statistics", "workspace")
    columns: list[tuple[str, Measuring | Training]] = [("training step", found.training)]
    if found.measuring is not None:
        columns.insert(0, ("measuring", found.measuring))
    if found.measuring_checkpointed is not None:
        columns.insert(1, ("with --checkpoint", found.measuring_checkpointed))
    if found.checkpointed is not None:
        columns.append(("with checkpointing", found.checkpointed))
    rows: list[Sequence[str]] = []
    for name in (*names, "device"):
        values = [getattr(part, name, None) for _, part in columns]
        if any(values):
            label = "peak on the device" if name == "device" else name
            rows.append([label, *("-" if value is None else size(value) for value in values)])
    return table("Memory", ("", *(name for name, _ in columns)), rows)


def _work(found: Sizes, speed: float | None, hint: bool) -> list[str]:
    lines, part = [], found.measuring
    times = {} if speed is None else _times(found, speed)
    if part is None:
        lines.append(f"{found.inquiry.method} measures nothing beforehand")
    else:
        many = f"{part.passes} passes over " if part.passes > 1 else ""
        unit = "tokens" if found.length else "examples"
        lines += [
            f"measuring: statistics {size(part.host)} on the host, {size(part.stored)} on disk; "
            f"{many}{found.tokens:,} {unit}",
            f"           {part.forward:.3g} FLOPs forward, {part.backward:.3g} backward, "
            f"{part.projections:.3g} for the statistics ({part.overhead:.1%} more)"
            + _spoken(times.get("measuring")),
        ]
        if part.checkpointed or found.inquiry.max_memory is not None:
            cap = found.inquiry.max_memory
            lines.append(
                f"           {'checkpointed' if part.checkpointed else 'not checkpointed'}, "
                f"{part.passes} pass{'es' if part.passes > 1 else ''}"
                + (
                    ""
                    if cap is None
                    else f": {size(part.activations + part.statistics)} beyond "
                    f"the model, --max-memory {size(cap)}"
                )
            )
    lines.append(
        f"a training step: {found.training.flops:.3g} FLOPs" + _spoken(times.get("training_step"))
    )
    if found.checkpointed is not None:
        lines[-1] += f"; with checkpointing {found.checkpointed.flops:.3g}" + _spoken(
            times.get("checkpointed_step")
        )
    if hint and speed is not None:
        lines.append(
            f"seconds at {speed * 1000:,.0f} GFLOP/s, which matrix products reach on this CPU now; "
            "models reach less, often a third. Give --tflops for what yours reaches."
        )
    return lines


def _spoken(value: float | None) -> str:
    return "" if value is None else f", {value:,.3g} s"
