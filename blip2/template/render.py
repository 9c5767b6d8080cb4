"""A separate program: reads a request as JSON from standard input, and writes the rendered chat template as JSON to
standard output.

A template may loop or produce very long texts, which the sandbox does not prevent; so this process has limits that end
it. It imports nothing of the package. Exit status: 1 for a template that fails, 3 without jinja2.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

CPU_S, MEMORY_BYTES, MOST_CHARACTERS = 2, 2**30, 10**6


def limit() -> None:
    """Limits of processor time and memory, if the system supports them; otherwise only the parent's timeout applies."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def rendered(source: str, messages: list[dict[str, str]], names: dict[str, str]) -> str:
    """Rendered with the settings that templates on the hub are written for. Raises any error of the template."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Block tag around generated text for training; it has no effect here."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template = environment.from_string(source)
    text = template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **names)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters")
    return text


def main() -> int:
    order = json.load(sys.stdin)
    try:
        import jinja2.sandbox  # noqa: F401
    except ImportError:
        return 3
    try:
        limit()
        json.dump(rendered(**order), sys.stdout)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
