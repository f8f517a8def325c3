"""Formulas as MathML, written at build time: browsers draw it, and no script is loaded."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# docutils would put the index of an accented letter below it; an empty group beside it helps.
_ACCENTED = re.compile(r"\{?(\\(?:hat|tilde|bar) \w)\}?_")


def convert(formula: str, block: bool) -> str:
    """Turn a formula into a MathML element.

    Args:
        formula: LaTeX.
        block: Whether it stands on a line of its own.

    Returns:
        The element.

    Raises:
        ExtensionError: If the formula uses what cannot be converted.
    """
    try:
        return latex2mathml.tex2mathml(_ACCENTED.sub(r"{\1{}}_", formula), as_block=block)
    except (MathError, SyntaxError) as error:
        raise ExtensionError(f"formula '{formula}' cannot be written as MathML: {error}") from error


def visit_inline(self: Any, node: nodes.math) -> None:
    """Write a formula inside a sentence."""
    self.body.append(convert(node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, with its number if it has one."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(f'<div class="formula">{convert(node.astext(), block=True)}</div>')
    if node["number"]:
        self.body.append(f'<span class="eqno">({node["number"]})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
