"""What a chat template takes. Its text is a program of Jinja."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Of every template: what transformers hands it, and the functions that it adds to Jinja's own.
GIVEN = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now",
})  # fmt: skip


class _Generation(Extension):
    """transformers' own tag, `{% generation %}`, around what the model wrote."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def variables(template: str, reserved: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names that a chat template reads and that are left for a request to set.

    Args:
        template: its text. One that is no template has none: rendering it says why.
        reserved: further names that are not for requests.
    """
    environment: Any = ImmutableSandboxedEnvironment(
        extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        read = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return frozenset()
    return frozenset(read) - GIVEN - set(environment.globals) - reserved
