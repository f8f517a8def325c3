"""Who looks at gradients: expectations, cost, and that training does not feel it."""

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, batches
from gradrank.core.errors import MeasurementError
from gradrank.ops.quadrature import as_printed, one_of_grid, trapezoid, with_interior_weighted
from gradrank.signals import scoring
from gradrank.signals.path import FACTORS, at_point, gradients
from gradrank.signals.scoring import PathScorer, RandomScaleScorer, TrainingScorer, scorer_for
from gradrank.signals.sensitivity import (
    Observation,
    PathGradient,
    RandomScale,
    TrainingGradient,
)
from signals.path_cases import UNIT, branches, of_case, polynomial, scalings, updates

BATCHES = batches(CASES["llama"], 4)
Found = dict[str, dict[str, Tensor]]


def path_scorer(model: Any, signal: PathGradient, seed: int = 0, **more: Any) -> PathScorer:
    made = scorer_for(signal, model, lambda: branches(model), seed, **more)
    assert isinstance(made, PathScorer)
    return made


def look(scorer: Any, model: Any, *given: Any, factor: float = 1.0) -> Observation:
    """One step of training, looked at."""
    scorer.before_step()
    for batch in given:
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        (factor * output["loss"]).backward()
    found = scorer.before_update()
    model.zero_grad()
    assert found is not None
    return found


def close(one: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-6) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.allclose(one[n][f].double(), other[n][f].double(), rtol, atol)
        for n in one
        for f in one[n]
    )


def weighted(model: Any, rule: Any, *given: Any) -> Found:
    """A rule's sum from passes of its own, all of them, averaged over the batches."""
    made = branches(model)
    total: Found = {b.name: {f: torch.zeros_like(b.learned[f]) for f in FACTORS} for b in made}
    for batch in given:
        for alpha, weight in zip(rule.points, rule.weights, strict=True):
            with at_point(made, alpha):
                output = model(**batch) if isinstance(batch, dict) else model(batch)
                found = gradients(output["loss"], made, FACTORS)
            for name, factors in found.items():
                for factor, grad in factors.items():
                    total[name][factor] += weight * grad / len(given)
    return total


# --- which points are drawn ----------------------------------------------------------------------


def test_grid_is_the_trapezoid_whatever_the_draw() -> None:
    signal = PathGradient("grid", 4)
    assert {signal.draw(s, i) for s in range(3) for i in range(5)} == {trapezoid(4)}


@pytest.mark.parametrize(
    ("signal", "rule"),
    [
        (PathGradient("stochastic", 6), as_printed),
        (PathGradient("unbiased", 6, "always"), with_interior_weighted),
    ],
)
def test_every_interior_point_is_drawn_once_per_round(signal: PathGradient, rule: Any) -> None:
    for around in range(4):
        drawn = [signal.draw(3, 5 * around + i) for i in range(5)]
        assert sorted(r.points for r in drawn) == [(0.0, k / 6, 1.0) for k in range(1, 6)]
        assert set(drawn) == {rule(6, k) for k in range(1, 6)}
    assert len({tuple(signal.draw(s, i).points for i in range(5)) for s in range(20)}) > 5


def test_of_the_whole_grid_every_segment_is_drawn_once_per_round() -> None:
    signal = PathGradient("unbiased", 5)
    counts: Counter[float] = Counter()
    for around in range(400):
        drawn = [signal.draw(1, 5 * around + i) for i in range(5)]
        assert all(rule.weights == (1.0,) for rule in drawn)
        points = sorted(rule.points[0] for rule in drawn)
        # One point per segment: sorted, the k-th lies in the k-th.
        assert all(k / 5 <= point <= (k + 1) / 5 for k, point in enumerate(points))
        counts.update(points)
    assert set(counts) == {k / 5 for k in range(6)}
    for k in range(6):
        expected = 200 if k in {0, 5} else 400
        assert abs(counts[k / 5] - expected) < 5 * expected**0.5
    assert signal.draw(1, 7) == signal.draw(1, 7)
    assert {signal.draw(1, i) for i in range(60)} <= {one_of_grid(5, d) for d in range(10)}


# --- expectations on a real model ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["svd", "plain", "fixed"])
def test_a_whole_round_of_unbiased_looks_is_the_grid(form: str) -> None:
    model, segments = polynomial(form), 5
    factors = ("A", "B") if form == "plain" else FACTORS

    def round_of(rule: str, looks: int) -> Found:
        signal = PathGradient(rule, segments, "always", micro_batches=looks, factors=factors)
        found = look(path_scorer(model, signal), model, *[UNIT] * looks)
        return {name: dict(grads) for name, grads in found.gradients.items()}

    grid, unbiased = round_of("grid", 1), round_of("unbiased", segments - 1)
    assert close(unbiased, grid)
    assert not close(round_of("stochastic", segments - 1), grid, rtol=1e-1)
    assert not close(round_of("unbiased", 1), grid, rtol=1e-1)


def test_a_whole_round_of_stochastic_looks_is_the_enumerated_sum() -> None:
    model, segments = polynomial(), 5
    signal = PathGradient("stochastic", segments, micro_batches=segments - 1)
    found = look(path_scorer(model, signal), model, *[UNIT] * (segments - 1))
    rules = [as_printed(segments, k) for k in range(1, segments)]
    sums = [weighted(model, rule, UNIT) for rule in rules]
    want = {n: {f: sum(s[n][f] for s in sums) / len(sums) for f in FACTORS} for n in sums[0]}
    assert close(found.gradients, want)
    ends = trapezoid(1)
    assert not close(found.gradients, weighted(model, ends, UNIT), rtol=1e-1)


def test_the_mean_over_all_draws_of_the_grid_is_the_grid() -> None:
    """Every (segment, side) weighs the same; looks are grouped by what they drew."""
    model, segments = polynomial(), 3
    signal = PathGradient("unbiased", segments)
    scorer = path_scorer(model, signal, seed=2)
    by_point: dict[float, Found] = {}
    for index in range(40):
        (point,) = signal.draw(2, index).points
        found = look(scorer, model, UNIT).gradients
        if point in by_point:
            assert close(found, by_point[point])
        by_point[point] = {n: {f: g.clone() for f, g in fs.items()} for n, fs in found.items()}
    assert len(by_point) == segments + 1
    draws = [one_of_grid(segments, d).points[0] for d in range(2 * segments)]
    name = next(iter(found))
    mean = {f: sum(by_point[p][name][f] for p in draws) / len(draws) for f in FACTORS}
    assert close({name: mean}, weighted(model, trapezoid(segments), UNIT))


# --- what a look costs, and what it shares -------------------------------------------------------


def passes(model: Any, signal: PathGradient, count: int = 1, **more: Any) -> list[int]:
    """Forward passes that looks made, by counting calls, checked against what they say."""
    calls = [0]
    handle = model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    scorer = path_scorer(model, signal, **more)
    found = []
    for _ in range(count):
        calls[0] = 0
        seen = look(scorer, model, BATCHES[0])
        found.append(calls[0] - 1)
        assert seen.passes == found[-1]
    handle.remove()
    return found


def own_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def test_passes_are_those_of_the_points_and_the_end_is_shared_with_training() -> None:
    model, _ = of_case("llama", double=False)
    assert passes(model, PathGradient("grid", 4)) == [4]
    assert passes(model, PathGradient("stochastic", 4)) == [2]
    assert passes(model, PathGradient("unbiased", 4, "always")) == [2]
    signal = PathGradient("unbiased", 4)
    drawn = [signal.draw(0, i).points[0] for i in range(24)]
    assert passes(model, signal, 24) == [int(point != 1.0) for point in drawn]
    assert 1.0 in drawn
    # Training may be on another loss than the given function's: nothing can be shared.
    assert passes(model, PathGradient("grid", 4), loss_function=own_loss) == [5]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["grid", "stochastic", "unbiased"])
def test_a_shared_pass_equals_one_of_its_own(name: str, rule: str) -> None:
    model, _ = of_case(name, double=False, lora_dropout=0.3)
    batch = batches(CASES[name], 1)[0]
    found = []
    for loss_function in (None, own_loss):
        torch.manual_seed(4)
        scorer = path_scorer(model, PathGradient(rule, 3, "always"), loss_function=loss_function)
        found.append(look(scorer, model, batch))
    assert found[0].passes == found[1].passes - 1
    assert close(found[0].gradients, found[1].gradients, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.25, 4096.0])
def test_accumulation_and_a_loss_scale_do_not_change_the_estimate(factor: float) -> None:
    model, _ = of_case("llama", double=False)
    signal = PathGradient("grid", 2, micro_batches=3)
    plain = look(path_scorer(model, signal), model, *BATCHES[:3])
    scaled = look(path_scorer(model, signal), model, *BATCHES[:3], factor=factor)
    assert close(scaled.gradients, plain.gradients, rtol=1e-4)
    assert close(plain.gradients, weighted(model, trapezoid(2), *BATCHES[:3]), rtol=1e-4)


def test_only_the_last_micro_batches_of_a_step_are_looked_at() -> None:
    model, _ = of_case("llama", double=False)
    scorer = path_scorer(model, PathGradient("grid", 2, micro_batches=2))
    found = look(scorer, model, *BATCHES)
    assert close(found.gradients, weighted(model, trapezoid(2), *BATCHES[2:]), rtol=1e-4)
    assert scorer.index == 2
    look(scorer, model, BATCHES[0])
    assert scorer.index == 3, "fewer, if a step has fewer"


def test_asking_for_one_factor_gives_one() -> None:
    model, _ = of_case("llama", double=False)
    found = look(path_scorer(model, PathGradient("grid", 2, factors=("lam",))), model, BATCHES[0])
    assert all(set(factors) == {"lam"} for factors in found.gradients.values())
    assert all(set(factors) == {"lam"} for factors in found.weights.values())
    want = weighted(model, trapezoid(2), BATCHES[0])
    assert close(found.gradients, {n: {"lam": fs["lam"]} for n, fs in want.items()}, rtol=1e-4)


def test_weights_and_gradients_are_of_the_components_in_use() -> None:
    model, _ = of_case("llama", "fixed", double=False)
    found = look(path_scorer(model, PathGradient("grid", 2)), model, BATCHES[0])
    for branch in branches(model):
        assert branch.rank == 2
        weights, grads = found.weights[branch.name], found.gradients[branch.name]
        assert torch.equal(weights["A"], branch.learned["A"].detach()[:2])
        assert torch.equal(weights["B"], branch.learned["B"].detach()[:, :2])
        assert torch.equal(weights["lam"], branch.learned["lam"].detach()[:2])
        assert all(grads[f].shape == weights[f].shape for f in FACTORS)


# --- the change of the loss ----------------------------------------------------------------------


def change(model: Any, *given: Any) -> float:
    total = 0.0
    for batch in given:
        for alpha, sign in ((1.0, 1), (0.0, -1)):
            with at_point(branches(model), alpha), torch.no_grad():
                total += sign * float(model(**batch)["loss"])
    return total / len(given)


@pytest.mark.parametrize("rule", ["grid", "unbiased"])
@pytest.mark.parametrize("endpoints", ["drawn", "always"])
def test_the_change_of_the_loss_is_that_of_the_same_micro_batches(
    rule: str, endpoints: str
) -> None:
    model, _ = of_case("llama", double=False)
    signal = PathGradient(rule, 3, endpoints, micro_batches=2, losses=True)
    for seed in range(4):
        found = look(path_scorer(model, signal, seed), model, *BATCHES[:3])
        assert found.loss_change == pytest.approx(change(model, *BATCHES[1:3]), rel=1e-4)
    bare = PathGradient(rule, 3, endpoints)
    assert look(path_scorer(model, bare), model, BATCHES[0]).loss_change is None


@pytest.mark.parametrize("endpoints", ["drawn", "always"])
def test_with_a_loss_function_its_own_change_counts_and_not_the_models(endpoints: str) -> None:
    model, _ = of_case("llama", double=False)

    def loss_function(given: Any, batch: Any) -> Tensor:
        return 10 * given(**batch).loss

    signal = PathGradient("unbiased", 3, endpoints, losses=True)
    for seed in range(6):
        scorer = path_scorer(model, signal, seed, loss_function=loss_function)
        found = look(scorer, model, BATCHES[0])
        assert found.loss_change == pytest.approx(10 * change(model, BATCHES[0]), rel=1e-4)


# --- training does not feel it -------------------------------------------------------------------


class Normed(nn.Module):
    """Has running statistics, dropout, and an adapter that is on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, _ = of_case("llama", double=False, lora_dropout=0.3)
        self.norm = nn.BatchNorm1d(97)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        output = self.model(**batch)
        shown = self.norm(output.logits.float().mean(1))
        return {
            "loss": output.loss + nn.functional.dropout(shown, 0.2, self.training).square().mean()
        }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "signal",
    [
        PathGradient("grid", 3, losses=True),
        PathGradient("stochastic", 3),
        PathGradient("unbiased", 3, micro_batches=2),
        PathGradient("unbiased", 3, "always", losses=True),
        TrainingGradient(),
    ],
    ids=["grid", "stochastic", "drawn", "always", "training"],
)
def test_training_is_the_same_to_the_last_bit_with_and_without_looking(
    signal: Any, autocast: bool
) -> None:
    def run(looking: bool) -> list[Any]:
        model = Normed()
        made = scorer_for(signal, model, lambda: branches(model.model), 0)
        seen: list[Any] = []
        torch.manual_seed(7)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for step in range(3):
            if looking:
                made.before_step()
            for batch in BATCHES[step : step + 2]:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch)["loss"]
                (loss / 2).backward()
                seen.append(loss.detach())
            if looking:
                assert made.before_update() is not None
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            if looking:
                made.after_update()
            seen += [b.clone() for b in model.buffers()]
            seen.append(torch.get_rng_state())
        made.close()
        return seen

    bare, watched = run(False), run(True)
    assert len(bare) == len(watched) > 100
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))


def test_gradients_that_are_not_finite_are_left_out() -> None:
    model, _ = of_case("llama", double=False)
    scorer = path_scorer(model, PathGradient("grid", 2))
    scorer.before_step()
    model(**BATCHES[0]).loss.backward()
    with torch.no_grad():
        branches(model)[0].learned["lam"][0] = float("nan")
    assert scorer.before_update() is None
    assert scorer.index == 1, "the next look draws the next point"


def test_a_model_that_is_not_the_one_that_is_trained_is_told() -> None:
    model, _ = of_case("llama", double=False)
    scorer = path_scorer(model, PathGradient("grid", 2))
    scorer.before_step()
    copy.deepcopy(model)(**BATCHES[0]).loss.backward()
    with pytest.raises(MeasurementError, match="was not called in training mode"):
        scorer.before_update()
    scorer.before_step()
    model.eval()(**BATCHES[0]).loss.backward()
    with pytest.raises(MeasurementError, match="was not called in training mode"):
        scorer.before_update()


def hooks(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize(
    "signal", [PathGradient("grid", 2), PathGradient("unbiased", 2), RandomScale(2)]
)
def test_closing_leaves_no_hook_even_in_the_middle_of_a_step(signal: Any) -> None:
    model, _ = of_case("llama", double=False)
    bare = hooks(model)
    scorer = scorer_for(signal, model, lambda: branches(model), 0)
    scorer.before_step()
    model(**BATCHES[0])
    assert hooks(model) > bare
    scorer.close()
    scorer.close()
    assert hooks(model) == bare


def test_a_failing_pass_leaves_no_hook_and_the_random_state() -> None:
    model, _ = of_case("llama", double=False)
    bare, state = hooks(model), []

    def fails(_model: Any, _batch: Any) -> Tensor:
        torch.rand(2)
        raise KeyError("loss")

    scorer = path_scorer(model, PathGradient("grid", 2), loss_function=fails)
    scorer.before_step()
    model(**BATCHES[0]).loss.backward()
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        scorer.before_update()
    assert hooks(model) == bare
    assert torch.equal(torch.get_rng_state(), state)


# --- as the published code does ------------------------------------------------------------------


def alphas(segments: int, seed: int, count: int) -> list[float]:
    """Which α training had, by what the polynomial model shows of its update."""
    model = polynomial()
    whole = next(iter(updates(model).values()))
    scorer = scorer_for(RandomScale(segments), model, lambda: branches(model), seed)
    found = []
    for _ in range(count):
        ratio = float((model(UNIT)["update"].detach() / whole).mean())
        found.append(round(ratio ** (1 / 3) * segments, 6))
    scorer.close()
    assert float((model(UNIT)["update"].detach() / whole).mean()) == pytest.approx(1)
    return found


def test_the_scale_is_the_cube_of_every_point_of_the_grid_but_the_start() -> None:
    found = alphas(4, 1, 400)
    counts = Counter(found)
    assert set(counts) == {1.0, 2.0, 3.0, 4.0}
    assert all(abs(count - 100) < 50 for count in counts.values())
    assert alphas(4, 1, 30) == found[:30]
    assert alphas(4, 2, 30) != found[:30]


def scaled_twin(model: Any, alpha: float, power: int = 3) -> Any:
    """An explicit copy: ``(α P)(α λ)(α Q)``, by its layers' scale."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= alpha**power
    return twin


@functools.cache
def halfway() -> int:
    """A seed whose first micro-batch is trained in the middle of the path."""
    return next(seed for seed in range(40) if alphas(4, seed, 1) == [2.0])


def test_training_is_that_of_the_scaled_adapter_and_evaluation_is_unscaled() -> None:
    model, _ = of_case("llama")
    alpha = 0.5
    twin = scaled_twin(model, alpha)
    want = model.eval()(**BATCHES[0]).logits
    scorer = scorer_for(RandomScale(4), model, lambda: branches(model), halfway())
    assert torch.equal(model(**BATCHES[0]).logits, want), "evaluation"
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0]).logits, want), "no gradients, as in evaluation"
    loss, twins = model(**BATCHES[0]).loss, twin(**BATCHES[0]).loss
    assert loss.item() == pytest.approx(twins.item(), rel=1e-6)
    loss.backward()
    twins.backward()
    one, other = dict(model.named_parameters()), dict(twin.named_parameters())
    for name, parameter in one.items():
        if parameter.grad is not None:
            grad = other[name].grad
            assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-9), name
    for power in (1, 2):
        wrong = scaled_twin(twin, alpha, power - 3)
        assert wrong(**BATCHES[0]).loss.item() != pytest.approx(loss.item(), rel=1e-4)
    scorer.close()


def test_its_signal_is_the_sensitivity_of_a_shrunken_adapter() -> None:
    """``|w dL/dw|`` under ``α³ P λ Q`` is ``|w' dL/dw'|`` at the factors ``w' = α w``."""
    model, _ = of_case("llama")
    alpha = 0.5
    shrunken = copy.deepcopy(model)
    with torch.no_grad():
        for branch in branches(shrunken):
            for tensor in branch.learned.values():
                tensor.mul_(alpha)
    scorer = scorer_for(RandomScale(4), model, lambda: branches(model), halfway())
    model(**BATCHES[0]).loss.backward()
    found = scorer.after_update()
    scorer.close()
    assert found is not None
    shrunken(**BATCHES[0]).loss.backward()
    for branch in branches(shrunken):
        for factor, tensor in branch.learned.items():
            want = (tensor * tensor.grad).abs().float()
            got = (found.weights[branch.name][factor] * found.gradients[branch.name][factor]).abs()
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-7)


def test_it_looks_after_the_step_at_what_was_accumulated() -> None:
    model, _ = of_case("llama", double=False)
    scorer = scorer_for(RandomScale(4), model, lambda: branches(model), 0)
    assert isinstance(scorer, RandomScaleScorer)
    for batch in BATCHES[:3]:
        (model(**batch).loss / 3).backward()
    assert scorer.index == 3, "one point per micro-batch"
    assert scorer.before_update() is None
    with torch.no_grad():
        for branch in branches(model):
            branch.learned["lam"].add_(1.0)
    found = scorer.after_update()
    scorer.close()
    for branch in branches(model):
        for factor, tensor in branch.learned.items():
            assert torch.equal(found.gradients[branch.name][factor], tensor.grad)
            assert torch.equal(found.weights[branch.name][factor], tensor.detach())


# --- AdaLoRA's signal ----------------------------------------------------------------------------


def test_the_training_gradient_is_what_the_optimizer_is_about_to_use() -> None:
    model, _ = of_case("llama", double=False)
    scorer = scorer_for(TrainingGradient(), model, lambda: branches(model), 0)
    assert isinstance(scorer, TrainingScorer)
    scorer.before_step()
    for batch in BATCHES[:2]:
        model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    found = scorer.before_update()
    for branch in branches(model):
        for factor, tensor in branch.learned.items():
            assert torch.equal(found.gradients[branch.name][factor], tensor.grad)
    assert scorer.after_update() is None
    model.zero_grad()
    empty = scorer.before_update()
    assert not any(g.any() for fs in empty.gradients.values() for g in fs.values())


def test_a_target_without_components_is_not_looked_at() -> None:
    model, _ = of_case("llama", "fixed", double=False)

    def some() -> list[Any]:
        made = branches(model)
        return [
            type(b)(b.name, b.inner, b.outer, b.learned, b.rank * (i > 0))
            for i, b in enumerate(made)
        ]

    gone = branches(model)[0].name
    for signal in (TrainingGradient(), PathGradient("grid", 2)):
        found = look(scorer_for(signal, model, some, 0), model, BATCHES[0])
        assert gone not in found.gradients
        assert gone not in found.weights
        assert len(found.gradients) == len(branches(model)) - 1


# --- several processes ---------------------------------------------------------------------------


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> list[Tensor]:
    """Pretend to be one of several processes; all send the same."""
    sent: list[Tensor] = []

    def all_reduce(tensor: Tensor) -> None:
        sent.append(tensor.clone())
        tensor.mul_(world)

    monkeypatch.setattr(scoring, "is_distributed", lambda: True)
    monkeypatch.setattr(scoring.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(scoring.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(scoring.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(scoring.dist, "all_reduce", all_reduce)
    return sent


def points_drawn(model: Any, signal: Any, looks: int) -> list[Any]:
    drawn: list[Any] = []

    class Spy(PathGradient):
        def draw(self, seed: int, index: int) -> Any:
            drawn.append(index)
            return super().draw(seed, index)

    fields = {f: getattr(signal, f) for f in ("rule", "segments", "endpoints", "micro_batches")}
    scorer = path_scorer(model, Spy(**fields))
    indices = []
    for _ in range(looks):
        scorer.before_step()
        for _ in range(signal.micro_batches):
            model(UNIT)["loss"].backward()
        drawn.clear()
        assert scorer.before_update() is not None
        indices += drawn
    return indices


def test_two_processes_draw_together_what_one_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, signal = polynomial(), PathGradient("unbiased", 5, micro_batches=2)
    alone = points_drawn(model, signal, 6)
    assert alone == list(range(12))
    halves = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            as_process(patch, rank, 2)
            halves.append(points_drawn(model, signal, 3))
    assert halves == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_the_mean_is_over_processes_and_the_change_of_the_loss_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = of_case("llama", double=False)
    signal = PathGradient("grid", 2, micro_batches=2, losses=True)
    alone = look(path_scorer(model, signal), model, *BATCHES[:2])
    sent = as_process(monkeypatch, 1, 4)
    found = look(path_scorer(model, signal), model, *BATCHES[:2])
    assert close(found.gradients, alone.gradients, rtol=1e-4)
    assert found.loss_change == pytest.approx(alone.loss_change, rel=1e-4)
    (packed,) = sent
    size = sum(g.numel() for fs in alone.gradients.values() for g in fs.values())
    assert packed.shape == (size + 1,), "one message per look"
    assert scalings(model)


def test_as_code_draws_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = alphas(20, 3, 12)
    halves = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            as_process(patch, rank, 2)
            halves.append(alphas(20, 3, 6))
    assert [a for pair in zip(*halves, strict=True) for a in pair] == alone


def test_a_share_of_the_rows_is_the_estimate_of_these_rows_and_shares_no_pass() -> None:
    model, _ = of_case("llama", double=False)
    rows = {key: torch.cat([BATCHES[0][key], BATCHES[1][key]])[:4] for key in BATCHES[0]}
    half = {key: value[:2] for key, value in rows.items()}
    model.eval()  # dropout falls on other units where there are fewer rows
    for module in model.modules():
        module.training = module is model
    seen = look(path_scorer(model, PathGradient("grid", 2, rows=0.5)), model, rows)
    want = look(path_scorer(model, PathGradient("grid", 2)), model, half)
    whole = look(path_scorer(model, PathGradient("grid", 2)), model, rows)
    assert (seen.passes, want.passes) == (3, 2)
    assert close(seen.gradients, want.gradients)
    assert not close(seen.gradients, whole.gradients)
