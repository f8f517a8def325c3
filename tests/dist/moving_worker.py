"""One of two gloo processes under torchrun: capacity that moves at fixed shapes.

Started as ``moving_worker.py FOLDER PART``; writes what it found as ``FOLDER/PART-RANK.json`` and
``.safetensors``. Parts: ``ddp``, ``fsdp2``, ``accelerate``, ``trainer``,
``sharded-trainer``, ``zero2``.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import gradrank as gr
from cases import CASES, tiny_llama

STEPS = 9
WORLD = 2
METHOD = gr.DynamicGard(interval=2, window=2, energy=0.6, beta=0.0, sketch_dim=8, max_delta=2)
BUDGET = "uniform:3"


def build() -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    return get_peft_model(tiny_llama(), config)


def batch(step: int, process: int) -> dict[str, torch.Tensor]:
    return CASES["llama"].batch(torch.Generator().manual_seed(10 * step + process))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def loop(
    model: nn.Module, optimizer: Any, rank: int, backward: Callable[[Any], Any] | None = None
) -> gr.Controller:
    """A loop of one's own; every process takes its own batches."""
    controller = gr.Controller(model, optimizer, METHOD, BUDGET, STEPS)
    for step in range(1, STEPS + 1):
        loss = model(**batch(step, rank)).loss
        backward(loss) if backward else loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return controller


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def report(folder: Path, part: str, rank: int, run: Any, weights: dict[str, Any]) -> None:
    facts = {
        "ranks_over_time": run.ranks_over_time,
        "parameters": [decision["parameters"] for decision in run.decisions],
        "budget": run.decisions[0]["budget"],
    }
    (folder / f"{part}-{rank}.json").write_text(json.dumps(facts))
    stored = {key: whole(value).contiguous() for key, value in weights.items()}
    save_file(stored, folder / f"{part}-{rank}.safetensors")


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".lora_" in key}


def refused_without_reserve(folder: Path, rank: int) -> None:
    model = build()
    wrapped = DistributedDataParallel(model)
    try:
        gr.Controller(wrapped, adamw(wrapped), METHOD, BUDGET, STEPS)
    except gr.SurgeryError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


def ddp(folder: Path, rank: int) -> None:
    refused_without_reserve(folder, rank)
    model = build()
    gr.reserve(model, METHOD, BUDGET)
    wrapped = DistributedDataParallel(model)
    controller = loop(wrapped, adamw(wrapped), rank)
    gr.settle(model)
    if rank == 0:
        model.save_pretrained(folder / "ddp-adapter")
    report(folder, "ddp", rank, controller.run, adapter(model))


def fsdp2(folder: Path, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = build()
    gr.reserve(model, METHOD, BUDGET)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    controller = loop(model, adamw(model), rank)
    report(folder, "fsdp2", rank, controller.run, adapter(model))


def accelerate(folder: Path, rank: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build()
    gr.reserve(model, METHOD, BUDGET)
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    controller = loop(wrapped, optimizer, rank, accelerator.backward)
    gr.settle(model)
    report(folder, "accelerate", rank, controller.run, adapter(model))


def zero2(folder: Path, rank: int) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = build()
    gr.reserve(model, METHOD, BUDGET)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=config,
    )
    controller = gr.Controller(engine, optimizer, METHOD, BUDGET, STEPS)
    for step in range(1, STEPS + 1):
        engine.backward(engine(**batch(step, rank)).loss)
        engine.step()
        controller.step()
    gr.settle(model)
    report(folder, "zero2", rank, controller.run, adapter(model))


class Sentences(Dataset):
    def __len__(self) -> int:
        return 2 * WORLD * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = CASES["llama"].batch(torch.Generator().manual_seed(index))
        return {key: value[0] for key, value in made.items()}


def make_trainer(out: Path, **more: Any) -> tuple[Any, gr.CapacityCallback]:
    from transformers import Trainer, TrainingArguments

    capacity = gr.CapacityCallback(METHOD, BUDGET)
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
        **more,
    )
    trainer = Trainer(build(), arguments, train_dataset=Sentences(), callbacks=[capacity])
    return gr.prepare_trainer(trainer), capacity


def trainer(folder: Path, rank: int) -> None:
    made, capacity = make_trainer(folder / "trainer-out")
    made.train()
    report(folder, "trainer", rank, capacity.run, adapter(made.model))
    again, capacity = make_trainer(folder / "trainer-out")
    again.train(resume_from_checkpoint=str(folder / "trainer-out" / "checkpoint-4"))
    report(folder, "trainer-resumed", rank, capacity.run, adapter(again.model))


def shard_on_the_cpu() -> None:
    """Let accelerate shard on a machine without GPU, where it falls back to DDP silently."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def sharded_trainer(folder: Path, rank: int) -> None:
    shard_on_the_cpu()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config["cpu_ram_efficient_loading"] = False
    sharded = {"fsdp": True, "fsdp_config": config}
    made, capacity = make_trainer(folder / "sharded-out", **sharded)
    made.train()
    assert "FSDP" in type(made.model).__name__
    report(folder, "sharded-trainer", rank, capacity.run, adapter(made.model))
    again, capacity = make_trainer(folder / "sharded-out", **sharded)
    again.train(resume_from_checkpoint=str(folder / "sharded-out" / "checkpoint-4"))
    report(folder, "sharded-trainer-resumed", rank, capacity.run, adapter(again.model))


PARTS = {
    "sharded-trainer": sharded_trainer,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "accelerate": accelerate,
    "trainer": trainer,
    "zero2": zero2,
}


def main(folder: Path, parts: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if set(parts) <= {"ddp", "fsdp2", "accelerate"}:
        dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    for part in parts:
        PARTS[part](folder, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
