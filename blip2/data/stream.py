"""Reads large JSON files: the elements of arrays and objects, with one element in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blip2.errors import RecipeError
from blip2.plaintext import NotTextError, read_pieces

LARGEST_ELEMENT = 2**27
"""Characters; a longer element means that the file is broken."""
LONGEST_CUT = 12
"""Length of a value that cannot be decoded if a chunk ends within it: ``-Infinit``, ``\\ud83d\\ude0``."""
SPACE = " \t\n\r"


class Element(NamedTuple):
    """``section``: the key of the array that contains it, "" for an array that is the whole file, `MEMBER` for a member
    of an object that is not an array. ``place``: file and position, for messages."""

    section: str
    key: str | int
    value: Any
    place: str


MEMBER = "*"


def elements(path: Path) -> Iterator[Element]:
    """The content of a file, in order: the elements of an array; for an object, the elements of each array in it, and
    its other members. Objects one after another (JSON lines) are the elements of the section "".

    Raises RecipeError, with file and line, for what cannot be read or is not JSON.
    """
    try:
        yield from _elements(path, _Text(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}); check it") from None
    except NotTextError as error:
        raise RecipeError(f"{path}: {error}") from None


def _elements(path: Path, text: _Text) -> Iterator[Element]:
    match text.peek():
        case "[":
            for number, value in enumerate(_array(text)):
                yield Element("", number, value, f"{path} [{number}]")
        case "{" if _is_lines(text):
            number = 0
            while text.peek():
                yield Element("", number, text.value(), f"{path} [{number}]")
                number += 1
        case "{":
            yield from _object(path, text)
        case "":
            raise RecipeError(f"{path}: is empty; check it")
        case _:
            raise text.error("neither an object nor an array")
    if text.peek():
        raise text.error("there is more after its end")


def _is_lines(text: _Text) -> bool:
    """Whether the first line is a complete object, followed by another object."""
    line, _, rest = text.ahead().partition("\n")
    try:
        return isinstance(json.loads(line), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _array(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() != "]":
        yield text.value()
        while text.peek() == ",":
            text.take(",")
            yield text.value()
    text.take("]")


def _object(path: Path, text: _Text) -> Iterator[Element]:
    text.take("{")
    while text.peek() != "}":
        if not isinstance(key := text.value(), str):
            raise text.error("a key has to be a text")
        text.take(":")
        if text.peek() == "[":
            for number, value in enumerate(_array(text)):
                yield Element(key, number, value, f"{path}: {key}[{number}]")
        else:
            yield Element(MEMBER, key, text.value(), f"{path}: {key}")
        if text.peek() != ",":
            break
        text.take(",")
    text.take("}")


class _Text:
    """A window on a file that moves forward."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces = read_pieces(path)
        self._decode = json.JSONDecoder().raw_decode
        self._window, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._window) and self._window[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._window) or not self._read():
                return self._window[self._at : self._at + 1]

    def ahead(self) -> str:
        return self._window[self._at :]

    def take(self, wanted: str) -> None:
        if (found := self.peek()) != wanted:
            raise self.error(f"{wanted!r} is missing" if found else "it ends too early")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._window, self._at)
            except RecursionError:
                raise self.error("too deep") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + LONGEST_CUT >= len(self._window)
                if not is_cut or not self._read():
                    self._at = error.pos
                    raise self.error(error.msg) from None
            else:
                # A number may continue in the next chunk, even after what looks like its end: 1e+
                if end + LONGEST_CUT < len(self._window) or not self._read():
                    self._at = end
                    return value

    def error(self, reason: str) -> RecipeError:
        line = self._line + self._window.count("\n", 0, self._at)
        return RecipeError(f"{self._path}:{line}: is not JSON of a known form ({reason}); fix it, or download it again")

    def _read(self) -> bool:
        """Read another chunk, if there is one; for a long value as much as it already has, to limit the number of
        retries."""
        wanted = len(self._window) - self._at
        if wanted > LARGEST_ELEMENT:
            raise self.error("an element does not end")
        pieces: list[str] = []
        while not pieces or (pieces[-1] and sum(len(piece) for piece in pieces) < wanted):
            pieces.append(next(self._pieces, ""))
        if not pieces[0]:
            return False
        self._line += self._window.count("\n", 0, self._at)
        self._window, self._at = self._window[self._at :] + "".join(pieces), 0
        return True
