"""Put an adapter onto its base model through stock PEFT, with nothing of its file left to run."""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from gradrank.adapters.apply import all_or_nothing
from gradrank.core.errors import DataError, PlanError, TargetError
from gradrank.serving.adapter import Adapter
from gradrank.serving.check import handed_back
from gradrank.serving.facts import AdapterFacts, describe
from gradrank.serving.folder import stored, write_exact
from gradrank.serving.reading import read_adapter
from gradrank.signals.layers import find_sites

_CHECK = "gradrank_check"
# What PEFT raises for an adapter that is damaged or belongs to another model.
_MISFITS = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
)


def load_adapter(base: nn.Module, folder: str | Path) -> PeftModel:
    """Load a stock PEFT adapter (LoRA or AdaLoRA, safetensors only) onto its base model.

    The folder may come from anywhere: its patterns are compared within a time limit, and PEFT is
    given names and numbers only.

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
    what = f"the adapter in '{folder}'"
    try:
        facts, adapter = describe(folder), read_adapter(folder)
        _check_told(facts, base)
    except DataError as error:
        raise PlanError(f"{what} does not fit this model: {error}") from error
    return install(base, adapter, what)


def _check_told(facts: AdapterFacts, base: nn.Module) -> None:
    """Refuse weights that are not those that the configuration speaks of."""
    config = facts.config
    if config.kind == "LORA":
        for target, rank in facts.ranks.items():
            told = config.told_rank(target.name)
            if told != rank:
                raise DataError(
                    f"'{target.name}' has rank {rank} in its weights and {str(told)[:20]} in its "
                    "configuration."
                )
    stems = {key.partition(".lora_")[0] for key in facts.shapes if ".lora_" in key}
    layers = [base_name(n) for n, module in base.named_modules() if hasattr(module, "weight")]
    missing = config.lacks(layers, stems)
    if missing:
        raise DataError(f"it names '{missing[0]}' as a target and has no weights for it.")
    strays = [name for name in stems if not config.names(name)]
    if strays:
        raise DataError(f"it has weights for '{min(strays)}', which is no target of its own.")


def install(base: nn.Module, adapter: Adapter, what: str = "the adapter") -> PeftModel:
    """Put an adapter onto a base model.

    Args:
        base: The base model.
        adapter: The adapter.
        what: What to call it in messages.

    Returns:
        The PEFT model.

    Raises:
        PlanError: If it does not fit the model, which is then left as it was.
    """
    check_fit(base, adapter, what)
    with _written(base, adapter) as folder, _explained(what), all_or_nothing(base), quiet():
        loaded: Any = PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
        _check_keys(loaded, adapter)
    return loaded


@contextlib.contextmanager
def beside(model: PeftModel, adapter: Adapter, what: str) -> Iterator[None]:
    """Let a model compute with another adapter for a while.

    Args:
        model: The PEFT model.
        adapter: The other adapter.
        what: What to call it in messages.

    Yields:
        None.

    Raises:
        PlanError: If the other adapter does not fit the model.
    """
    base: Any = model.get_base_model()
    check_fit(base, adapter, what)
    active = str(model.active_adapters[0])
    # Loading an adapter for inference freezes parameters and changes the mode.
    with handed_back(model):
        try:
            with _written(base, adapter) as folder, _explained(what), quiet():
                # New layers draw random weights before they get the stored ones.
                with torch.random.fork_rng(devices=[]):
                    model.load_adapter(str(folder), _CHECK)
                model.set_adapter(_CHECK)
            yield
        finally:
            model.set_adapter(active)
            if _CHECK in model.peft_config:
                model.delete_adapter(_CHECK)


def taken(model: PeftModel, adapter: str | None = None) -> Adapter:
    """Return the adapter of a live model, as it would be saved.

    Args:
        model: The PEFT model.
        adapter: Name of the adapter; default: the active one.

    Returns:
        The adapter; masks, SVD forms and partitions are baked.

    Raises:
        PlanError: If it is of a kind that cannot be read.
    """
    name = adapter or str(model.active_adapters[0])
    with tempfile.TemporaryDirectory(prefix="gradrank-") as held, quiet():
        folder = Path(held)
        model.save_pretrained(str(folder), selected_adapters=[name])
        # PEFT puts every adapter but 'default' into a folder of its own.
        written = folder if (folder / "adapter_config.json").is_file() else folder / name
        try:
            return read_adapter(written)
        except DataError as error:
            told = str(error).replace(f"'{written}'", "the model").replace(f"{written}/", "")
            raise PlanError(told) from error


def check_fit(base: nn.Module, adapter: Adapter, what: str) -> None:
    """Check that a model has every module that an adapter updates, in the same shape.

    Args:
        base: The base model.
        adapter: The adapter.
        what: What to call it in messages.

    Raises:
        PlanError: If not.
    """
    wanted = {name: update.target for name, update in adapter.updates.items()}
    modules = {base_name(name) for name, _ in base.named_modules()}
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise PlanError(
            f"{what} does not fit this model: the model has no module '{missing[0]}' "
            f"({len(missing)} of {len(wanted)} are missing)."
        )
    try:
        sites = find_sites(base, list(wanted))
    except TargetError as error:
        raise PlanError(f"{what} does not fit this model: {error}") from error
    for site in sites:
        made, found = wanted.get(site.target.name, site.target), site.target
        if (made.d_in, made.d_out) != (found.d_in, found.d_out):
            raise PlanError(
                f"{what} does not fit this model: '{made.name}' is {made.d_out} x {made.d_in} in "
                f"the adapter and {found.d_out} x {found.d_in} in the model."
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PEFT from warning of what is checked here, and refused."""
    with warnings.catch_warnings():
        for start in (
            "Found missing adapter keys",
            "The following rank_pattern keys",
            "The following alpha_pattern keys",
            "Could not find a config file",
            "Setting `save_embedding_layers`",
            r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape",  # biases of factors
        ):
            warnings.filterwarnings("ignore", message=start)
        yield


@contextlib.contextmanager
def _written(base: nn.Module, adapter: Adapter) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gradrank-") as held:
        names = [base_name(name) for name, _ in base.named_modules()]
        write_exact(adapter, Path(held), names)
        yield Path(held)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except _MISFITS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise PlanError(f"{what} does not fit this model: {reason}") from error


def base_name(name: str) -> str:
    """Return a module's name without the layers that PEFT puts around it.

    Args:
        name: Its name in a wrapped model.
    """
    return name.replace(".base_layer", "")


def _check_keys(model: PeftModel, adapter: Adapter) -> None:
    """Refuse weights that the model has no place for, and places that got no weight."""
    found = set(stored(adapter))
    places = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(places - found)
    stray = sorted(key for key in found - places if ".lora_" in key)
    if missing or stray:
        what = f"it lacks '{missing[0]}'" if missing else f"'{stray[0]}' has no place in the model"
        raise ValueError(f"{what} ({len(missing)} missing, {len(stray)} left over)")
