"""What measuring and training would take: parameters, memory and work of a model of any size.

No weights and no data are read: :mod:`gradrank.lab.shapes` counts what cannot be put in a formula,
:mod:`gradrank.lab.sizes` has the formulas.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradrank.core.budget import Budget
from gradrank.core.errors import OptionError
from gradrank.core.targets import Target, cost_of_rank_one
from gradrank.lab import sizes
from gradrank.lab.arms import head_options
from gradrank.lab.compare.dry_arms import Question, footprint
from gradrank.lab.compare.dry_models import Outline, config_of, empty_model, outline, quietly
from gradrank.lab.models import HEADS, check_head, model_head
from gradrank.lab.shapes import Pass, by_shape, fake_batch, make_fake, one_pass, weights_of
from gradrank.lab.sized import Inquiry, Measuring, Parameters, Sizes, Training
from gradrank.session import allocate, apply
from gradrank.signals import scheme as measured
from gradrank.signals.blocks import checkpointed, repeated_blocks
from gradrank.signals.held import mean_gradient_bytes, weights
from gradrank.signals.layers import find_sites
from gradrank.signals.loss import model_loss
from gradrank.signals.mean_gradient import MeanGradientProbe
from gradrank.signals.measure import MeanGradient, Signal, Spectrum, probe_for
from gradrank.signals.scheme import Cap, Scheme, scheme_of
from gradrank.signals.weigh import weigh

# A head for classes is small beside the model, and how many classes there are is in the data.
_CLASSES = 2
# Drop-out inside attention; kernels of GPUs apply it without keeping the scores.
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
DEFAULT_LENGTH = 256


def size_up(asked: Inquiry) -> Sizes:
    """Return what a model would take.

    Args:
        asked: What to look at.

    Returns:
        The sizes.

    Raises:
        OptionError: If the model has an encoder and a decoder.
    """
    if config_of(asked.model)[0].is_encoder_decoder:
        raise OptionError(
            f"model '{asked.model}' has an encoder and a decoder; gradrank fine-tunes models with "
            "one of them. Choose another model."
        )
    head = asked.head or default_head(asked.model)
    found = outline(asked.model, head, _CLASSES, asked.targets)
    length = 0 if head == "image" else usable_length(asked.length, found.max_length)
    budget = Budget.parse(asked.budget).resolve(found.targets, found.base_parameters)
    question = Question(
        model=asked.model,
        head=head,
        targets=asked.targets,
        method=asked.method,
        options=asked.options,
        budget=asked.budget,
        parameters=budget,
        steps=None,
        scaling=None,
        lora_alpha=16.0,
        lora_dropout=0.0,
    )
    planned = footprint(question)
    work = _Work(asked, found, model_head(head), length)
    measuring = work.measuring(asked.checkpoint) if asked.signals else None
    open_choice = asked.checkpoint is None and asked.max_memory is None and work.blocks
    return Sizes(
        inquiry=asked,
        outline=found,
        length=length,
        parameters=_parameters(found, budget, planned.peak),
        measuring=measuring,
        measuring_checkpointed=work.measuring(True) if measuring and open_choice else None,
        training=work.training(budget, planned.peak, False),
        checkpointed=work.training(budget, planned.peak, True) if work.checkpoints else None,
        footprint=planned,
        packed=work.packed,
    )


def default_head(model: str) -> str:
    """Return the head that a model is sized up with if the user names none.

    Args:
        model: The model.

    Returns:
        ``lm`` where it has that head, else one for classes.
    """
    config = config_of(model)[0]
    for head in HEADS:
        with contextlib.suppress(OptionError):
            check_head(config, head, model)
            return head
    return "lm"


def usable_length(length: int | None, limit: int | None) -> int:
    """Return the tokens per example.

    Args:
        length: What was asked for.
        limit: Positions of the model; None without a limit.

    Returns:
        Tokens.

    Raises:
        OptionError: If the model has fewer positions.
    """
    if length is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and length > limit:
        raise OptionError(
            f"--max-length is {length}, and the model has positions for {limit} tokens. Choose at "
            f"most {limit}."
        )
    return length


def _parameters(found: Outline, budget: int, peak: int) -> Parameters:
    by_type: dict[str, tuple[int, int]] = {}
    for target in found.targets:
        number, weights = by_type.get(target.module_type, (0, 0))
        by_type[target.module_type] = number + 1, weights + target.d_in * target.d_out
    rank_one = cost_of_rank_one(found.targets)
    return Parameters(
        base=found.base_parameters,
        targets=len(found.targets),
        by_type=by_type,
        budget=budget,
        share=budget / found.base_parameters,
        uniform_rank=budget // rank_one,
        rank_one=rank_one,
        peak=peak,
        head=found.head_parameters,
        adapter_bytes=sizes.FLOAT * budget,
    )


class _Work:
    """Measuring and training of one model on shapes."""

    def __init__(self, asked: Inquiry, found: Outline, head: str, length: int) -> None:
        self.asked, self.found, self.head, self.length = asked, found, head, length
        self.dtype = getattr(torch, asked.dtype)
        model = empty_model(asked.model, head, _CLASSES)
        weights = weights_of(model)
        self.checkpoints = bool(getattr(model, "supports_gradient_checkpointing", False))
        self.blocks = bool(repeated_blocks(model))
        self.weights = sizes.weight_bytes(weights, self.dtype.itemsize, asked.bits)
        self.packed = sizes.weight_bytes(weights, self.dtype.itemsize, 4)
        self.workspace = sizes.workspace_bytes(weights, self.dtype.itemsize, asked.bits)

    def measuring(self, checkpoint: bool | None) -> Measuring:
        """Return what measuring takes, with or without checkpointing, or as the cap asks for."""
        asked, targets = self.asked, self.found.targets
        scheme = self._scheme(checkpoint)
        groups = _groups(scheme)
        found = [self._measured(one, scheme.checkpoint) for one, _ in groups]
        runs, count = asked.batches * asked.accumulate, len(scheme.passes)
        projections = forward = backward = activations = statistics = 0
        for one, (block, many) in zip(found, groups, strict=True):
            work = sizes.projection_flops(block.targets, block.signals, one.rows, one.inputs)
            forward, backward = one.forward, one.backward - work[0]
            projections += sum(work) * many
            held = self._sums(block.targets, block.signals, asked.batches)
            if one.peak + held > activations + statistics:
                activations, statistics = one.peak, held
        spectra = [s for s in asked.signals if isinstance(s, Spectrum)]
        host = sum(sizes.spectrum_host_bytes(targets, s, asked.batches) for s in spectra)
        if asked.gpu or count > 1:
            # Sums of passes that are done are brought to the host.
            host += self._sums(targets, asked.signals, asked.batches)
        parts = (self.weights, activations, statistics, self.workspace)
        whole = (forward + backward) * count
        return Measuring(
            *parts,
            device=sum(parts),
            host=host,
            stored=sizes.stored_bytes(targets, asked.signals, asked.batches),
            passes=count,
            forward=forward * runs * count,
            backward=backward * runs * count,
            projections=projections * runs,
            overhead=projections / whole if whole else 0.0,
            checkpointed=scheme.checkpoint,
        )

    def _scheme(self, checkpoint: bool | None) -> Scheme:
        asked, targets = self.asked, self.found.targets
        cap = None
        if asked.max_memory is not None:
            model, mode = self._quiet_model()
            with mode, by_shape(), self._explained():
                probes = [probe_for(signal, targets, 0) for signal in asked.signals]
                batch = fake_batch(model, self.head, asked.batch_size, self.length)
                sites = find_sites(model, [target.name for target in targets])
                memory = weigh(model, sites, probes, lambda: model_loss(model, batch), batch, None)
            cap = Cap(asked.max_memory, memory, not asked.gpu, bool(repeated_blocks(model)))
        return scheme_of(targets, asked.signals, asked.batches, checkpoint, cap)

    @staticmethod
    def _sums(targets: Sequence[Target], signals: Sequence[Signal], batches: int) -> int:
        means = [signal for signal in signals if isinstance(signal, MeanGradient)]
        return sum(min(2, batches) * mean_gradient_bytes(targets, signal) for signal in means)

    def _quiet_model(self) -> tuple[nn.Module, FakeTensorMode]:
        mode = FakeTensorMode()
        model = make_fake(self._empty().requires_grad_(False), mode, self.dtype)
        return model.eval(), mode

    def _measured(self, one: measured.Pass, checkpoint: bool) -> Pass:
        model, mode = self._quiet_model()
        with mode:
            probes = [probe_for(signal, one.targets, 0) for signal in one.signals]
            for probe in probes:
                if isinstance(probe, MeanGradientProbe):
                    # Sums are counted by formula, and not among the activations.
                    probe.reserve()
        names = [target.name for target in one.targets]
        # Random states are no part of what is counted, and fake ones cannot be read.
        with checkpointed(model, False) if checkpoint else contextlib.nullcontext():
            return self._pass(model, mode, probes=probes, targets=names)

    def training(self, budget: int, peak: int, checkpointing: bool) -> Training:
        """Return what a step of uniform LoRA takes, with the method's peak of parameters."""
        mode = FakeTensorMode()
        base = self._empty()
        plan = allocate(self.found.targets, "uniform", budget)
        with quietly(), torch.device("meta"):
            model: Any = apply(plan, base, **head_options(base, self.head))
        make_fake(model, mode, self.dtype).train()
        if checkpointing:
            # Random states are no part of what is counted, and fake ones cannot be read.
            recompute(base, preserve_rng_state=False)
        learned = [p for p in model.parameters() if p.requires_grad]
        with mode:
            for parameter in learned:
                # As from the second step on: so gradients are no part of the activations.
                parameter.grad = torch.zeros_like(parameter)
        own = sum(p.numel() * p.itemsize for p in learned)
        own += max(0, peak - plan.parameters) * sizes.FLOAT
        state = sizes.training_state_bytes(own, 1)
        # Gradients of inputs are taken in bfloat16 on a GPU that has it, as the Trainer does.
        autocast = torch.bfloat16 if self.asked.gpu else None
        found = self._pass(model, mode, autocast=autocast)
        parts = (
            self.weights,
            state["adapter"],
            state["gradients"],
            state["moments"],
            found.peak,
            self.workspace,
        )
        flops = (found.forward + found.backward) * self.asked.accumulate
        return Training(*parts, device=sum(parts), flops=flops)

    def _empty(self) -> Any:
        model: Any = empty_model(self.asked.model, self.head, _CLASSES)
        if self.asked.gpu:
            _without_attention_dropout(model)
        model.config.use_cache = False
        if self.head != "lm":
            model.config.problem_type = "single_label_classification"
            if self.head == "classification":
                # Without one, a decoder refuses more than one example.
                model.config.pad_token_id = model.config.pad_token_id or 0
        elif getattr(model, "loss_type", "") is None:
            model.loss_type = "ForCausalLM"
        return model

    def _pass(self, model: nn.Module, mode: FakeTensorMode, **more: Any) -> Pass:
        def inputs() -> Mapping[str, torch.Tensor]:
            return fake_batch(model, self.head, self.asked.batch_size, self.length)

        with self._explained():
            return one_pass(model, mode, inputs, **more)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of what cannot be run on shapes that this is so."""
        try:
            with warnings.catch_warnings(), quietly():
                warnings.simplefilter("ignore")
                yield
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise OptionError(
                f"model '{self.asked.model}' ({self.found.kind}) cannot be run on shapes alone: "
                f"{reason}. Its memory and work are known only by running it."
            ) from error


def recompute(model: Any, **options: Any) -> None:
    """Switch gradient checkpointing on, by whichever name this transformers has for it.

    Args:
        model: A model of transformers.
        **options: Options of ``torch.utils.checkpoint``.
    """
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False, **options})


def _groups(scheme: Scheme) -> list[tuple[measured.Pass, int]]:
    """Return the passes to look at, and how many each stands for: those of the same signals."""
    alike: dict[tuple[Signal, ...], list[measured.Pass]] = {}
    for one in scheme.passes:
        alike.setdefault(one.signals, []).append(one)
    return [(max(same, key=lambda p: weights(p.targets)), len(same)) for same in alike.values()]


def _without_attention_dropout(model: Any) -> None:
    for module in model.modules():
        for name in _ATTENTION_DROPOUT:
            for owner in (module, getattr(module, "config", None)):
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)
