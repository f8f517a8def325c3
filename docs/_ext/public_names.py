"""Public names in the reference: links to where they are documented, and options of methods."""

import dataclasses
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import gradrank

PUBLIC = {f"{module}.{name}": f"gradrank.{name}" for name, module in gradrank._NAMES.items()}


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> Any:
    """Resolve a reference to where a public name is defined as one to the public name.

    Args:
        app: The application.
        env: Its environment.
        node: The reference that was not found.
        content: What it shows.

    Returns:
        The link, or None if the reference is no public name.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    name, _, member = target.rpartition(".")
    public = PUBLIC.get(target) or (f"{PUBLIC[name]}.{member}" if name in PUBLIC else None)
    public = public or (f"gradrank.{target}" if target.split(".")[0] in gradrank._NAMES else None)
    if public is None or public == target:
        return None
    domain = env.get_domain("py")
    kind = "obj"  # a class may be named where a function is expected, and the other way round
    return domain.resolve_xref(env, node["refdoc"], app.builder, kind, public, node, content)


def list_options(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Add the options of a method to its docstring, from the texts that the command line shows.

    Args:
        app: The application.
        what: Kind of the object.
        name: Its name.
        value: The object.
        options: Of the directive.
        lines: The docstring, changed in place.
    """
    if what == "class" and dataclasses.is_dataclass(value):
        texts = [(field.name, field.metadata.get("help")) for field in dataclasses.fields(value)]
        texts = [(field, text.replace("|", r"\|")) for field, text in texts if text]
        lines += ["", *(f":param {field}: {text}" for field, text in texts), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handlers."""
    app.connect("autodoc-process-docstring", list_options)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
