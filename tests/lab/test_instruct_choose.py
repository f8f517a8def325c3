"""Choice by likelihood: against a loop over single tokens."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.choose import choose_by_likelihood, score_choices
from gradrank.lab.models import resolve_model
from gradrank.lab.tiny import byte_tokenizer
from oracles.prompting import log_probability, without_first_token

TOKENIZER = byte_tokenizer()


def item(prompt: str, words: str, *choices: str) -> Prompt:
    return Prompt(prompt, words + choices[0], choices[0], "", choices)


# Shared words of various lengths (none, some), choices of one and of several tokens, one choice
# that begins another, and various numbers of choices.
PROMPTS = [
    item("Is it so?\n", "it is ", "true", "false"),
    item("Which of them?", "the answer is answer", "1", "2", "3"),
    item("Q", "", "yes", "no"),
    item("A rather longer question than the others, about nothing", "so ", "a", "ab", "abc", "b"),
    item("One letter", "", "x", "y"),
    item("The same end", "", "seen", "been"),
]


def tiny(name: str = "tiny-llama", seed: int = 0):
    return resolve_model(name, "lm", device="cpu", seed=seed).model


def reference(model, prompt, room=None, probability=log_probability):
    head = TOKENIZER(prompt.prompt)["input_ids"]
    tails = [TOKENIZER(prompt.completed(choice))["input_ids"] for choice in prompt.choices]
    head = head if room is None else head[-(room - max(map(len, tails))) :]
    return [probability(model, head, tail) for tail in tails], [len(tail) for tail in tails]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_scores_are_those_of_a_loop_over_tokens(name):
    model = tiny(name)
    for size in (1, 2, 4, 6, 50):
        found = score_choices(model, PROMPTS, TOKENIZER, size)
        for prompt, row in zip(PROMPTS, found, strict=True):
            assert row == pytest.approx(reference(model, prompt)[0], abs=2e-4)


def test_double_precision_is_kept():
    model = tiny().double()
    for prompt, row in zip(PROMPTS, score_choices(model, PROMPTS, TOKENIZER, 4), strict=True):
        assert row == pytest.approx(reference(model, prompt)[0], abs=1e-10)


def test_oracle_catches_a_first_token_taken_for_given():
    model = tiny()
    for prompt, row in zip(PROMPTS, score_choices(model, PROMPTS, TOKENIZER), strict=True):
        broken = reference(model, prompt, probability=without_first_token)[0]
        assert all(abs(one - two) > 1e-2 for one, two in zip(row, broken, strict=True))


def test_normalised_scores_are_means_over_tokens():
    model = tiny()
    found = score_choices(model, PROMPTS, TOKENIZER, 3, normalise=True)
    for prompt, row in zip(PROMPTS, found, strict=True):
        sums, sizes = reference(model, prompt)
        assert row == pytest.approx([s / n for s, n in zip(sums, sizes, strict=True)], abs=2e-4)


def test_normalising_can_change_the_choice():
    prompt = item("Q", "", "a", "aaaa")
    different = 0
    for seed in range(5):
        model = tiny(seed=seed)
        sums, sizes = reference(model, prompt)
        means = [s / n for s, n in zip(sums, sizes, strict=True)]
        best = [prompt.choices[row.index(max(row))] for row in (sums, means)]
        plain = choose_by_likelihood(model, [prompt], TOKENIZER)
        normalised = choose_by_likelihood(model, [prompt], TOKENIZER, normalise=True)
        assert [*plain, *normalised] == best
        different += plain != normalised
    assert different > 0


def test_choice_is_the_most_probable_for_any_batch_size():
    model = tiny(seed=2)
    best = []
    for prompt in PROMPTS:
        scores = reference(model, prompt)[0]
        best.append(prompt.choices[scores.index(max(scores))])
    for size in (1, 3, 6):
        assert choose_by_likelihood(model, PROMPTS, TOKENIZER, size) == best
    # The reference answer has no influence.
    turned = [
        replace(p, completion=p.completed(p.choices[-1]), answer=p.choices[-1]) for p in PROMPTS
    ]
    assert choose_by_likelihood(model, turned, TOKENIZER, 3) == best


def test_prompts_are_cut_on_the_left_and_completions_never():
    model = tiny()
    found = score_choices(model, PROMPTS, TOKENIZER, 3, max_length=24)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row == pytest.approx(reference(model, prompt, room=24)[0], abs=2e-4)
    long = item("".join(chr(97 + (i * 7) % 26) for i in range(300)), "it is ", "true", "false")
    row = score_choices(model, [long], TOKENIZER)[0]
    assert row == pytest.approx(reference(model, long, room=128)[0], abs=2e-4)
    with pytest.raises(OptionError, match="no room for a prompt"):
        score_choices(model, PROMPTS, TOKENIZER, max_length=4)


def test_adapter_takes_part():
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        lora_dropout=0.5,
    )
    model = get_peft_model(tiny(), config)
    model.eval()
    expected = [reference(model, prompt)[0] for prompt in PROMPTS]
    model.train()
    for row, scores in zip(score_choices(model, PROMPTS, TOKENIZER, 4), expected, strict=True):
        assert row == pytest.approx(scores, abs=2e-4)


def test_scoring_leaves_no_trace():
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    first = score_choices(model, PROMPTS, TOKENIZER, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert score_choices(model, PROMPTS, TOKENIZER, 2) == first


def test_prompts_without_choices_are_refused():
    with pytest.raises(OptionError, match=r"prompt 2 has no fixed choices.*'generate'"):
        score_choices(tiny(), [PROMPTS[0], Prompt("a", "b", "b")], TOKENIZER)
    with pytest.raises(DataError, match="does not end with its answer"):
        score_choices(tiny(), [Prompt("a", "b c", "b", "", ("b", "c"))], TOKENIZER)
    assert choose_by_likelihood(tiny(), [], TOKENIZER) == []
