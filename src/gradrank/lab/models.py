"""Load the model that is to be fine-tuned: from a folder, a package, a hub, or built tiny.

Weights are read from safetensors only, and no code that comes with a model runs unless the caller
asks for it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from gradrank.core.errors import DataError, GradrankError, OptionError, nearest
from gradrank.core.switches import switched_on
from gradrank.lab.arms import stray_weights
from gradrank.lab.environment import resolve_device, resolve_dtype
from gradrank.lab.locate import Say, known_models, locate
from gradrank.lab.tiny import TINY_MODELS, byte_tokenizer, image_processor

HEADS: dict[str, tuple[Any, Any]] = {
    "lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "classification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
    "image": (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    # A decoder like any other: only the data differs.
    "instruct": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
}
# Families whose position table starts after the padding index.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer"}


def model_head(head: str) -> str:
    """Return the head that a model has for data of a head: ``lm`` for ``instruct``.

    Args:
        head: Head of the data.
    """
    return "lm" if head == "instruct" else head


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured and trained.

    Attributes:
        model: The model, on its device, in training-independent ``eval`` mode.
        tokenizer: Its tokenizer, with a padding token; None for images.
        image_processor: Its image processor; None for text.
        name: What the user gave (for a folder, its last part).
        source: Where it came from, in words.
        head: ``lm``, ``classification`` or ``image``.
        base_parameters: Parameters of the model, tied ones counted once.
        max_length: Longest sequence it has positions for, tokens; None if it has no limit.
    """

    model: PreTrainedModel
    tokenizer: Any
    image_processor: Any
    name: str
    source: str
    head: str
    base_parameters: int
    max_length: int | None


def resolve_model(
    spec: str,
    head: str = "lm",
    num_labels: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    label_names: Sequence[str] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    say: Say = None,
) -> LoadedModel:
    """Load a model with the head that the task needs.

    Args:
        spec: A local folder, a name in :func:`known_models`, or a name on the model hub.
        head: ``lm``, ``classification``, ``image`` or ``instruct`` (the same as ``lm``).
        num_labels: Number of classes; needed for the two classification heads.
        dtype: See :func:`gradrank.lab.environment.resolve_dtype`.
        device: See :func:`gradrank.lab.environment.resolve_device`.
        label_names: Names of the classes, written into the model's configuration.
        seed: Seed of a new head (and of all weights of a tiny model).
        trust_remote_code: Whether code that comes with a hub model may run. Never by default.
        say: Receives one line for each thing that takes time.

    Returns:
        The model with its tokenizer or image processor.

    Raises:
        OptionError: If an option is unknown or the model has no such head.
        DataError: If the model cannot be had or read.
    """
    if head not in HEADS:
        raise OptionError(f"unknown head '{head}'. {nearest(head, HEADS)}")
    head = model_head(head)
    if head != "lm" and (num_labels is None or num_labels < 2):
        raise OptionError(f"head '{head}' needs at least 2 classes; got {num_labels}.")
    where = resolve_device(device)
    weights = resolve_dtype(dtype, where)
    location, name, source = locate(spec, say)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tiny = location is None
    with _hub_errors(spec), _quietly():
        config = TINY_MODELS[spec]() if tiny else AutoConfig.from_pretrained(location, **common)
        check_head(config, head, name)
        if head != "lm":
            labels = list(label_names or (str(index) for index in range(num_labels or 0)))
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
            config.problem_type = "single_label_classification"
        processor = _processor(location, config, head, common)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if tiny:
                model = HEADS[head][0].from_config(config, dtype=weights)
            else:
                model = _load_weights(str(location), config, head, weights, common)
    if head != "image":
        _set_padding(processor, model, name)
    if head == "lm" and getattr(model, "loss_type", "") is None:
        # GPT-2's class name tells transformers 5 nothing; it would warn and then take this one.
        model.loss_type = "ForCausalLM"
    model.to(where)  # pyright: ignore[reportArgumentType] - a decorator hides the signature
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=None if head == "image" else processor,
        image_processor=processor if head == "image" else None,
        name=name,
        source=source,
        head=head,
        base_parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_length=position_limit(config),
    )


def check_head(config: PreTrainedConfig, head: str, name: str) -> None:
    """Refuse a head that the architecture does not have.

    Args:
        config: The model's configuration.
        head: ``lm``, ``classification`` or ``image``.
        name: The model's name, for the message.

    Raises:
        OptionError: If it has none.
    """
    usable = [known for known in HEADS if known == model_head(known) and _has_head(config, known)]
    if head not in usable:
        other = f"It can be used with: {', '.join(usable)}." if usable else "Choose another model."
        raise OptionError(
            f"model '{name}' ({config.model_type}) has no '{head}' head here"
            + (" (only decoders predict the next token). " if head == "lm" else ". ")
            + other
        )


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence a model has positions for.

    Args:
        config: The model's configuration.

    Returns:
        Tokens, or None if the architecture states no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return int(limit) - int(getattr(config, "pad_token_id", 1) or 0) - 1
    return int(limit)


def _has_head(config: PreTrainedConfig, head: str) -> bool:
    if type(config) not in HEADS[head][1]:
        return False
    if head == "lm":
        masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        return not config.is_encoder_decoder and (
            not masked or bool(getattr(config, "is_decoder", False))
        )
    return True


def _load_weights(
    location: str, config: PreTrainedConfig, head: str, dtype: torch.dtype, common: dict[str, Any]
) -> PreTrainedModel:
    model, report = HEADS[head][0].from_pretrained(
        location,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        # A classifier fine-tuned on other classes gets a new head of the right size.
        ignore_mismatched_sizes=head != "lm",
        output_loading_info=True,
        **common,
    )
    new = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    prefix = f"{model.base_model_prefix}."
    lost = sorted(
        key
        for key in new
        if head == "lm" or (key.startswith(prefix) and "pooler" not in key.split("."))
    )
    if lost:
        raise DataError(
            f"model '{location}' lacks {len(lost)} weights that its architecture needs, for "
            f"example '{lost[0]}': the files are incomplete or belong to another architecture."
        )
    stray = [] if head == "lm" else stray_weights(model, new)
    if stray:
        raise DataError(
            f"model '{location}' has no weights for '{stray[0]}', which is no part of a task head "
            "as gradrank knows them: it would stay random. Choose another model."
        )
    return model


def _processor(
    location: str | None, config: PreTrainedConfig, head: str, common: dict[str, Any]
) -> Any:
    if head == "image":
        if location is None:
            return image_processor()
        return AutoImageProcessor.from_pretrained(location, backend="pil", **common)
    if location is None:
        return byte_tokenizer(markers=config.model_type == "bert")
    return AutoTokenizer.from_pretrained(location, **common)


def _set_padding(tokenizer: Any, model: PreTrainedModel, name: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(
                f"the tokenizer of '{name}' has neither a padding nor an end token. Set one in its "
                f"tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _hub_errors(spec: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be read into one message."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, GradrankError):
            raise
        offline = switched_on("HF_HUB_OFFLINE")
        detail = str(error).strip().splitlines()
        mode = " HF_HUB_OFFLINE is set, so only its cache was searched." if offline else ""
        told = f"model '{spec}' could not be loaded ({detail[0] if detail else error!r})."
        if Path(spec).expanduser().is_dir():
            raise DataError(
                f"{told} The folder's files are damaged, or of an architecture that this version "
                "of transformers does not know. Fetch it again, or upgrade transformers."
            ) from error
        raise DataError(
            f"{told}{mode} A hub name needs the network; a local folder and these do not. "
            f"{nearest(spec, known_models())}"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide the library's loading bar and report; what is wrong with weights is checked here."""
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
