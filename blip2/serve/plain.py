"""``/caption``, ``/ask``, ``/match``, ``/explain``: one thing each, as a form with a file or as JSON."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from blip2.api import Matcher
from blip2.generation import GenerateOptions
from blip2.image import grey_address
from blip2.serve.attention import Attended
from blip2.serve.choosing import choosing, chosen
from blip2.serve.decoding import fitting, options_of
from blip2.serve.described import body_of
from blip2.serve.errors import ApiError
from blip2.serve.names import served_name
from blip2.serve.reading import Reading
from blip2.serve.schemas import (
    Answered,
    AskRequest,
    CaptionRequest,
    Decoding,
    Explained,
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


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=Attended)

    async def ticket(reading: Reading, body: Decoding, text: str, defaults: GenerateOptions) -> Ticket:
        options = options_of(body, defaults, service.limits)
        options = await asyncio.to_thread(fitting, service.pipeline.speaker, text, options, service.limits)
        return Ticket(await reading.look(0, service.worker.images), text, options)

    async def answered(asked: Ticket) -> Answered:
        answers = await service.answers(asked)
        pipeline = service.pipeline
        texts = [pipeline.speaker.tokenizer.decode(each.tokens) for each in answers]
        return Answered(
            text=texts[0], texts=texts, finish_reason=answers[0].finish_reason, model=served_name(pipeline.name)
        )

    @routes.post("/caption", openapi_extra=body_of("/caption"), response_model_exclude_none=True)
    async def caption(request: Request) -> Answered:
        """Describe a picture; ``prompt`` is the beginning of the caption."""
        async with service.readings.read(request) as reading:
            body = CaptionRequest.model_construct(**reading.fields)
            asked = await ticket(reading, body, clean(body.prompt), CAPTION)
        return await answered(asked)

    @routes.post("/ask", openapi_extra=body_of("/ask"), response_model_exclude_none=True)
    async def ask(request: Request) -> Answered:
        """Answer a question about a picture, freely or with one of ``choices``."""
        async with service.readings.read(request) as reading:
            body = AskRequest.model_construct(**reading.fields)
            [text] = ask_task.prompts(service.pipeline.speaker, [body.question])
            if body.choices is None:
                asked = await ticket(reading, body, text, ASK)
            else:
                question = await choosing(service, reading, body, text)
        return await (answered(asked) if body.choices is None else chosen(service, question))

    @routes.post("/match", openapi_extra=body_of("/match"))
    async def match(request: Request) -> Matched:
        """How well texts fit a picture."""
        matcher, cache = service.matcher, service.features
        async with service.readings.read(request) as reading:
            body = MatchRequest.model_construct(**reading.fields)
            ids = await asyncio.to_thread(matcher.reader.ids, body.texts)
            seen = await reading.look(0, cache)

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

        return Matched(results=await service.compute(compare), model=served_name(matcher.name))

    @routes.post("/explain", openapi_extra=body_of("/explain"))
    async def explain(request: Request) -> Explained:
        """Where in a picture the model finds what speaks for a text, an answer, or a word of a caption."""
        async with service.readings.read(request) as reading:
            given = {name: text for name, text in reading.fields.items() if text is not None}
            text = given.pop("text", None)
            words = Words(**given)
            words.check()
            if text is not None and given:
                raise ApiError(400, "invalid_value", f"a text is explained by itself; leave out {next(iter(given))}")
            model = service.pipeline if text is None else service.matcher
            small, pixels_CHW = await reading.shown(0, model.eye, MAP_PX)

        def look_closely() -> Explanation:
            if isinstance(model, Matcher):
                assert text is not None
                seen = Sight(small, *model.eye.with_blank(pixels_CHW, model.model.encode))
                return explain_match(model.reader, seen, text)
            seen = Sight(small, *model.eye.with_blank(pixels_CHW, model.speaker.model.patches))
            return explain_words(model.speaker, seen, words)

        found = await service.compute(look_closely)
        place = found.strongest
        return Explained(
            text=found.text,
            score=found.score,
            strongest=None if place is None else (place[0] / small.width, place[1] / small.height),
            heat=grey_address(found.heat.numpy()),
            model=served_name(model.name),
        )

    return routes
