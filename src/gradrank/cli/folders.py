"""Output folders: whole or not at all, and nothing of others is ever replaced."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradrank.core.errors import OutputError
from gradrank.core.files import explain_os_error, is_temporary, refuse_existing
from gradrank.core.locks import held

RUN_FILES = (
    "config.yaml", "plan.json", "measurement.safetensors", "record.json", "report.html",
    "adapter", "adapter-unchecked", "checkpoints",
)  # fmt: skip
EXPORT_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter.gguf", "README.md", "config.json",
    "generation_config.json", "model*.safetensors", "*.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "spiece.model",
)  # fmt: skip


def check_out(path: Path, overwrite: bool, known: Sequence[str] = RUN_FILES) -> None:
    """Refuse an output folder that would lose something.

    Args:
        path: The folder.
        overwrite: Whether it may be replaced.
        known: Names (patterns) of what a verb writes there. A folder with anything else in it is
            not replaced, whatever was asked: ``--overwrite --out ~`` shall not empty a home.

    Raises:
        OutputError: If the folder may not be replaced.
    """
    refuse_existing(path, overwrite)
    # Before hours of work, not after them.
    above = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if above is not None and not (above.is_dir() and os.access(above, os.W_OK)):
        what = "may not be written" if above.is_dir() else "is a file"
        raise OutputError(f"'{path}' cannot be made: '{above}' {what}. Choose another --out.")
    if not path.is_dir():
        return
    foreign = [
        item.name
        for item in sorted(path.iterdir())
        if not any(fnmatch.fnmatchcase(item.name, pattern) for pattern in known)
        and not is_temporary(item.name)
    ]
    if foreign:
        listed = ", ".join(f"'{name}'" for name in foreign[:3])
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"folder '{path}' holds {listed}{more}, not written by this command, so it is not "
            "replaced. Move that away, or choose another --out."
        )


@contextlib.contextmanager
def run_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Make the folder of a long run, in place, so that an interrupted run can be resumed there.

    What stood there before is kept aside until the new run has left something to keep (a record
    or a checkpoint); if it leaves nothing, the old folder is put back. A run that was killed could
    not put it back: the next one does. While a run writes, no other may have its folder.

    Args:
        path: The folder.
        overwrite: Whether an old run may be replaced.

    Yields:
        The folder, empty.

    Raises:
        OutputError: If it may not be replaced or cannot be made, or if another run writes to it.
    """
    aside = path.with_name(f".{path.name}.replaced")
    put_back(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(path))
        check_out(path, overwrite)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            had_one = path.is_dir()
            if had_one:
                path.rename(aside)
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(explain_os_error(error, path)) from error
        stack.enter_context(held(path))
        try:
            yield path
        finally:
            if not worth_keeping(path):
                shutil.rmtree(path, ignore_errors=True)
                if had_one:
                    aside.rename(path)
            shutil.rmtree(aside, ignore_errors=True)


def put_back(path: Path) -> None:
    """Put a run back that one that was killed had put aside, if that one left nothing to keep.

    Args:
        path: The folder of both.

    Raises:
        OutputError: If it cannot be put back.
    """
    aside = path.with_name(f".{path.name}.replaced")
    if not aside.is_dir():
        return
    with held(aside, path), held(path):
        try:
            if not worth_keeping(path):
                if path.is_dir():
                    shutil.rmtree(path)
                aside.rename(path)
            else:
                shutil.rmtree(aside)
        except OSError as error:
            raise OutputError(explain_os_error(error, path)) from error


@contextlib.contextmanager
def told_when_interrupted(path: Path | None) -> Iterator[None]:
    """Add to an interruption what it left behind.

    Args:
        path: The folder that was being written.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: If the body was interrupted.
    """
    before = path is not None and path.exists()
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args or path is None:
            raise
        left = "is as it was before" if before else "was not written"
        raise KeyboardInterrupt(f"'{path}' {left}.") from error


def worth_keeping(path: Path) -> bool:
    """Tell whether a run left something that can be read or resumed.

    Args:
        path: Its folder.

    Returns:
        Whether there is a record, or a checkpoint with the configuration to resume it.
    """
    checkpoints = path / "checkpoints"
    resumable = (path / "config.yaml").is_file() and checkpoints.is_dir()
    saved = (path / "record.json").is_file() or (path / "adapter-unchecked").is_dir()
    return saved or (resumable and any(checkpoints.iterdir()))
