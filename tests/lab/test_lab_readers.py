"""Local files: what is wrong is named with its file and line."""

import gzip
import json
from pathlib import Path

import pytest

from gradrank.core.errors import DataError
from gradrank.lab.readers import read_image_folder, read_rows

ROWS = [{"text": "a, b", "label": "x"}, {"text": 'say "hi"\nthere', "label": "y"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_skip_blank_lines(tmp_path):
    text = json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n"
    assert read_rows(write(tmp_path / "a.jsonl", text)) == ROWS


def test_json_list(tmp_path):
    assert read_rows(write(tmp_path / "a.json", json.dumps(ROWS))) == ROWS


def test_csv_with_quotes_and_line_breaks(tmp_path):
    text = 'text,label\r\n"a, b",x\r\n"say ""hi""\nthere",y\r\n'
    assert read_rows(write(tmp_path / "a.csv", text)) == ROWS


def test_tsv_takes_quotes_literally(tmp_path):
    found = read_rows(write(tmp_path / "a.tsv", 'sentence\tlabel\n"a b\t1\n'))
    assert found == [{"sentence": '"a b', "label": "1"}]


def test_text_gives_one_row_per_line(tmp_path):
    found = read_rows(write(tmp_path / "a.txt", "one\ntwo \x85 same\r\n\nfour"))
    assert [row["text"] for row in found] == ["one", "two \x85 same", "", "four"]


def test_gzip_and_byte_order_mark(tmp_path):
    packed = gzip.compress(b"\xef\xbb\xbf" + b"text,label\nhello,x\n")
    assert read_rows(write(tmp_path / "a.CSV.gz", packed)) == [{"text": "hello", "label": "x"}]


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert read_rows(tmp_path / "a.parquet") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1, 2]\n', r"line 2 holds list, expected an object"),
        ("a.jsonl", "[" * 100_000, r"line 1 is not valid JSON"),
        ("a.json", "{}", r"must hold a JSON list"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"must end\s+in .jsonl"),
        ("a.csv", "text,label\na,b\nc\n", r"line 3 has 1 fields.*2 columns"),
        ("a.csv", 'text,label\na,"b"c\n', r"line 2 is malformed"),
        ("a.csv", "text,text\na,b\n", r"distinct column names"),
        ("a.txt", b"caf\xe9\n", r"not UTF-8 text \(byte 0xe9\).*iconv"),
        ("a.csv", b"text\ncaf\xe9\n", r"not UTF-8"),
        ("a.docx", "x", r"unknown type '.docx'.*Known: .csv"),
        ("a", "x", r"unknown type 'none'"),
        ("a.jsonl.gz", b"no gzip", r"could not be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abcdef"}\n' * 99, mtime=0)[:40],
            r"could not be read",
        ),
        ("a.parquet", b"no parquet", r"could not be read"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, told):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"(?s){name}.*{told}|{told}.*{name}") as caught:
        read_rows(path)
    assert "Traceback" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_image_folder_lists_classes(tmp_path):
    for name in ("dog/b.png", "dog/.hidden.png", "dog/notes.md", "cat/a.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    rows = read_image_folder(tmp_path)
    assert [(row["image"].name, row["label"]) for row in rows] == [
        ("a.JPG", "cat"),
        ("b.png", "dog"),
    ]


def test_image_folder_without_pictures(tmp_path):
    write(tmp_path / "a.png", "")
    with pytest.raises(DataError, match="<class>/<picture>"):
        read_image_folder(tmp_path)
