"""Where an adapter to be exported comes from: its files, its base model, its head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradrank.cli import runfile
from gradrank.core.errors import DataError, OptionError
from gradrank.core.plan import Plan
from gradrank.serving.facts import AdapterFacts, describe

_TASK_TYPES = {"CAUSAL_LM": "lm", "SEQ_CLS": "classification"}


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported, and onto what.

    Attributes:
        folder: The PEFT adapter folder.
        model: The base model, as ``--model`` takes it.
        head: ``lm``, ``classification`` or ``image``.
        label_names: Names of the classes; empty for ``lm``.
        seed: Seed of a new head (and of a tiny model's weights) in the run.
        dtype: As the run had it, or None.
    """

    folder: Path
    model: str
    head: str
    label_names: tuple[str, ...]
    seed: int
    dtype: str | None


def find_source(path: Path, model: str | None, head: str | None) -> Source:
    """Find out what there is to know about an adapter without loading a model.

    Args:
        path: The folder of a run, or an adapter's folder.
        model: The base model that the user named, if any.
        head: The head that the user named, if any.

    Returns:
        The source.

    Raises:
        DataError: If there is no adapter.
        OptionError: If base model or head cannot be known.
    """
    folder = path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path
    if not (folder / "adapter_config.json").is_file():
        what = "holds no adapter (adapter_config.json)" if path.exists() else "does not exist"
        raise DataError(f"'{path}' {what}. Give the folder of a finished run, or of an adapter.")
    facts = describe(folder)
    config, origin = _run_of(folder)
    base = model or config.get("model") or facts.base_model
    if not base:
        raise OptionError(f"the adapter in '{folder}' names no base model. Give it with --model.")
    kind = head or origin.get("head") or _TASK_TYPES.get(facts.task_type)
    if not isinstance(kind, str):
        raise OptionError(f"the adapter in '{folder}' does not tell its head. Give it with --head.")
    names = tuple(str(name) for name in origin.get("label_names") or ())
    if kind != "lm" and not names:
        names = _numbered(facts, folder)
    seed = config.get("seed")
    return Source(
        folder=folder,
        model=str(base),
        head=kind,
        label_names=names,
        seed=seed if isinstance(seed, int) else 0,
        dtype=str(config["dtype"]) if "dtype" in config else None,
    )


def _run_of(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return configuration and provenance of the run that made an adapter, empty if unknown."""
    config = folder.parent / "config.yaml"
    plan = folder.parent / "plan.json"
    if folder.name != "adapter" or not config.is_file() or not plan.is_file():
        return {}, {}
    return runfile.read(config), Plan.load(plan).provenance


def _numbered(facts: AdapterFacts, folder: Path) -> tuple[str, ...]:
    if not facts.num_labels:
        raise OptionError(
            f"the adapter in '{folder}' holds no trained head, so that the number of classes is "
            "unknown. Export it from the folder of its run."
        )
    return tuple(str(index) for index in range(facts.num_labels))
