"""What is remembered of training's own calls, and that repeating them disturbs nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, batches
from gradrank.core.errors import MeasurementError
from gradrank.signals import replay as replay_module
from gradrank.signals.path import FACTORS, at_point, gradients
from gradrank.signals.replay import Replay, is_finite
from signals.path_cases import UNIT, branches, of_case, polynomial

BATCHES = batches(CASES["llama"], 4)


def shared(model: Any) -> dict[tuple[str, str], Tensor]:
    return {(b.name, factor): t for b in branches(model) for factor, t in b.learned.items()}


def own(model: Any, replay: Replay, index: int = -1) -> dict[str, dict[str, Tensor]]:
    """Gradients at the end of the path from a pass of their own."""
    made = branches(model)
    with replay.undisturbed():
        return gradients(replay.loss(replay.batches[index]), made, FACTORS)


def equal(one: Any, other: Any, rtol: float = 1e-6) -> bool:
    return all(torch.allclose(one[n][f], other[n][f], rtol, 1e-9) for n in other for f in other[n])


# --- what is remembered --------------------------------------------------------------------------


def test_the_last_calls_of_training_are_remembered_and_no_others() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model, size=2)
    model(**BATCHES[0])
    assert not replay.batches, "not open yet"
    replay.open()
    for batch in BATCHES[:3]:
        model(**batch).loss.backward()
    with torch.no_grad():
        model(**BATCHES[3])
    model.eval()
    model(**BATCHES[3])
    model.train()
    copy.deepcopy(model)(**BATCHES[3])
    assert len(replay.batches) == 2
    for kept, batch in zip(replay.batches, BATCHES[1:3], strict=True):
        assert kept.args == ()
        assert kept.kwargs.keys() == batch.keys()
        assert all(kept.kwargs[key] is batch[key] for key in batch)
    replay.close()
    model(**BATCHES[3])
    assert len(replay.batches) == 2
    replay.open()
    assert not replay.batches
    model(**BATCHES[0])
    assert len(replay.batches) == 1
    replay.forget()
    assert not replay.batches


def hooks(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or {}) for p in model.parameters())


def test_closing_removes_every_hook_and_opening_twice_installs_them_once() -> None:
    model, _ = of_case("llama", double=False)
    bare = hooks(model)
    replay = Replay(model)
    replay.open(shared(model))
    once = hooks(model)
    replay.open(shared(model))
    assert hooks(model) == once == bare + 2 + len(shared(model))
    assert replay.is_open
    replay.close()
    replay.close()
    assert hooks(model) == bare
    assert not replay.is_open


def test_keeping_the_call_does_not_keep_later_changes_of_its_dictionary() -> None:
    model = polynomial()
    replay = Replay(model)
    replay.open()
    given = {"x": UNIT, "factor": 1.0}
    model(**given)
    given["factor"] = 5.0
    assert replay.batches[0].kwargs["factor"] == 1.0


# --- repeating -----------------------------------------------------------------------------------


def dropping(**lora: Any) -> Any:
    model, _ = of_case("llama", double=False, lora_dropout=0.4, **lora)
    return model


def test_a_repetition_is_the_call_itself_under_dropout() -> None:
    model = dropping()
    replay = Replay(model, size=3)
    replay.open()
    torch.manual_seed(1)
    losses = [model(**batch).loss for batch in BATCHES[:3]]
    replay.close()
    after = torch.get_rng_state()
    with replay.undisturbed():
        for order in ((0, 1, 2), (2, 2, 0)):
            for k in order:
                assert torch.equal(replay.loss(replay.batches[k]), losses[k])
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(model(**BATCHES[0]).loss, losses[0]), "another dropout"


def test_a_repetition_has_the_autocast_setting_of_the_call() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model, size=2)
    replay.open()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**BATCHES[0]).loss
    high = model(**BATCHES[0]).loss
    assert low != high
    with replay.undisturbed():
        assert torch.equal(replay.loss(replay.batches[0]), low)
        assert torch.equal(replay.loss(replay.batches[1]), high)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(replay.loss(replay.batches[1]), high)


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.map(self.norm(x)).square().mean()}


def test_running_statistics_and_random_states_come_back_even_after_an_exception() -> None:
    model = WithNorm()
    replay = Replay(model)
    replay.open()
    model(torch.randn(6, 5))
    replay.close()
    before = {n: b.clone() for n, b in model.named_buffers()}
    random = torch.get_rng_state()

    def fail() -> None:
        with replay.undisturbed():
            torch.rand(3)
            replay.loss(replay.batches[0])
            assert model.norm.num_batches_tracked == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(model.named_buffers())
    assert all(torch.equal(before[n], after[n]) for n in before)
    replay.open()
    model(torch.randn(6, 5))
    assert len(replay.batches) == 1, "remembers again after an exception"


def test_repetitions_are_not_remembered_themselves() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model, size=4)
    replay.open(shared(model))
    model(**BATCHES[0]).loss.backward()
    kept = {key: grad.clone() for key, grad in replay.batches[0].grads.items()}
    with replay.undisturbed(), at_point(branches(model), 0.5):
        gradients(replay.loss(replay.batches[0]), branches(model), FACTORS)
    assert len(replay.batches) == 1
    assert all(torch.equal(replay.batches[0].grads[key], kept[key]) for key in kept)


# --- the gradient of training, shared ------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.25, 1024.0])
def test_training_gradients_are_those_of_the_models_own_loss_whatever_its_scale(
    factor: float,
) -> None:
    model = dropping()
    replay = Replay(model, size=3)
    replay.open(shared(model))
    for batch in BATCHES[:3]:
        (factor * model(**batch).loss).backward()
    replay.close()
    for k in range(3):
        found = replay.batches[k].training_gradients(branches(model), FACTORS)
        assert found is not None
        assert equal(found, own(model, replay, k), rtol=1e-4)
        assert replay.batches[k].scale == factor
    first = replay.batches[0].training_gradients(branches(model), FACTORS)
    assert not equal(first, own(model, replay, 1), rtol=1e-2), "each micro-batch has its own"


def test_what_training_does_to_its_gradients_afterwards_does_not_count() -> None:
    """Clipping, unscaling and averaging over processes change the fields in place."""
    model, _ = of_case("llama", double=False)
    replay = Replay(model)
    replay.open(shared(model))
    model(**BATCHES[0]).loss.backward()
    replay.close()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(65536)
    found = replay.batches[0].training_gradients(branches(model), FACTORS)
    assert equal(found, own(model, replay), rtol=1e-4)


def test_a_loss_that_is_not_the_models_own_is_not_shared() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model)
    replay.open(shared(model))
    model(**BATCHES[0]).logits.square().mean().backward()
    assert replay.batches[0].training_gradients(branches(model), FACTORS) is None


def test_a_gradient_that_overflowed_is_not_shared() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model)
    replay.open(shared(model))
    (float("inf") * model(**BATCHES[0]).loss).backward()
    assert replay.batches[0].training_gradients(branches(model), FACTORS) is None


def test_without_a_backward_pass_or_without_sharing_there_is_nothing() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model)
    replay.open(shared(model))
    model(**BATCHES[0])
    assert replay.batches[0].training_gradients(branches(model), FACTORS) is None
    replay.open()
    model(**BATCHES[0]).loss.backward()
    assert replay.batches[0].training_gradients(branches(model), FACTORS) is None


def test_gradients_of_two_calls_with_one_backward_pass_are_not_mixed_up() -> None:
    """As in contrastive losses, or losses that are added up before one backward pass."""
    model, _ = of_case("llama", double=False)
    replay = Replay(model, size=2)
    replay.open(shared(model))
    (model(**BATCHES[0]).loss + model(**BATCHES[1]).loss).backward()
    replay.close()
    for k in range(2):
        found = replay.batches[k].training_gradients(branches(model), FACTORS)
        assert found is None or equal(found, own(model, replay, k), rtol=1e-4), k


def test_gradients_of_two_calls_with_late_backward_passes_are_not_mixed_up() -> None:
    model, _ = of_case("llama", double=False)
    replay = Replay(model, size=2)
    replay.open(shared(model))
    losses = [model(**batch).loss for batch in BATCHES[:2]]
    for loss in losses:
        loss.backward()
    replay.close()
    for k in range(2):
        found = replay.batches[k].training_gradients(branches(model), FACTORS)
        assert found is None or equal(found, own(model, replay, k), rtol=1e-4), k


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["named", "one", "several"])
def test_a_loss_function_gets_what_the_model_was_called_with(call: str) -> None:
    model = polynomial()
    seen: list[Any] = []

    def loss_function(given: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        assert given is model
        x = batch["x"] if isinstance(batch, dict) else batch[0] if call == "several" else batch
        return model(x)["update"].square().sum()

    replay = Replay(model, loss_function=loss_function)
    replay.open()
    if call == "named":
        model(x=UNIT, factor=2.0)
    elif call == "one":
        model(UNIT)
    else:
        model(UNIT, 2.0)
    with replay.undisturbed():
        loss = replay.loss(replay.batches[0])
    want = {"named": {"x": UNIT, "factor": 2.0}, "one": UNIT, "several": (UNIT, 2.0)}[call]
    (batch,) = seen
    assert batch == want if call == "named" else batch is UNIT or batch == want
    assert torch.equal(loss, model(UNIT)["update"].square().sum())


def test_a_positional_call_of_a_model_with_a_loss_is_repeated() -> None:
    model = polynomial()
    replay = Replay(model)
    replay.open()
    given = model(UNIT, 3.0)["loss"]
    with replay.undisturbed():
        assert torch.equal(replay.loss(replay.batches[0]), given)


@pytest.mark.parametrize("named", [True, False])
def test_a_model_without_a_loss_is_told(named: bool) -> None:
    model, _ = of_case("llama", double=False)
    batch = {key: value for key, value in BATCHES[0].items() if key != "labels"}
    replay = Replay(model)
    replay.open()
    model(**batch) if named else model(batch["input_ids"])
    message = r"no loss for a batch.*labels" if named else r"without a loss.*loss_function"
    with pytest.raises(MeasurementError, match=message), replay.undisturbed():
        replay.loss(replay.batches[0])


def test_finite_is_finite() -> None:
    fine = [torch.ones(3), torch.zeros(2, 2)]
    assert is_finite(fine)
    assert is_finite([])
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not is_finite([*fine, torch.tensor([0.0, bad])])


# --- a part of the rows --------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.3, 2), (0.01, 1), (1.0, 4)])
def test_a_share_of_the_rows_gives_the_loss_of_these_rows(share: float, kept: int) -> None:
    model, _ = of_case("llama", double=False)
    model.eval()
    batch = {key: torch.cat([BATCHES[0][key], BATCHES[1][key]])[:4] for key in BATCHES[0]}
    assert batch["input_ids"].shape[0] == 4
    model.train()
    replay = Replay(model, rows=share)
    replay.open()
    model(**batch, num_items_in_batch=None).loss.backward()
    replay.close()
    first = {key: value[:kept] for key, value in batch.items()}
    state = torch.get_rng_state()
    with replay.undisturbed():
        found = replay.loss(replay.batches[0])
    torch.set_rng_state(replay.batches[0].random[0])
    want = model(**first).loss
    torch.set_rng_state(state)
    assert torch.equal(found, want)
    assert kept == 4 or not torch.equal(found, model(**batch).loss)


def test_rows_are_cut_in_positional_and_nested_arguments_and_nowhere_else() -> None:
    args = (torch.zeros(4, 2), [torch.ones(4), torch.ones(3)], "text")
    kwargs = {"deep": {"x": torch.ones(4, 1)}, "whole": torch.ones(1, 4), "n": torch.tensor(4)}
    cut, named = replay_module._first_rows((args, kwargs), 0.5)
    assert [cut[0].shape[0], cut[1][0].shape[0], cut[1][1].shape[0], cut[2]] == [2, 2, 3, "text"]
    assert [named["deep"]["x"].shape[0], named["whole"].shape[1], int(named["n"])] == [2, 4, 4]
    assert replay_module._first_rows(((), {"n": 3}), 0.5) == ((), {"n": 3})
