"""Run a model on shapes alone and count what it would allocate and compute.

The model's own code, PEFT's and the probes' run on fake tensors, which have a shape, a dtype and no
memory; every operation passes through a ledger that adds up the bytes of living tensors and the
FLOPs. So residual copies, float32 norms, logits and what autograd keeps are counted as the
architecture has them, and no formula has to know it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import masking_utils

from gradrank.core.targets import Target
from gradrank.lab.sizes import Weight
from gradrank.ops import sketch
from gradrank.signals.layers import find_sites
from gradrank.signals.loss import model_loss
from gradrank.signals.observe import Kept, Observer, Probe

_PACKING = "find_packed_sequence_indices"
_REMEMBERED = "_scatter_plan"
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Ledger(TorchDispatchMode):
    """Counts bytes of living tensors and FLOPs while it is entered.

    Tensors that were there before are not counted: the ledger sees what the block allocates.

    Attributes:
        now: Bytes alive.
        peak: The most at any moment.
        flops: FLOPs so far, of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and enter what it gave."""
        kwargs = kwargs or {}
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            # A view, or what was there before and has been written to, is nothing new.
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._enter(leaf)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet.__name__ == _FUSED:
            self.flops += sdpa_flop_count(*(item.shape for item in args[:3]))
        elif packet.__name__ == _FUSED + "_backward":
            self.flops += sdpa_backward_flop_count(*(item.shape for item in args[:4]))
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, lambda _: self._leave(key, size))

    def _leave(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass over a micro-batch takes.

    Attributes:
        peak: Bytes at its highest point, beyond what was there before.
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass (with recomputation, if there is any).
        rows: T per target that a gradient reached; empty without probes.
        inputs: ``(T, d_in)`` of every distinct input of targets; empty without probes.
    """

    peak: int
    forward: int
    backward: int
    rows: Mapping[str, int]
    inputs: tuple[tuple[int, int], ...]


class _Counted:
    """A probe that also notes what it is shown."""

    def __init__(self, probe: Any) -> None:
        self._probe = probe
        self.rows: dict[str, int] = {}
        self.inputs: list[tuple[int, int]] = []

    def share_key(self, target: Target) -> object:
        return self._probe.share_key(target)

    def on_input(self, target: Target, x: Tensor) -> Kept:
        self.inputs.append((x.shape[0], x.shape[1]))
        return self._probe.on_input(target, x)

    def on_output_grad(self, target: Target, kept: Any, delta: Tensor) -> None:
        self.rows[target.name] = self.rows.get(target.name, 0) + delta.shape[0]
        self._probe.on_output_grad(target, kept, delta)


def make_fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """Give a model on the meta device tensors that look as if they were on a CPU.

    The meta device has no fused attention; on fake CPU tensors every operation takes the path
    that it takes in earnest.

    Args:
        model: The model, with or without PEFT's adapter; changed in place.
        mode: The mode that fake tensors belong to.
        dtype: Of floating-point parameters; buffers keep theirs, adapters get float32.

    Returns:
        The model.
    """
    made: dict[int, Tensor] = {}
    with mode:
        for path, module in model.named_modules():
            # PEFT keeps adapters in float32 beside a base in half precision.
            own = torch.float32 if ".lora_" in path else dtype
            kinds: list[Any] = [module._parameters, module._buffers]
            for kind in kinds:
                for name, old in kind.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        made[id(old)] = _fake(old, own)
                    kind[name] = made[id(old)]
    return model


def _fake(old: Tensor, dtype: torch.dtype) -> Tensor:
    learned = isinstance(old, nn.Parameter)
    kind = dtype if learned and old.is_floating_point() else old.dtype
    new = torch.empty(old.shape, dtype=kind, device="cpu")
    return nn.Parameter(new, requires_grad=old.requires_grad) if learned else new


def weights_of(model: nn.Module) -> list[Weight]:
    """Return the parameters of a base model as sizes, tied ones once.

    Args:
        model: The model, on any device.

    Returns:
        The weights.
    """
    packed = {id(site.module.weight) for site in find_sites(model)}
    return [
        Weight(int(p.shape[0]) if p.dim() else 1, p.numel(), id(p) in packed)
        for p in model.parameters()
    ]


def fake_batch(model: Any, head: str, batch: int, length: int) -> dict[str, Tensor]:
    """Return inputs without padding; to be called inside the fake mode.

    Args:
        model: The model.
        head: ``lm``, ``classification`` or ``image``.
        batch: Examples.
        length: Tokens of each; not looked at for pictures.

    Returns:
        Named arguments of the model, labels among them.
    """
    whole = torch.zeros(batch, dtype=torch.long)
    if head == "image":
        config = model.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype), "labels": whole}
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone() if head == "lm" else whole}


def one_pass(
    model: nn.Module,
    mode: FakeTensorMode,
    inputs: Callable[[], Mapping[str, Tensor]],
    probes: Sequence[Probe] = (),
    targets: Sequence[str] = (),
    autocast: torch.dtype | None = None,
) -> Pass:
    """Run one forward and backward pass on shapes.

    Args:
        model: A fake model, in the mode (training or not) that it shall run in.
        mode: Its fake mode.
        inputs: Makes the micro-batch.
        probes: Probes that look at targets, as while measuring.
        targets: Names of the targets that they look at.
        autocast: Dtype that operations are cast to, or None.

    Returns:
        What it takes.
    """
    seen = [_Counted(probe) for probe in probes]
    observer: Any = contextlib.nullcontext()
    if seen:
        observer = Observer(find_sites(model, targets), seen)
    with mode, by_shape(), observer:
        batch = inputs()
        with Ledger() as ledger:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = model_loss(model, batch)
            forward = ledger.flops
            loss.backward()
        return Pass(
            peak=ledger.peak,
            forward=forward,
            backward=ledger.flops - forward,
            rows=seen[0].rows if seen else {},
            inputs=tuple(seen[0].inputs) if seen else (),
        )


@contextlib.contextmanager
def by_shape() -> Iterator[None]:
    """Keep shapes and values apart.

    Batches are taken as not packed: transformers would otherwise expect packed sequences wherever
    it cannot see values, and make a mask. And what the sketches remember between calls is put
    aside, because fake tensors must not be found there later, nor real ones now.

    Yields:
        Nothing.
    """
    remembered: Any = getattr(sketch, _REMEMBERED)
    changes = [(sketch, _REMEMBERED, remembered.__wrapped__)]
    if hasattr(masking_utils, _PACKING):
        changes.append((masking_utils, _PACKING, lambda _positions: None))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
