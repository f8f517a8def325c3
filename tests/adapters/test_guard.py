"""Every refusal, one by one and together; a refused edit changes nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import gradrank as gr
from adapters.surgery_cases import config, everything, logits, same, sites, trainable, trained
from cases import CASES, tiny_llama, tiny_mixtral
from gradrank.adapters import forms
from gradrank.adapters.guard import check, wrapping
from gradrank.adapters.reserve import reserve_ranks
from gradrank.core.errors import SurgeryError

LLAMA = CASES["llama"]
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"  # 32 -> 16


def refused(model: Any, edits: Any, optimizer: Any = None, **options: Any) -> str:
    """The text of the refusal, after a check that nothing has changed."""
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError) as caught:
        gr.edit(model, edits, optimizer, **options)
    assert same(everything(model, optimizer), before)
    return str(caught.value)


EDITS: dict[str, tuple[Any, str]] = {
    "shrink-up": (gr.Shrink(5), "has rank 4 and cannot shrink to 5"),
    "grow-down": (gr.Grow(3), "has rank 4 and cannot grow to 3"),
    "zero": (gr.Shrink(0), "would get rank 0; a rank is a whole number from 1"),
    "negative": (gr.Grow(-1), "would get rank -1"),
    "float": (gr.Grow(5.0), "would get rank 5.0"),  # type: ignore[arg-type]
    "bool": (gr.Shrink(True), "would get rank True"),
    "beyond": (gr.Grow(17), "would get rank 17, above min(d_in, d_out), 16"),
    "number": (7, "was given 7, which is no edit"),
    "sketch-width": (gr.Grow(5, torch.ones(3, 31)), "not floats [s, 32]"),
    "sketch-shape": (gr.Grow(5, torch.ones(32)), "not floats [s, 32]"),
    "sketch-kind": (gr.Grow(5, torch.ones(3, 32).long()), "torch.int64, not floats"),
    "sketch-nan": (gr.Grow(5, torch.full((3, 32), torch.nan)), "sketch with NaN"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_makes_no_sense(name: str) -> None:
    edit, reason = EDITS[name]
    text = refused(*refusing(), {K: edit})
    assert "1 reason(s)" in text
    assert f"'{K}' " in text
    assert reason in text


def refusing() -> tuple[Any]:
    return (trained(steps=1)[0],)


def test_an_unknown_target_is_named_with_the_nearest() -> None:
    model, optimizer = trained(steps=1)
    text = refused(model, {Q.replace("q_proj", "q_prj"): gr.Grow(5)}, optimizer)
    assert "carries no LoRA adapter. Did you mean" in text
    assert Q in text


def test_merged() -> None:
    model, optimizer = trained(steps=1)
    model.merge_adapter()
    assert "'" + Q + "' is merged into its base weight" in refused(
        model, {Q: gr.Grow(5)}, optimizer
    )
    model.unmerge_adapter()
    gr.edit(model, {Q: gr.Grow(5)}, optimizer)


def test_dora() -> None:
    model, optimizer = trained(steps=1, use_dora=True)
    assert "LoRA variant DoraLinearVariant" in refused(model, {Q: gr.Shrink(2)}, optimizer)


def test_a_bias_on_lora_b() -> None:
    model, optimizer = trained(CASES["bert"], steps=1, lora_bias=True)
    name = next(iter(sites(model)))
    assert "trains a bias on lora_B" in refused(model, {name: gr.Shrink(2)}, optimizer)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changed_the_base_weight_by_the_rank(start: str) -> None:
    model, optimizer = trained(steps=1, init_lora_weights=start)
    text = refused(model, {Q: gr.Shrink(2)}, optimizer)
    assert f"init_lora_weights='{start}'" in text
    assert "1 reason(s)" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_diverged(value: float, factor: str) -> None:
    model, _ = trained(steps=1)
    with torch.no_grad():
        sites(model)[Q].raw(factor)[0, 0] = value
    with pytest.raises(SurgeryError, match=f"NaN or infinite values in its factor {factor}"):
        gr.edit(model, {Q: gr.Shrink(2)})


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_hooks_on_a_factor(kind: str) -> None:
    model, _ = trained(steps=1)
    parameter = sites(model)[Q].raw("B")
    if kind == "gradient":
        handle = parameter.register_hook(lambda gradient: gradient)
    else:
        handle = parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert "has hooks on its factor B" in refused(model, {Q: gr.Grow(5)})
    handle.remove()
    gr.edit(model, {Q: gr.Grow(5)})


def test_meta_quantised_and_empty_factors() -> None:
    model, _ = trained(steps=1)
    site = sites(model)[Q]
    whole = site.raw("A")
    for value, reason in (
        (whole.detach().to("meta"), "factor A on the meta device"),
        (whole.detach().to(torch.int8), "quantised factor A (torch.int8)"),
        (torch.zeros(0), "sharded or flattened factors"),
    ):
        site.linear("A").weight = nn.Parameter(value, requires_grad=False)
        with pytest.raises(SurgeryError) as caught:
            gr.edit(model, {Q: gr.Grow(5)})
        assert reason in str(caught.value)


def test_other_forms_and_parametrizations() -> None:
    model, _ = trained(steps=1)
    names = list(sites(model))
    layer = sites(model)[names[1]].layer
    rows = torch.arange(layer.out_features) % 2 == 0
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    forms.attach_partition(layer, "default", rows, 3, 1)
    parametrize.register_parametrization(
        sites(model)[names[2]].linear("A"), "weight", nn.Identity()
    )
    with pytest.raises(SurgeryError) as caught:
        gr.edit(model, {name: gr.Grow(5) for name in names[1:3]})
    text = str(caught.value)
    assert f"'{names[1]}' has a neuron partition already" in text
    assert f"'{names[2]}' has a parametrization that gradrank did not make" in text
    gr.edit(model, {names[3]: gr.Grow(5)})


def test_layers_of_another_kind() -> None:
    options: Any = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = get_peft_model(
        tiny_mixtral(), LoraConfig(r=2, target_modules=["q_proj"], **options)
    ).eval()
    experts = "model.layers.0.mlp.experts.down_proj"
    text = refused(model, {experts: gr.Grow(3), Q: gr.Grow(3)})
    assert f"'{experts}' is adapted by a ParamWrapper LoRA layer" in text
    assert Q not in text
    torch.manual_seed(5)
    before = logits(model)
    gr.edit(model, {Q: gr.Grow(3)})
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].r == 2, "the rank that most layers have"
    ada: Any = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    other = get_peft_model(tiny_llama(), ada)
    with pytest.raises(SurgeryError, match="is adapted by a SVDLinear LoRA layer"):
        gr.edit(other, {Q: gr.Grow(5)})


def test_no_adapter_and_several() -> None:
    with pytest.raises(SurgeryError, match="carries no PEFT adapter"):
        gr.edit(tiny_llama(), {Q: gr.Grow(5)})
    model, _ = trained(steps=1)
    model.add_adapter("second", config(LLAMA, 3))
    assert "adapter 'third' is unknown" in refused(model, {Q: gr.Grow(5)}, adapter="third")
    text = refused(model, {Q: gr.Drop()})
    assert "carries other adapters too (default, second)" in text
    model.base_model.set_adapter(["default", "second"])
    assert "2 adapters are active" in refused(model, {Q: gr.Grow(5)})


def test_dropping_everything() -> None:
    model, optimizer = trained(steps=1)
    names = list(sites(model))
    text = refused(model, dict.fromkeys(names, gr.Drop()), optimizer)
    assert "every target would be dropped" in text
    gr.edit(model, dict.fromkeys(names[1:], gr.Drop()), optimizer)
    assert list(sites(model)) == names[:1]


def test_optimizers_that_cannot_follow() -> None:
    model, _ = trained(steps=1)
    elsewhere = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    text = refused(model, {Q: gr.Grow(5)}, elsewhere)
    assert f"{Q}.lora_A, {Q}.lora_B: not in the optimizer" in text
    assert "has no state per LoRA component" in refused(
        model, {Q: gr.Grow(5)}, torch.optim.LBFGS(trainable(model))
    )


def test_masked_layers() -> None:
    model, _ = trained(steps=1)
    reserve_ranks(model, {Q: 6})
    optimizer = torch.optim.AdamW(trainable(model))
    assert "above the rank reserved for it, 6" in refused(model, {Q: gr.Grow(7)}, optimizer)
    text = refused(model, {Q: gr.Drop()}, optimizer)
    assert "has a fixed shape and cannot be dropped" in text
    with pytest.raises(SurgeryError, match="component mask already"):
        reserve_ranks(model, {Q: 6})


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("held", [True, False])
def test_a_live_wrapper_even_of_one_process(held: bool) -> None:
    model, optimizer = trained(steps=1)
    wrapped = DistributedDataParallel(model)
    assert wrapping(wrapped, optimizer) == "DistributedDataParallel"
    before = everything(model, optimizer)
    with pytest.raises(
        SurgeryError, match=r"trains under DistributedDataParallel.*gradrank.reserve"
    ):
        gr.edit(wrapped, {Q: gr.Grow(5)}, optimizer if held else None)
    assert same(everything(model, optimizer), before)
    fixed, _ = trained(steps=1)
    reserve_ranks(fixed, {Q: 6})
    gr.edit(DistributedDataParallel(fixed), {Q: gr.Grow(5)}, torch.optim.AdamW(trainable(fixed)))
    assert sites(fixed)[Q].rank == 5


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(steps=1)
    monkeypatch.setattr("gradrank.adapters.guard.is_distributed", lambda: True)
    assert wrapping(model) == "several processes"
    assert "trains under several processes" in refused(model, {Q: gr.Grow(5)}, optimizer)
    gr.edit(model, {Q: gr.Grow(5)})  # between two phases, before the next optimizer


def test_deepspeed_is_seen_by_its_module() -> None:
    model, optimizer = trained(steps=1)

    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model
            self.peft_config = model.peft_config  # the real one passes attributes on

    Engine.__module__ = "deepspeed.runtime.engine"
    assert wrapping(Engine(), optimizer) == "DeepSpeed"
    with pytest.raises(SurgeryError, match="trains under DeepSpeed"):
        check(sites(model), {Q: gr.Grow(5)}, optimizer, None, Engine())


def test_several_reasons_come_in_one_error() -> None:
    model, _ = trained(steps=1)
    names = list(sites(model))
    model.merge_adapter()
    edits: dict[str, Any] = dict.fromkeys(names[:6], gr.Grow(5))
    edits |= {names[6]: gr.Shrink(9), names[7]: gr.Grow(0), "model.nowhere": gr.Drop()}
    text = refused(model, edits, torch.optim.LBFGS([nn.Parameter(torch.ones(2))]))
    assert text.startswith("capacity cannot be moved; nothing was changed. 6 reason(s):\n- ")
    assert text.count("\n- ") == 6
    for reason in (
        f"'{names[0]}', '{names[1]}', '{names[2]}' and 5 more: each is merged",
        f"'{names[6]}' has rank 4 and cannot shrink to 9",
        f"'{names[7]}' would get rank 0",
        "'model.nowhere' carries no LoRA adapter",
        "LBFGS has no state per LoRA component",
        "not in the optimizer",
    ):
        assert reason in text
