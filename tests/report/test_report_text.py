import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.report.layout import arrange
from gradrank.report.text import as_count, as_float, clean, count, listed, number, percent, shorten


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(max_size=60))
def test_cleaned_text_is_printable_and_encodes(text):
    result = clean(text)
    assert result.isprintable()
    assert len(result) == len(text)
    result.encode("utf-8")


def test_clean_replaces_controls_bidi_and_surrogates():
    assert clean("a\x00b\u202ec\ud800d\ne") == "a\ufffdb\ufffdc\ufffdd\ufffde"


def test_clean_bounds_the_length():
    assert clean("x" * 500, 10) == "x" * 9 + "…"


def test_shorten_keeps_both_ends():
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abc", 5) == "abc"


@pytest.mark.parametrize("value", [None, "3", True, [], {}, float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_none(value):
    assert as_float(value) is None
    assert as_count(value) is None


def test_counts_are_whole_and_not_negative():
    assert [as_count(v) for v in (3, 3.0, 3.5, -1, 0)] == [3, 3, None, None, 0]


def test_number_words():
    assert count(2442240) == "2,442,240"
    assert number(-0.5) == "−0.5"
    assert percent(1e-9) == "<\xa00.0001\xa0%"
    assert listed([]) == ""
    assert listed(["a", "b"]) == "a and b"


def test_layers_are_ordered_by_number_and_not_by_text():
    layout = arrange([f"h.{i}.q" for i in (11, 1, 2)])
    assert layout.column_labels == ["1", "2", "11"]


def test_two_stacks_do_not_share_columns():
    layout = arrange(["enc.0.q", "dec.0.q", "enc.1.q"])
    assert layout.columns == (("enc", 0), ("enc", 1), ("dec", 0))


def test_equal_last_parts_inside_one_layer_are_told_apart():
    names = ["e.0.attention.output.dense", "e.0.intermediate.dense", "e.0.output.dense", "e.0.q"]
    layout = arrange(names)
    assert layout.rows == ("attention.output.dense", "intermediate.dense", "output.dense", "q")


def test_names_without_a_layer_are_rows_of_their_own():
    layout = arrange(["lm_head", "a.fc", "b.fc"])
    assert layout.rows == ("lm_head", "a.fc", "b.fc")
    assert layout.column_labels == ["–"]


_PART = st.sampled_from(["a", "b", "0", "1", "²", "9" * 30, "", "q"])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.lists(_PART, min_size=1, max_size=5).map(".".join), unique=True, min_size=1))
def test_no_two_targets_share_a_cell(names):
    layout = arrange(names)
    assert set(layout.places) == set(names)
    assert len(set(layout.places.values())) == len(names)
    grid = layout.grid({name: float(i) for i, name in enumerate(names)})
    found = sorted(v for row in grid for v in row if v is not None)
    assert found == [float(i) for i in range(len(names))]
    json.dumps(grid)
