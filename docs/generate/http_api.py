"""The reference of the server, from the description that it serves itself at /openapi.json."""

from __future__ import annotations

from typing import Any

from docs.generate.markdown import entry, prose


def page() -> str:
    from blip2.serve.app import create_app

    def no_models() -> Any:
        raise AssertionError("a description needs no model")

    described = create_app(no_models).openapi()
    parts = [
        "# HTTP API",
        "Generated from the OpenAPI description that [`blip2 serve`](cli/serve.md) serves at `/openapi.json`. A field "
        "that a route does not know is an error that names the nearest one. On `/v1`, fields of other servers that "
        "change no answer are ignored, and the response header `X-Blip2-Ignored` lists them.",
        "Images are data URLs (`data:image/png;base64,...`); on the plain routes (`/caption`, `/ask`, `/match`, "
        "`/explain`) also a file of a form. URLs need `--allow-images-from`.",
        "Errors have the shape of OpenAI's: `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}`.",
    ]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts += _route(path, method, operation)
    return "\n\n".join(parts) + "\n"


def _route(path: str, method: str, operation: dict[str, Any]) -> list[str]:
    parts = [f"## {method.upper()} {path}", prose(operation.get("description", ""))]
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        return [part for part in parts if part]
    parts.append("Content types: " + ", ".join(f"`{name}`" for name in content) + ".")
    schema = content["application/json"]["schema"]
    others: dict[str, list[str]] = {}
    for name, value in schema["properties"].items():
        if value.get("description", "").startswith("The same as "):
            others.setdefault(value["description"].removeprefix("The same as "), []).append(name)
    required = schema.get("required", ())
    for name, value in schema["properties"].items():
        if value.get("description", "").startswith("The same as "):
            continue
        told = prose(value.get("description", "").rstrip(".") + ".") if value.get("description") else ""
        if name in others:
            told += " Other names: " + ", ".join(f"`{other}`" for other in others[name]) + "."
        is_required = ", required" if name in required else ""
        parts.append(entry(f"`{name}` ({kind_of(value)}{is_required})", told.strip() or "See the OpenAI API."))
    return [part for part in parts if part]


def kind_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "integer, 1 or more", "text or list"."""
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        found = dict.fromkeys(kind_of(each) for each in branches if each.get("type") != "null")
        return " or ".join(found)
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    name = {"string": "text", "array": "list"}.get(kind, kind)
    low, high = schema.get("minimum", schema.get("ge")), schema.get("maximum", schema.get("le"))
    if low is not None and high is not None:
        return f"{name}, {low} to {high}"
    if low is not None:
        return f"{name}, {low} or more"
    return name
