"""``blip2 chat``: a conversation about an image, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import in_flags, of_image
from blip2.cli.images import READING, of_reading
from blip2.cli.options import CHAT_TEMPLATE, DECODING, MODEL, given, load_pipeline, of_model, of_template, with_options
from blip2.errors import Blip2Error, OptionError
from blip2.plaintext import NotTextError, lines_of

if TYPE_CHECKING:
    from blip2.api import Pipeline
    from blip2.tasks.chat import Chat

HELP = """\
/image FILE   switch to another image (a file or a web address)
/reset        clear the history
/help         show this list
/quit         quit (also Ctrl-D); Ctrl-C stops an answer"""


@click.command("chat")
@click.argument("image", required=False)
@with_options(DECODING, READING, (*MODEL, CHAT_TEMPLATE))
def command(image: str | None, **others: Any) -> None:
    """Chat about an image.

    IMAGE is a file or a URL. Each question is answered in the context of the earlier turns. Commands: /image FILE
    switches to another image, /reset clears the history, /help lists all commands, /quit ends the chat.

    If standard input is not a terminal, each line is a question or a command, and each answer is one line on standard
    output. The default is greedy decoding of at most 40 tokens.

    \b
    blip2 chat beach.jpg
    printf 'what is in the picture?\\nwhere is it?\\n' | blip2 chat beach.jpg
    """
    from blip2.tasks.defaults import CHAT, merged

    model = of_model(others) | of_reading(others) | of_template(others)
    options = given(others)
    merged(CHAT, options)
    if image == "-":
        raise click.UsageError("standard input holds the questions; give the image as a file or a web address")
    conversation = Conversation(load_pipeline(**model), options)
    if image is not None:
        conversation.look_at(image)
    if sys.stdin.isatty():
        _on_terminal(conversation)
    else:
        _through_pipe(conversation)


class Conversation:
    """The image and the chat about it. `answer` is None if a line was a command."""

    def __init__(self, blip: Pipeline, options: dict[str, Any]) -> None:
        self.blip = blip
        self.chat: Chat | None = None
        self.is_over = False
        self._options = options

    def look_at(self, image: str) -> None:
        """Start a new chat about this image. Raises ImageError; the current chat is kept then."""
        self.chat = self.blip.chat(image, **self._options)

    def command(self, line: str) -> str | None:
        """Run a line that begins with a slash. Returns a message to show, or None."""
        verb, _, rest = line.partition(" ")
        match verb, rest.strip():
            case "/image", "":
                raise OptionError("which image? write /image FILE")
            case "/image", image:
                self.look_at(image)
                return None
            case "/reset", "":
                if self.chat is not None:
                    self.chat.reset()
                return None
            case "/help", "":
                return HELP
            case (("/quit" | "/exit"), ""):
                self.is_over = True
                return None
        raise OptionError(f"there is no command {line!r}; /help lists the commands")

    def about(self) -> Chat:
        """The chat; OptionError if there is no image yet."""
        if self.chat is None:
            raise OptionError("there is no image yet; name one with /image FILE")
        return self.chat


def _through_pipe(conversation: Conversation) -> None:
    """Stops at the first error: otherwise questions and answers would no longer match line by line."""
    try:
        for line in map(str.strip, lines_of(sys.stdin.buffer, sys.stdin.encoding)):
            if line.startswith("/"):
                if (reply := conversation.command(line)) is not None:
                    click.echo(reply, err=True)
            elif line:
                click.echo(conversation.about().say(line))
            if conversation.is_over:
                return
    except NotTextError as error:
        raise OptionError(f"standard input {error}") from None


def _on_terminal(conversation: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines in `input`)
    hint = "Ask about the image; /help lists the commands." if conversation.chat else "Name an image with /image FILE."
    click.echo(hint)
    while not conversation.is_over:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        try:
            if line.startswith("/"):
                if (reply := conversation.command(line)) is not None:
                    click.echo(reply)
            elif line:
                _show_answer(conversation.about(), line)
        except Blip2Error as error:
            click.echo(of_image(in_flags(error, click.get_current_context().command)), err=True)


def _show_answer(chat: Chat, question: str) -> None:
    forgotten = chat.num_forgotten
    pieces = chat.stream(question)
    if chat.num_forgotten > forgotten:
        click.echo(f"(the prompt only has room for the last {len(chat.history) - chat.num_forgotten} turns)", err=True)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        pieces.close()  # the generating thread stops at its next token
    click.echo()
