"""Slow twin of the observer: weight gradients by autograd, inner products by loops, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def weight_gradients(
    model: nn.Module, batches: Sequence[Any], names: Sequence[str], loss: Loss = own_loss
) -> dict[str, list[Tensor]]:
    """Per target and batch ``∇_W L``, ``[d_out, d_in]`` float64, by asking autograd for it."""
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in modules.items()}
    model.eval()
    model.requires_grad_(False)
    weights = [modules[name].weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        grads = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
        for name, weight, grad in zip(names, weights, grads, strict=True):
            full = torch.zeros_like(weight) if grad is None else grad
            # GPT-2's Conv1D stores its weight as [d_in, d_out].
            is_conv1d = type(modules[name]).__name__ == "Conv1D"
            found[name].append((full.T if is_conv1d else full).detach().double())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    for name, module in modules.items():
        module.training = modes[name]
    return found


def factors(
    model: nn.Module, batches: Sequence[Any], name: str, loss: Loss = own_loss
) -> list[tuple[Tensor, Tensor]]:
    """Per batch the input ``X [T, d_in]`` and output gradient ``Δ [T, d_out]`` of one target."""
    module = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []
    pairs = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].detach(), output))

    handle = module.register_forward_hook(hook)
    modes = {key: part.training for key, part in model.named_modules()}
    model.eval()
    for batch in batches:
        seen.clear()
        value = loss(model, batch)
        deltas = torch.autograd.grad(value, [output for _, output in seen])
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in seen])
        delta = torch.cat([d.reshape(-1, d.shape[-1]) for d in deltas])
        pairs.append((x.double(), delta.double()))
    handle.remove()
    for key, part in model.named_modules():
        part.training = modes[key]
    return pairs


def gram_of(gradients: Sequence[Tensor]) -> Tensor:
    """``C_ab = <vec g_a, vec g_b> / M``, entry by entry."""
    count = len(gradients)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for a in range(count):
        for b in range(count):
            gram[a, b] = float((gradients[a] * gradients[b]).sum()) / count
    return gram


def gram_of_factors(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The same without forming a gradient: ``C_ab = Σ_tu (X_a X_bᵀ)_tu (Δ_a Δ_bᵀ)_tu / M``."""
    count = len(pairs)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for a, (x_a, d_a) in enumerate(pairs):
        for b, (x_b, d_b) in enumerate(pairs):
            gram[a, b] = float(((x_a @ x_b.T) * (d_a @ d_b.T)).sum()) / count
    return gram
