"""What works here, found out by doing it with a tiny model: run as a process of its own.

A broken installation may not only raise but crash. So the trials run in a child of
``gradrank doctor`` that writes a line of JSON when it begins one and when it ends one.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding, guarded, reason

SECTION = "what works here"
DEVICES, BACKENDS = "devices", "backends"
TARGETS = ("peft", "vllm", "sglang", "llama.cpp", "merged")
_IMPORTS = ("transformers", "peft", "safetensors", "matplotlib", "accelerate", "datasets")
_STEPS = 6


@dataclass
class Bench:
    """What trials share.

    Attributes:
        folder: For files; removed at the end.
        trained: The model of the first trial, trained; later ones export it.
    """

    folder: Path
    trained: Any = field(default=None)


def devices(_bench: Bench) -> Iterator[Finding]:
    """Look at what PyTorch computes on."""
    import torch

    yield Finding(DEVICES, "cpu", OK, f"PyTorch uses {torch.get_num_threads()} threads here")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        told = f"{torch.cuda.get_device_name(index)}, {total / 2**30:.0f} GiB, "
        told += f"{free / 2**30:.1f} GiB free, {half}"
        yield Finding(DEVICES, f"cuda:{index}", OK, told)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        told = "PyTorch sees no CUDA device" + ("" if built else " (this is a build for the CPU)")
        fix = "nothing for small models; else a CUDA build of PyTorch and its driver"
        yield Finding(DEVICES, "cuda", NOTE, told, fix)
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        yield Finding(DEVICES, "mps", NOTE, "seen, but gradrank computes on cpu and cuda only")


def imports(_bench: Bench) -> Iterator[Finding]:
    """Import what is installed: a package can be there and broken."""
    for name in _IMPORTS:
        if importlib.util.find_spec(name) is None:
            continue  # among the packages it is told already
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises
            vital = name not in {"accelerate", "datasets"}
            fix = f"pip install --force-reinstall {name}"
            told = f"installed, but cannot be imported: {reason(error)}"
            yield Finding(BACKENDS, name, NO, told, fix, vital)


def planning(bench: Bench) -> Iterator[Finding]:
    """Do the main job: measure, allocate, apply, train."""
    import gradrank as gr

    model, batches = _model()
    plan = gr.plan(model, batches, method="gard", budget="uniform:2", num_batches=len(batches))
    bench.trained = gr.apply(plan, model)
    losses = list(_train(bench.trained, batches, None))
    fell = math.isfinite(losses[-1]) and losses[-1] < losses[0]
    where = next(model.parameters()).device
    told = f"measured, allocated and trained a tiny model on {where}: loss {losses[0]:.2f} to "
    fix = "" if fell else "gradrank doctor --json, and report it with that"
    done = OK if fell else NO
    yield Finding(SECTION, "plan and train", done, f"{told}{losses[-1]:.2f}", fix, True)


def dynamic(_bench: Bench) -> Iterator[Finding]:
    """Train with capacity that moves."""
    import gradrank as gr

    model, batches = _model()
    plan = gr.allocate(gr.measure(model, batches[:2], num_batches=2), "uniform", "uniform:2")
    wrapped = gr.apply(plan, model)
    decided = sum(1 for report in _train(wrapped, batches, "gard-dynamic") if report is not None)
    told = f"{decided} decisions in {_STEPS} steps of gard-dynamic"
    yield Finding(SECTION, "capacity that moves", OK if decided else NO, told)


def quantised(_bench: Bench) -> Iterator[Finding]:
    """Try a layer of 4 bits, and one of 8: forward, backward, measuring."""
    name = "bitsandbytes"
    if importlib.util.find_spec(name) is None:
        told = "bitsandbytes is not installed"
        yield Finding(SECTION, "4-bit and 8-bit bases", NOTE, told, f"pip install {name}")
        return
    bnb = importlib.import_module(name)
    for bits in (4, 8):
        yield from guarded(SECTION, f"{bits}-bit bases", lambda bits=bits: [_packed(bnb, bits)])


def _packed(bnb: Any, bits: int) -> Finding:
    import torch
    from torch import nn

    import gradrank as gr

    where = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 64, bias=False)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    model = nn.Sequential(nn.Linear(64, 64), layer).to(where)
    batches = [{"x": torch.randn(8, 64, device=where)} for _ in range(2)]
    # The layer on its own, and a gradient through it to the one before.
    found = gr.measure(
        model,
        batches,
        targets=["0", "1"],
        num_batches=2,
        loss_function=lambda chosen, batch: chosen(batch["x"]).square().mean(),
    )
    energies = [float(found.gram(target.name).trace()) for target in found.targets]
    good = all(math.isfinite(energy) and energy > 0 for energy in energies)
    told = f"bitsandbytes on {where}: forward, backward and measuring"
    return Finding(SECTION, f"{bits}-bit bases", OK if good else NO, told)


def exporting(bench: Bench) -> Iterator[Finding]:
    """Export the trained adapter to every target."""
    import gradrank as gr

    if bench.trained is None:
        planning_failed = "not tried, since no adapter could be trained"
        yield Finding(SECTION, "export", NO, planning_failed)
        return
    for target in TARGETS:
        try:
            done = gr.export(bench.trained, bench.folder / f"export-{target}", target=target)
        except Exception as error:  # one target must not hide the others
            yield Finding(SECTION, f"export to {target}", NO, reason(error))
        else:
            told = f"logits differ by at most {done.difference:.2g}"
            yield Finding(SECTION, f"export to {target}", OK, told)


def drawing(bench: Bench) -> Iterator[Finding]:
    """Draw a figure as PNG."""
    from gradrank.report.svg import canvas, finish, look

    with look():
        drawn = canvas(80, 60)
        drawn.add_axes((0.2, 0.2, 0.7, 0.7)).plot([0, 1], [0, 1])
        figure = finish(drawn, "trial", "Trial", "", {})
    path = bench.folder / "trial.png"
    figure.save(path)
    yield Finding(
        SECTION, "report with PNG figures", OK, f"a figure of {path.stat().st_size} bytes"
    )


def workers(_bench: Bench) -> Iterator[Finding]:
    """Start a process as ``compare --workers`` does."""
    from gradrank.cli.doctor_machine import usable_cores

    process = multiprocessing.get_context("spawn").Process(target=time.monotonic)
    process.start()
    process.join(120)
    if process.exitcode != 0:
        process.kill()
        told = f"a worker process ended with status {process.exitcode}"
        yield Finding(SECTION, "compare --workers", NO, told, "use --workers 1")
        return
    cores = usable_cores()
    told = f"up to {cores} of one thread each; more only if memory allows"
    yield Finding(SECTION, "compare --workers", OK, told)


def distributed(bench: Bench) -> Iterator[Finding]:
    """Look at what several processes can talk through; try gloo with one."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        told = "this build of PyTorch has no torch.distributed"
        yield Finding(BACKENDS, "several processes", NOTE, told, "train in one process")
        return
    known = {"nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    if dist.is_gloo_available():
        store = dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
            str(bench.folder / "store"), 1
        )
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        total = torch.ones(2)
        dist.all_reduce(total)
        dist.destroy_process_group()
        known = {"gloo": bool(total.sum() == 2), **known}
    there = ", ".join(name for name, works in known.items() if works)
    told = there or "neither gloo nor nccl"
    yield Finding(BACKENDS, "several processes", OK if there else NOTE, told)


TRIALS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "imports": imports,
    "devices": devices,
    "plan and train": planning,
    "capacity that moves": dynamic,
    "4-bit and 8-bit bases": quantised,
    "export": exporting,
    "report with PNG figures": drawing,
    "compare --workers": workers,
    "several processes": distributed,
}
VITAL = {"plan and train"}


def _model() -> tuple[Any, list[dict[str, Any]]]:
    """Return a tiny model on the device that runs would use, and batches."""
    import torch

    from gradrank.lab.models import resolve_model

    model = resolve_model("tiny-llama").model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 200, (4, 2, 12), generator=generator).to(next(model.parameters()).device)
    return model, [{"input_ids": one, "labels": one} for one in ids]


def _train(model: Any, batches: list[dict[str, Any]], method: str | None) -> Iterator[Any]:
    """Train on one batch; yield losses, or what a dynamic method decided."""
    import torch

    import gradrank as gr

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    controller = None
    if method is not None:
        few = {"interval": 2, "window": 2}
        controller = gr.Controller(model, optimizer, method, "uniform:2", _STEPS, options=few)
    model.train()
    for _ in range(_STEPS):
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        if controller is None:
            yield float(loss.detach())
        else:
            yield controller.step()
        optimizer.zero_grad()


def main(names: list[str]) -> None:
    """Run trials; one line of JSON on stdout when each begins, one when it ends.

    Args:
        names: Names in ``TRIALS``.
    """
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            _tell({"begun": name})
            found = guarded(SECTION, name, lambda name=name: list(TRIALS[name](bench)))
            vital = [Finding(**{**one.to_dict(), "vital": one.vital or name in VITAL})
                     for one in found]  # fmt: skip
            _tell({"ended": name, "findings": [one.to_dict() for one in vital]})


def _tell(message: dict[str, Any]) -> None:
    stream = sys.__stdout__
    assert stream is not None
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
