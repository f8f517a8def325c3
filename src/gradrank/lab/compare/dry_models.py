"""Models as shapes: from configurations alone, on the meta device, without a weight."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
)
from transformers.utils import logging as transformers_logging

from gradrank.core.errors import DataError, nearest
from gradrank.core.targets import Target
from gradrank.lab.arms import head_modules
from gradrank.lab.locate import known_models
from gradrank.lab.models import HEADS, check_head, model_head, position_limit
from gradrank.lab.tiny import TINY_MODELS
from gradrank.signals.facts import find_targets
from gradrank.signals.layers import base_parameters


def _llama(**sizes: Any) -> PreTrainedConfig:
    return LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **sizes)


def _qwen(**sizes: Any) -> PreTrainedConfig:
    return Qwen2Config(max_position_embeddings=32768, **sizes)


# Shapes as the models' publishers state them; nothing else of a configuration matters here.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "meta-llama/Llama-2-7b-hf": lambda: _llama(
        vocab_size=32000,
        intermediate_size=11008,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "meta-llama/Meta-Llama-3-8B": lambda: _llama(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "Qwen/Qwen2.5-0.5B": lambda: _qwen(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": lambda: _qwen(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "FacebookAI/roberta-large": lambda: RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
    ),
    # The defaults of both towers are ViT-B/32's.
    "openai/clip-vit-base-patch32": lambda: CLIPConfig(
        text_config=CLIPTextConfig().to_dict(), vision_config=CLIPVisionConfig().to_dict()
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "minilm-l6": lambda: BertConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        max_position_embeddings=512,
    ),
    "dinov2-small-focus": lambda: Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
    ),
    **TINY_MODELS,
}


@dataclass(frozen=True)
class Outline:
    """A model without weights, and what follows from its shapes.

    Attributes:
        name: As in the recipe.
        source: Where the shapes come from, in words.
        kind: Class of the model.
        targets: Modules that the recipe adapts, in model order.
        base_parameters: Parameters of the model with its head, tied ones counted once.
        head_parameters: Parameters of the task head, trained with every arm; 0 without one.
        max_length: Longest sequence it has positions for, tokens; None without a limit.
    """

    name: str
    source: str
    kind: str
    targets: tuple[Target, ...]
    base_parameters: int
    head_parameters: int
    max_length: int | None


def config_of(spec: str) -> tuple[PreTrainedConfig, str]:
    """Return a model's configuration without loading or fetching anything.

    Args:
        spec: A model as a recipe names it.

    Returns:
        The configuration, and where it comes from.

    Raises:
        DataError: If its shapes are not known here.
    """
    if spec in CONFIGS:
        return CONFIGS[spec](), "built in"
    folder = Path(spec).expanduser()
    if folder.is_dir():
        path, source = folder / "config.json", "local folder"
        if not path.is_file():
            raise DataError(f"folder '{spec}' holds no model: config.json is missing.")
    else:
        path, source = spec, "hub cache"
    try:
        with quietly():
            found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"the shapes of model '{spec}' are not known here: it is no folder, and its "
            f"config.json is not in the hub's cache ({reason}). Give a folder that holds its "
            f"config.json, or fetch that file first. {nearest(spec, [*CONFIGS, *known_models()])}"
        ) from error
    return found, source


def empty_model(spec: str, head: str, classes: int) -> nn.Module:
    """Build a model with its task head on the meta device.

    Args:
        spec: The model.
        head: Head of the data.
        classes: Number of classes; not looked at where the head has none.

    Returns:
        The model; every parameter is on the meta device.
    """
    config = copy.deepcopy(config_of(spec)[0])
    kind = model_head(head)
    check_head(config, kind, spec)
    if kind != "lm":
        config.num_labels = classes
    with quietly(), torch.device("meta"):
        return HEADS[kind][0].from_config(config)


@lru_cache(maxsize=64)
def outline(spec: str, head: str, classes: int, targets: str) -> Outline:
    """Return what follows from a model's shapes.

    Args:
        spec: The model.
        head: Head of the data.
        classes: Number of classes.
        targets: ``all-linear`` or names of modules with commas between.

    Returns:
        The outline.
    """
    model = empty_model(spec, head, classes)
    heads = () if model_head(head) == "lm" else head_modules(model)
    config, source = config_of(spec)
    return Outline(
        name=spec,
        source=source,
        kind=type(model).__name__,
        targets=find_targets(model, targets),
        base_parameters=base_parameters(model),
        head_parameters=sum(base_parameters(model.get_submodule(name)) for name in heads),
        max_length=position_limit(config),
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide what the library remarks on a model that is being built.

    Yields:
        Nothing.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
