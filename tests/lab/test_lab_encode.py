"""Encoded data: blocks without loss or padding, padded texts, pictures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.data import DataSpec, Examples, Split, read_examples
from gradrank.lab.encode import TextCollator, load_task_data, pack
from gradrank.lab.models import resolve_model
from gradrank.lab.pictures import open_picture
from gradrank.lab.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20), st.integers(2, 8))
def test_packing_is_the_joined_stream_cut_in_blocks(texts, length):
    stream = []
    for text in texts:
        stream += [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    if len(stream) < length:
        with pytest.raises(DataError, match="not one block"):
            pack(texts, TOKENIZER, length, "training")
        return
    blocks = pack(texts, TOKENIZER, length, "training")
    assert blocks.ids.flatten().tolist() == stream[: len(blocks) * length]
    assert len(stream) - blocks.ids.numel() < length


def test_packing_more_texts_than_a_chunk():
    texts = ["ab"] * 2500
    assert pack(texts, TOKENIZER, 3, "training").ids.shape == (2500, 3)


@given(st.text(max_size=40))
def test_byte_tokenizer_gives_one_token_per_byte_and_reads_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert all(4 <= i < 260 for i in ids)


def test_texts_are_padded_to_the_longest_of_the_batch():
    batch = TextCollator(pad=9)(
        [{"input_ids": [1, 2, 3], "labels": 1}, {"input_ids": [4], "labels": 0}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_texts_are_cut_at_max_length(prepare):
    _, data = prepare("tiny-bert", "tiny-sentiment")
    lengths = [len(data.train[i]["input_ids"]) for i in range(50)]
    assert 20 < max(lengths) <= 32
    loaded = resolve_model("tiny-bert", "classification", 2, device="cpu")
    cut = load_task_data(read_examples(DataSpec("tiny-sentiment")), loaded, 10)
    assert {len(cut.train[i]["input_ids"]) for i in range(50)} == {10}
    first = cut.train[0]["input_ids"]
    assert (first[0], first[-1]) == (2, 3)  # <cls> ... <sep>, kept when cut


def test_description_counts_tokens(prepare):
    _, data = prepare("tiny-llama", "tiny-lm")
    told = data.describe
    assert told["train_tokens"] == told["train_examples"] * 16 == data.train.ids.numel()
    assert told["name"] == "tiny-lm"
    assert told["max_length"] == 16


def test_batches_are_seeded_and_repeat_only_after_all(prepare):
    _, data = prepare("tiny-bert", "tiny-sentiment")
    twice = [list(data.batches(3, 4, seed=1)) for _ in range(2)]
    for one, two in zip(*twice, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
    other = next(data.batches(1, 4, seed=2))
    assert not torch.equal(twice[0][0]["labels"], other["labels"]) or not torch.equal(
        twice[0][0]["input_ids"], other["input_ids"]
    )
    small = load_task_data(
        Examples("lm", Split(["abcdef"], None), Split(["abc"], None), (), "eval_loss"),
        resolve_model("tiny-llama", "lm", device="cpu"),
        2,
    )
    drawn = [row for batch in small.batches(3, 2) for row in batch["input_ids"].tolist()]
    assert len({tuple(row) for row in drawn[:3]}) == 3
    assert len(drawn) == 6


def test_length_is_checked():
    examples = read_examples(DataSpec("tiny-lm"))
    loaded = resolve_model("tiny-llama", "lm", device="cpu")
    with pytest.raises(OptionError, match="positions for 128 tokens only"):
        load_task_data(examples, loaded, 129)
    with pytest.raises(OptionError, match="at least 2"):
        load_task_data(examples, loaded, 1)
    assert load_task_data(examples, loaded, None).describe["max_length"] == 128


def test_head_of_the_model_must_fit():
    examples = read_examples(DataSpec("tiny-sentiment"))
    with pytest.raises(OptionError, match="needs the head 'classification'"):
        load_task_data(examples, resolve_model("tiny-llama", "lm", device="cpu"))


def pictures(inputs: list) -> Examples:
    split = Split(inputs, [0, 1] * (len(inputs) // 2))
    return Examples("image", split, split, ("a", "b"), "accuracy")


def test_pictures_of_any_kind_become_pixels(tmp_path):
    loaded = resolve_model("tiny-vit", "image", 2, device="cpu")
    path = tmp_path / "grey.png"
    Image.new("L", (30, 20), 255).save(path)
    array = np.full((9, 7, 3), 255, dtype=np.uint8)
    data = load_task_data(pictures([path, str(path), array, Image.new("RGBA", (5, 5))]), loaded)
    batch = data.collate([data.train[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["pixel_values"][:3].min() == batch["pixel_values"].max() == 1.0
    assert batch["pixel_values"][3].max() == -1.0


def test_unreadable_picture_is_named_before_training(tmp_path):
    loaded = resolve_model("tiny-vit", "image", 2, device="cpu")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png' cannot be read"):
        load_task_data(pictures([tmp_path / "good.png", tmp_path / "bad.png"]), loaded)
    with pytest.raises(DataError, match=r"gone\.png' cannot be read"):
        load_task_data(pictures([tmp_path / "gone.png", tmp_path / "good.png"]), loaded)


def test_picture_cut_off_in_its_data_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"cut\.jpg' cannot be read"):
        open_picture(path)


def pairs(*inputs: tuple[str, str]) -> Examples:
    split = Split(list(inputs), [index % 2 for index in range(len(inputs))])
    return Examples("classification", split, split, ("a", "b"), "accuracy")


def test_pairs_are_told_apart():
    loaded = resolve_model("tiny-bert", "classification", 2, device="cpu")
    data = load_task_data(pairs(("ab", "cde"), ("f", "")), loaded)
    one, two = data.train[0], data.train[1]
    single = loaded.tokenizer(["ab", "cde"], add_special_tokens=False)["input_ids"]
    assert one["input_ids"] == [2, *single[0], 3, *single[1], 3]
    assert one["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    batch = data.collate([one, two])
    assert batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 4, [0] * 3 + [1] + [0] * 4]
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 4]
    assert batch["input_ids"][1, 4:].tolist() == [loaded.tokenizer.pad_token_id] * 4
    loaded.model.eval()
    told = loaded.model(**batch).logits
    batch["token_type_ids"].zero_()
    assert not torch.equal(told, loaded.model(**batch).logits)


def test_the_longer_text_of_a_pair_is_cut():
    loaded = resolve_model("tiny-bert", "classification", 2, device="cpu")
    data = load_task_data(pairs(("ab", "c" * 50), ("d" * 50, "e")), loaded, 12)
    assert {len(data.train[index]["input_ids"]) for index in range(2)} == {12}
    assert data.train[0]["input_ids"].count(3) == data.train[1]["input_ids"].count(3) == 2
    assert sum(data.train[1]["token_type_ids"]) == 2


def test_single_texts_bring_no_types(prepare):
    _, data = prepare("tiny-bert", "tiny-sentiment")
    assert set(data.collate([data.train[0]])) == {"input_ids", "attention_mask", "labels"}


def test_prompts_are_learnt_behind_their_prompt():
    prompts = [Prompt("ab", "cd", "d"), Prompt("efgh", "i", "i")]
    split = Split(prompts, None)
    loaded = resolve_model("tiny-llama", "instruct", device="cpu")
    assert loaded.head == "lm"
    data = load_task_data(Examples("instruct", split, split, (), "eval_loss"), loaded, 20)
    batch = data.collate([data.train[0], data.train[1]])
    ids = [loaded.tokenizer(text)["input_ids"] for text in ("cd", "i")]
    end = loaded.tokenizer.eos_token_id
    assert [[t for t in row if t != -100] for row in batch["labels"].tolist()] == [
        [*row, end] for row in ids
    ]
    assert (data.kind, data.num_labels, data.answering) == ("instruct", None, None)
    assert data.describe["max_length"] == 20
    assert data.describe["train_examples"] == 2
