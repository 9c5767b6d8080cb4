"""From what a model says to the lines that outputs have: a function of texts alone."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Literal, get_args

from blip2.collection.patterns import check_patterns
from blip2.collection.record import Record
from blip2.collection.run import Outcome
from blip2.errors import OptionError, option

FIELDS = ("caption", "name", "folder", "concept", "old")
IfExists = Literal["skip", "overwrite", "append", "prepend"]
EDGES = " ,;"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How captions are worded. Raises OptionError at once for what cannot be.

    A caption goes through these, in this order: repeated words at its end are cut (``dedupe_words``), each of
    ``replace`` (old, new) and of ``remove`` (regular expressions) is applied, and of several captions those without
    ``forbid_words`` come first; from the others these words are removed (whole words, of any case). Then come
    ``template``, ``prefix`` and ``suffix`` (as they are, no blank is added), and ``max_chars``, for which the caption
    is cut, at a word where it has one, and nothing else. ``if_exists`` "append" and "prepend" put the line after or
    before what was said before, with ``separator``; not if it is there already.

    A line has no line breaks or control characters, and is composed (NFC). Where no caption is left, no line is.
    """

    prefix: str = ""
    suffix: str = ""
    template: str = "{caption}"
    replace: Sequence[tuple[str, str]] = ()
    remove: Sequence[str] = ()
    forbid_words: Sequence[str] = ()
    dedupe_words: bool = False
    max_chars: int | None = None
    if_exists: IfExists = "skip"
    separator: str = ", "
    pieces: Sequence[tuple[str, str]] = field(init=False, repr=False, compare=False)
    """The template: a text as it is, and the field that follows it, "" at the end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _pieces(self.template))
        check_patterns(self.remove)
        if self.if_exists not in get_args(IfExists):
            known = ", ".join(get_args(IfExists))
            raise OptionError(f"{option('if_exists')} is {self.if_exists!r}; it may be {known}")
        if any(not old for old, _ in self.replace):
            raise OptionError(f"{option('replace')} has an empty text to replace; give OLD=NEW")
        if any(not word.strip() for word in self.forbid_words):
            raise OptionError(f"{option('forbid_words')} has an empty word; remove it")
        fixed = len(self.prefix + self.suffix) + sum(len(text) for text, _ in self.pieces)
        if self.max_chars is not None and self.max_chars <= fixed:
            raise OptionError(
                f"{option('max_chars')} is {self.max_chars}, which leaves no room for a caption beside the {fixed} "
                "characters of prefix, suffix and template; raise it, or shorten these"
            )

    def __call__(self, record: Record, outcome: Outcome) -> str:
        """`lines` as one text, for `Job.word`."""
        return "\n".join(self.lines(record, outcome.captions))

    def lines(self, record: Record, captions: Sequence[str]) -> list[str]:
        """Those for an image, the best caption first, each once; none if no caption is left."""
        found = dict.fromkeys(
            line for caption in self._chosen(captions) if (line := self._line(record, caption)) is not None
        )
        if self.if_exists == "overwrite" or self.if_exists == "skip" or not found:
            return [*found]
        old = [line for part in record.text.split("\n") if (line := clean(part).strip())]
        return [*dict.fromkeys(self._joined(old, [*found]))]

    def _chosen(self, captions: Sequence[str]) -> list[str]:
        """What is left of the captions; those that have no forbidden words first."""
        texts = [self._mended(caption) for caption in captions]
        sound = [text for text in texts if not self._forbidden.search(text)] if self.forbid_words else texts
        others = [tidy(self._forbidden.sub(" ", text)) for text in texts if text not in sound]
        return [text for text in sound + others if text.strip(EDGES + ".")]

    def _mended(self, caption: str) -> str:
        text = tidy(clean(caption))
        if self.dedupe_words:
            text = without_repeats(text)
        for old, new in self.replace:
            text = text.replace(clean(old), clean(new))
        for pattern in self.remove:
            text = tidy(re.sub(pattern, "", text))
        return tidy(text)

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        words = sorted((clean(word).strip() for word in self.forbid_words), key=len, reverse=True)
        return re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)

    def _line(self, record: Record, caption: str) -> str | None:
        """None if there is no room for a caption."""
        values = {**about(record), "old": " ".join(clean(record.text).split())}
        line = self._filled(values, caption)
        if self.max_chars is None or len(line) <= self.max_chars:
            return line
        num_captions = sum(name == "caption" for _, name in self.pieces)
        room = (self.max_chars - len(self._filled(values, ""))) // num_captions
        cut = shortened(caption, room)
        return self._filled(values, cut) if cut else None

    def _filled(self, values: dict[str, str], caption: str) -> str:
        filled = "".join(text + {**values, "caption": caption, "": ""}[name] for text, name in self.pieces)
        return clean(self.prefix + filled + self.suffix)

    def _joined(self, old: list[str], new: list[str]) -> Iterator[str]:
        separator = self.separator
        if not old:
            yield from new
        elif "\n" in separator:
            yield from old + new if self.if_exists == "append" else new + old
        else:
            for line in new:
                for before in old:
                    if separator + line + separator in separator + before + separator:
                        yield before  # of an earlier run
                    else:
                        both = (before, line) if self.if_exists == "append" else (line, before)
                        yield clean(separator.join(both))


def about(record: Record) -> dict[str, str]:
    """What a template may say of an image's place: its ``name`` without suffix, that of its ``folder``, and this
    without the number of repeats that trainers have before it, "10_sks dog" -> "sks dog"."""
    path = PurePath(record.key)
    if path.parent.name in ("", "..") and PurePath(record.name).name == path.name:  # lies in the source's root
        path = PurePath(os.path.abspath(record.name))
    # The key of a shard has no suffix, but it may have dots in its folders.
    name = path.stem if re.fullmatch(r"\.[A-Za-z]\w{1,4}", path.suffix) else path.name
    folder = path.parent.name
    found = {"name": name, "folder": folder, "concept": re.sub(r"^\d+_(?=.)", "", folder)}
    return {field: clean(text) for field, text in found.items()}


def clean(text: str) -> str:
    """Composed (NFC), on one line: control characters and line breaks as blanks, what is no Unicode as U+FFFD."""
    text = "".join(_CLEAN.get(unicodedata.category(character), character) for character in text)
    return unicodedata.normalize("NFC", text.replace("\ufeff", ""))


_CLEAN = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}


def tidy(text: str) -> str:
    """Single blanks, none before a comma or full stop, no comma at either end."""
    text = " ".join(text.split())
    text = re.sub(r"(?:[,;] ?)+([,;.])", r"\1", re.sub(r" ([,.;:!?](?!\w))", r"\1", text))
    return text.strip().lstrip(EDGES).rstrip(EDGES)


def without_repeats(text: str) -> str:
    """A text whose end goes round in circles, once round: "a dog a dog a dog" -> "a dog".

    A circle of one word is one if it goes round three times ("Bora Bora" is none), others if twice.
    """
    words = text.split()
    while (end := _first_round(words)) is not None:
        words = words[:end]
    return " ".join(words).rstrip(EDGES)


def _first_round(words: list[str]) -> int | None:
    said = [word.strip(",;.").casefold() for word in words]
    for period in range(1, len(said) // 2 + 1):
        start = len(said) - period
        while start > 0 and said[start - 1] == said[start - 1 + period]:
            start -= 1
        length = len(said) - start
        if length >= period * (3 if period == 1 else 2):
            rest = length % period
            # "a man and a man and a man": what joins the rounds is not needed after the last.
            return start + (rest if rest * 2 > period else period)
    return None


def shortened(text: str, max_chars: int) -> str:
    """At most so many characters, cut before a word; where the first word is longer already, within it."""
    if len(text) <= max_chars:
        return text
    kept = text[: max(max_chars, 0) + 1]
    at_word = kept.rpartition(" ")[0].rstrip(EDGES)
    if at_word:
        return at_word
    end = max(max_chars, 0)
    while end > 0 and unicodedata.combining(text[end]):  # an accent belongs to what is before it
        end -= 1
    return text[:end]


def _pieces(template: str) -> list[tuple[str, str]]:
    known = " ".join(f"{{{name}}}" for name in FIELDS)
    found = []
    try:
        for text, name, spec, conversion in string.Formatter().parse(template):
            if name is not None and (name not in FIELDS or spec or conversion):
                told = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise OptionError(
                    f"{option('template')} has {{{told}}}, which is not known; it may have {known}, and {{{{ and }}}} "
                    "for braces"
                )
            found.append((text, name or ""))
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(
            f"{option('template')} is {template!r}: {error}; it may have {known}, and {{{{ and }}}} for braces"
        ) from None
    if "caption" not in [name for _, name in found]:
        raise OptionError(f"{option('template')} is {template!r}, without {{caption}}; say where the caption goes")
    return found
