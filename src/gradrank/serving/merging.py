"""Updates added into the weights, with what rounding does to them."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from gradrank.core.errors import OptionError, PlanError
from gradrank.ops.four_bit import keep_quantised_layout
from gradrank.serving.adapter import Adapter
from gradrank.serving.check import logits
from gradrank.serving.installing import beside
from gradrank.serving.merged import Merged, Rounding
from gradrank.serving.weights import Stock, dense, merged_weight, quantised


def write_merged(
    model: PeftModel,
    adapter: Adapter,
    folder: Path,
    batch: Mapping[str, Tensor],
    dtype: str | None = None,
    requantise: bool = False,
) -> Merged:
    """Write a base model with an adapter added into its weights, and read it back.

    Sums are taken in double precision and rounded once. The live model is not touched and not
    copied: new memory is taken for the merged weights only, and for the model that is read back.

    A quantised base is dequantised and becomes a full-precision model, unless it is to be
    requantised: then its own quantiser rounds the sums to codes again.

    Args:
        model: The PEFT model.
        adapter: The adapter to add: the live one, or a smaller form of it.
        folder: An existing folder.
        batch: The check inputs.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for all weights; default: as they are.
        requantise: Whether to write a quantised base in codes again.

    Returns:
        Logits of the files and the rounding of every merged weight.

    Raises:
        OptionError: If the options do not suit the base model.
        PlanError: If a module cannot be merged, the files do not hold what was merged, or
            requantising rounds the updates away.
    """
    inner: Any = model.get_base_model()
    if not hasattr(type(inner), "from_pretrained") or not hasattr(inner, "config"):
        raise PlanError(
            f"a {type(inner).__name__} has no from_pretrained to load a merged model with. Call "
            "model.merge_and_unload() and save its state_dict instead."
        )
    codes = [(name, module) for name, module in inner.named_modules() if quantised(module)]
    if requantise:
        _check_requantise(inner, bool(codes), dtype)
    wanted = None
    if codes:
        with beside(model, adapter, "the adapter"), _dequantised(codes):
            wanted = logits(model, batch)
    # Neither building nor loading may move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        if requantise:
            _write_codes(model, adapter, folder)
        else:
            _write_stock(model, adapter, folder, getattr(torch, dtype) if dtype else None)
        again = _read_back(inner, folder).to(next(iter(batch.values())).device)
    keep_quantised_layout(again)
    rounding = _rounding(inner, again, adapter, requantise)
    found = logits(again, _cast(batch, again))
    merged = Merged(found, wanted, rounding, _dtype(again, adapter), requantise)
    merged.check_kept()
    return merged


def _check_requantise(inner: Any, codes: bool, dtype: str | None) -> None:
    if not codes:
        raise OptionError("the base model is not quantised, so there is nothing to requantise.")
    if dtype is not None:
        raise OptionError(f"dtype '{dtype}' does not go with requantising, which keeps the codes.")
    if getattr(inner, "hf_quantizer", None) is None:
        raise PlanError(
            "the base model was not loaded with a quantization_config, so it cannot be saved in "
            "codes. Merge without requantising."
        )


@contextlib.contextmanager
def _dequantised(codes: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Let quantised layers compute with their dequantised weights, without rounding activations."""

    def hook(name: str) -> Any:
        def run(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            bias = module.bias.float() if getattr(module, "bias", None) is not None else None
            # In single precision at least, as the merged model may compute.
            found = functional.linear(args[0].float(), dense(module, name).float(), bias)
            return found.to(output.dtype)

        return run

    handles = [module.register_forward_hook(hook(name)) for name, module in codes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _write_stock(
    model: PeftModel, adapter: Adapter, folder: Path, dtype: torch.dtype | None
) -> None:
    inner: Any = model.get_base_model()
    tensors = Stock(inner, adapter, str(model.active_adapters[0]), dtype).tensors
    config = copy.deepcopy(inner.config)
    for field_name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field_name):
            delattr(config, field_name)
    fresh, clash = _empty(type(inner), config, tensors)
    if clash:
        # Training has made two weights differ that the base model shares.
        for part in (config, *vars(config).values()):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = False
        fresh, clash = _empty(type(inner), config, tensors)
    if clash:
        raise PlanError(
            f"the model ties '{clash[0]}' to '{clash[1]}', and the trained adapter changes one of "
            "them only, so that a merged model cannot be written. Export the adapter instead."
        )
    missing, stray = fresh.load_state_dict(tensors, strict=False, assign=True)
    if missing or stray:
        what = f"lacks '{missing[0]}'" if missing else f"has no place for '{stray[0]}'"
        raise PlanError(
            f"a stock {type(inner).__name__} of this configuration does not fit the trained "
            f"model: it {what}. Export the adapter instead."
        )
    fresh.tie_weights()
    if getattr(inner, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(inner.generation_config)
    fresh.save_pretrained(str(folder))


def _empty(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, tuple[str, ...]]:
    """Build a model without weights; name two weights that it ties and that differ, if any."""
    with torch.device("meta"):
        fresh = kind(config)
    fresh.tie_weights()
    first: dict[int, str] = {}
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        one, two = tensors.get(name), tensors.get(other)
        if one is not None and two is not None and one is not two:
            same = one.data_ptr() == two.data_ptr() or torch.equal(one, two)
            if not same:
                return fresh, (name, other)
    return fresh, ()


def _write_codes(model: PeftModel, adapter: Adapter, folder: Path) -> None:
    # A copy of codes is small, and PEFT knows how to put sums back into each kind of them.
    with beside(model, adapter, "the adapter"), warnings.catch_warnings():
        # What rounding does is measured and told.
        warnings.filterwarnings("ignore", message="Merge lora module to .-bit linear")
        merged: Any = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    # A map of devices makes saving believe that weights are offloaded.
    vars(merged).pop("hf_device_map", None)
    merged.save_pretrained(str(folder))


def _read_back(inner: Any, folder: Path) -> Any:
    kernel = getattr(inner.config, "_attn_implementation", None)
    options = {"attn_implementation": kernel} if isinstance(kernel, str) else {}
    # Of the model's own class, as whoever loads the files will get it.
    return type(inner).from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, local_files_only=True, **options
    )


def _rounding(
    inner: nn.Module, again: nn.Module, adapter: Adapter, requantised: bool
) -> dict[str, Rounding]:
    """Compare the weights in the files with the exact sums."""
    found = {}
    places: dict[str, Any] = dict(inner.named_modules())
    for name in adapter.updates:
        layer = places[name]
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        exact = merged_weight(base, adapter, name)
        read = dense(again.get_submodule(name), name).cpu()
        error = float((read.double() - exact).norm())
        change = float((exact - dense(base, name).cpu().double()).norm())
        size = float(exact.norm())
        info = torch.finfo(read.dtype)
        least = info.smallest_normal * info.eps * exact.numel() ** 0.5
        if not requantised and not error <= info.eps * size + least:
            raise PlanError(
                f"the merged weight of '{name}' differs from the sum of weight and update by "
                f"{error / size:.3g} of its norm in the files, more than rounding to "
                f"{str(read.dtype).removeprefix('torch.')} explains. Please report this with the "
                "adapter's configuration."
            )
        found[name] = Rounding(error / size if size else 0.0, error / change if change else 0.0)
    return found


def _dtype(again: nn.Module, adapter: Adapter) -> torch.dtype:
    types = {dense(again.get_submodule(name), name).dtype for name in adapter.updates}
    return max(types or {torch.float32}, key=lambda kind: torch.finfo(kind).eps)


def _cast(batch: Mapping[str, Tensor], again: Any) -> dict[str, Tensor]:
    """Return inputs whose floating-point tensors (pixels) have the model's type."""
    return {k: v.to(again.dtype) if v.is_floating_point() else v for k, v in batch.items()}
