"""What makes tests cheap without changing what they test."""

import functools

import jinja2


def compile_templates_once() -> None:
    """Remember compiled templates: PEFT writes a model card with each adapter that it saves.

    The card's template is the same each time, and compiling it costs more than writing a tiny
    adapter. What is written stays the same.
    """
    compile_once = functools.lru_cache(maxsize=64)(jinja2.Environment.compile)
    jinja2.Environment.compile = compile_once  # type: ignore[method-assign]
