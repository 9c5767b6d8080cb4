"""``/caption``, ``/ask``, ``/match``, ``/explain``: one thing each, as a form with a file or as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from torch import Tensor

from blip2.api import Matcher
from blip2.generation import GenerateOptions
from blip2.image import RgbImage, grey_address, shrunk
from blip2.serve.decoding import check_prompt, checked_text, options_of
from blip2.serve.errors import ApiError
from blip2.serve.names import served_name
from blip2.serve.schemas import (
    Answered,
    AskRequest,
    CaptionRequest,
    Decoding,
    Explained,
    ExplainRequest,
    Matched,
    MatchedText,
    MatchRequest,
)
from blip2.serve.service import Service
from blip2.serve.worker import Ticket
from blip2.tasks import ask as ask_task
from blip2.tasks.defaults import ASK, CAPTION
from blip2.tasks.explain import Explanation, Sight, Words, explain_match, explain_words
from blip2.text import clean

MAP_PX = 512
"""The longer side of the map that /explain gives."""
LISTS = ("texts", "stop")
"""Fields of a form that may be given several times."""
Asked = TypeVar("Asked", bound=BaseModel)


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    async def answer(
        request: Request, body: Decoding, image: str | bytes, text: str, defaults: GenerateOptions
    ) -> Answered:
        options = options_of(body, defaults, service.limits)
        pipeline = service.pipeline
        await asyncio.to_thread(check_prompt, pipeline.speaker, text, service.limits)
        seen = await service.pictures.look(image, service.worker.images)
        answers = await service.answers(request, Ticket(seen, text, options))
        texts = [pipeline.speaker.tokenizer.decode(each.tokens) for each in answers]
        return Answered(
            text=texts[0], texts=texts, finish_reason=answers[0].finish_reason, model=served_name(pipeline.name)
        )

    @routes.post("/caption", openapi_extra=_either(CaptionRequest))
    async def caption(request: Request) -> Answered:
        """Describe a picture; ``prompt`` is the beginning of the caption."""
        body, image = await _read(request, CaptionRequest)
        text = clean(checked_text(body.prompt, service.limits))
        return await answer(request, body, image, text, CAPTION)

    @routes.post("/ask", openapi_extra=_either(AskRequest))
    async def ask(request: Request) -> Answered:
        """Answer a question about a picture."""
        body, image = await _read(request, AskRequest)
        [text] = ask_task.prompts(service.pipeline.speaker, [checked_text(body.question, service.limits)])
        return await answer(request, body, image, text, ASK)

    @routes.post("/match", openapi_extra=_either(MatchRequest))
    async def match(request: Request) -> Matched:
        """How well texts fit a picture."""
        matcher = service.matcher
        body, image = await _read(request, MatchRequest)
        if len(body.texts) > service.limits.max_texts:
            message = f"{len(body.texts)} texts; at most {service.limits.max_texts} are compared"
            raise ApiError(400, "too_many_texts", message, param="texts")
        ids = matcher.reader.ids([checked_text(text, service.limits) for text in body.texts])
        cache = service.features
        seen = await service.pictures.look(image, cache)

        def compare() -> list[MatchedText]:
            [kept] = cache.see([seen])
            if isinstance(kept, Exception):
                raise kept
            found = matcher.reader.compare([kept], ids, matcher.reader.embed_texts(ids))
            shares = found.itc_probability
            return [
                MatchedText(
                    text=text,
                    itm_probability=float(found.itm_probability[0, place]),
                    itc_cosine=float(found.itc_cosine[0, place]),
                    itc_probability=None if shares is None else float(shares[0, place]),
                )
                for place, text in enumerate(body.texts)
            ]

        return Matched(results=await service.compute(request, compare), model=served_name(matcher.name))

    @routes.post("/explain", openapi_extra=_either(ExplainRequest))
    async def explain(request: Request) -> Explained:
        """Where in a picture the model finds what speaks for a text, an answer, or a word of a caption."""
        body, image = await _read(request, ExplainRequest)
        given = {
            name: checked_text(text, service.limits)
            for name in ("text", "question", "answer", "word", "caption")
            if (text := getattr(body, name)) is not None
        }
        text = given.pop("text", None)
        words = Words(**given)
        words.check()
        if text is not None and given:
            raise ApiError(400, "invalid_value", f"a text is explained by itself; leave out {next(iter(given))}")
        model = service.pipeline if text is None else service.matcher

        def prepare(picture: RgbImage) -> tuple[RgbImage, Tensor]:
            return shrunk(picture, MAP_PX), model.eye.pixels(picture)

        small, pixels_CHW = await service.pictures.read(image, prepare)

        def look_closely() -> Explanation:
            if isinstance(model, Matcher):
                assert text is not None
                seen = Sight(small, *model.eye.with_blank(pixels_CHW, model.model.encode))
                return explain_match(model.reader, seen, text)
            seen = Sight(small, *model.eye.with_blank(pixels_CHW, model.speaker.model.patches))
            return explain_words(model.speaker, seen, words)

        found = await service.compute(request, look_closely)
        place = found.strongest
        return Explained(
            text=found.text,
            score=found.score,
            strongest=None if place is None else (place[0] / small.width, place[1] / small.height),
            heat=grey_address(found.heat.numpy()),
            model=served_name(model.name),
        )

    return routes


async def _read(request: Request, schema: type[Asked]) -> tuple[Asked, str | bytes]:
    """The fields, and the picture: a form's file as bytes, otherwise as it was written. Raises what says why not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        given, image = await _form(request)
    elif kind in ("application/json", ""):
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ApiError(400, "invalid_json", f"the body is no valid JSON: {reason}") from None
        image = None
    else:
        raise ApiError(415, "unsupported_media_type", "send multipart/form-data with a file, or application/json")
    try:
        body = schema.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return body, image if image is not None else getattr(body, "image")  # noqa: B009  (each schema has it)


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    image: bytes | None = None
    given: dict[str, Any] = {}
    try:
        async with request.form(max_files=1, max_fields=400, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise ApiError(400, "invalid_value", f"the file is called {name[:40]!r}; call it 'image'")
                    image = await value.read()
                    given["image"] = "file"
                elif name in LISTS:
                    given.setdefault(name, []).append(value)
                elif name != "image" or image is None:
                    given[name] = value
    except (HTTPException, UnicodeError) as error:  # the latter: a form may name the encoding of its own names
        reason = error.detail if isinstance(error, HTTPException) else error
        raise ApiError(400, "invalid_form", f"the form cannot be read: {reason}") from None
    return given, image


def _either(schema: type[BaseModel]) -> dict[str, Any]:
    """A body that is JSON, or a form whose picture is a file, for /openapi.json."""
    as_json = schema.model_json_schema()
    as_form = json.loads(json.dumps(as_json))
    as_form["properties"]["image"] = {"type": "string", "format": "binary"}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}},
        }
    }
