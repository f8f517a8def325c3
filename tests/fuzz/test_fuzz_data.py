"""Data files of every form, from the reader to encoded examples, and bombs among them."""

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from PIL import Image

from fuzz.mutations import ODD, SEEDS, damaged, fuzzed, read_or_refused, spoilt
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.pictures import check_picture, open_picture
from gradrank.lab.readers import read_rows

ROWS: list[dict[str, Any]] = [
    {"text": f'sentence {i}, with "quotes" and\nlines é', "label": i % 3, "weight": i / 3}
    for i in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def lines(rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode() if isinstance(rows, list) else b""


def table(delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def parquet() -> bytes:
    from pyarrow import Table
    from pyarrow import parquet as pq

    stream = io.BytesIO()
    pq.write_table(Table.from_pylist(ROWS), stream)
    return stream.getvalue()


FORMS = {
    "x.jsonl": lines(ROWS),
    "x.json": json.dumps(ROWS).encode(),
    "x.csv": table(","),
    "x.tsv": table("\t"),
    "x.txt": b"one\ntwo\n\nthree\n" * 5,
    "x.parquet": parquet(),
    "x.csv.gz": gzip.compress(table(",")),
}


def examples(path: Path, head: str) -> None:
    def work() -> Any:
        found = read_examples(DataSpec(source=str(path), head=head))
        repr(found)
        return found

    read_or_refused(work)


@pytest.mark.parametrize("name", FORMS)
@fuzzed(40)
@given(seed=SEEDS)
def test_bytes(folder: Path, name: str, seed: int) -> None:
    path = folder / name
    path.write_bytes(spoilt(FORMS[name], seed))
    examples(path, ("lm", "classification", "instruct")[seed % 3])


@fuzzed(120)
@given(seed=SEEDS)
def test_values(folder: Path, seed: int) -> None:
    path = folder / "v.jsonl"
    path.write_bytes(lines(damaged(ROWS, seed, 6)))
    examples(path, ("lm", "classification", "image")[seed % 3])


@pytest.mark.parametrize("column", ["text", "label"])
def test_every_odd_value_in_every_row(folder: Path, column: str) -> None:
    path = folder / "o.jsonl"
    for odd in ODD:
        path.write_bytes(lines([{**row, column: odd} for row in ROWS]))
        for head in ("lm", "classification", "image", "instruct"):
            examples(path, head)


PICTURES = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
for _kind, _stream in PICTURES.items():
    Image.radial_gradient("L").resize((24, 24)).convert("RGB").save(_stream, _kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PICTURES)
@fuzzed(50)
@given(seed=SEEDS)
def test_pictures(folder: Path, kind: str, seed: int) -> None:
    path = folder / f"x.{kind.lower()}"
    path.write_bytes(spoilt(PICTURES[kind].getvalue(), seed))
    read_or_refused(lambda: check_picture(path))
    read_or_refused(lambda: open_picture(path))


def test_a_picture_that_is_a_pipe(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.png")
    assert read_or_refused(lambda: check_picture(tmp_path / "x.png")) is None


BOMBS = """
import gzip, resource, sys
from pathlib import Path
kind, path = sys.argv[1], Path(sys.argv[2])
if kind == "gzip":
    with gzip.open(path, "wb", compresslevel=6) as stream:
        for _ in range(600):
            stream.write(bytes(2**20))
elif kind == "parquet":
    import pyarrow as pa
    from pyarrow import parquet
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 40000, pa.int32()), ["x" * 100000])
    parquet.write_table(pa.table({"text": column}), path)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from gradrank.core.errors import DataError
from gradrank.lab.readers import read_rows
try:
    read_rows(path)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "name"), [("gzip", "x.txt.gz"), ("parquet", "x.parquet")])
def test_small_files_that_hold_gigabytes(tmp_path: Path, kind: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, kind, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times its size" in done.stdout


def test_what_compresses_well_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"the same line\n" * 100_000))
    assert len(read_rows(path)) == 100_000
