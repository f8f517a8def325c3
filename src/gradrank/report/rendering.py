"""From templates to a page that needs nothing else, and from a page and figures to files."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gradrank.core.errors import OutputError
from gradrank.core.files import write_text
from gradrank.report.svg import Figure
from gradrank.report.text import listed


def render(
    template: str,
    packages: Sequence[str],
    styles: Sequence[str],
    scripts: Sequence[str],
    **values: Any,
) -> str:
    """Fill in a template, with its styles and scripts in the page itself.

    Args:
        template: Name of the template.
        packages: Packages whose folder ``templates`` is searched, in order.
        styles: Style sheets, put together.
        scripts: Scripts, put together; the page allows this text and no other.
        **values: What the template names.

    Returns:
        The page. Every value is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, "templates") for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = "".join(_asset(environment, name) for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template(template).render(
        style="".join(_asset(environment, name) for name in styles),
        script=script,
        script_digest=digest,
        **values,
    )


def write_files(
    texts: Mapping[Path, str], figures: Mapping[Path, Figure], overwrite: bool
) -> list[Path]:
    """Write texts and figures; nothing if any file exists and may not be replaced.

    Args:
        texts: Text by file.
        figures: Figure by file, whose ending is its format.
        overwrite: Whether existing files may be replaced.

    Returns:
        The files.

    Raises:
        OutputError: If a file exists and may not be replaced.
    """
    taken = [str(path) for path in (*texts, *figures) if path.exists()]
    if taken and not overwrite:
        raise OutputError(
            f"{listed(taken[:3])} exists already. Choose another name or pass --overwrite."
        )
    for path, text in texts.items():
        write_text(path, text, overwrite)
    for path, figure in figures.items():
        figure.save(path, overwrite)
    return [*texts, *figures]


def _asset(environment: jinja2.Environment, name: str) -> str:
    # Read through the loader but not rendered: only files of this package are ever trusted.
    loader = environment.loader
    assert loader is not None
    return loader.get_source(environment, name)[0]
