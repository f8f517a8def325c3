"""The heavy part of ``gradrank export``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrank.cli.console import Console
from gradrank.cli.source import Source
from gradrank.lab.models import LoadedModel, resolve_model
from gradrank.serving.check import check_inputs as random_inputs
from gradrank.serving.check import reference
from gradrank.serving.combining import combine
from gradrank.serving.installing import PeftModel, install, load_adapter
from gradrank.serving.reading import read_adapter
from gradrank.serving.summing import check_sum
from gradrank.session import ExportReport, export

# What the logits are compared on: ordinary text, which random tokens are not.
_SENTENCES = (
    "The film begins slowly, but its last hour is as good as anything made that year.",
    "Water boils at a lower temperature on a mountain, because the air presses less upon it.",
)


def run(
    sources: Sequence[Source], out: Path, values: Mapping[str, Any], console: Console
) -> tuple[ExportReport, float | None]:
    """Load base model and adapters, write, compare.

    Args:
        sources: What is exported; several are added up.
        out: The folder to write.
        values: The verb's flags.
        console: Told what is loaded.

    Returns:
        What was written, with the largest difference found; and for several adapters how far the
        combined one is from their sum.
    """
    first = sources[0]
    dtype = values["dtype"]
    loaded = resolve_model(
        first.model,
        first.head,
        num_labels=len(first.label_names) or None,
        dtype=first.dtype or dtype if dtype == "auto" else dtype,
        device=values["device"],
        label_names=first.label_names,
        seed=first.seed,
        trust_remote_code=values["trust_remote_code"],
        say=console.say,
    )
    console.say(f"base model: {loaded.name} ({loaded.source})")
    inputs = check_inputs(loaded)
    weights = list(values["weights"]) or [1.0] * len(sources)
    summed = None
    if len(sources) == 1 and not values["weights"]:
        model = load_adapter(loaded.model, first.folder)
    else:
        model, summed = _combined(loaded, sources, weights, inputs, values)
    report = export(
        model,
        out,
        values["target"],
        inputs=inputs,
        tokenizer=(loaded.tokenizer or loaded.image_processor)
        if values["target"] == "merged"
        else None,
        overwrite=values["overwrite"],
        dtype=values["save_dtype"],
        padding=values["padding"],
        budget=values["budget"],
        rank=values["rank"],
        requantise=values["requantise"],
    )
    return report, summed


def _combined(
    loaded: LoadedModel,
    sources: Sequence[Source],
    weights: Sequence[float],
    inputs: Any,
    values: Mapping[str, Any],
) -> tuple[PeftModel, float]:
    adapters = [read_adapter(source.folder) for source in sources]
    # Whoever names the base model has said that it is the base of all of them.
    whole, _ = combine(adapters, weights, same_base=values["model"] is not None)
    model = install(loaded.model, whole, "the combined adapter")
    batch = {k: v.to(loaded.model.device) for k, v in (inputs or random_inputs(model)).items()}
    wanted = reference(model, batch)
    return model, check_sum(model, adapters, weights, batch, wanted)


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
