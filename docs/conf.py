"""Settings of the documentation site: Sphinx, MyST and furo; nothing is fetched from a network."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent / "src"))

import gradrank  # noqa: E402

smartquotes = False  # "--help" must keep both hyphens
project = "gradrank"
author = "The gradrank authors"
copyright = "The gradrank authors. Apache-2.0"
version = release = gradrank.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "cli_reference",
    "public_names",
]
exclude_patterns = ["_*"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
# $ stands for dollars only where a formula is meant.
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
math_number_all = False
math_eqref_format = "({number})"
html_math_renderer = "mathml"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "params_style"), "Source"]
autodoc_member_order = "bysource"
autoclass_content = "both"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

nitpicky = True
# A field of the type "tuple[str, ...]" is cut at its comma.
nitpick_ignore = [("py:class", "tuple[str")]
# Types of other packages, and of our own floors below the public names, stand in signatures
# without a link: an inventory of theirs would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|peft|transformers|numpy|np|nn|collections|pathlib|typing|os)\b.*"),
    (r"py:.*", r"gradrank\.(core|ops|allocation|signals|methods|adapters|serving|schedule)\..*"),
    (r"py:.*", r"gradrank\.(capacity|controller|callback|session|record|watch)\..*"),
]

html_theme = "furo"
html_title = "gradrank"
html_static_path = ["_static"]
html_css_files = ["gradrank.css"]
html_extra_path = ["_extra"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5d8f", "color-brand-content": "#0b5d8f"},
    "dark_css_variables": {"color-brand-primary": "#6bb7e8", "color-brand-content": "#6bb7e8"},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"
