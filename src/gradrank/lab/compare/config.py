"""The settings of one run of a comparison, checked by name and type before anything is loaded."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.epochs import steps_in
from gradrank.lab.settings import TrainSettings
from gradrank.presets import find_preset

# Flags of `gradrank train` under another name here, so that presets and recipes may use either.
_ALIASES = {"accumulation": "accumulate", "max_eval_batches": "eval_batches"}
# What a preset or a recipe for `train` may say and a grid decides itself.
_THE_GRIDS = {"method", "option", "budget", "seed"}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What all runs of a cell share; names and units are those of ``gradrank train``.

    Attributes:
        model: Folder, name that needs no hub, or name on the model hub.
        task: A registered task; or ``data`` with ``head`` and columns.
        scoring: How answers are found where there are choices: ``generate`` or ``likelihood``.
        targets: ``all-linear`` or names of modules.
        batches: Mini-batches of the calibration.
        calibration_seed: Seed of the calibration; None: the run's seed, so that its noise is part
            of every interval.
        head_steps: Steps for which a new task head is trained alone before the calibration. Its
            weights serve the measuring only; every run starts from the same new head.
        steps: Optimizer steps; ``epochs`` goes before it.
        lr: Learning rate where none is searched.
        scaling: Scale of every arm's update; None: ``lora_alpha`` by the rank of uniform LoRA at
            the budget.
        validation: Examples held out of the training data for choosing learning rates.
        train_examples: Examples to train on; None: all.
        eval_examples: Examples of the reported split; None: all.
        data_seed: Seed of every choice of examples; the same for all runs.
    """

    model: str = ""
    task: str | None = None
    data: str | None = None
    eval_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    head: str | None = None
    scoring: str = "generate"
    max_length: int | None = None
    targets: str = "all-linear"
    batches: int = 16
    calibration_seed: int | None = None
    head_steps: int = 0
    batch_size: int = 8
    eval_batch_size: int | None = None
    accumulate: int = 1
    steps: int = 100
    epochs: float | None = None
    lr: float = 2e-4
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    scaling: float | None = None
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    device: str = "auto"
    dtype: str = "auto"
    validation: int = 0
    train_examples: int | None = None
    eval_examples: int | None = None
    eval_batches: int | None = None
    data_seed: int = 0

    def settings(self, seed: int, examples: int) -> TrainSettings:
        """Return the lab's settings of training.

        Args:
            seed: Seed of the run.
            examples: Training examples, which say how long an epoch is.
        """
        steps = self.steps
        if self.epochs is not None:
            steps = steps_in(self.epochs, examples, self.batch_size * self.accumulate)
        return TrainSettings(
            steps=steps,
            batch_size=self.batch_size,
            accumulation=self.accumulate,
            lr=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=seed,
            gradient_checkpointing=self.gradient_checkpointing,
            eval_batch_size=self.eval_batch_size,
            max_eval_batches=self.eval_batches,
        )


_FIELDS = {item.name: item for item in fields(RunConfig)}


def run_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Read the settings of a run.

    Args:
        values: Values by key; ``preset`` names settings that the others override.
        where: Where they stand, for messages.

    Returns:
        The settings.

    Raises:
        OptionError: If a key is unknown, a value has the wrong type or range, or model or data
            are missing.
    """
    merged = flattened(values, where)
    config = RunConfig(**{key: _typed(key, value, where) for key, value in merged.items()})
    if not config.model:
        raise OptionError(f"{where}: 'model' is missing. Name a folder or a known model.")
    if bool(config.task) == bool(config.data):
        both = "both were given" if config.task else "neither was given"
        raise OptionError(f"{where}: give either 'task' or 'data'; {both}.")
    for key in ("validation", "head_steps", "data_seed"):
        if getattr(config, key) < 0:
            raise OptionError(f"{where}: '{key}' is {getattr(config, key)}; at least 0 is needed.")
    for key in ("batches", "train_examples", "eval_examples"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise OptionError(f"{where}: '{key}' is {value}; at least 1 is needed.")
    if config.scaling is not None and not 0 < config.scaling < float("inf"):
        raise OptionError(f"{where}: 'scaling' is {config.scaling}; a positive number is needed.")
    config.settings(0, 1).check()
    return config


def flattened(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings with the preset's below them and aliases resolved.

    Args:
        values: Values by key.
        where: Where they stand, for messages.

    Returns:
        Values by field of :class:`RunConfig`.

    Raises:
        OptionError: If a key is unknown.
    """
    own = {str(key).replace("-", "_"): value for key, value in values.items()}
    preset = own.pop("preset", None)
    merged: dict[str, Any] = {}
    if preset is not None:
        below = {k.replace("-", "_"): v for k, v in find_preset(str(preset)).run.items()}
        if "steps" in own:
            below.pop("epochs", None)
        merged = {key: value for key, value in below.items() if key not in _THE_GRIDS}
    merged |= own
    merged = {_ALIASES.get(key, key): value for key, value in merged.items()}
    unknown = next((key for key in merged if key not in _FIELDS), None)
    if unknown in _THE_GRIDS:
        raise OptionError(
            f"{where}: '{unknown}' is an axis of the grid; name it under 'methods', 'budgets' or "
            "'seeds'."
        )
    if unknown is not None:
        raise OptionError(f"{where} has the unknown key '{unknown}'. {nearest(unknown, _FIELDS)}")
    if "epochs" in own and "steps" in own:
        raise OptionError(f"{where}: the length is given twice, as steps and as epochs.")
    return merged


def _typed(key: str, value: Any, where: str) -> Any:
    """Return a value from YAML in the type of its field; 1e-3 is text in YAML 1.1."""
    kinds = get_args(_FIELDS[key].type) or (_FIELDS[key].type,)
    if type(value) in kinds:
        return value
    if key == "targets" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = [getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not types.NoneType]
    wants = " or ".join(names)
    raise OptionError(f"{where}: key '{key}' is {value!r}; it takes {wants}.")
