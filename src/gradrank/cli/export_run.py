"""The heavy part of ``gradrank export``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradrank.serving.installing import load_adapter
from gradrank.cli.console import Console
from gradrank.cli.source import Source
from gradrank.lab.models import LoadedModel, resolve_model
from gradrank.session import ExportReport, export

# What the logits are compared on: ordinary text, which random tokens are not.
_SENTENCES = (
    "The film begins slowly, but its last hour is as good as anything made that year.",
    "Water boils at a lower temperature on a mountain, because the air presses less upon it.",
)


def run(
    source: Source, target: str, out: Path, values: Mapping[str, Any], console: Console
) -> ExportReport:
    """Load base model and adapter, write, compare.

    Args:
        source: What is exported.
        target: ``peft`` or ``merged``.
        out: The folder to write.
        values: The verb's flags: ``device``, ``dtype``, ``trust_remote_code``, ``overwrite``.
        console: Told what is loaded.

    Returns:
        What was written, with the largest difference found.
    """
    dtype = values["dtype"]
    loaded = resolve_model(
        source.model,
        source.head,
        num_labels=len(source.label_names) or None,
        dtype=source.dtype or dtype if dtype == "auto" else dtype,
        device=values["device"],
        label_names=source.label_names,
        seed=source.seed,
        trust_remote_code=values["trust_remote_code"],
        say=console.say,
    )
    console.say(f"base model: {loaded.name} ({loaded.source})")
    model = load_adapter(loaded.model, source.folder)
    return export(
        model,
        out,
        target,
        inputs=check_inputs(loaded),
        tokenizer=(loaded.tokenizer or loaded.image_processor) if target == "merged" else None,
        overwrite=values["overwrite"],
    )


def check_inputs(loaded: LoadedModel) -> Any:
    """Return two sentences as model inputs; None for pictures, which the export makes itself.

    Args:
        loaded: The model with its tokenizer.
    """
    if loaded.tokenizer is None:
        return None
    return dict(
        loaded.tokenizer(
            list(_SENTENCES),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=min(64, loaded.max_length or 64),
            return_token_type_ids=False,
        )
    )
