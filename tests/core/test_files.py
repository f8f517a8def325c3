"""Files are written whole or not at all, and read with clear errors."""

import errno
from pathlib import Path
from typing import Any

import pytest

from gradrank.core.errors import DataError, OutputError
from gradrank.core.files import read_json, write_atomic, write_json, write_text
from gradrank.core.folders import new_folder


def test_files_appear_whole_with_their_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, "é"]})
    assert read_json(path, "thing") == {"x": [1, "é"]}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    assert path.stat().st_mode & 0o600 == 0o600


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(OutputError, match="exists already"):
        write_text(path, "new", overwrite=False)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "may not be written")]
)
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, code: int, says: str
) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(code, "as asked")

    with pytest.raises(OutputError, match=says):
        write_atomic(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_values_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "could not be read"),
        (b"", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "no JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5_000, "not valid JSON"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_json(path, "plan")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"plan .* does not exist"):
        read_json(tmp_path / "x.json", "plan")
    with pytest.raises(DataError, match="could not be read"):
        read_json(tmp_path, "plan")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"

    def fail_inside() -> None:
        with new_folder(out) as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fail_inside()
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_told_and_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(OutputError, match="not empty"), new_folder(out):
        pass
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["old"]
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
    assert [p.name for p in out.iterdir()] == ["new"]


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a file"), new_folder(tmp_path / "out", overwrite):
            pass
    with pytest.raises(OutputError), new_folder(tmp_path / "out" / "deeper"):
        pass


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill() -> Any:
        with new_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "as asked")

    with pytest.raises(OutputError, match="no space left"):
        fill()
    assert not list(tmp_path.iterdir())
