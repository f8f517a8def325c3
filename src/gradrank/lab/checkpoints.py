"""Checkpoints of training runs: what a resumption needs, sealed when they are whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradrank.core import marker
from gradrank.core.errors import DataError, OptionError
from gradrank.core.files import read_json, write_json
from gradrank.record.checks import is_count, is_curve, is_number

STATE = "gradrank_state.json"
# A pickle of the Trainer's arguments, with local paths in it; nothing needs it to resume.
_UNWANTED = ("training_args.bin",)


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Finish a checkpoint that the Trainer has written.

    Args:
        folder: The checkpoint's folder.
        state: What else a resumed run needs (losses so far, settings); plain data.
    """
    for name in _UNWANTED:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / STATE, dict(state))
    marker.seal(folder)


def last_complete(folder: Path) -> Path | None:
    """Find the newest whole checkpoint of a training run.

    Args:
        folder: The folder that holds ``checkpoint-<step>`` folders.

    Returns:
        The one with the most steps, or None.
    """
    return marker.last_complete(folder, needs=STATE)


def read_state(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read what :func:`seal` was given, and check that the run is the same one.

    Args:
        folder: A whole checkpoint.
        settings: The settings of the run that wants to resume.

    Returns:
        The state.

    Raises:
        OptionError: If the settings differ: the result would be neither run's.
        DataError: If the state is not what :func:`seal` writes.
    """
    state = read_json(folder / STATE, "checkpoint state")
    fault = _fault(state)
    if fault:
        raise DataError(
            f"checkpoint '{folder.name}' is damaged: {STATE} {fault}. Remove it to go on from the "
            "one before, or start again in a new folder."
        )
    before = state["settings"]
    changed = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if changed:
        raise OptionError(
            f"checkpoint '{folder.name}' was made with other settings: {', '.join(changed)}. "
            f"Resume with the same ones, or start again in a new folder."
        )
    return state


def _fault(state: Any) -> str:
    """Say what is wrong with the state in a checkpoint, or return ""."""
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        return "holds no settings"
    wrong = [key for key in ("step", "tokens") if not is_count(state.get(key, -1))]
    wrong += [key for key in ("train_seconds", "eval_seconds") if not is_number(state.get(key, ""))]
    wrong += [key for key in ("losses", "eval_losses") if not is_curve(state.get(key))]
    wrong += [key for key in ("step", "tokens", "train_seconds") if state.get(key) is None]
    return f"has no proper '{wrong[0]}'" if wrong else ""


def check_same_adapter(model: Any, folder: Path) -> None:
    """Check that a checkpoint's adapter has the shape of the model's.

    Args:
        model: The model, with its adapter.
        folder: A whole checkpoint.

    Raises:
        DataError: If a target's rank or scale differs, or the checkpoint holds no adapter.
    """
    active = getattr(model, "active_adapter", None)
    configs = getattr(model, "peft_config", None)
    path = folder / "adapter_config.json"
    if not configs or not isinstance(active, str):
        return
    if not path.is_file():
        raise DataError(f"checkpoint '{folder.name}' holds no adapter, but the model has one.")
    saved, now = read_json(path, "adapter configuration"), configs[active].to_dict()
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
        before, after = saved.get(key), now.get(key)
        if key == "target_modules" and isinstance(before, list):
            before, after = sorted(before), sorted(after or ())
        if before != after:
            raise DataError(
                f"checkpoint '{folder.name}' was made with another plan: its adapter differs from "
                f"the model's in '{key}'. Resume with the plan of that run, or start again in a "
                f"new folder."
            )
