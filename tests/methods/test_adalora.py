"""AdaLoRA's rule: options, and its recursion and scores against PEFT's own allocator."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

import gradrank as gr
from gradrank.adapters.view import lora_sites
from gradrank.signals.sensitivity import Observation, TrainingGradient
from methods.importance_cases import RANKS, TARGETS, element_scores, lams, observations
from oracles import igu as oracle
from pruning_cases import DUE, method, run, started, step, weights
from pruning_cases import data as tokens


@pytest.mark.parametrize(
    ("option", "values", "rule"),
    [
        ("beta1", [-0.1, 1.0, 2.0, float("nan")], r"in \[0, 1\)"),
        ("beta2", [-0.1, 1.0, 2.0, float("nan")], r"in \[0, 1\)"),
        ("initial_rank", [0], "1 or more, or none"),
        ("r_min", [-1], "0 or more"),
        ("interval", [0], "1 or more"),
        ("warmup", [-1], "0 or more, or none"),
        ("final", [0], "1 or more, or none"),
        ("orthogonality", [-1.0, float("inf")], "0 or more"),
        ("init", ["zeros"], "'svd' or 'keep'"),
        ("after", ["stop"], "'continue' or 'restart'"),
    ],
)
def test_values_out_of_range_are_refused_with_their_rule(
    option: str, values: list[Any], rule: str
) -> None:
    assert option in {field.name for field in dataclasses.fields(gr.AdaLora)}
    for value in values:
        with pytest.raises(gr.OptionError, match=rf"'{option}' of method 'adalora' is .*{rule}"):
            gr.AdaLora(**{option: value})


def course(**options: Any) -> Any:
    return gr.AdaLora(**{"initial_rank": 4} | options).course(TARGETS, 40, 100)


def test_it_looks_at_every_steps_training_gradient() -> None:
    found = course()
    assert found.sensitivity == TrainingGradient()
    assert found.schedule.score_every == 1
    assert (found.schedule.warmup, found.schedule.final) == (10, 30)
    assert found.whole_penalty


def test_its_scores_are_products_of_smoothed_sensitivity_and_deviation() -> None:
    made, looks, lam = course(beta1=0.8, beta2=0.7), observations(5), lams()
    for look in looks:
        made.take(look)
    found = made._importance.scores(TARGETS, lam)
    scoring = oracle.Scoring(0.8, 0.7, "product")
    for name in RANKS:
        history = element_scores(looks, name)
        want = oracle.direction_scores(history, scoring)
        assert found[name].tolist() == pytest.approx(want, rel=1e-4)
        by_size = oracle.direction_scores(history, scoring, lam[name])
        assert found[name].tolist() != pytest.approx(by_size, rel=1e-2)


class Layers(nn.Module):
    """Parameters named as PEFT names those of its AdaLoRA layers."""

    def __init__(self) -> None:
        super().__init__()
        for target in TARGETS:
            rank = RANKS[target.name]
            layer = nn.Module()
            shapes = {"A": (rank, target.d_in), "E": (rank, 1), "B": (target.d_out, rank)}
            for factor, shape in shapes.items():
                values = nn.ParameterDict({"default": nn.Parameter(torch.zeros(shape))})
                layer.add_module(f"lora_{factor}", values)
            self.add_module(target.name, layer)

    def set(self, look: Observation) -> None:
        for name in RANKS:
            layer: Any = self.get_submodule(name)
            for theirs, ours in (("A", "A"), ("E", "lam"), ("B", "B")):
                parameter = getattr(layer, f"lora_{theirs}")["default"]
                parameter.data = look.weights[name][ours].view(parameter.shape).clone()
                parameter.grad = look.gradients[name][ours].view(parameter.shape).clone()


def pefts_allocator(layers: Layers) -> Any:
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=50, beta1=0.8, beta2=0.7
    )
    return RankAllocator(layers, config, "default")


def pefts_scores(allocator: Any, name: str) -> Tensor:
    """Its triplet scores, by its own functions."""

    def element(factor: str) -> Tensor:
        return allocator._element_score(f"{name}.lora_{factor}.default")

    of_q = torch.mean(element("A"), dim=1, keepdim=True)
    of_p = torch.mean(element("B"), dim=0).view(-1, 1)
    return allocator._combine_ipt(element("E"), torch.cat([of_q, of_p], dim=1))


def test_recursion_and_scores_are_pefts_on_the_same_gradients() -> None:
    made, layers, looks = course(beta1=0.8, beta2=0.7), Layers(), observations(6)
    allocator = pefts_allocator(layers)
    for look in looks:
        layers.set(look)
        allocator.update_ipt(layers)
        made.take(look)
    state = made.state()
    for name in RANKS:
        for theirs, ours in (("A", "A"), ("E", "lam"), ("B", "B")):
            key = f"{name}.lora_{theirs}.default"
            mean, deviation = allocator.exp_avg_ipt[key], allocator.exp_avg_unc[key]
            assert torch.allclose(state[f"mean/{ours}/{name}"].view(mean.shape), mean)
            assert torch.allclose(state[f"deviation/{ours}/{name}"].view(mean.shape), deviation)
        found = made._importance.scores(TARGETS, lams())[name]
        assert torch.allclose(found, pefts_scores(allocator, name))


def test_it_keeps_what_peft_keeps_where_every_direction_costs_the_same() -> None:
    layers, looks = Layers(), observations(6)
    allocator = pefts_allocator(layers)
    even = [gr.Target("q", 6, 6), gr.Target("k", 9, 3)]
    made = gr.AdaLora(initial_rank=4, beta1=0.8, beta2=0.7).course(even, 40, 100)
    for look in looks:
        layers.set(look)
        allocator.update_ipt(layers)
        made.take(look)
    for budget in range(1, 7):
        pattern = allocator.mask_to_budget(layers, budget)
        theirs = {
            name: tuple(i for i, kept in enumerate(pattern[f"{name}.lora_E.default"]) if kept)
            for name in RANKS
        }
        assert made.choose(12 * budget, lams()).keep == theirs


def test_a_whole_run_prunes_to_the_budget_without_a_pass_of_its_own() -> None:
    made = method("adalora")
    model, optimizer, controller = started(made)
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for batch in tokens():
        step(model, optimizer, controller, batch)
    assert calls[0] == len(tokens())
    entries = controller.run.decisions
    assert [entry["step"] for entry in entries] == DUE
    assert {entry["passes"] for entry in entries} == {0.0}
    assert entries[-1]["parameters"] <= controller.run.budget
    assert len(set(controller.ranks.values())) > 1


def test_what_it_remembers_is_the_gradient_of_training_before_the_penalty() -> None:
    made = method("adalora", orthogonality=100.0)
    model, optimizer, controller = started(made)
    before = weights(model)
    loss = model(**tokens()[0]).loss
    loss.backward()
    grads = {
        f"{site}/{factor}": tensor.grad.clone()
        for site, factors in _learned(model).items()
        for factor, tensor in factors.items()
    }
    optimizer.step()
    controller.step()
    state = controller.run.course.state()
    for key, grad in grads.items():
        name, _, factor = key.rpartition("/")
        want = 0.15 * (before[key] * grad).abs()
        assert torch.allclose(state[f"mean/{factor}/{name}"], want, rtol=1e-4, atol=1e-10)
    controller.close()


def _learned(model: Any) -> dict[str, dict[str, Any]]:
    sites = lora_sites(model, "default")
    return {name: site.learned() for name, site in sites.items()}


@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_micro_batches_are_one_look(parts: int) -> None:
    """Three micro-batches, each a third of the loss, are looked at once, as their sum."""
    model, optimizer, controller = started(method("adalora"))
    for batch in tokens()[:parts]:
        (model(**batch).loss / parts).backward()
        controller.step()
    grads = {n: fs["lam"].grad.clone() for n, fs in _learned(model).items()}
    lam = {n: fs["lam"].detach().clone() for n, fs in _learned(model).items()}
    optimizer.step()
    controller.step()
    state = controller.run.course.state()
    assert state["counts"].tolist() == [0, 0]
    for name, grad in grads.items():
        want = 0.15 * (lam[name] * grad).abs()
        assert torch.allclose(state[f"mean/lam/{name}"], want, rtol=1e-4, atol=1e-12)
    controller.close()


def test_uncertainty_changes_what_is_kept() -> None:
    """With no smoothing of the mean nothing deviates, and every product is zero: ties."""
    _, smooth = run(method("adalora"))
    _, tied = run(method("adalora", beta1=0.0))
    assert smooth.ranks != tied.ranks
