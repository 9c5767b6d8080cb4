"""OpenAI messages to BLIP-2's input: one image, the turns about it, and the current question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blip2.errors import OptionError
from blip2.serve.errors import ApiError
from blip2.serve.images import ImageSource, check_no_image, parse_source
from blip2.serve.limits import Limits
from blip2.serve.schemas import Message, Part
from blip2.text import clean

CAPTION_QUESTION = "what is in the picture?"
"""The question that stands for a request for a caption in the history."""
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image_url", "input_image", "image")
MAX_SENT = 2000
"""Maximum images of a conversation, including those sent again with each turn; comparing them takes time."""
AS_PART = 'send it as {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}} beside the text'


@dataclass(frozen=True)
class Conversation:
    """``history``: questions and answers about the image, oldest first. ``question``: may be "". ``ignored``: messages
    that were ignored."""

    image: ImageSource
    history: list[tuple[str, str]]
    question: str
    ignored: list[str]


@dataclass
class _Turn:
    """A question and its answer, as pieces that are joined once at the end."""

    asked: list[str] = field(default_factory=list)
    said: list[str] | None = None
    """None: not answered yet."""
    has_image: bool = False


def read(messages: Sequence[Message], limits: Limits) -> Conversation:
    """The conversation in the messages. A new image starts a new conversation, since earlier turns were about another
    one. The same image again, as clients send it with each turn, does not.

    Consecutive messages of one role are joined. Raises ApiError for messages without a meaning here, so that nothing is
    ignored silently, and ImageError.
    """
    if sum(map(_num_images, messages)) > MAX_SENT:
        raise _bad("too_many_images", f"more than {MAX_SENT:,} images in one request; leave out older ones")
    image: ImageSource | None = None
    turns: list[_Turn] = []
    num_images = 0
    ignored: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role in ("tool", "function"):
            raise _bad("invalid_message", f"this model does not call tools; leave out {message.role} messages", where)
        text, images = _content(message, where)
        match message.role:
            case "user":
                images = list(dict.fromkeys(images))
                if len(images) > 1:
                    raise _bad(
                        "one_image_only", f"{len(images)} images in one message; this model takes one at a time", where
                    )
                is_open = bool(turns) and turns[-1].said is None
                if images and images[0] != image:
                    num_images += 1
                    if num_images > limits.max_images:
                        message_text = f"more than {limits.max_images} images in one request; leave out older ones"
                        raise _bad("too_many_images", message_text)
                    image = images[0]
                    turns = turns[-1:] if is_open and not turns[-1].has_image else []
                if not (turns and turns[-1].said is None):
                    turns.append(_Turn())
                turns[-1].asked.append(text)
                turns[-1].has_image |= bool(images)
            case "assistant":
                if images:
                    raise _bad("invalid_message", "an answer contains an image; only user messages may", where)
                if not turns and text:
                    raise _bad("invalid_message", "the first message is an answer; start with a user message", where)
                if turns:
                    turns[-1].said = turns[-1].said or []
                    turns[-1].said.append(text)
            case _:
                if images:
                    raise _bad("invalid_message", f"{message.role} messages cannot contain images", where)
                if text and limits.system_prompt == "refuse":
                    raise _bad(
                        "system_message_unsupported",
                        "this model cannot follow a system prompt; leave it out, or start the server with "
                        "--system-prompt ignore, which skips such messages",
                        where,
                    )
                if text and "system" not in ignored:
                    ignored.append("system")
    if not turns or turns[-1].said is not None:
        raise _bad("invalid_message", "the last message has to be a user message")
    if image is None:
        raise _bad(
            "image_required",
            "there is no image in the conversation, and this model only answers about images; send one as an "
            "image_url part with a data:image/...;base64, URL",
        )
    question = _joined(turns[-1].asked)
    if turns[:-1] and not question:
        raise OptionError("the last message is empty; ask a question, or send only the image to get a caption")
    history = [(_joined(turn.asked) or CAPTION_QUESTION, _joined(turn.said or [])) for turn in turns[:-1]]
    return Conversation(image, history, question, ignored)


def _num_images(message: Message) -> int:
    parts = message.content if isinstance(message.content, list) else []
    return len(message.images or []) + sum(part.type in IMAGE_TYPES for part in parts)


def _content(message: Message, where: str) -> tuple[str, list[ImageSource]]:
    """The text of a message, and its images."""
    for name, given in (("image", message.image), ("image_url", message.image_url)):
        if given is not None:
            raise _bad("invalid_value", f"the content holds an image; {AS_PART}", f"{where}.{name}")
    images = [parse_source(each, f"{where}.images[{place}]") for place, each in enumerate(message.images or [])]
    if message.content is None and not images and message.role != "assistant":
        raise _bad("invalid_value", "give a text, or a list of parts", f"{where}.content")
    if not isinstance(message.content, list):
        text = message.content or ""
        check_no_image(text, f"{where}.content", AS_PART)
        return clean(text), images
    texts = []
    for number, part in enumerate(message.content):
        place = f"{where}.content[{number}]"
        if part.type in TEXT_TYPES:
            if part.text is None:
                raise _bad("invalid_value", "give a text", f"{place}.text")
            check_no_image(part.text, f"{place}.text", AS_PART)
            texts.append(part.text)
        elif part.type in IMAGE_TYPES:
            images.append(_shown(part, place))
        else:
            raise _bad(
                "invalid_message",
                f"unknown part type {part.type[:40]!r}; send 'text' and 'image_url'",
                f"{place}.type",
            )
    return _joined(texts), images


def _shown(part: Part, where: str) -> ImageSource:
    """The image of a part, in the fields of OpenAI's, vLLM's or Anthropic's clients."""
    address = part.image_url if isinstance(part.image_url, str) else part.image_url and part.image_url.url
    source = part.source and (part.source.data or part.source.url)
    for name, found in (("image_url", address), ("image", part.image), ("source", source)):
        if found:
            return parse_source(found, f"{where}.{name}")
    raise _bad("invalid_value", 'give {"url": "data:image/...;base64,..."}', f"{where}.image_url")


def _joined(texts: Sequence[str]) -> str:
    return clean(" ".join(texts))


def _bad(code: str, message: str, where: str | None = None) -> ApiError:
    return ApiError(400, code, f"{where}: {message}" if where else message, param=where or "messages")
