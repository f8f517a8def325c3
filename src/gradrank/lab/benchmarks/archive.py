"""Pictures out of an untrusted archive ``train/<class>/<picture>``, ``test/<class>/<picture>``.

No member's name ever becomes a file's: the pictures are written one after another into one file of
the cache, with an index of ours beside it.
"""

import io
import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image

from gradrank.core.errors import DataError
from gradrank.core.files import read_json, sha256_of, write_json
from gradrank.lab.benchmarks.task import Say
from gradrank.lab.cache import cache_root, ensure_entry
from gradrank.lab.pictures import FAULTS, PackedPicture
from gradrank.lab.readers import IMAGE_SUFFIXES

SPLITS = ("train", "test")
MOST_BYTES = 2**35
MOST_MEMBERS = 2_000_000
LARGEST_PICTURE = 2**26
_FORM = 1
_PACK, _INDEX = "pictures.bin", "index.json"

Pictures = dict[str, tuple[list[Any], list[Any] | None]]


def packed_pictures(archive: Path, say: Say = None) -> Pictures:
    """Return the pictures of an archive; unpack it into the cache first if need be.

    Args:
        archive: A tar archive, compressed or not.
        say: Receives one line for each thing that takes time.

    Returns:
        Per split the pictures and their class names, in the order of classes and names.

    Raises:
        DataError: If it cannot be read, is too large, or holds what such an archive must not.
    """
    tell = say or (lambda _message: None)
    try:
        digest = sha256_of(archive)
    except OSError as error:
        raise DataError(f"archive '{archive}' cannot be read: {error}.") from error

    def build(_scratch: Path, target: Path) -> dict[str, object]:
        tell(f"unpacking '{archive.name}'")
        with (target / _PACK).open("wb") as out:
            entries = _pack(archive, out)
        write_json(target / _INDEX, {"pictures": entries})
        return {"archive_sha256": digest, "form": _FORM}

    folder = cache_root() / "pictures" / f"{digest[:24]}-{_FORM}"
    ensure_entry(folder, build, tell, 2 * archive.stat().st_size)
    found: dict[str, tuple[list[Any], list[Any]]] = {split: ([], []) for split in SPLITS}
    for split, label, name, start, size in read_json(folder / _INDEX, "index")["pictures"]:
        pictures, labels = found[split]
        shown = f"{archive.name}: {split}/{label}/{name}"
        pictures.append(PackedPicture(folder / _PACK, start, size, shown))
        labels.append(label)
    return dict(found)


def _pack(archive: Path, out: IO[bytes]) -> list[list[str | int]]:
    """Copy the pictures of an archive and return split, class, name, start and size of each."""
    index: dict[tuple[str, str, str], list[str | int]] = {}
    seen = position = 0
    try:
        with tarfile.open(archive, mode="r|*") as opened:
            for number, info in enumerate(opened):
                seen += info.size
                if seen > MOST_BYTES or number >= MOST_MEMBERS:  # a bomb, for one
                    raise DataError(
                        f"archive '{archive.name}' holds more than {MOST_BYTES / 2**30:.0f} GiB or "
                        f"{MOST_MEMBERS:,} files. Unpack it by hand, and name the folder."
                    )
                key = _place(info, archive.name)
                if key is None:
                    continue
                if key in index:
                    raise DataError(f"archive '{archive.name}' holds '{info.name}' twice.")
                data = _picture(opened, info, archive.name)
                out.write(data)
                index[key] = [*key, position, len(data)]
                position += len(data)
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"archive '{archive.name}' cannot be unpacked: {error}.") from error
    absent = [split for split in SPLITS if not any(key[0] == split for key in index)]
    if absent:
        raise DataError(
            f"archive '{archive.name}' holds no pictures '{absent[0]}/<class>/<picture>'."
        )
    return [index[key] for key in sorted(index)]


def _place(info: tarfile.TarInfo, archive: str) -> tuple[str, str, str] | None:
    """Return split, class and name of a picture; None for what is none.

    Raises:
        DataError: If it is a link or device, or its name leads out of the archive.
    """
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or not (info.isreg() or info.isdir()):
        raise DataError(
            f"archive '{archive}' holds '{info.name}', which leads out of it or is no ordinary "
            f"file. Such an archive is not unpacked."
        )
    parts = path.parts[-3:]
    wanted = len(parts) == 3 and parts[0] in SPLITS and not path.name.startswith(".")
    if not info.isreg() or not wanted or path.suffix.lower() not in IMAGE_SUFFIXES:
        return None
    return parts[0], parts[1], parts[2]


def _picture(opened: tarfile.TarFile, info: tarfile.TarInfo, archive: str) -> bytes:
    if info.size > LARGEST_PICTURE:
        raise DataError(
            f"'{info.name}' in '{archive}' has {info.size:,} bytes; a picture may have "
            f"{LARGEST_PICTURE:,}."
        )
    stream = opened.extractfile(info)
    data = stream.read() if stream is not None else b""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()
    except FAULTS as error:
        raise DataError(f"'{info.name}' in '{archive}' is no picture: {error}.") from error
    return data
