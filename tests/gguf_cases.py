"""Tiny decoders, their base models as GGUF files, and llama.cpp itself where it is installed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from oracles.gguf_rotation import rotation

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Writer = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Decoder:
    """A kind of model: its configuration, and what its GGUF file says beside the sizes."""

    config: Callable[..., Any]
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: _SIZES)
    more: Writer | None = None
    norm_shift: float = 0.0
    rotary: bool = False
    # llama.cpp looks GELU up in a table of half precision.
    coarse: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        config = self.config(**{**self.sizes, **self.options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith(".bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape)
        return model.eval()


def _windows(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _gemma2(writer: Any, config: Any) -> None:
    _windows(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


DECODERS = {
    "llama": Decoder(LlamaConfig, "llama", rotary=True),
    "llama-tied": Decoder(LlamaConfig, "llama", {"tie_word_embeddings": True}, rotary=True),
    "mistral": Decoder(MistralConfig, "llama", rotary=True),
    "smollm3": Decoder(SmolLM3Config, "smollm3", rotary=True),
    "granite": Decoder(GraniteConfig, "granite", {
        "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }, more=_granite, rotary=True),
    "qwen2": Decoder(Qwen2Config, "qwen2"),
    "qwen3": Decoder(Qwen3Config, "qwen3", {"head_dim": 32}),
    "gemma": Decoder(GemmaConfig, "gemma", {"head_dim": 16}, norm_shift=1.0, coarse=True),
    "gemma2": Decoder(Gemma2Config, "gemma2", {
        "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16,
    }, more=_gemma2, norm_shift=1.0, coarse=True),
    "gemma3": Decoder(Gemma3TextConfig, "gemma3", {
        "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16,
    }, more=_windows, norm_shift=1.0, coarse=True),
    "phi": Decoder(PhiConfig, "phi2", {"num_key_value_heads": 4}, coarse=True),
    "phi3": Decoder(Phi3Config, "phi3", {"original_max_position_embeddings": 64}),
    "starcoder2": Decoder(Starcoder2Config, "starcoder2", coarse=True),
    "olmo2": Decoder(Olmo2Config, "olmo2"),
    "gpt2": Decoder(GPT2Config, "gpt2", sizes=_GPT2_SIZES, coarse=True),
}  # fmt: skip


def write_base(model: Any, decoder: Decoder, path: Path) -> None:
    """Write a base model as GGUF in float32, without llama.cpp's converter."""
    import gguf

    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    writer = gguf.GGUFWriter(path, decoder.architecture)
    _sizes(writer, config)
    if decoder.more:
        decoder.more(writer, config)
    _tokens(writer)
    names = gguf.get_tensor_name_map(kinds[decoder.architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _converted(name, tensor, config, decoder)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None)
                                   or 4 * config.hidden_size)  # fmt: skip
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            writer.add_layer_norm_eps(getattr(config, name))
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)


def _tokens(writer: Any) -> None:
    words = [f"word{i}" for i in range(VOCABULARY - 259)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _converted(name: str, tensor: Tensor, config: Any, decoder: Decoder) -> np.ndarray:
    if decoder.rotary and ("q_proj." in name or "k_proj." in name):
        heads = config.num_attention_heads if "q_proj." in name else config.num_key_value_heads
        tensor = tensor[rotation(tensor.shape[0], heads)]
    if decoder.norm_shift and name.endswith("norm.weight"):
        tensor = tensor + decoder.norm_shift
    if decoder.architecture == "gpt2" and ".c_" in name:
        tensor = tensor.t()
    return tensor.float().contiguous().numpy()


class Engine:
    """llama.cpp in this process: one model, and at most one adapter."""

    def __init__(self, engine: Any, base: Path, adapter: Path | None = None) -> None:
        options = engine.CommonParams()
        options.model.path = str(base)
        options.n_ctx = options.n_batch = 64
        options.n_parallel = 1
        options.n_gpu_layers = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = False
        options.verbosity = -1
        # Everything in single precision: what is left is the order of the sums.
        options.cache_type_k = options.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            found = engine.CommonAdapterLoraInfo()
            found.path = str(adapter)
            found.scale = 1.0
            options.lora_adapters = [found]
        self.server = engine.Server(options)

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """Of the token after each prefix, ``[len(ids), VOCABULARY]``."""
        return torch.stack([self._next(ids[: end + 1]) for end in range(len(ids))])

    def _next(self, prompt: list[int]) -> Tensor:
        # Half a character would hold the answer back, so a plain word is always chosen; what is
        # told are the probabilities before such preferences.
        answer = self.server.handle_completions({
            "prompt": prompt, "max_tokens": 1, "logprobs": VOCABULARY, "temperature": 0.0,
            "cache_prompt": False, "logit_bias": [[VOCABULARY - 1, 1e6]],
        })  # fmt: skip
        told = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full((VOCABULARY,), float("nan"))
        for item in told:
            found[item["id"]] = item["logprob"]
        return found


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """The same of a transformers model."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
