"""Adapters in training, twins that were built with other ranks, and exact comparisons."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cases import CASES, Case, batches
from gradrank.adapters.view import lora_sites

LR = 1e-2
optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda params: optim.AdamW(params, LR, weight_decay=0.1),
    "adam": lambda params: optim.Adam(params, LR),
    "momentum": lambda params: optim.SGD(params, LR, momentum=0.9),
    "adafactor": lambda params: optim.Adafactor(params, LR),
}


def config(case: Case, rank: int = 4, **options: Any) -> LoraConfig:
    options = {"target_modules": "all-linear", "lora_alpha": 2 * rank} | options
    if case.name == "gpt2":
        options.setdefault("fan_in_fan_out", True)
    return LoraConfig(r=rank, **options)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: Any, case: Case, steps: int = 1, seed: int = 0) -> None:
    """Plain steps without dropout."""
    for batch in batches(case, steps, seed):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def trained(
    case: Case = CASES["llama"], optimizer: str = "adamw", steps: int = 3, **options: Any
) -> tuple[Any, Any]:
    """A PEFT model some steps into training, and its optimizer."""
    torch.manual_seed(5)
    model = get_peft_model(case.model(), config(case, **options)).eval()
    made = OPTIMIZERS[optimizer](trainable(model))
    train(model, made, case, steps)
    return model, made


def layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def sites(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    return lora_sites(model, adapter)


def logits(model: nn.Module, case: Case = CASES["llama"], seed: int = 99) -> Tensor:
    with torch.no_grad():
        return model(**batches(case, 1, seed)[0]).logits


def step_of(model: nn.Module, optimizer: Any, case: Case, seed: int = 50) -> dict[str, Tensor]:
    """The weights after one more step."""
    train(model, optimizer, case, 1, seed)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def built_that_way(model: Any, optimizer: Any, case: Case, name: str) -> tuple[Any, Any]:
    """A model built with the ranks that another one has now, with its weights and state."""
    twin = get_peft_model(case.model(), copy.deepcopy(model.peft_config["default"])).eval()
    mine, other = (dict(m.named_parameters()) for m in (twin, model))
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in other.items()}
    made = OPTIMIZERS[name](trainable(twin))
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(other[key])
            if other[key] in optimizer.state:
                made.state[parameter] = copy.deepcopy(optimizer.state[other[key]])
    return twin, made


def reloaded(model: Any, case: Case, **options: Any) -> PeftModel:
    """Save, and load with stock PEFT around a fresh base."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(case.model(), folder, **options).eval()


def everything(model: Any, optimizer: Any = None) -> dict[str, Any]:
    """All that an edit may touch: values and which objects hold them."""
    found: dict[str, Any] = {"config": {}, "layers": {}, "groups": [], "state": {}}
    found["modules"] = {n: id(m) for n, m in model.named_modules()}
    found["parameters"] = {
        n: (id(p), p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }
    found["buffers"] = {n: b.clone() for n, b in model.named_buffers()}
    for name, made in model.peft_config.items():
        found["config"][name] = copy.deepcopy(vars(made))
    for name, layer in layers(model).items():
        kept: dict[str, Any] = {
            key: dict(getattr(layer, key)) for key in ("r", "lora_alpha", "scaling")
        }
        linears = [*layer.lora_A.values(), *layer.lora_B.values()]
        kept["shapes"] = [(lin.in_features, lin.out_features) for lin in linears]
        found["layers"][name] = kept
    if optimizer is not None:
        for group in optimizer.param_groups:
            rest = {k: v for k, v in group.items() if k != "params"}
            found["groups"].append(([id(p) for p in group["params"]], copy.deepcopy(rest)))
        found["state"] = {id(p): copy.deepcopy(dict(s)) for p, s in optimizer.state.items()}
    return found


def same(left: Any, right: Any) -> bool:
    """Bitwise, types included."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
