"""One of two gloo processes: methods that prune or split under DistributedDataParallel.

Started as ``prune_worker.py FOLDER PART ...`` by torchrun or ``accelerate launch``; writes what it
found as ``FOLDER/PART-RANK.json`` and ``.safetensors``. Parts: the names of ``METHODS`` and
``NEURONS``, ``refusals`` and ``trainer``, and the last two with ``:METHOD`` behind them.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import gradrank as gr
from cases import CASES, tiny_llama
from gradrank.adapters.view import lora_sites

STEPS = 9
WORLD = 2
BUDGET = "uniform:2"
_SHORT: dict[str, Any] = {"interval": 2, "warmup": 1, "final": 3}
METHODS: dict[str, Any] = {
    "adalora": gr.AdaLora(**_SHORT),
    "grid": gr.Igu(estimator="grid", segments=2, score_every=1, **_SHORT),
    "direction": gr.IguDirection(segments=2, score_every=1, tolerance=1e6, **_SHORT),
    "unbiased": gr.Igu(score_every=1, segments=4, **_SHORT),
    "as-code": gr.Igu(estimator="as-code", segments=4, **_SHORT),
    "restart": gr.AdaLora(after="restart", **_SHORT),
}
# Looks in steps 2 and 4; the split after step 5.
_STAGES: dict[str, Any] = {"rank": 2, "interval": 2, "initial_steps": 5}
NEURONS: dict[str, Any] = {
    "pilora": gr.PiLora(supplementary_rank=1, **_STAGES),
    "pilora-warm": gr.PiLora(supplementary_rank=1, start="warm", **_STAGES),
    # Rows that are not dominant have no adapter, and micro-batches are not synchronised.
    "pilora-alone": gr.PiLora(supplementary_rank=0, rule="top_fraction", fraction=0.3, **_STAGES),
}
ALL = METHODS | NEURONS


def build() -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    return get_peft_model(tiny_llama(), config)


def batch(step: int, process: int) -> dict[str, torch.Tensor]:
    return CASES["llama"].batch(torch.Generator().manual_seed(10 * step + process))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # A large epsilon: where a gradient is zero but for rounding, Adam would make much of it.
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=2e-2, eps=1e-4)


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".lora_" in key}


def story(run: Any) -> dict[str, Any]:
    return {
        "ranks_over_time": run.ranks_over_time,
        "decisions": [{k: v for k, v in d.items() if k != "seconds"} for d in run.decisions],
        "budget": run.budget,
        "start": run.start_parameters,
        "neurons": run.neurons,
        "hits": {n: h.tolist() for n, h in getattr(run.course, "hits", {}).items()},
    }


def write(folder: Path, part: str, rank: int, facts: Any, weights: dict[str, Any]) -> None:
    (folder / f"{part}-{rank}.json").write_text(json.dumps(facts))
    stored = {key: value.detach().clone().contiguous() for key, value in weights.items()}
    save_file(stored, folder / f"{part}-{rank}.safetensors")


def loop(folder: Path, part: str, rank: int) -> None:
    """Every process takes its own batches; nobody says that shapes are to stay."""
    method, model = ALL[part], build()
    gr.reserve(model, method, BUDGET)
    assert all(site.masked for site in lora_sites(model, "default").values())
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(wrapped)
    shapes = [p.shape for p in model.parameters()]
    with gr.Controller(wrapped, optimizer, method, BUDGET, STEPS) as controller:
        for step in range(1, STEPS + 1):
            if part == "pilora-alone":
                halves(wrapped, batch(step, rank))
            else:
                wrapped(**batch(step, rank)).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert [p.shape for p in model.parameters()] == shapes
    assert gr.settle(model) == controller.ranks
    if rank == 0:
        model.save_pretrained(folder / f"{part}-adapter")
    write(folder, part, rank, story(controller.run), adapter(model))


def halves(wrapped: Any, whole: dict[str, torch.Tensor]) -> None:
    """Micro-batches of two rows and of one, of which the last alone is synchronised."""
    first, last = ({key: value[part] for key, value in whole.items()} for part in _PARTS)
    with wrapped.no_sync():
        (wrapped(**first).loss * 2 / 3).backward()
    (wrapped(**last).loss / 3).backward()


_PARTS = (slice(0, 2), slice(2, 3))


def refusals(folder: Path, rank: int, name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    method, found = ALL[name], {}

    def refused(what: str, work: Any) -> None:
        try:
            work()
        except gr.SurgeryError as error:
            found[what] = str(error)

    resizing: Any = build()
    gr.reserve(resizing, method, BUDGET, fixed=False)
    live = DistributedDataParallel(resizing)
    refused("shapes", lambda: gr.Controller(live, adamw(live), method, BUDGET, STEPS))
    plain = DistributedDataParallel(build())
    refused("plain", lambda: gr.Controller(plain, adamw(plain), method, BUDGET, STEPS))
    sharded: Any = build()
    gr.reserve(sharded, method, BUDGET)
    fully_shard(sharded)
    refused("fsdp", lambda: gr.Controller(sharded, adamw(sharded), method, BUDGET, STEPS))
    late: Any = build()
    fully_shard(late)
    refused("late", lambda: gr.reserve(late, method, BUDGET))
    (folder / f"refusals-{rank}.json").write_text(json.dumps(found))


class Sentences(Dataset):
    def __len__(self) -> int:
        return 2 * WORLD * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = CASES["llama"].batch(torch.Generator().manual_seed(index))
        return {key: value[0] for key, value in made.items()}


def make_trainer(out: Path, name: str) -> tuple[Any, gr.CapacityCallback]:
    from transformers import Trainer, TrainingArguments

    capacity = gr.CapacityCallback(ALL[name], BUDGET)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        save_steps=4,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(build(), arguments, train_dataset=Sentences(), callbacks=[capacity])
    return gr.prepare_trainer(trainer), capacity


def trainer(folder: Path, rank: int, name: str) -> None:
    made, capacity = make_trainer(folder / "trainer-out", name)
    made.train()
    write(folder, "trainer", rank, story(capacity.run), adapter(made.model))
    for step in (4, 8):
        again, capacity = make_trainer(folder / "trainer-out", name)
        again.train(resume_from_checkpoint=str(folder / "trainer-out" / f"checkpoint-{step}"))
        write(folder, f"trainer-resumed-{step}", rank, story(capacity.run), adapter(again.model))


def main(folder: Path, parts: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    named = {part.partition(":")[0]: part.partition(":")[2] for part in parts}
    if "trainer" in named:
        trainer(folder, rank, named["trainer"] or "unbiased")
    else:
        dist.init_process_group("gloo")
    for part in named:
        if part in ALL:
            loop(folder, part, rank)
    if "refusals" in named:
        refusals(folder, rank, named["refusals"] or "adalora")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
