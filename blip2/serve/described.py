"""The request schemas of /openapi.json, with every accepted name of every field."""

from __future__ import annotations

from typing import Any

from blip2.serve.dialect import ALIASES, IGNORED_FIELDS, NAMES
from blip2.serve.schemas import SCHEMAS


def body_of(route: str) -> dict[str, Any]:
    """For FastAPI's ``openapi_extra``: JSON; on the plain routes also a form, in which the image may be a file."""
    schema = schema_of(route)
    content = {"application/json": {"schema": schema}}
    if route not in IGNORED_FIELDS:
        file = {"image": {"type": "string", "format": "binary"}}
        form = {**schema, "properties": {**schema["properties"], **file}}
        content |= {"multipart/form-data": {"schema": form}, "application/x-www-form-urlencoded": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def schema_of(route: str) -> dict[str, Any]:
    """The JSON schema of a route's request, without references outside it."""
    whole = SCHEMAS[route].model_json_schema()
    found = _inlined(whole, whole.pop("$defs", {}))
    properties = found["properties"]
    others = {
        name: {**properties[own], "description": f"The same as {own}"}
        for name, own in NAMES[route].items()
        if name != own
    }
    return {
        **found,
        "properties": {**properties, **others},
        "required": [name for name in found.get("required", ()) if name not in ALIASES],
        "additionalProperties": route in IGNORED_FIELDS,
    }


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with references replaced by their content; no schema of ours contains itself."""
    if isinstance(schema, list):
        return [_inlined(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        others = {name: value for name, value in schema.items() if name != "$ref"}
        return {**_inlined(parts[schema["$ref"].removeprefix("#/$defs/")], parts), **others}
    return {name: _inlined(value, parts) for name, value in schema.items()}
