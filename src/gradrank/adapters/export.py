"""Write an adapter, or the merged model, and prove that it computes what was trained."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gradrank.adapters.apply import all_or_nothing
from gradrank.core.errors import MeasurementError, OptionError, PlanError, nearest
from gradrank.core.files import new_folder

TARGETS = ("peft", "merged")
_CHECK = "gradrank_check"
# What PEFT raises for an adapter that is damaged or belongs to another model.
_MISFITS = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how well it agrees.

    Attributes:
        target: ``peft`` or ``merged``.
        folder: Where it stands.
        difference: Largest absolute difference of the logits on the check inputs.
        tolerance: Largest difference that was allowed.
        bytes: Size of all files.
    """

    target: str
    folder: Path
    difference: float
    tolerance: float
    bytes: int


def export(
    model: nn.Module,
    out: str | Path,
    target: str = "peft",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a trained adapter in a form that others load, with a check of its logits.

    ``peft`` writes the stock adapter and loads it back beside the trained one; the logits must
    be bitwise equal. ``merged`` adds the updates into the weights of a copy of the model and
    saves that; the logits may differ by rounding.

    Args:
        model: The PEFT model.
        out: Folder to write; appears only if the check passes.
        target: ``peft`` or ``merged``.
        inputs: Model inputs for the check; default: seeded random tokens or pixels.
        tokenizer: Saved beside the model, if given.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was written, with the largest difference found.

    Raises:
        OptionError: If the target is unknown.
        PlanError: If the model carries no adapter, cannot be merged, or the check fails; nothing
            is left behind.
    """
    if target not in TARGETS:
        raise OptionError(f"export target '{target}' is unknown. {nearest(target, TARGETS)}")
    if not isinstance(model, PeftModel):
        raise PlanError(
            f"a {type(model).__name__} carries no adapter to export. Pass the PeftModel that was "
            "trained."
        )
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in (inputs or check_inputs(model)).items()}
    with new_folder(Path(out), overwrite) as folder:
        before = logits(model, batch)
        write = _write_adapter if target == "peft" else _write_merged
        after = write(model, folder, batch)
        tolerance = 0.0 if target == "peft" else _merge_tolerance(before)
        difference = float((after - before).abs().max())
        if not difference <= tolerance:
            raise PlanError(
                f"the {target} export differs from the trained model by {difference:.3g} in its "
                f"logits, more than {tolerance:.3g}; nothing was written. Export in float32, or "
                "report this with the adapter's configuration."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return ExportReport(target, Path(out), difference, tolerance, size)


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a model's logits in evaluation mode, leaving its mode as it was.

    Args:
        model: The model.
        inputs: Its inputs.

    Returns:
        Logits, float32, on the CPU.

    Raises:
        MeasurementError: If they are not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        outputs = model.eval()(**inputs)
    finally:
        for module, training in modes:
            module.training = training
    values = outputs.logits.float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise MeasurementError("the model's logits are not finite; the adapter is not usable.")
    return values


def check_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return seeded random inputs that fit a model: two sequences of 16 tokens, or two images.

    Args:
        model: A model with a transformers configuration.

    Returns:
        Keyword arguments.

    Raises:
        OptionError: If the configuration names neither a vocabulary nor an image size.
    """
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if vocabulary := getattr(config, "vocab_size", None):
        ids = torch.randint(0, vocabulary, (2, 16), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        return batch
    if size := getattr(config, "image_size", None):
        height, width = size if isinstance(size, tuple | list) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    raise OptionError(
        "the model's configuration names no vocabulary and no image size, so check inputs cannot "
        "be made. Pass inputs={...} with a batch that the model takes."
    )


def load_adapter(base: nn.Module, folder: str | Path) -> PeftModel:
    """Load a stock PEFT adapter (safetensors only) onto its base model.

    Args:
        base: The base model.
        folder: The adapter's folder.

    Returns:
        The PEFT model.

    Raises:
        PlanError: If the folder holds no safetensors adapter, or it does not fit the model, which
            is then left as it was.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise PlanError(f"'{folder}' is no adapter: it has no {name} (pickles are not read).")
    try:
        with all_or_nothing(base), warnings.catch_warnings():
            # What these warn of is checked below, and refused.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="The following rank_pattern keys")
            warnings.filterwarnings("ignore", message="The following alpha_pattern keys")
            loaded: Any = PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
            _check_keys(loaded, folder / "adapter_model.safetensors")
    except _MISFITS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise PlanError(f"the adapter in '{folder}' does not fit this model: {reason}") from error
    return loaded


def _check_keys(model: PeftModel, file: Path) -> None:
    """Refuse weights that the model has no place for, and places that got no weight."""
    with safe_open(str(file), framework="pt") as stored:
        found = set(stored.keys())
    places = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(places - found)
    stray = sorted(key for key in found - places if ".lora_" in key)
    if missing or stray:
        what = f"it lacks '{missing[0]}'" if missing else f"'{stray[0]}' has no place in the model"
        raise ValueError(f"{what} ({len(missing)} missing, {len(stray)} left over)")


def _write_adapter(model: PeftModel, folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
    active = str(model.active_adapters[0])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in model.modules()]
    model.save_pretrained(str(folder), selected_adapters=[active])
    # PEFT puts every adapter but 'default' into a folder of its own.
    written = folder if (folder / "adapter_config.json").is_file() else folder / active
    try:
        # New layers draw random weights before they get the stored ones.
        with torch.random.fork_rng(devices=[]):
            model.load_adapter(str(written), _CHECK)
        model.set_adapter(_CHECK)
        return logits(model, batch)
    finally:
        model.set_adapter(active)
        if _CHECK in model.peft_config:
            model.delete_adapter(_CHECK)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        # Loading an adapter for inference puts the model into evaluation mode.
        for module, training in modes:
            module.training = training


def _write_merged(model: PeftModel, folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
    if getattr(model.get_base_model(), "is_quantized", False):
        raise PlanError(
            "the base model is quantised, and merging would round the update away. Export with "
            "target 'peft', or merge into the full-precision base."
        )
    merged: Any = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(folder))
    return logits(merged, batch)


def _merge_tolerance(reference: Tensor) -> float:
    """Rounding that merging may add: a thousandth of the logits' largest magnitude."""
    return 1e-3 * max(float(reference.abs().max()), 1.0)
