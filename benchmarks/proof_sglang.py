"""SGLang's own LoRA code on a mixed-rank adapter: our export, and PEFT's ordinary save.

Usage, with a Python that has SGLang and gradrank: python benchmarks/proof_sglang.py
    [--shapes tiny|smollm2-135m|both] [--policy constant|alpha/r|rslora] [--dtype float32|bfloat16]
    [--double]

Runs on a CPU, without SGLang's compiled kernels. Real, of the installed release: LoRAManager with
its reading and validation of the configuration, reading and fusing of the weights, the memory pool
and its copies, and the forward of the real linear layers through the backend "torch_native". Not
real: the model around the layers is a skeleton (a decoder's linear layers with weights of zero, no
attention), so that what a layer returns for the identity is the update alone; the batch is a plain
namespace; the compiled package sgl_kernel and two operators of torchvision are empty stand-ins if
they are missing; pinned memory is ordinary memory. Prints, per form, the largest difference between
the updates that the layers apply and the true ones.
"""

# ruff: noqa: E402 - the engine is imported after what it needs on a CPU has been arranged

import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

ABSENT = ("sgl_kernel",)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives empty modules for compiled packages that are not installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return a specification for what is absent."""
        if fullname.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        """Return an empty module."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = _nothing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        """Do nothing."""


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


def _without_pinning(function: Any) -> Any:
    def made(*values: Any, pin_memory: bool = False, **options: Any) -> Any:
        del pin_memory
        return function(*values, **options)

    return made


sys.meta_path.append(Absent())
warnings.simplefilter("ignore")
if not torch.cuda.is_available():
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    torch.tensor, torch.zeros = _without_pinning(torch.tensor), _without_pinning(torch.zeros)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]

import sglang
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context, get_parallel

from gradrank.serving.engines.sglang import Sglang
from proof_adapters import FAILURES, SHAPES, Finding, arguments, case, check_double, compared, told

MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Skeleton(nn.Module):
    """The linear layers of a decoder under the names that SGLang gives them."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        layers = [_layer(config, dtype) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        for parameter in self.parameters():
            parameter.data.zero_()


def _layer(config: Any, dtype: torch.dtype) -> nn.Module:
    wide, high = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = wide // heads
    options: Any = {"bias": False, "params_dtype": dtype}
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict(
                {
                    "qkv_proj": QKVParallelLinear(wide, size, heads, groups, **options),
                    "o_proj": RowParallelLinear(heads * size, wide, **options),
                }
            ),
            "mlp": nn.ModuleDict(
                {
                    "gate_up_proj": MergedColumnParallelLinear(wide, [high, high], **options),
                    "down_proj": RowParallelLinear(high, wide, **options),
                }
            ),
        }
    )


def served(config: Any, folder: Path, dtype: torch.dtype, arguments: Any) -> dict[str, Tensor]:
    """Load an adapter into SGLang's layers and return what they add, by PEFT's module names.

    Args:
        config: The base model's configuration.
        folder: The adapter.
        dtype: Of the server.
        arguments: The server's arguments.
    """
    model: Any = Skeleton(config, dtype)
    reference = LoRARef(lora_name="proof", lora_path=str(folder), pinned=False)
    manager = LoRAManager(
        model, config, 2, LoadConfig(), dtype, arguments, "torch_native", lora_paths=[reference]
    )
    manager.fetch_new_loras({reference.lora_id})
    found: dict[str, Tensor] = {}
    for modules in manager.lora_modules:
        for name, layer in modules.items():
            stem, _, last = name.rpartition(".")
            count = layer.base_layer.input_size
            manager.prepare_lora_batch(_batch(reference.lora_id, count))
            with torch.no_grad():
                out, _ = layer(torch.eye(count, dtype=dtype))
            members = MEMBERS.get(last, (last,))
            sizes = list(getattr(layer.base_layer, "output_partition_sizes", [out.shape[1]]))
            parts = out.T.split(sizes)
            found |= {f"{stem}.{m}": part for m, part in zip(members, parts, strict=True)}
    return found


def _batch(adapter: str, tokens: int) -> Any:
    """Return one request of some tokens, with what LoRA asks of a batch."""
    return types.SimpleNamespace(
        lora_ids=[adapter],
        batch_size=1,
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens=torch.tensor([tokens], dtype=torch.int32),
        extend_seq_lens_cpu=[tokens],
        extend_num_tokens=tokens,
        extend_logprob_start_lens_cpu=[0],
        return_logprob=False,
        spec_info=None,
    )


def outcome(made: Any, folder: Path, dtype: torch.dtype, arguments: Any) -> Finding | Exception:
    """Serve one folder; an error of the engine's is an outcome too.

    Args:
        made: The case.
        folder: One of its folders.
        dtype: Of the server.
        arguments: The server's arguments.
    """
    try:
        found = served(made.config, folder, dtype, arguments)
    except FAILURES as error:
        return error
    return compared(made.adapter, found)


def main() -> None:
    """Run the proof."""
    options = arguments(__doc__ or "")
    logging.disable(logging.WARNING)
    print(f"SGLang {sglang.__version__}, policy {options.policy}, {options.dtype}")
    flags = {"device": "cpu", "enable_lora": True, "lora_backend": "torch_native"}
    with get_context().override_server_args(**flags) as server:
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29541", 0, "gloo")
        initialize_model_parallel(backend="gloo")
        get_parallel().override_permanently(tp_rank=0)
        if options.double:
            check_double(Sglang(), lambda c, f, _: served(c, f, torch.float32, server))
            return
        for shapes in SHAPES if options.shapes == "both" else (options.shapes,):
            dtype = getattr(torch, options.dtype)
            with case(shapes, Sglang(), options.policy, options.dtype) as made:
                told(shapes, "exported", outcome(made, made.exported, dtype, server))
                told(shapes, "ordinary", outcome(made, made.ordinary, dtype, server))


if __name__ == "__main__":
    main()
