"""A small network on which PiLoRA's two stages run beside their oracle."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from oracles.pilora import Batch, Groups, Layer, TwoStages

SIZES = (6, 9, 7, 1)
RANK, SUPPLEMENTARY = 3, 1
NAMES = ("first", "second", "head")
INTERVAL, INITIAL, STEPS = 2, 7, 12
LR, DECAY, MAX_NORM = 3e-2, 0.02, 0.5


class Net(nn.Module):
    """Linear layers with tanh between them; the head has a single output row."""

    def __init__(self) -> None:
        super().__init__()
        for name, n, m in zip(NAMES, SIZES, SIZES[1:], strict=False):
            setattr(self, name, nn.Linear(n, m))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def network(seed: int = 0) -> Any:
    """It with stock LoRA in float64, every target at the scale 2; the head's rank is 1."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(NAMES),
        rank_pattern={"head": 1},
        alpha_pattern={"head": 2},
    )
    model: Any = get_peft_model(Net().double(), config)
    # PEFT keeps adapters of narrow floats in float32, and may do so with wide ones.
    return model.double().train()


def steps(count: int = STEPS, micro_batches: int = 2, seed: int = 1) -> list[list[Batch]]:
    """Micro-batches of very different sizes of the target, so that one is not like their mean."""
    generator = torch.Generator().manual_seed(seed)

    def batch(size: float) -> Batch:
        x = torch.randn(5, SIZES[0], generator=generator, dtype=torch.float64)
        y = size * torch.sin(x.sum(1, keepdim=True)) + x[:, :1] * x[:, 1:2]
        return x, y

    return [[batch(3.0 - 2.5 * k) for k in range(micro_batches)] for _ in range(count)]


def twin(model: Any, **options: Any) -> TwoStages:
    """The oracle of a network's run, with copies of its weights as they are."""
    layers = {}
    for name in NAMES:
        layer: Any = model.base_model.model.get_submodule(name)
        weights = layer.base_layer.weight, layer.base_layer.bias
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        copies = [t.detach().clone().double() for t in (*weights, *factors)]
        layers[name] = Layer(*copies, scaling=layer.scaling["default"])
    settings = {"interval": INTERVAL, "lr": LR, "weight_decay": DECAY, "max_norm": MAX_NORM}
    return TwoStages(layers, **settings | options)


def fresh_groups(masks: dict[str, list[int]], seed: int = 2) -> dict[str, Groups]:
    """New factors for stage 2, B = 0, in the shapes that the masks ask for."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, n in zip(NAMES, SIZES, strict=False):
        mask, dominant = masks[name], sum(masks[name])
        upper, lower = min(RANK, n, len(mask)), min(SUPPLEMENTARY, n, len(mask))
        a, b = (torch.randn(r, n, generator=generator).double() for r in (upper, lower))
        zeros = torch.zeros(dominant, upper), torch.zeros(len(mask) - dominant, lower)
        found[name] = Groups(mask, a, zeros[0].double(), b, zeros[1].double())
    return found
