"""The model names that clients use."""

from __future__ import annotations

from typing import Any

from blip2.serve.errors import ApiError
from blip2.serve.service import Service


class Names:
    """The served names; ``blip2`` is an alias of either model."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[dict[str, Any]]:
        worker = self._service.worker
        found = [_model(worker.pipeline.name, ["caption", "ask", "chat"])]
        if worker.matcher is not None:
            found.append(_model(worker.matcher.name, ["match", "embeddings"]))
        return found

    def generative(self, asked: str | None) -> str:
        return self._named(asked, self._service.pipeline.name)

    def matching(self, asked: str | None) -> str:
        return self._named(asked, self._service.matcher.name)

    def _named(self, asked: str | None, name: str) -> str:
        if asked not in (None, "", "blip2", served_name(name)):
            raise self.unknown(str(asked), served_name(name))
        return served_name(name)

    def unknown(self, name: str, fitting: str | None = None) -> ApiError:
        """``fitting``: the only model that supports the request; None if the models themselves are requested."""
        known = fitting or ", ".join(each["id"] for each in self.all())
        there = "use" if fitting else "the models are"
        message = f"model {name[:100]!r} is not available here; {there} {known}"
        return ApiError(404, "model_not_found", message, param="model")


def served_name(name: str) -> str:
    """The last part of a folder's path, since the rest is private; a hub name as a whole."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


def _model(name: str, capabilities: list[str]) -> dict[str, Any]:
    return {
        "id": served_name(name),
        "object": "model",
        "created": 0,
        "owned_by": "blip2",
        "capabilities": capabilities,
    }
