"""Load what a run works on: data first, because a class head needs the number of classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradrank.cli.console import Console
from gradrank.cli.settings import Settings
from gradrank.lab.data import DataSpec, Examples, read_examples
from gradrank.lab.encode import TaskData, load_task_data
from gradrank.lab.environment import environment
from gradrank.lab.models import LoadedModel, resolve_model
from gradrank.lab.tasks import find_task


@dataclass(frozen=True)
class Prepared:
    """A model and its data, ready to be measured and trained.

    Attributes:
        loaded: The model.
        data: The encoded data.
    """

    loaded: LoadedModel
    data: TaskData

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.loaded.model.parameters()).device

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Return what plans and measurements keep about where they come from, as plain data.

        Args:
            settings: The settings of the run.
        """
        return {
            "model_spec": settings.model,
            "head": self.loaded.head,
            "model_source": self.loaded.source,
            "data": dict(self.data.describe),
            "label_names": list(self.data.label_names),
            "batch_size": settings.batch_size,
        }

    def environment(self) -> dict[str, Any]:
        """Return what the run runs on, for its record."""
        return environment(self.device, next(self.loaded.model.parameters()).dtype)

    def check_inputs(self) -> Mapping[str, torch.Tensor]:
        """Return two examples of the evaluation split as model inputs, for the export's check."""
        size = min(2, len(self.data.eval))  # pyright: ignore[reportArgumentType]
        batch = self.data.collate([self.data.eval[index] for index in range(size)])
        return {key: value for key, value in batch.items() if key != "labels"}


def prepare(settings: Settings, console: Console) -> Prepared:
    """Load model and data.

    Args:
        settings: What was asked for.
        console: Told what is loaded.

    Returns:
        Both.
    """
    examples = read(settings, console)
    loaded = load_model(settings, examples, console)
    data = load_task_data(examples, loaded, settings.max_length)
    weights = next(loaded.model.parameters())
    console.say(
        f"model: {loaded.name}, {loaded.base_parameters:,} parameters, "
        f"{str(weights.dtype).removeprefix('torch.')} on {weights.device}"
    )
    about = data.describe
    length = f", {about['max_length']} tokens each" if data.kind == "lm" else ""
    console.say(
        f"data:  {about['name']}, {about['train_examples']:,} training and "
        f"{about['eval_examples']:,} evaluation examples{length}"
    )
    if "note" in about:
        console.say(f"       {about['note']}")
    return Prepared(loaded, data)


def read(settings: Settings, console: Console) -> Examples:
    """Read and check the data.

    Args:
        settings: What was asked for.
        console: Told what takes time.

    Returns:
        The examples.
    """
    if settings.task:
        find_task(settings.task)
    return read_examples(
        DataSpec(
            source=str(settings.task or settings.data),
            head=settings.head,
            text_column=settings.text_column,
            label_column=settings.label_column,
            image_column=settings.image_column,
            eval_file=settings.eval_data,
            seed=settings.seed,
            data_dir=settings.data_dir,
        ),
        console.say,
    )


def load_model(settings: Settings, examples: Examples, console: Console) -> LoadedModel:
    """Load the model with the head that the data needs.

    Args:
        settings: What was asked for.
        examples: The data.
        console: Told what takes time.

    Returns:
        The model.
    """
    return resolve_model(
        str(settings.model),
        examples.head,
        num_labels=len(examples.label_names) or None,
        dtype=settings.dtype,
        device=settings.device,
        label_names=examples.label_names,
        seed=settings.seed,
        trust_remote_code=settings.trust_remote_code,
        say=console.say,
    )
