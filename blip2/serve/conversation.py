"""OpenAI's messages as BLIP-2 understands them: one picture, the turns about it, and what is asked now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blip2.errors import OptionError
from blip2.serve.errors import ApiError
from blip2.serve.schemas import Message
from blip2.text import clean

CAPTION_QUESTION = "what is in the picture?"
"""How a caption stands among the questions of a conversation."""


@dataclass(frozen=True)
class Conversation:
    """``image``: as it was sent. ``history``: questions and answers about it, oldest first. ``question``: may be ""."""

    image: str
    history: list[tuple[str, str]]
    question: str


@dataclass
class _Turn:
    """What the user asked, and what was answered: in pieces, which are joined once, at the end."""

    asked: list[str] = field(default_factory=list)
    said: list[str] | None = None
    """None: not answered yet."""
    has_image: bool = False


def read(messages: Sequence[Message], max_images: int) -> Conversation:
    """What the messages amount to. A new picture begins anew: what was said before it was about another one.

    Several messages of one side, one after the other, are one. Raises ApiError for what has no meaning here, so that
    nothing is left out in silence.
    """
    image: str | None = None
    turns: list[_Turn] = []
    num_images = 0
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        text, images = _content(message, where)
        num_images += len(images)
        if num_images > max_images:
            raise _bad("too_many_images", f"more than {max_images} pictures in one request; leave out older ones")
        match message.role:
            case "user":
                if len(images) > 1:
                    raise _bad(
                        "one_image_only", f"{len(images)} pictures in one message; this model sees one at a time", where
                    )
                is_open = bool(turns) and turns[-1].said is None
                if images:
                    image = images[0]
                    turns = turns[-1:] if is_open and not turns[-1].has_image else []
                if not (turns and turns[-1].said is None):
                    turns.append(_Turn())
                turns[-1].asked.append(text)
                turns[-1].has_image |= bool(images)
            case "assistant":
                if images:
                    raise _bad("invalid_message", "a picture in an answer; pictures come from the user", where)
                if not turns and text:
                    raise _bad("invalid_message", "the first message is an answer; begin with the user's", where)
                if turns:
                    turns[-1].said = turns[-1].said or []
                    turns[-1].said.append(text)
            case "system" | "developer":
                if text or images:
                    raise _bad(
                        "system_message_unsupported",
                        "this model follows no system prompt, only a question about a picture; leave it out",
                        where,
                    )
            case _:
                raise _bad("invalid_message", f"this model calls no tools; leave out messages of {message.role}", where)
    if not turns or turns[-1].said is not None:
        raise _bad("invalid_message", "the last message has to be the user's")
    if image is None:
        raise _bad(
            "image_required",
            "there is no picture in the conversation, and this model speaks only of pictures; send one as an "
            "image_url part with a data:image/...;base64, address",
        )
    question = _joined(turns[-1].asked)
    if turns[:-1] and not question:
        raise OptionError("the last message is empty; ask something, or send the picture alone to get a caption")
    history = [(_joined(turn.asked) or CAPTION_QUESTION, _joined(turn.said or [])) for turn in turns[:-1]]
    return Conversation(image, history, question)


def _content(message: Message, where: str) -> tuple[str, list[str]]:
    """The text of a message, and its pictures as they were sent."""
    if not isinstance(message.content, list):
        return clean(message.content or ""), []
    texts, images = [], []
    for part in message.content:
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            texts.append(part.text)
        elif part.type in ("image_url", "input_image") and part.image_url is not None:
            images.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
        else:
            raise _bad(
                "invalid_message", f"a part of type {part.type[:40]!r}; send 'text' and 'image_url' parts", where
            )
    return _joined(texts), images


def _joined(texts: Sequence[str]) -> str:
    return clean(" ".join(texts))


def _bad(code: str, message: str, where: str | None = None) -> ApiError:
    return ApiError(400, code, f"{where}: {message}" if where else message, param=where or "messages")
