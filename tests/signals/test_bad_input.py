"""What cannot be measured is refused by name, and nothing else is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, batches

LLAMA = CASES["llama"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def xs(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(3, 4)} for _ in range(count)]


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "signal", ["spectrum", gr.Spectrum("dense"), gr.Spectrum(sketch_dim=2), "mean-gradient"]
)
def test_a_non_finite_gradient_names_target_and_batch(bad: float, signal: Any) -> None:
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, active: bool) -> Tensor:
            ctx.active = active
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            (grad,) = grads
            if ctx.active:
                grad = grad.clone()
                grad[0, 0] = bad
            return grad, None

    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        hidden = Poison.apply(model.first(batch["x"]), len(seen) == 3)
        return model.second(hidden).square().mean()

    with pytest.raises(gr.MeasurementError, match=r"'first'.*batch 2") as caught:
        gr.measure(Net(), xs(4), signal, num_batches=4, loss_function=loss)
    assert "second" not in str(caught.value)


def test_opposite_infinities_do_not_cancel() -> None:
    model = Net()
    data = xs(2)
    data[1]["x"] = torch.tensor([[3e38, -3e38, 3e38, -3e38]] * 3)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        # A bounded loss with a gradient that overflows on its way to the first target.
        return (model.second(torch.relu(model.first(batch["x"] * 1e-38))) * 1e30).tanh().sum()

    gr.measure(model, data, num_batches=2, loss_function=loss)


def test_a_nan_loss_names_its_batch() -> None:
    data = batches(LLAMA, 3)
    data[1]["labels"] = torch.full_like(data[1]["labels"], -100)
    with pytest.raises(gr.MeasurementError, match="loss of batch 1 is nan"):
        gr.measure(LLAMA.model(), data, num_batches=3)


def detached(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).detach().sum()


def without_grad(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(batch["x"]).sum()


def unrelated(model: nn.Module, batch: Any) -> Tensor:
    return torch.ones(1, requires_grad=True).sum()


@pytest.mark.parametrize("loss", [detached, without_grad, unrelated])
@pytest.mark.parametrize("signal", ["spectrum", gr.Spectrum("dense", max_bytes=1)])
def test_a_loss_without_gradient_is_refused(loss: Any, signal: Any) -> None:
    with pytest.raises(gr.MeasurementError, match=r"no gradient|reaches no target"):
        gr.measure(Net(), xs(2), signal, num_batches=2, loss_function=loss)


@pytest.mark.parametrize("value", [1.0, None, torch.ones(2, requires_grad=True)])
def test_a_loss_that_is_no_scalar_tensor_is_refused(value: Any) -> None:
    with pytest.raises(gr.MeasurementError, match="batch 0 is no scalar"):
        gr.measure(Net(), xs(2), num_batches=2, loss_function=lambda *_: value)


def test_batches_without_labels_say_what_to_add() -> None:
    data = [{"input_ids": batch["input_ids"]} for batch in batches(LLAMA, 2)]
    with pytest.raises(gr.MeasurementError, match=r"\['input_ids'\].*'labels'"):
        gr.measure(LLAMA.model(), data, num_batches=2)


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, dtype=torch.long), (1, 2), "text", None, 3])
def test_a_batch_that_is_no_mapping_is_refused(batch: Any) -> None:
    with pytest.raises(gr.MeasurementError, match="not a mapping"):
        gr.measure(LLAMA.model(), [batch, batch], num_batches=2)


def test_a_mapping_given_for_the_batches_is_refused() -> None:
    with pytest.raises(gr.MeasurementError, match="not a mapping"):
        gr.measure(LLAMA.model(), batches(LLAMA, 1)[0], num_batches=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "accumulate"), [(0, 1), (0, 3), (2, 3)])
def test_too_few_batches_are_refused_with_numbers(count: int, accumulate: int) -> None:
    with pytest.raises(gr.MeasurementError, match=rf"gave {count} batches.*the {accumulate} that"):
        gr.measure(LLAMA.model(), batches(LLAMA, count), num_batches=4, accumulate=accumulate)


def test_an_incomplete_last_mini_batch_is_left_out() -> None:
    found = gr.measure(LLAMA.model(), batches(LLAMA, 5), num_batches=4, accumulate=2)
    assert found.batches == 2


@pytest.mark.parametrize("options", [{"num_batches": 0}, {"accumulate": 0}, {"num_batches": -3}])
def test_impossible_counts_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(gr.OptionError, match="at least 1"):
        gr.measure(LLAMA.model(), batches(LLAMA, 2), **options)


def test_unknown_and_repeated_signals_are_refused() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 1)
    with pytest.raises(gr.OptionError, match=r"'spectrums' is unknown. Did you mean 'spectrum'"):
        gr.measure(model, data, "spectrums")
    with pytest.raises(gr.OptionError, match="twice"):
        gr.measure(model, data, ["spectrum", gr.Spectrum("dense")])
    with pytest.raises(gr.OptionError, match="no signal"):
        gr.measure(model, data, [])
    with pytest.raises(gr.OptionError, match=r"'sketchy'.*Did you mean 'sketch'"):
        gr.Spectrum("sketchy")
    for size in (0, 4097):
        with pytest.raises(gr.OptionError, match=f"is {size}"):
            gr.Spectrum(sketch_dim=size)
        with pytest.raises(gr.OptionError, match=f"is {size}"):
            gr.MeanGradient(size)


def test_a_named_tuple_batch_reaches_the_loss_function() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    data = [Pair(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(2)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch.x) - batch.y).square().mean()

    assert gr.measure(Net(), data, num_batches=2, loss_function=loss).batches == 2
