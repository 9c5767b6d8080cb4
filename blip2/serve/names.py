"""What the models are called by those who ask for one."""

from __future__ import annotations

from typing import Any

from blip2.serve.errors import ApiError
from blip2.serve.service import Service


class Names:
    """The served names; ``blip2`` is another name for either model."""

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
        """``fitting``: the one model that does what was asked, if it is not asked what there is."""
        known = fitting or ", ".join(each["id"] for each in self.all())
        there = "it is done by" if fitting else "there are"
        message = f"the model {name[:100]!r} does not do that here; {there} {known}"
        return ApiError(404, "model_not_found", message, param="model")


def served_name(name: str) -> str:
    """A folder's name without the way to it, which is nobody's business; a hub's name whole."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


def _model(name: str, capabilities: list[str]) -> dict[str, Any]:
    return {
        "id": served_name(name),
        "object": "model",
        "created": 0,
        "owned_by": "blip2",
        "capabilities": capabilities,
    }
