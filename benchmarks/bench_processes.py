"""Measuring and training over one and two processes: seconds, and the bytes that they exchange.

Usage: python -m benchmarks.bench_processes [--steps 17] [--repeats 3] [--quick]

Every part runs in processes of its own, one or two (gloo on CPUs, NCCL on GPUs), with one thread
each unless told otherwise. Two processes share the mini-batches that one measures, and the rows of
the batches that one trains on. Bytes are counted where they are handed to torch: by
``gradrank.signals.distributed`` for what gradrank exchanges, and in DistributedDataParallel's
communication hook for the gradients that training itself exchanges. They do not depend on how
busy the machine is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.frame import ROOT, Bench, Found, Row, main, ratio_row
from benchmarks.setting import Batch, load, lora, make_batches, optimizer_of, stepper
from benchmarks.timing import ratio, synchronise, timed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import gradrank as gr
from gradrank.signals.distributed import bytes_exchanged

SIGNALS = {"measure spectrum": "spectrum", "measure mean-gradient": "mean-gradient"}
TIMEOUT = 1200
METHODS = ("uniform", "gard-dynamic", "igu", "igu-direction", "pilora")


def method_of(name: str, args: argparse.Namespace) -> Any:
    """Return a method that decides once, after the last step but one."""
    due = args.steps - 1
    looks = max(1, due // 2)
    pruned: dict[str, Any] = {"interval": due - 1, "warmup": 1, "final": 1, "score_every": looks}
    made: dict[str, Any] = {
        "gard-dynamic": lambda: gr.DynamicGard(interval=due, window=min(16, due)),
        "igu": lambda: gr.Igu(**pruned),
        "igu-direction": lambda: gr.IguDirection(**pruned),
        "pilora": lambda: gr.PiLora(interval=looks, initial_steps=due),
    }
    return made[name]()


def part(args: argparse.Namespace, wanted: str) -> Row:
    """Do one part in one of its processes; the figures go to a file."""
    asked = json.loads(wanted)
    gpu = torch.cuda.is_available()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(args.threads or 1)
    if gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if processes > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"file://{asked['folder']}/store",
            rank=rank,
            world_size=processes,
        )
    name = asked["name"]
    if name in SIGNALS:
        found = _measure(args, SIGNALS[name], rank, processes)
    else:
        found = _train(args, name, rank, processes)
    Path(asked["folder"], f"{rank}.json").write_text(json.dumps(found))
    if processes > 1:
        dist.destroy_process_group()
    return {}


def _measure(args: argparse.Namespace, signal: str, rank: int, processes: int) -> Row:
    model = load(args)
    mine = make_batches(args, model, args.batches)[rank::processes]
    gr.measure(model, mine[:1], signal, num_batches=1)
    before = bytes_exchanged()
    _together()
    seconds, found = timed(lambda: gr.measure(model, mine, signal, num_batches=len(mine)))
    assert found.batches == args.batches
    return {
        "seconds": seconds,
        "exchanged_bytes": bytes_exchanged() - before,
        "targets": len(found.targets),
    }


class _Gradients:
    """Bytes of the gradients that DistributedDataParallel exchanges."""

    def __init__(self) -> None:
        self.bytes = 0

    def hook(
        self, group: dist.ProcessGroup | None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """Count a bucket, and average it over processes."""
        flat = bucket.buffer()
        self.bytes += flat.numel() * flat.element_size()
        return allreduce_hook(group, bucket)


def _train(args: argparse.Namespace, name: str, rank: int, processes: int) -> Row:
    model, budget = lora(args, args.rank), f"uniform:{args.rank}"
    method = None if name == "uniform" else method_of(name, args)
    if method is not None:
        gr.reserve(model, method, budget)
    batches = [_share(batch, rank, processes) for batch in make_batches(args, model)]
    trained, gradients = model, _Gradients()
    if processes > 1:
        trained = DistributedDataParallel(model)
        trained.register_comm_hook(dist.group.WORLD, gradients.hook)
    optimizer = optimizer_of(trained)
    controller = None
    if method is not None:
        controller = gr.Controller(trained, optimizer, method, budget, args.steps)
    step = stepper(trained, optimizer, controller.step if controller else None)
    _together()
    synchronise()
    started = time.perf_counter()
    for number in range(args.steps):
        step(batches[number % len(batches)])
    synchronise()
    found: Row = {
        "seconds": time.perf_counter() - started,
        "gradient_bytes": gradients.bytes // args.steps,
    }
    if controller is not None:
        controller.close()
        (decision,) = controller.run.decisions
        found["targets"] = len(controller.ranks)
        found["exchanged_bytes"] = decision["bytes_exchanged"]
    return found


def _share(batch: Batch, rank: int, processes: int) -> Batch:
    return {key: value[rank::processes] for key, value in batch.items()}


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


def launch(args: argparse.Namespace, name: str, processes: int) -> Row:
    """Run a part in some processes; return the slowest one's seconds and the bytes of each."""
    with tempfile.TemporaryDirectory() as folder:
        plain = {k: v for k, v in vars(args).items() if k not in {"out", "part"}}
        wanted = {"part": json.dumps({"name": name, "folder": folder}), "args": plain}
        command = [sys.executable, "-m", "benchmarks.bench_processes", "--part", json.dumps(wanted)]
        threads = {"OMP_NUM_THREADS": str(args.threads or 1), "WORLD_SIZE": str(processes)}
        running = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **threads, "RANK": str(rank)},
            )
            for rank in range(processes)
        ]
        try:
            failed = any(process.wait(TIMEOUT) for process in running)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed:
            raise SystemExit(f"'{name}' over {processes} process(es) failed; see above.")
        rows = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(processes)]
    assert all({**row, "seconds": 0} == {**rows[0], "seconds": 0} for row in rows)
    return {**rows[0], "seconds": max(row["seconds"] for row in rows)}


def run(args: argparse.Namespace) -> Found:
    """Run every part over one and over two processes, in turn."""
    rows: dict[str, Row] = {}
    for name in (*SIGNALS, *METHODS):
        taken: dict[int, list[Row]] = {1: [], 2: []}
        for _ in range(args.repeats):
            for processes, found in taken.items():
                found.append(launch(args, name, processes))
        seconds = {count: [row["seconds"] for row in found] for count, found in taken.items()}
        for count, found in taken.items():
            against = f"{name}, 1 process"
            row = ratio_row(ratio(seconds[count], seconds[1]), sum(seconds[count]), against)
            row["seconds"] /= args.repeats
            facts = {k: v for k, v in found[0].items() if k != "seconds"}
            if "exchanged_bytes" in facts:
                facts["target_bytes"] = round(facts["exchanged_bytes"] / facts["targets"])
            rows[f"{name}, {count} process{'es' if count > 1 else ''}"] = row | facts
    return Found(
        rows,
        notes=[
            "Bytes are the payload that one process hands over, per measurement or per decision "
            "with all looks that it rests on. In two processes ranks are masked at a fixed shape, "
            "in one they are real, so a step is not the same work."
        ],
    )


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own flags."""
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16, help="mini-batches to measure, in all")
    parser.add_argument("--steps", type=int, default=17, help="with one decision before the last")
    parser.add_argument("--repeats", type=int, default=3)


BENCH = Bench(
    "processes",
    "Measuring and moving capacity over one and two processes; bytes exchanged per decision.",
    25,
    run,
    flags,
    {"steps": 5, "batches": 4, "repeats": 1},
    part,
    columns=(
        "seconds",
        "ratio",
        "exchanged_bytes",
        "target_bytes",
        "gradient_bytes",
        "targets",
    ),
)

if __name__ == "__main__":
    main(BENCH)
