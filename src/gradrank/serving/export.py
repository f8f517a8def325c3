"""Write an adapter for an engine, and prove that it computes what was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradrank.core.errors import OptionError, PlanError, nearest
from gradrank.core.folders import new_folder
from gradrank.ops.four_bit import quantised_layout
from gradrank.serving.adapter import Adapter
from gradrank.serving.check import Reference, check_inputs, largest_error, logits, reference
from gradrank.serving.compression import Losses, compress, truncate
from gradrank.serving.engines.engine import Base, Engine
from gradrank.serving.engines.registry import ENGINES
from gradrank.serving.installing import base_name, beside, taken
from gradrank.serving.merging import Merged, Rounding, write_merged
from gradrank.serving.padding import PADDINGS, padded
from gradrank.signals.layers import base_parameters, find_sites

MERGED = "merged"
TARGETS = (*ENGINES, MERGED)
_QUIET = "the adapter hardly changes the logits of the check, so that the check proves little"
# Relative error of an update that folding a scale in single precision may bring.
_UPDATES = 1e-6
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how well it agrees.

    Attributes:
        target: ``peft``, an engine's name, or ``merged``.
        folder: Where it stands.
        difference: Largest absolute difference of the logits on the check inputs, between what
            the target computes from the written files and what it should compute.
        tolerance: Largest difference that was allowed.
        bytes: Size of all files.
        bytes_before: Size of the adapter's tensors before the export.
        error: Largest error of an update in the files, relative to its Frobenius norm.
        effect: Largest change of a logit that the adapter brings about.
        ranks: Rank by module as written; empty for ``merged``.
        losses: What a smaller budget cost, if one was given.
        change: Largest change of a logit by smaller ranks, 0 without them.
        advice: How to load it, in lines.
        rounding: What merging rounded, by module; empty unless ``merged``.
        notes: What else to know of what was written, in lines.
    """

    target: str
    folder: Path
    difference: float
    tolerance: float
    bytes: int
    bytes_before: int = 0
    error: float = 0.0
    effect: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    losses: Losses | None = None
    change: float = 0.0
    advice: tuple[str, ...] = ()
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export(
    model: nn.Module,
    out: str | Path,
    target: str = "peft",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    dtype: str | None = None,
    padding: str | None = None,
    budget: Any = None,
    rank: int | None = None,
    requantise: bool = False,
) -> ExportReport:
    """Write a trained adapter in the form that a target loads, with a check of its logits.

    The files are read back by the target's own rule (which for servers is not PEFT's) and the
    logits compared with the trained model's. ``peft`` has to be bitwise equal; the others may
    differ by the rounding of folded or merged weights.

    Args:
        model: The PEFT model.
        out: Folder to write; appears only if the check passes.
        target: ``peft``, ``vllm``, ``sglang``, ``llama.cpp`` or ``merged``.
        inputs: Model inputs for the check; default: seeded random tokens or pixels.
        tokenizer: Saved beside, if given.
        overwrite: Whether an existing folder may be replaced.
        dtype: ``float32``, ``float16`` or ``bfloat16``; default: as trained.
        padding: ``none``, ``groups`` or ``all``; default: what the target needs.
        budget: Re-allocate the ranks of the trained adapter under this budget first, see
            :func:`gradrank.serving.compression.compress`.
        rank: Cut every update to this rank first.
        requantise: For ``merged`` on a quantised base: write codes again, with the rounding that
            this brings, instead of full-precision weights.

    Returns:
        What was written, with the largest difference found.

    Raises:
        OptionError: If an option is unknown or does not suit the target.
        PlanError: If the model carries no adapter, the target cannot express it, or the check
            fails; nothing is left behind.
    """
    _check_options(model, target, dtype, padding)
    if requantise and target != MERGED:
        raise OptionError(f"requantise is for target 'merged', not for '{target}'.")
    assert isinstance(model, PeftModel)
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in (inputs or check_inputs(model)).items()}
    with quantised_layout(model):
        wanted = reference(model, batch)
        trained = taken(model)
        job = _Job(model, trained, batch, wanted)
        if budget is not None or rank is not None:
            job = job.smaller(budget, rank)
        with new_folder(Path(out), overwrite) as folder:
            if target == MERGED:
                done = job.merged(folder, dtype, requantise)
            else:
                done = job.written(ENGINES[target], dtype, padding, folder)
            _judge(target, done.difference, done.tolerance)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # Merged weights are compared themselves.
    quiet = target != MERGED and wanted.effect <= 10 * done.tolerance
    return replace(
        done,
        folder=Path(out),
        bytes=size,
        bytes_before=trained.bytes,
        effect=wanted.effect,
        losses=job.losses,
        change=job.change,
        notes=(*done.notes, *([_QUIET] if quiet and done.tolerance else [])),
    )


@dataclass(frozen=True)
class _Job:
    """An adapter on its way, and what it is compared with."""

    model: PeftModel
    adapter: Adapter
    batch: Mapping[str, Tensor]
    reference: Reference
    losses: Losses | None = None
    change: float = 0.0

    @property
    def base(self) -> Base:
        inner: Any = self.model.get_base_model()
        config = inner.config.to_dict() if hasattr(inner, "config") else {}
        names = (base_name(name) for name, _ in inner.named_modules())
        return Base(config, tuple(name for name in names if ".lora_" not in name))

    def smaller(self, budget: Any, rank: int | None) -> "_Job":
        """Return the job with smaller ranks; what is written is compared with these."""
        if budget is not None and rank is not None:
            raise OptionError("both a budget and a rank were given. Give one of them.")
        if rank is not None:
            adapter, losses = truncate(self.adapter, rank)
        else:
            parameters = base_parameters(self.model.get_base_model())
            adapter, losses = compress(self.adapter, budget, base_parameters=parameters)
        with beside(self.model, adapter, "the compressed adapter"):
            found = logits(self.model, self.batch)
        wanted = replace(self.reference, logits=found)
        change = self.reference.difference(found)
        return _Job(self.model, adapter, self.batch, wanted, losses, change)

    def shaped(self, engine: Engine, dtype: str | None, padding: str | None) -> Adapter:
        chosen = engine.pads if padding is None else padding
        if chosen not in engine.paddings:
            raise OptionError(
                f"padding '{chosen}' does not serve {engine.name}: it reads "
                f"{' or '.join(engine.paddings)}."
            )
        made = self.adapter.to(DTYPES[dtype]) if dtype else self.adapter
        shapes = {}
        if chosen != "none":
            sites = find_sites(self.model.get_base_model())
            shapes = {s.target.name: (s.target.d_out, s.target.d_in) for s in sites}
        return padded(made, chosen, shapes)

    def written(
        self, engine: Engine, dtype: str | None, padding: str | None, folder: Path
    ) -> ExportReport:
        made = self.shaped(engine, dtype, padding)
        engine.write(made, folder, self.base)
        seen = engine.read(folder, self.base)
        error, worst = largest_error(self.adapter, seen)
        allowed = _UPDATES + 8 * torch.finfo(_coarsest(made)).eps
        if not error <= allowed:
            raise PlanError(
                f"the {engine.name} export changes the update of '{worst}' by {error:.3g} of its "
                f"norm, more than {allowed:.3g}; nothing was written. Please report this with the "
                "adapter's configuration."
            )
        with beside(self.model, seen, f"what {engine.name} reads"):
            found = logits(self.model, self.batch)
        return ExportReport(
            target=engine.name,
            folder=folder,
            difference=self.reference.difference(found),
            tolerance=self.tolerance(engine, made),
            bytes=0,
            ranks=made.ranks,
            error=error,
            advice=engine.advice(made, self.base),
        )

    def tolerance(self, engine: Engine, made: Adapter) -> float:
        if engine.name == "peft" and made is self.adapter and self.losses is None:
            return 0.0
        return self.reference.tolerance(_coarsest(made))

    def merged(self, folder: Path, dtype: str | None, requantise: bool) -> ExportReport:
        done: Merged = write_merged(self.model, self.adapter, folder, self.batch, dtype, requantise)
        return ExportReport(
            target=MERGED,
            folder=folder,
            difference=done.difference(self.reference),
            tolerance=done.tolerance(self.reference),
            bytes=0,
            advice=("it is a whole model; load it without an adapter",),
            rounding=done.rounding,
            notes=done.lines(),
        )


def _coarsest(adapter: Adapter) -> torch.dtype:
    types = {update.a.dtype for update in adapter.updates.values()} or {torch.float32}
    return max(types, key=lambda kind: torch.finfo(kind).eps)


def _check_options(model: nn.Module, target: str, dtype: str | None, padding: str | None) -> None:
    if target not in TARGETS:
        raise OptionError(f"export target '{target}' is unknown. {nearest(target, TARGETS)}")
    if not isinstance(model, PeftModel):
        raise PlanError(
            f"a {type(model).__name__} carries no adapter to export. Pass the PeftModel that was "
            "trained."
        )
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype '{dtype}' is unknown. {nearest(dtype, DTYPES)}")
    if padding is not None and padding not in PADDINGS:
        raise OptionError(f"padding '{padding}' is unknown. {nearest(padding, PADDINGS)}")


def _judge(target: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise PlanError(
            f"the {target} export differs from the trained model by {difference:.3g} in its "
            f"logits, more than {tolerance:.3g}; nothing was written. Export in float32 and "
            "without requantising, or report this with the adapter's configuration."
        )
