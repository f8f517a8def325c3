"""Generation: greedy, in batches as one at a time, without side effects."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.generate import answers, generate
from gradrank.lab.models import resolve_model
from gradrank.lab.tiny import byte_tokenizer
from oracles.prompting import greedy, with_padding_seen

TEXTS = ["a", "hello there", "what is this about?", "zz", "One more, of middling length"]
TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def tiny(name: str = "tiny-llama"):
    model = resolve_model(name, "lm", device="cpu").model
    # Untrained weights end nothing by themselves: let the end token win now and then.
    with torch.no_grad():
        head = model.get_output_embeddings()
        if model.config.tie_word_embeddings:
            head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[END] *= 4
    return model


def expected(model, texts=TEXTS, most=12, room=None):
    heads = [TOKENIZER(text)["input_ids"] for text in texts]
    found = [greedy(model, ids if room is None else ids[-room:], END, most) for ids in heads]
    return TOKENIZER.batch_decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batches_write_what_a_greedy_loop_writes(name, dtype):
    model = tiny(name).to(getattr(torch, dtype))
    reference = expected(model)
    for size in (1, 2, 3, 5, 50):
        assert generate(model, TEXTS, TOKENIZER, 12, size) == reference


def test_end_token_stops_one_text_and_not_the_others():
    model = tiny()
    lengths = {len(greedy(model, TOKENIZER(text)["input_ids"], END, 12)) for text in TEXTS}
    assert len(lengths) > 1, "the case needs texts of which some end early"
    assert generate(model, TEXTS, TOKENIZER, 12, 5) == expected(model)


def test_oracle_catches_padding_that_is_attended_to():
    model = tiny()
    broken = [
        TOKENIZER.decode(with_padding_seen(model, TOKENIZER(text)["input_ids"], END, 12, 0))
        for text in TEXTS
    ]
    assert broken != generate(model, TEXTS, TOKENIZER, 12, 5)


def test_generation_settings_of_the_model_do_not_leak_in():
    model = tiny()
    reference = expected(model)
    own = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        top_k=5,
        top_p=0.3,
        num_beams=2,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        max_length=9,
        bad_words_ids=[[5]],
        forced_eos_token_id=7,
        eos_token_id=[9, 10],
    )
    model.generation_config = own
    before = copy.deepcopy(own.to_dict())
    assert generate(model, TEXTS, TOKENIZER, 12, 3) == reference
    assert model.generation_config is own
    assert own.to_dict() == before


def test_adapter_takes_part():
    model = tiny()
    plain = expected(model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.eval()
    reference = expected(adapted)
    assert reference != plain
    assert generate(adapted, TEXTS, TOKENIZER, 12, 3) == reference


def test_generation_leaves_no_trace():
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    settings = model.generation_config
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(model, TEXTS, TOKENIZER, 6, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert model.config.use_cache is False
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_is_restored_after_an_error(monkeypatch):
    model = tiny()
    model.train()
    settings = model.generation_config
    monkeypatch.setattr(type(model), "forward", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, TEXTS, TOKENIZER, 6, 2)
    assert all(module.training for module in model.modules())
    assert model.generation_config is settings


def test_dropout_is_off_while_generating():
    model = tiny()
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.9, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    adapted.eval()
    reference = expected(adapted)
    adapted.train()
    assert generate(adapted, TEXTS, TOKENIZER, 12, 5) == reference


def test_long_texts_are_cut_on_the_left():
    model = tiny()
    assert generate(model, TEXTS, TOKENIZER, 8, 2, max_length=4) == expected(model, most=8, room=4)
    # 128 positions: what is written needs 8 of them.
    long = ["".join(chr(97 + (i * 7) % 26) for i in range(300))]
    assert generate(model, long, TOKENIZER, 8) == expected(model, long, most=8, room=120)


def test_new_tokens_must_leave_room():
    model = tiny()
    with pytest.raises(OptionError, match="128 new tokens leave no room"):
        generate(model, TEXTS, TOKENIZER, 128)
    with pytest.raises(OptionError, match="max_new_tokens is 0"):
        generate(model, TEXTS, TOKENIZER, 0)
    with pytest.raises(OptionError, match="batch_size is 0"):
        generate(model, TEXTS, TOKENIZER, 8, 0)


def test_tokenizer_needs_a_padding_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="padding token"):
        generate(tiny(), TEXTS, tokenizer, 8)


def test_answers_are_parsed_for_their_own_prompt_and_keep_their_order():
    model = tiny()
    prompts = [Prompt(text, "", "", group=str(index)) for index, text in enumerate(TEXTS)]
    found = answers(model, prompts, TOKENIZER, lambda text, prompt: prompt.group + text, 12, 2)
    assert found == [f"{index}{text}" for index, text in enumerate(expected(model))]
    assert answers(model, [], TOKENIZER, lambda text, _: text) == []
