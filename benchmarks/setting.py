"""What benchmarks work on: a model, batches of random tokens, LoRA, and steps of training."""

import argparse
import gc
import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model

from gradrank.lab.memory import PeakMemory
from gradrank.lab.models import resolve_model

# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], Any]


def load(args: argparse.Namespace) -> Any:
    """Return the base model on the best device, in the dtype of its file."""
    return resolve_model(args.model, "lm").model


def make_batches(args: argparse.Namespace, model: Any, count: int = 8) -> list[Batch]:
    """Return seeded batches of random tokens (time does not depend on the tokens)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, args.length)
    device = next(model.parameters()).device
    drawn = [
        torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
        for _ in range(count)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def lora(args: argparse.Namespace, rank: int) -> Any:
    """Return a model with uniform LoRA on all linear layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(load(args), config)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Return AdamW over what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def stepper(
    model: Any, optimizer: torch.optim.Optimizer, after: Callable[[], Any] | None = None
) -> Step:
    """Return one step of training, with something to do after the optimizer's."""

    def step(batch: Batch) -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        if after is not None:
            after()
        optimizer.zero_grad(set_to_none=True)

    return step


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of what an optimizer trains, and of its moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*parameters, *(v for v in moments if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


def resident() -> int:
    """Return what this process holds now, in bytes: on the accelerator if there is one."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak_over(work: Callable[[], Any], before: int) -> dict[str, int]:
    """Do something and return the highest point of memory, in bytes.

    Args:
        work: What to do.
        before: What the process held before the model was built: Python and its libraries.

    Returns:
        ``peak_bytes``: the highest point above that, model included.
    """
    gc.collect()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with PeakMemory(device) as memory:
        work()
    return {"peak_bytes": memory.peak - before}
