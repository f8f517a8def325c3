"""4-bit weights that bitsandbytes rearranges for inference on some processors.

The rearranging itself is plain PyTorch, so that it is tried here on every processor; what computes
with rearranged weights needs instructions that few have, so no test computes with them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from gradrank.ops.four_bit import keep_quantised_layout, quantised_layout
from gradrank.serving.weights import dense

bnb = pytest.importorskip("bitsandbytes")
SWITCH = "support_avx512bf16_for_cpu"
WIDTH, ROWS = 128, 64
pytestmark = pytest.mark.skipif(
    not hasattr(bnb.nn.Linear4bit(64, 64), SWITCH), reason="this bitsandbytes rearranges nothing"
)


def layer(nested: bool = False, d_in: int = WIDTH, d_out: int = ROWS) -> Any:
    torch.manual_seed(3)
    found = bnb.nn.Linear4bit(d_in, d_out, bias=False)
    # Scales that differ from row to row, so that their order matters.
    weight = torch.randn(d_out, d_in) * torch.arange(1, d_out + 1)[:, None]
    found.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    found = found.to("cpu")
    setattr(found, SWITCH, True)
    return found


def rearrange(module: Any) -> None:
    """Do what the first inference on such a processor does."""
    pack = bnb.functional._convert_weight_packed_for_cpu
    module.weight.data, module.weight.quant_state = pack(
        module.weight.data, module.weight.quant_state
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("nested", [False, True])
def test_rearranged_weights_are_put_back(nested: bool) -> None:
    module = layer(nested)
    wanted, codes = dense(module, "it").clone(), module.weight.data.clone()
    rearrange(module)
    assert not torch.equal(module.weight.data.reshape(-1), codes.reshape(-1))
    held = keep_quantised_layout(nn.Sequential(module))
    assert held == [module]
    assert not getattr(module, SWITCH)
    assert torch.equal(module.weight.data, codes)
    # Its scales were rounded to bfloat16 in between, and nested ones are quantised again.
    assert relative(dense(module, "it"), wanted) < (0.02 if nested else 2**-8)
    assert keep_quantised_layout(nn.Sequential(module)) == []


def test_putting_codes_back_alone_would_mix_the_scales_up() -> None:
    """The broken twin: what bitsandbytes itself puts back, without the order of the scales."""
    module = layer()
    wanted = dense(module, "it").clone()
    rearrange(module)
    module.state_dict()
    scales = module.weight.quant_state.absmax
    assert scales.shape == (WIDTH // 64, ROWS)
    module.weight.quant_state.absmax = scales.reshape(-1).float()
    assert relative(dense(module, "it"), wanted) > 0.1


def test_the_switch_is_back_after_the_block_also_after_an_error() -> None:
    module = layer()

    def fail() -> None:
        with quantised_layout(module):
            assert not getattr(module, SWITCH)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert getattr(module, SWITCH)


class Net(nn.Module):
    """A trained layer below a 4-bit one: its gradient has to come through the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = layer(d_in=64), layer(d_in=ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(torch.tanh(self.below(x) / 100)) / 100


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(4)
    return [{"x": torch.randn(4, 64)} for _ in range(3)]


def loss(model: Any, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def test_measuring_rearranges_nothing_and_hands_the_model_back() -> None:
    model, plain = Net(), Net()
    for module in (plain.below, plain.above):
        setattr(module, SWITCH, False)
    found = gr.measure(model, batches(), num_batches=3, loss_function=loss)
    wanted = gr.measure(plain, batches(), num_batches=3, loss_function=loss)
    for target in wanted.targets:
        assert torch.equal(found.gram(target.name), wanted.gram(target.name))
    for module in (model.below, model.above):
        assert getattr(module, SWITCH)
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def test_an_adapter_learns_after_an_evaluation() -> None:
    model = Net()
    found = gr.measure(model, batches(), num_batches=3, loss_function=loss)
    tuned = gr.apply(gr.allocate(found, "uniform", "uniform:2"), model)
    tuned.eval()
    with torch.no_grad():
        loss(tuned, batches()[0])
    tuned.train()
    loss(tuned, batches()[0]).backward()
    lora_b = tuned.base_model.model.below.lora_B["default"].weight
    assert lora_b.grad is not None
    assert float(lora_b.grad.norm()) > 0
