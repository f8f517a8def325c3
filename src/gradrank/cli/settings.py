"""The settings of a run, checked as far as that is possible without loading torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click

from gradrank.cli import runfile
from gradrank.core.budget import Budget
from gradrank.core.bytesize import parse_bytes
from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.methods.registry import METHODS

# Where and how a run is written is no part of what it computes.
_NOT_REPLAYED = frozenset({"out", "overwrite"})
# What makes a plan, and is not looked at where one is given.
_PLANNING = (
    "method", "option", "budget", "targets", "batches", "checkpoint", "max_memory",
    "calibration_seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags and the configuration file ask for; names and units are those of the flags.

    Attributes:
        options: Options of the method, as text; a length may be given in epochs (``1 epoch``).
        checkpoint: Whether to measure with checkpointing; None: if ``max_memory`` asks for it.
        max_memory: Cap on what measuring holds beyond the model, as text.
        epochs: Passes over the training data; None where ``steps`` counts.
        preset: Name of the preset that settings were taken from.
        plan: Path of a plan to train instead of allocating one.
        measured: Path of a measurement to allocate from instead of measuring.
    """

    model: str | None = None
    task: str | None = None
    data: str | None = None
    eval_data: str | None = None
    data_dir: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    head: str | None = None
    max_length: int | None = None
    trust_remote_code: bool = False
    method: str = "gard"
    options: Mapping[str, str] | None = None
    budget: str = "uniform:8"
    targets: str = "all-linear"
    batches: int = 32
    batch_size: int = 8
    accumulate: int = 1
    checkpoint: bool | None = None
    max_memory: str | None = None
    calibration_seed: int | None = None
    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    schedule: str | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    eval_every: int | None = None
    eval_batches: int | None = None
    checkpoint_every: int | None = None
    gradient_checkpointing: bool | None = None
    group_by_length: bool | None = None
    workers: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None
    overwrite: bool = False
    preset: str | None = None
    plan: str | None = None
    measured: str | None = None

    @property
    def measuring_seed(self) -> int:
        """Seed of measuring: ``calibration_seed``, or ``seed``."""
        return self.seed if self.calibration_seed is None else self.calibration_seed

    def replay(self) -> dict[str, Any]:
        """Return the configuration that replays the run, by key of the file."""
        values = {k: v for k, v in asdict(self).items() if k not in _NOT_REPLAYED and v is not None}
        options = values.pop("options", None)
        if options:
            values["option"] = options
        if self.plan is not None:
            # The plan decides; what would have made one is not looked at.
            for key in _PLANNING:
                values.pop(key, None)
        if self.measured is not None:
            values = {key: values[key] for key in ("method", "option", "budget") if key in values}
            values["from"] = self.measured
        return values

    @property
    def chosen_out(self) -> Path:
        """The folder to write; refused if none was given."""
        return needed(self.out)


def needed(out: Path | None) -> Path:
    """Return the folder to write.

    Args:
        out: What ``--out`` gave.

    Returns:
        The folder.

    Raises:
        OptionError: If none was given.
    """
    if out is None:
        raise OptionError("give the folder to write with --out DIR.")
    return out


def collect(context: click.Context, values: Mapping[str, Any]) -> Settings:
    """Make settings of a verb's parameters.

    Args:
        context: Context of the verb.
        values: Its parameters.

    Returns:
        The settings.
    """
    names = {item.name for item in fields(Settings)}
    taken = {key: value for key, value in values.items() if key in names}
    if "option" in values:
        taken["options"] = _options(context, values)
    for key in ("plan", "measured"):
        if taken.get(key) is not None:
            taken[key] = str(taken[key])
    if taken.get("epochs") is not None:
        taken |= _one_length(context, taken)
    return Settings(**taken)


def _one_length(context: click.Context, taken: Mapping[str, Any]) -> dict[str, None]:
    """Return which of steps and epochs does not count: the command line's goes before the file's.

    Args:
        context: Context of the verb.
        taken: Values by name.

    Returns:
        None for the one that does not count.

    Raises:
        OptionError: If both were given in one place.
    """
    typed, set_at_all = given(context, command_line=True), given(context)
    both = {"steps", "epochs"}
    if both <= typed or (both <= set_at_all and not both & typed):
        raise OptionError(
            f"the length of training is given twice, as steps ({taken['steps']}) and as epochs "
            f"({taken['epochs']:g}). Leave one of them out."
        )
    return {"epochs": None} if "steps" in typed else {"steps": None}


def given(context: click.Context, command_line: bool = False) -> set[str]:
    """Return the parameters that the user set.

    Args:
        context: Context of the verb.
        command_line: Whether to leave out those of the configuration file.
    """
    source = click.core.ParameterSource
    wanted = {source.COMMANDLINE} if command_line else {source.COMMANDLINE, source.DEFAULT_MAP}
    return {
        str(p.name)
        for p in context.command.params
        if context.get_parameter_source(str(p.name)) in wanted
    }


def _options(context: click.Context, values: Mapping[str, Any]) -> dict[str, str]:
    """Merge options: flags over file over preset, of those that were meant for this method."""
    method = values.get("method")
    meant: Any = method
    base: dict[str, str] = {}
    for layer in (runfile.from_preset(context), runfile.from_file(context)):
        meant = layer.get("method", meant)
        if meant == method:
            base |= parse_options(layer.get("option", ()))
    if context.get_parameter_source("option") is click.core.ParameterSource.COMMANDLINE:
        return base | parse_options(values["option"])
    return base


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """Read options of a method.

    Args:
        pairs: Texts ``key=value``.

    Returns:
        Values by key, as text; hyphens in keys become underscores.

    Raises:
        OptionError: If a text has another form, or a key comes twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key or not value.strip():
            raise OptionError(f"option '{pair}' is not understood. Write --option KEY=VALUE.")
        if key in options:
            raise OptionError(f"option '{key}' is given twice. Give it once.")
        options[key] = value.strip()
    return options


def check_method(name: str) -> None:
    """Refuse an unknown method.

    Args:
        name: Its name.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in METHODS:
        raise OptionError(f"method '{name}' is unknown. {nearest(name, METHODS)}")


def check_budget(text: str) -> None:
    """Refuse a budget that cannot be read.

    Args:
        text: The budget.
    """
    Budget.parse(text)


def check_memory(text: str | None) -> None:
    """Refuse a cap on memory that cannot be read.

    Args:
        text: The cap, or None.
    """
    if text is not None:
        parse_bytes(text)


def check(settings: Settings) -> None:
    """Refuse settings that cannot work, before anything heavy is loaded.

    Args:
        settings: The settings of a run on a model and data.

    Raises:
        OptionError: If something is missing or contradictory.
        DataError: If a file is missing.
    """
    check_method(settings.method)
    check_budget(settings.budget)
    check_memory(settings.max_memory)
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            flag = "--" + item.name.replace("_", "-")
            raise OptionError(f"{flag} is {value}; a finite number is needed.")
    if not settings.model:
        raise OptionError(
            "give a model with --model: a folder, a hub name, or one that needs no hub "
            "(smollm2-135m, minilm-l6, dinov2-small-focus, tiny-llama, tiny-bert, tiny-vit)."
        )
    if bool(settings.task) == bool(settings.data):
        both = "both were given" if settings.task else "neither was given"
        raise OptionError(f"give the data with either --task or --data; {both}.")
    if settings.data and not settings.head:
        raise OptionError(
            "--data needs --head lm, classification, image or instruct, which is missing."
        )
    for flag, name in (("--data", settings.data), ("--eval-data", settings.eval_data)):
        if name is not None:
            _check_file(flag, name)


def _check_file(flag: str, name: str) -> None:
    from gradrank.lab.readers import READERS, data_suffix

    path = Path(name).expanduser()
    looks_like_file = data_suffix(path) in READERS or name.startswith((".", "/", "~"))
    if looks_like_file and not path.exists():
        near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, near)
        more = f" {hint.partition('?')[0]}?" if hint.startswith("Did you mean") else ""
        raise DataError(f"{flag}: file '{name}' does not exist.{more}")
