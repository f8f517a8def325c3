"""vLLM's own LoRA code on a mixed-rank adapter: our export, and PEFT's ordinary save.

Usage, with a Python that has vLLM and gradrank: python benchmarks/proof_vllm.py
    [--shapes tiny|smollm2-135m|both] [--policy constant|alpha/r|rslora] [--dtype float32|bfloat16]
    [--double]

Runs on a CPU, without vLLM's compiled kernels. Real, of the installed release: reading and
validation of the configuration, reading of the weights, packing of q/k/v and gate/up, copying into
the buffers of the real linear layers, and their forward through vLLM's torch kernels for CPUs. Not
real: the model around the layers is a skeleton (a decoder's linear layers with weights of zero, no
attention), so that what a layer returns for the identity is the update alone; the engine's
configuration is a plain namespace; the platform is set to "cpu", which the published CUDA build
does not detect. Prints, per form, the largest difference between the updates that the layers apply
and the true ones.
"""

# ruff: noqa: E402 - the engine is imported after what it needs on a CPU has been arranged

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
import vllm.platforms
from torch import Tensor, nn
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.llama import LlamaForCausalLM

from gradrank.serving.engines.vllm import Vllm, largest_rank
from proof_adapters import FAILURES, SHAPES, Finding, arguments, case, check_double, compared, told


class Skeleton(nn.Module, SupportsLoRA):
    """The linear layers of a decoder under the names that vLLM gives them."""

    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        layers = [_layer(config, dtype) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        for parameter in self.parameters():
            parameter.data.zero_()
        for module in self.modules():
            if isinstance(module, LinearBase):
                module.quant_method.process_weights_after_loading(module)


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


def served(config: Any, folder: Path, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load an adapter into vLLM's layers and return what they add, by PEFT's module names.

    Args:
        config: The base model's configuration.
        folder: The adapter.
        rank: The server's ``--max-lora-rank``.
        dtype: Of the server.
    """
    model: Any = Skeleton(config, dtype)
    tokens = max(config.hidden_size, config.intermediate_size)
    engine: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=1, max_num_batched_tokens=tokens),
        model_config=SimpleNamespace(
            get_vocab_size=lambda: config.vocab_size, hf_config=config, is_encoder_decoder=False
        ),
        lora_config=LoRAConfig(max_lora_rank=rank, lora_dtype=dtype),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
    )
    old = vllm.__version__.startswith("0.11.")
    worker = WorkerLoRAManager(engine, torch.device("cpu"), {}, *([[]] if old else []))
    worker.create_lora_manager(model, *([] if old else [engine]))
    worker.add_adapter(LoRARequest("proof", 1, str(folder)))
    manager = worker._adapter_manager
    found: dict[str, Tensor] = {}
    for name, layer in manager.modules.items():
        count = layer.input_size
        manager.set_adapter_mapping(LoRAMapping((1,) * count, (1,), is_prefill=True))
        with torch.no_grad():
            out, _ = layer(torch.eye(count, dtype=dtype))
        stem, _, last = name.rpartition(".")
        members = model.packed_modules_mapping.get(last, [last])
        parts = out.T.split(list(layer.output_slices))
        found |= {f"{stem}.{m}": part for m, part in zip(members, parts, strict=True)}
    return found


def outcome(made: Any, folder: Path, dtype: torch.dtype) -> Finding | Exception:
    """Serve one folder; an error of the engine's is an outcome too.

    Args:
        made: The case.
        folder: One of its folders.
        dtype: Of the server.
    """
    try:
        rank = largest_rank(made.adapter.max_rank)
        return compared(made.adapter, served(made.config, folder, rank, dtype))
    except FAILURES as error:
        return error


def main() -> None:
    """Run the proof."""
    options = arguments(__doc__ or "")
    print(f"vLLM {vllm.__version__}, policy {options.policy}, {options.dtype}")
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        if options.double:
            check_double(Vllm(), lambda c, f, r: served(c, f, largest_rank(r), torch.float32))
            return
        for shapes in SHAPES if options.shapes == "both" else (options.shapes,):
            dtype = getattr(torch, options.dtype)
            with case(shapes, Vllm(), options.policy, options.dtype) as made:
                told(shapes, "exported", outcome(made, made.exported, dtype))
                told(shapes, "ordinary", outcome(made, made.ordinary, dtype))


if __name__ == "__main__":
    main()
