"""Resuming and best checkpoints under a Trainer, where ranks have changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradrank.adapters import sidecar
from gradrank.adapters.guard import wrapping
from gradrank.adapters.reserve import refit
from gradrank.adapters.view import PREFIX, adapter_name, lora_sites, name_targets
from gradrank.callback import CapacityCallback
from gradrank.core import marker
from gradrank.core.errors import DataError, OptionError
from gradrank.signals.layers import unwrapped


def prepare_trainer(trainer: Any) -> Any:
    """Make resuming and ``load_best_model_at_end`` work where ranks have changed.

    Afterwards ``trainer.train(resume_from_checkpoint=True)`` picks the newest checkpoint that is
    whole, the model gets the checkpoint's ranks before its weights are loaded, and the allocator
    goes on where it was. Every decision appears in the Trainer's logs, and so in its trackers.

    Args:
        trainer: A ``transformers.Trainer`` with a :class:`CapacityCallback` (or one with a static
            adapter, whose ranks may differ from the checkpoint's all the same).

    Returns:
        The trainer.

    Raises:
        OptionError: If it has two such callbacks, or was prepared before.
    """
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, CapacityCallback)]
    if len(found) > 1 or getattr(trainer, "_gradrank_prepared", False):
        raise OptionError("a Trainer takes one CapacityCallback and is prepared once.")
    callback = found[0] if found else None
    if callback is not None:
        callback.attach(trainer.model, trainer.args)
        callback.report_through(trainer)
    _Prepared(trainer, callback)
    trainer._gradrank_prepared = True
    return trainer


class _Prepared:
    """What stands in for three methods of one Trainer object."""

    def __init__(self, trainer: Any, callback: CapacityCallback | None) -> None:
        self._trainer, self._callback = trainer, callback
        self._train = trainer.train
        self._given_optimizer = trainer.optimizer is not None
        self._layers: dict[str, nn.Module] = {}
        self._load, self._load_best = trainer._load_from_checkpoint, trainer._load_best_model
        trainer.train = self.train
        trainer._load_from_checkpoint, trainer._load_best_model = self.load, self.load_best

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback = self._callback
        if callback is None:
            return self._train(resume_from_checkpoint, *args, **kwargs)
        output_dir = Path(self._trainer.args.output_dir)
        if self._trainer.args.load_best_model_at_end:
            self._layers = {n: s.layer for n, s in lora_sites(self._model, self._adapter).items()}
        # Before a checkpoint gives the layers its own shape, which may be a plain one.
        again = callback.attach(self._trainer.model, self._trainer.args)
        if again and not self._given_optimizer:
            self._trainer.optimizer = None  # a second phase of training: it is made anew
        if resume_from_checkpoint:
            resume_from_checkpoint = _whole(resume_from_checkpoint, output_dir)
            self._refit(Path(resume_from_checkpoint))
            callback.resume_from = Path(resume_from_checkpoint)
        try:
            return self._train(resume_from_checkpoint, *args, **kwargs)
        finally:
            callback.close()
            self._layers = {}

    def load(self, folder: str, model: Any = None) -> None:
        self._refit(Path(folder))
        if wrapping(self._trainer.model) == "FSDP":
            # accelerate's loader asks a sharded model for raw names, which forms do not show.
            sidecar.load_sharded(self._trainer.model, Path(folder), self._adapter)
        elif model is not None:
            self._load(folder, model)
        else:
            self._load(folder)
        if self._callback is not None:
            self._callback.resume_from = Path(folder)

    def load_best(self) -> None:
        folder = Path(self._trainer.state.best_model_checkpoint)
        if self._callback is not None and self._callback.run is not None:
            self._callback.run.close()
        self._bring_back(sidecar.stored_ranks(folder, self._adapter))
        self._refit(folder, ended=True)
        self._load_best()

    @property
    def _model(self) -> Any:
        return self._trainer.model

    @property
    def _adapter(self) -> str:
        asked = self._callback.adapter if self._callback else None
        return adapter_name(self._model, asked)

    def _bring_back(self, ranks: Mapping[str, int]) -> None:
        """Put LoRA layers back that have been taken off since the best checkpoint was written."""
        model, sites = unwrapped(self._model), lora_sites(self._model, self._adapter)
        lost = {n: layer for n, layer in self._layers.items() if ranks.get(n) and n not in sites}
        for name, layer in lost.items():
            model.set_submodule(PREFIX + name, layer)
        if lost:
            name_targets(model, self._adapter)

    def _refit(self, folder: Path, ended: bool = False) -> None:
        optimizer = self._trainer.optimizer
        if ended or wrapping(self._model, optimizer):
            optimizer = None
        ranks = sidecar.stored_ranks(folder, self._adapter)
        file = folder / sidecar.FILE
        partitions = sidecar.stored_partitions(file) if file.is_file() else {}
        refit(self._model, ranks, optimizer, self._adapter, partitions)


def _whole(asked: Any, output_dir: Path) -> str:
    """Return the checkpoint that was asked for, or the newest one, if it is whole."""
    if asked is not True:
        folder = Path(str(asked))
        if marker.is_complete(folder, sidecar.FILE):
            return str(folder)
        last = marker.last_complete(folder.parent, sidecar.FILE)
        hint = f"The last whole one is '{last.name}'." if last else "There is no whole one."
        raise DataError(
            f"checkpoint '{folder.name}' is not whole (its writing was cut off, or it has no "
            f"allocator state). {hint}"
        )
    last = marker.last_complete(output_dir, sidecar.FILE)
    if last is None:
        raise DataError(
            f"there is no whole checkpoint in '{output_dir}' to resume from. Start again without "
            "resume_from_checkpoint."
        )
    return str(last)
