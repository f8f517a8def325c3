"""Read rows from local files. What is wrong is named with its file and line.

A row is a mapping from column to value. Files are untrusted input: nothing in them is executed,
and each is read as UTF-8 text.
"""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError, nearest
from gradrank.core.text import refuse_unwritable

Row = dict[str, Any]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# A field of a CSV file may be a whole document; the default limit is 128 KiB.
csv.field_size_limit(2**27)
# A compressed text is about a tenth of its length; a bomb is a thousandth.
_DENSEST, _UNPACKED = 100, 2**28


def read_rows(path: Path) -> list[Row]:
    """Read a data file into rows.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.txt`` file, or one of these with
            ``.gz`` added, or a ``.parquet`` file. A text file gives one row per line, column
            ``text``.

    Returns:
        The rows.

    Raises:
        DataError: If the file is missing, of another type, not UTF-8, or malformed.
    """
    with _readable(path):
        suffix = data_suffix(path)
        if suffix not in READERS:
            raise DataError(
                f"data file '{path}' has the unknown type '{suffix or 'none'}'. "
                f"{nearest(suffix, READERS)} Each but .parquet may be compressed with gzip (.gz)."
            )
        return list(READERS[suffix](path))


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file.

    Args:
        path: A text file, or one with ``.gz`` added.

    Returns:
        The lines without their ends.
    """
    with _readable(path):
        return [line for _, line in _lines(path)]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refuse what is no file, and turn what reading raises into one message."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"data file '{path}' {what}.")
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file '{path}' is not UTF-8 text (byte 0x{error.object[error.start]:02x}). "
            f"Convert it, for example with: iconv -f latin1 -t utf-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data file '{path}' could not be read: {error}.") from error


def data_suffix(path: Path) -> str:
    """Return the type of a data file, without a final ``.gz``.

    Args:
        path: The file.

    Examples:
        >>> data_suffix(Path("train.jsonl.gz"))
        '.jsonl'
    """
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_image_folder(folder: Path) -> list[Row]:
    """List the pictures of a folder ``class/picture.png``.

    Args:
        folder: The folder.

    Returns:
        Rows with ``image`` (a path) and ``label`` (the sub-folder's name), sorted.

    Raises:
        DataError: If there are none.
    """
    rows = [
        {"image": path, "label": path.parent.name}
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not rows:
        raise DataError(
            f"folder '{folder}' holds no pictures. Expected '{folder.name}/<class>/<picture>' with "
            f"one of: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return rows


def _open(path: Path) -> io.TextIOBase:
    # utf-8-sig also takes files that begin with a byte-order mark.
    if path.suffix.lower() == ".gz":
        packed = io.BufferedReader(_Unpacked(path))
        return io.TextIOWrapper(packed, encoding="utf-8-sig", newline="")
    return path.open("rt", encoding="utf-8-sig", newline="")  # pyright: ignore[reportReturnType]


class _Unpacked(io.RawIOBase):
    """A compressed file, read no further than a text of its size can reach."""

    def __init__(self, path: Path) -> None:
        self._path, self._stream = path, gzip.open(path, "rb")  # noqa: SIM115 - closed by close()
        self._left = max(_UNPACKED, _DENSEST * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"data file '{self._path}' holds more than {_DENSEST} times its size, which no "
                "text does, and was not read to the end. Unpack it yourself if it is meant."
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.rstrip("\r\n")


def _text(path: Path) -> Iterator[Row]:
    for _, line in _lines(path):
        yield {"text": line}


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield _object(line, f"'{path}' line {number}")


def _json(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        try:
            text = stream.read()
            rows = json.loads(text)
            refuse_unwritable(rows, text)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"'{path}' is not valid JSON ({error}). A file with one object per line must end "
                f"in .jsonl."
            ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"'{path}' must hold a JSON list of objects, one per example.")
    yield from rows


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        refuse_unwritable(row, line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds {type(row).__name__}, expected an object such as "
            f'{{"text": "...", "label": "..."}}.'
        )
    return row


def _csv(path: Path) -> Iterator[Row]:
    return _table(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Iterator[Row]:
    # Public benchmark files in this format use quotes as ordinary characters.
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, delimiter: str, quoting: int) -> Iterator[Row]:
    with _open(path) as stream:
        table = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)  # pyright: ignore[reportArgumentType]
        try:
            header = next(table, [])
            if len(set(header)) != len(header) or not all(header):
                raise DataError(
                    f"'{path}' line 1 must hold distinct column names; found: {', '.join(header)}."
                )
            for cells in table:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"'{path}' line {table.line_num} has {len(cells)} fields, but the header "
                        f"names {len(header)} columns."
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"'{path}' line {table.line_num} is malformed: {error}.") from error


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # truly optional: comes with datasets, an extra

    try:
        with parquet.ParquetFile(path) as file:
            left = max(_UNPACKED, _DENSEST * path.stat().st_size)
            if file.metadata.num_rows > left:
                raise DataError(f"data file '{path}' claims {file.metadata.num_rows:,} rows.")
            for batch in file.iter_batches(batch_size=256):
                rows = batch.to_pylist()
                # Arrow counts a text once that many rows refer to.
                left -= max(batch.nbytes, sum(map(_text_size, rows)))
                if left < 0:
                    raise DataError(
                        f"data file '{path}' holds more than {_DENSEST} times its size, and was "
                        "not read to the end."
                    )
                yield from rows
    except DataError:
        raise
    except (ValueError, ArrowException) as error:  # what pyarrow raises for a malformed file
        told = " ".join(str(error).split())[:300]
        raise DataError(f"data file '{path}' could not be read: {told}.") from error


def _text_size(row: Row) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, str | bytes))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".parquet": _parquet,
}
