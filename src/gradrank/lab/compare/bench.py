"""What the runs of one worker share: read data, and measurements on disk."""

import contextlib
import copy
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from gradrank.adapters.precision import held_in_float32
from gradrank.core.errors import GradrankError
from gradrank.lab.arms import head_modules
from gradrank.lab.baselines.arm import frozen
from gradrank.lab.compare.config import RunConfig
from gradrank.lab.data import DataSpec, Examples, read_examples
from gradrank.lab.encode import TaskData, load_task_data
from gradrank.lab.environment import source_digest
from gradrank.lab.measured import together
from gradrank.lab.memory import PeakMemory
from gradrank.lab.models import LoadedModel, resolve_model
from gradrank.session import measure
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement

# What a measurement depends on, beside the task and the seeds.
_MEASURED = ("model", "targets", "batches", "batch_size", "accumulate", "head_steps", "dtype")
_DATA = (
    "task",
    "data",
    "eval_data",
    "text_column",
    "label_column",
    "image_column",
    "head",
    "scoring",
    "validation",
    "train_examples",
    "eval_examples",
    "data_seed",
)


@dataclass
class Loaded:
    """A fresh model and its data.

    Attributes:
        loaded: The model, with a new head of the run's seed.
        data: Encoded data of the split that is evaluated.
        head_seed: Seed of the new head; None where the model has none.
    """

    loaded: LoadedModel
    data: TaskData
    head_seed: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.loaded.model.parameters()).device

    def batches(self, count: int, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Draw batches of training data, on the model's device.

        Args:
            count: How many.
            size: Examples in each.
            seed: Seed of the choice.

        Yields:
            Batches.
        """
        for batch in self.data.batches(count, size, seed):
            yield {name: value.to(self.device) for name, value in batch.items()}


class Bench:
    """Loads what runs need; data is read and encoded once per worker."""

    def __init__(self, cache: Path, data_dir: str | None = None) -> None:
        """Prepare.

        Args:
            cache: Folder of measurements that runs share.
            data_dir: Folder with public data.
        """
        self.cache, self.data_dir = cache, data_dir
        self._examples: dict[str, Examples] = {}
        self._encoded: dict[str, TaskData] = {}

    def load(self, config: RunConfig, split: str, seed: int) -> Loaded:
        """Load a fresh model and the data.

        Args:
            config: The run's settings.
            split: ``test`` or ``validation``.
            seed: Seed of a new head.

        Returns:
            Both.
        """
        key, examples = _key(config, _DATA) + split, self.examples(config, split)
        loaded = resolve_model(
            config.model,
            examples.head,
            num_labels=len(examples.label_names) or None,
            dtype=config.dtype,
            device=config.device,
            label_names=examples.label_names,
            seed=seed,
        )
        encoded = f"{key}{config.model}{config.max_length}"
        if encoded not in self._encoded:
            self._encoded[encoded] = load_task_data(examples, loaded, config.max_length)
        new = seed if head_modules(loaded.model) else None
        return Loaded(loaded, self._encoded[encoded], new)

    def examples(self, config: RunConfig, split: str) -> Examples:
        """Read the data of a task, once.

        Args:
            config: The run's settings.
            split: ``test`` or ``validation``.

        Returns:
            The examples.
        """
        key = _key(config, _DATA) + split
        if key not in self._examples:
            self._examples[key] = read_examples(self._spec(config, split))
        return self._examples[key]

    def measurement(
        self, fresh: Loaded, config: RunConfig, signals: Sequence[Signal], seed: int
    ) -> Measurement:
        """Measure, or read what another run of the grid measured with the same settings.

        Args:
            fresh: The model, without an adapter, and the data.
            config: The run's settings.
            signals: What the method asks for.
            seed: Seed of the calibration.

        Returns:
            The measurement, possibly of more signals; its cost is that of the whole pass.
        """
        wanted = together(signals)
        about = [
            _key(config, (*_DATA, *_MEASURED)),
            config.max_length,
            seed,
            repr(wanted),
            # Nothing else about a rate or a run's seed can reach the gradients.
            config.lr if config.head_steps else None,
            fresh.head_seed,
            source_digest(),
        ]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
        path = self.cache / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs of other workers that need the same one wait for it instead of repeating it.
        with FileLock(str(path.with_suffix(".lock"))):
            if path.is_file():
                try:
                    return Measurement.load(path)
                except GradrankError:
                    path.unlink()  # only a cache: a damaged entry is measured again
            found = self._measure(fresh, config, wanted, seed)
            found.save(path, overwrite=True)
        return found

    def _measure(
        self, fresh: Loaded, config: RunConfig, signals: Sequence[Signal], seed: int
    ) -> Measurement:
        started = time.perf_counter()
        with PeakMemory(fresh.device) as memory, warmed(fresh, config, seed):
            warming = time.perf_counter() - started
            found = measure(
                fresh.loaded.model,
                fresh.data.batches(config.batches * config.accumulate, config.batch_size, seed),
                signals,
                config.targets,
                num_batches=config.batches,
                accumulate=config.accumulate,
                seed=seed,
            )
        seconds = warming + float(found.info.get("seconds") or 0.0)
        return replace(
            found, info={**found.info, "seconds": seconds, "peak_memory_bytes": memory.peak}
        )

    def _spec(self, config: RunConfig, split: str) -> DataSpec:
        return DataSpec(
            source=str(config.task or config.data),
            head=config.head,
            scoring=config.scoring,
            text_column=config.text_column,
            label_column=config.label_column,
            image_column=config.image_column,
            eval_file=config.eval_data,
            seed=config.data_seed,
            split=split,
            validation=config.validation,
            train_examples=config.train_examples,
            eval_examples=config.eval_examples,
            data_dir=self.data_dir,
        )


@contextlib.contextmanager
def warmed(fresh: Loaded, config: RunConfig, seed: int) -> Iterator[None]:
    """Have a new head trained for the recipe's ``head_steps`` while the block lasts.

    Args:
        fresh: The model; the head is put back afterwards.
        config: Steps, batch size and rate.
        seed: Seed of the calibration.

    Yields:
        Nothing.
    """
    model: nn.Module = fresh.loaded.model
    head = head_modules(model) if config.head_steps else ()
    kept = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in head}
    if head:
        warm_head(fresh, config, head, seed)
    try:
        yield
    finally:
        for name, state in kept.items():
            model.get_submodule(name).load_state_dict(state)


def warm_head(fresh: Loaded, config: RunConfig, head: Sequence[str], seed: int) -> None:
    """Train a new head alone for a few steps, so that gradients below it are not noise.

    Args:
        fresh: The model, which is handed back with the same parameters trainable as before.
        config: Steps, batch size and rate.
        head: Names of the head's modules.
        seed: Seed of the batches.
    """
    model: nn.Module = fresh.loaded.model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen(model, head)
    with contextlib.ExitStack() as stack:
        for name in head:
            stack.enter_context(held_in_float32(model.get_submodule(name)))
        chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(chosen, lr=config.lr, weight_decay=0.0)
        for batch in fresh.batches(config.head_steps, config.batch_size, seed + 1):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = before[name]


def _key(config: RunConfig, names: Sequence[str]) -> str:
    values: dict[str, Any] = asdict(config)
    return json.dumps({name: values[name] for name in names}, sort_keys=True)
