"""One of two gloo processes: counts every collective call on data, apart from gradrank's count.

Started by torchrun as ``traffic_worker.py FOLDER``; writes ``FOLDER/RANK.json``.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import gradrank as gr
from cases import CASES, tiny_llama
from gradrank.adapters.stores import agree
from gradrank.signals import distributed

STEPS = 6
BUDGET = "uniform:2"
WINDOW = 2
METHODS: dict[str, Any] = {
    "gard-dynamic": gr.DynamicGard(
        interval=2, window=WINDOW, energy=0.6, beta=0.0, sketch_dim=8, grow="gradient"
    ),
    "pilora": gr.PiLora(rank=2, supplementary_rank=1, interval=1, initial_steps=3),
    "igu": gr.Igu(estimator="grid", segments=2, score_every=1, interval=2, warmup=1, final=3),
    "igu-direction": gr.IguDirection(
        segments=2, score_every=1, interval=2, warmup=1, final=3, tolerance=1e6
    ),
}


class Ledger:
    """What this process has put into torch's collective calls; those of DDP are not seen."""

    def __init__(self) -> None:
        self.bytes, self.calls = 0, 0
        for name, place in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1)):
            setattr(dist, name, self._wrap(getattr(dist, name), place))

    def _wrap(self, call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.bytes += args[place].untyped_storage().nbytes()
            self.calls += 1
            return call(*args, **kwargs)

        return counted


def run(name: str, rank: int, ledger: Ledger) -> dict[str, Any]:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    gr.reserve(model, METHODS[name], BUDGET)
    wrapped = DistributedDataParallel(model)
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=2e-2)
    seen, calls = [], []
    with gr.Controller(wrapped, optimizer, METHODS[name], BUDGET, STEPS) as controller:
        before, calls_before = ledger.bytes, ledger.calls
        for step in range(1, STEPS + 1):
            data = CASES["llama"].batch(torch.Generator().manual_seed(10 * step + rank))
            wrapped(**data).loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter, 1e-2)
            optimizer.step()
            decided = controller.step()
            optimizer.zero_grad()
            if decided is not None:
                seen.append(ledger.bytes - before)
                calls.append(ledger.calls - calls_before)
                before, calls_before = ledger.bytes, ledger.calls
    return {
        "stated": [d["bytes_exchanged"] for d in controller.run.decisions],
        "seen": seen,
        "calls": calls,
        "changed": [d["changed"] for d in controller.run.decisions],
        "targets": len(controller.run.ranks),
        "learned": sum(p.numel() for p in adapter),
    }


def incisions(values: torch.Tensor, carry: torch.Tensor) -> list[Any]:
    return [
        SimpleNamespace(values={"A": values}, carries={"A": SimpleNamespace(matrix=carry)}),
        SimpleNamespace(values={"A": values.new_zeros(0)}, carries={}),
    ]


def agreeing(rank: int, ledger: Ledger) -> dict[str, Any]:
    """Factors that are alike, and factors that differ."""
    found: dict[str, Any] = {}
    for name, mine in (("alike", 0), ("apart", rank)):
        values = torch.full((3, 5), 1.0 + mine, dtype=torch.bfloat16)
        carry = torch.eye(3, dtype=torch.float64) * (1 - 2 * mine)
        before = ledger.bytes
        agree(incisions(values, carry))
        found[name] = {"bytes": ledger.bytes - before, "values": values.tolist()}
        found[name]["carry"] = carry.tolist()
    return found


def buckets(rank: int, ledger: Ledger) -> dict[str, Any]:
    """Sums in several calls where a bucket is full, of two dtypes, one tensor empty."""
    distributed.BUCKET_BYTES = 40
    tensors = [torch.full((n,), float(n + rank)) for n in (4, 4, 20, 0, 1)]
    tensors.append(torch.full((2, 2), 3 + rank))
    before = ledger.calls
    distributed.sum_over_processes(tensors)
    return {"calls": ledger.calls - before, "sums": [t.flatten().tolist() for t in tensors]}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ledger = int(os.environ["RANK"]), Ledger()
    found: dict[str, Any] = {name: run(name, rank, ledger) for name in METHODS}
    found["total"] = {"stated": distributed.bytes_exchanged(), "seen": ledger.bytes}
    found["agree"] = agreeing(rank, ledger)
    found["buckets"] = buckets(rank, ledger)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
