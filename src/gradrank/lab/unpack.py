"""Read single members out of untrusted archives.

Nothing is ever extracted by the names in the archive: one member is looked up by its exact name,
must be an ordinary file of the pinned size and checksum, and is written under a name of ours.
"""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gradrank.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive.

    Attributes:
        path: Its exact name in the archive.
        name: The name under which it is written.
        sha256: Its checksum, or empty if the archive's own checksum is enough.
        limit: Largest size that is accepted, bytes.
    """

    path: str
    name: str
    sha256: str = ""
    limit: int = 2**30


def unpack(archive: Path, members: tuple[Member, ...], folder: Path) -> None:
    """Write members of a wheel or of a gzipped tar archive into a folder.

    Args:
        archive: The ``.whl``, ``.zip`` or ``.tar.gz`` file.
        members: What to take.
        folder: An existing folder.

    Raises:
        DataError: If the archive cannot be read, or a member is missing, is no ordinary file, is
            too large or does not match its checksum.
    """
    try:
        if archive.suffix in {".whl", ".zip"}:
            with zipfile.ZipFile(archive) as opened:
                for member in members:
                    with opened.open(member.path) as stream:
                        _write(stream, member, folder)
        else:
            with tarfile.open(archive, mode="r:gz") as opened:
                for member in members:
                    _write(_ordinary(opened, member.path), member, folder)
    except KeyError as error:
        raise DataError(f"'{archive.name}' lacks a file: {error.args[0]}.") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"'{archive.name}' cannot be unpacked: {error}.") from error


def read_inner(data: bytes, path: str, limit: int) -> bytes:
    """Read one member of a gzipped tar archive that is held in memory.

    Args:
        data: The archive.
        path: The member's exact name.
        limit: Largest size that is accepted, bytes.

    Returns:
        The member's content.

    Raises:
        DataError: If the archive cannot be read, or the member is missing or too large.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as opened:
            content = _ordinary(opened, path).read(limit + 1)
    except KeyError as error:
        raise DataError(f"the inner archive lacks '{path}'.") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the inner archive cannot be read: {error}.") from error
    if len(content) > limit:
        raise DataError(f"'{path}' is larger than {limit} bytes and was not read.")
    return content


def _ordinary(opened: tarfile.TarFile, path: str) -> IO[bytes]:
    info = opened.getmember(path)
    stream = opened.extractfile(info) if info.isreg() else None
    if stream is None:
        raise DataError(f"'{path}' is no ordinary file in its archive and was not read.")
    return stream


def _write(stream: IO[bytes], member: Member, folder: Path) -> None:
    target = folder / member.name
    seen = 0
    with target.open("wb") as out:
        while block := stream.read(2**20):
            seen += len(block)
            if seen > member.limit:  # a zip bomb, for one
                raise DataError(f"'{member.path}' is larger than {member.limit} bytes.")
            out.write(block)
    if member.sha256:
        with target.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        if digest != member.sha256:
            target.unlink()
            raise DataError(f"'{member.path}' has sha256 {digest}, expected {member.sha256}.")
