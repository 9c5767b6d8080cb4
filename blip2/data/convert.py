"""Converts files of well-known data sets, described in `blip2.data.kinds`, to rows of training data."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.kinds import Kind
from blip2.data.sample import parse_row
from blip2.data.stream import MEMBER, Element, elements
from blip2.errors import OptionError, RecipeError, option

IMAGE, TEXT = "picture", "text"
KEY = "#"
"""Key for the name of an item, if the file is one object with named items."""
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant")

Texts = dict[str, Any]
"""The fields of a row other than its image."""


@dataclass
class Counts:
    """Counts of a conversion. ``left_out``: for each reason the number of texts and the place of the first."""

    rows: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    _images: array[int] = field(default_factory=lambda: array("q"))

    @property
    def images(self) -> int:
        return len(np.unique(np.frombuffer(self._images, np.int64))) if self._images else 0

    def leave_out(self, reason: str, place: str, count: int = 1) -> None:
        before, first = self.left_out.get(reason, (0, place))
        self.left_out[reason] = (before + count, first)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        self._images.append(hash(row["image"]))
        self.texts["captions"] += len(row.get("captions", ()))
        self.texts["questions"] += len(row.get("questions", ())) + ("question" in row)
        self.texts["dialogues"] += len(row.get("dialogues", ()))


class Conversion:
    """Converts the files of a data set. ``images``: folder of the images; rows whose image is missing are left out, and
    the others get a path relative to ``base``. ``split``: the wanted part, or several separated by commas. ``by``:
    "picture" for one row with all texts of an image, or "text" for one row each; by default as the kind has it.

    ``keep``: fields to keep in addition, for evaluation instead of training: names, each with fields of which the first
    existing one counts. Rows then have a list of them as "kept", one for each text, and all answers to a question as
    they were given, as "given". ``read``: reads the elements of a file. ``near``: if several images have the same name,
    the one that shares most folders with this path is chosen.

    ``counts`` is complete after all rows were read. Raises OptionError.
    """

    def __init__(
        self,
        kind: Kind,
        files: Sequence[Path],
        *,
        images: Path | None = None,
        base: Path | None = None,
        split: str | None = None,
        by: str | None = None,
        keep: Mapping[str, Sequence[str]] | None = None,
        read: Callable[[Path], Iterator[Element]] = elements,
        near: Path | None = None,
    ) -> None:
        if split and not kind.split:
            raise OptionError(f"{option('split')} is {split!r}, but files of this kind have no splits; leave it out")
        self.kind, self.files, self.counts = kind, files, Counts()
        self._splits = split.split(",") if split else []
        self._by = by or kind.by
        self._keep, self._read = keep or {}, read
        self._folder = None if images is None else _Folder(images, base, near)
        self._joined: dict[object, tuple[Path, Mapping[str, Any]]] = {}
        self._of_file: dict[Path, dict[str, Any]] = defaultdict(dict)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in the order of the files. Raises RecipeError with file and place for data of another kind."""
        if self.kind.joined is not None:
            self._join()
        texts_of_files = self._texts_of_files()
        if self._by == IMAGE:
            texts_of_files = _by_image(texts_of_files, self.kind.within != "")
        for image, texts, place in texts_of_files:
            row = {"image": image, **texts}
            try:
                if self.kind.answer or self.kind.caption or self.kind.talk:  # else there is nothing to train on
                    parse_row(row)
            except ValueError as error:
                raise RecipeError(f"{place}: {error}") from None
            self.counts.add(row)
            yield row
        self._check()

    def _check(self) -> None:
        if unknown := [name for name in self._splits if name not in self.counts.splits]:
            known = ", ".join(f"{name} ({count:,})" for name, count in self.counts.splits.items())
            raise RecipeError(f"{self.files[0]}: has no split {unknown[0]!r}; its splits are {known or 'none'}")
        if not self.counts.rows:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, (count, _) in self.counts.left_out.items())
            sections = {"": "no array", MEMBER: "no objects"}
            reasons = reasons or f"it has {sections.get(self.kind.items, f'no {self.kind.items!r}')}"
            raise RecipeError(f"{self.files[0]}: gives no rows ({reasons}); check the kind and the files")

    # ---- items ----

    def _join(self) -> None:
        joined = self.kind.joined
        assert joined is not None
        for file in self.files:
            for section, key, value, place in self._read(file):
                if section == MEMBER and isinstance(value, str | int):
                    self._of_file[file][str(key)] = value
                elif section == joined.section:
                    record = _object(value, place)
                    name = _field(record, joined.key, place)
                    if name in self._joined:
                        raise RecipeError(f"{place}: {joined.key!r} {name!r} appears twice; name each file once")
                    self._joined[name] = (file, {known: record[known] for known in joined.fields if known in record})
        if not self._joined:
            raise RecipeError(
                f"{', '.join(map(str, self.files))}: has no {joined.section!r}; name all files of this kind"
            )

    def _texts_of_files(self) -> Iterator[tuple[str, Texts, str]]:
        """For each text: the image, the fields of the text, and the place in the file."""
        for file in self.files:
            for section, key, value, place in self._read(file):
                if section == self.kind.items:
                    item = _object(value, place)
                    yield from self._item({KEY: key, **item} if section == MEMBER else item, file, place)

    def _item(self, item: dict[str, Any], file: Path, place: str) -> Iterator[tuple[str, Texts, str]]:
        kind = self.kind
        whole = item
        if kind.joined is not None:
            name = _field(item, kind.joined.of, place)
            if not isinstance(name, str | int) or name not in self._joined:
                self.counts.leave_out(f"it is not among the {kind.joined.section}", place)
                return
            source, joined = self._joined[name]
            whole = {**self._of_file[source], **self._of_file[file], **item, **joined}
        inner: Sequence[Any] = [{}]
        if kind.within:
            inner = _field(item, kind.within, place)
            if not isinstance(inner, list):
                raise RecipeError(f"{place}: {kind.within!r} has to be a list")
        if kind.split:
            split = str(whole.get(kind.split, ""))
            split = kind.renamed.get(split, split)
            self.counts.splits[split] += 1
            if self._splits and split not in self._splits:
                self.counts.leave_out("it belongs to another split", place, len(inner))
                return
        for number, one in enumerate(inner):
            where = f"{place}.{kind.within}[{number}]" if kind.within else place
            record = {**whole, **_object(one, where)}
            image = self._image(record, where)
            if image is not None:
                kept = {"kept": [self._kept(record)]} if self._keep else {}
                for texts in self._texts(record, where):
                    yield image, {**texts, **kept}, where

    def _kept(self, record: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: next((key for key in fields if key in record), None) for name, fields in self._keep.items()}
        return {name: record[key] for name, key in found.items() if key is not None}

    def _image(self, record: Mapping[str, Any], place: str) -> str | None:
        names = []
        for template in self.kind.image:
            fields = dict(re.findall(r"\{(\w+)(:?)", template))
            if all(record.get(name) not in (None, "") for name in fields):
                try:
                    names.append(template.format_map({name: _id(record[name], fields[name] != "") for name in fields}))
                except (ValueError, TypeError):
                    values = " and ".join(f"{name} {record[name]!r}" for name in fields)
                    raise RecipeError(f"{place}: {values} cannot be the name of an image {template}") from None
        if not names:
            if self.kind.talk:  # LLaVA's later files have conversations without an image
                self.counts.leave_out("it has no image", place)
                return None
            wanted, own = " or ".join(self.kind.image), ", ".join(name for name in record if name != KEY)
            raise RecipeError(f"{place}: has no image field ({wanted}); its fields are {own}")
        if self._folder is None or re.match("https?://", names[0], re.IGNORECASE):
            return names[0]
        path, reason = self._folder.find(names)
        if reason:
            self.counts.leave_out(reason, f"{place}: {names[0]}")
        return path

    # ---- texts ----

    def _texts(self, record: Mapping[str, Any], place: str) -> Iterator[Texts]:
        kind, counts = self.kind, self.counts
        if kind.talk:
            yield from self._conversation(_first(record, kind.talk, place), place)
        elif kind.caption and (not kind.question or kind.question[0] not in record):
            captions = _first(record, kind.caption, place)
            captions = captions if isinstance(captions, list) else [captions]
            if not all(isinstance(caption, str) for caption in captions):
                raise RecipeError(f"{place}: {kind.caption[0]!r} has to be a text, or a list of texts")
            if some := [" ".join(caption.split()) for caption in captions if caption.strip()]:
                yield {"captions": some}
            else:
                counts.leave_out("its caption is empty", place)
        else:
            question = _first(record, kind.question, place)
            if not isinstance(question, str):
                raise RecipeError(f"{place}: {kind.question[0]!r} has to be a text")
            if not kind.answer:
                yield {"question": question.strip()}
                return
            given = _answers(_first(record, kind.answer, place), kind.answer[0], place)
            answers = Counter(given)
            given_answers = {"given": given} if self._keep else {}
            if not question.strip() or not answers:
                counts.leave_out("its question or its answer is empty", place)
            elif len(answers) == 1:
                yield {"question": question.strip(), "answer": next(iter(answers)), **given_answers}
            else:
                yield {"question": question.strip(), "answers": dict(answers.most_common()), **given_answers}

    def _conversation(self, turns: object, place: str) -> Iterator[Texts]:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise RecipeError(f"{place}: a conversation has to be a list of objects")
        spoken = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
        spoken = [(role, text) for role, text in spoken if role != "system"]
        texts = [re.sub(r"\s*<image>\s*", "", text).strip() if isinstance(text, str) else "" for _, text in spoken]
        roles = [role for role, _ in spoken]
        if len(texts) % 2 or any(role not in (ASKING, ANSWERING)[turn % 2] for turn, role in enumerate(roles)):
            self.counts.leave_out("its speakers do not alternate", place)
        elif not texts or not all(texts):
            self.counts.leave_out("a question or an answer is empty", place)
        else:
            pairs = [{"question": ask, "answer": answer} for ask, answer in zip(texts[::2], texts[1::2], strict=True)]
            yield pairs[0] if len(pairs) == 1 else {"dialogues": [pairs]}


def _by_image(texts_of_files: Iterator[tuple[str, Texts, str]], is_sorted: bool) -> Iterator[tuple[str, Texts, str]]:
    """One row for each image. Unless the texts of an image are adjacent, all of them are held in memory."""
    if is_sorted:
        for image, group in groupby(texts_of_files, key=itemgetter(0)):
            some = list(group)
            yield image, _merged([texts for _, texts, _ in some]), some[0][2]
        return
    found: dict[str, tuple[list[Texts], str]] = {}
    for image, texts, place in texts_of_files:
        found.setdefault(image, ([], place))[0].append(texts)
    for image, (all_texts, place) in found.items():
        yield image, _merged(all_texts), place


def _merged(some: Sequence[Texts]) -> Texts:
    merged: dict[str, list[Any]] = {}
    for texts in some:
        if "question" in texts:
            texts = {"questions": [texts]}
        for name, values in texts.items():
            merged.setdefault(name, []).extend(values)
    return merged


class _Folder:
    """Images in a folder, found by their relative path or, since data sets are often unpacked differently, by file
    name."""

    def __init__(self, folder: Path, base: Path | None, near: Path | None) -> None:
        if not folder.is_dir():
            raise OptionError(f"{option('images')}: there is no folder {folder}; name the folder of the images")
        self._root = folder.absolute() if base is None else Path(os.path.relpath(folder, base))
        self._near = None if near is None else Path(os.path.relpath(near, folder)).parts
        self._paths: set[str] = set()
        self._named: dict[str, list[str]] = defaultdict(list)
        for inner, _, names in os.walk(folder, followlinks=True):
            within = os.path.relpath(inner, folder)
            for name in names:
                path = name if within == "." else os.path.join(within, name)
                self._paths.add(path)
                self._named[name].append(path)

    def find(self, names: Sequence[str]) -> tuple[str | None, str]:
        """The path for a row, or the reason why there is none."""
        found = [name for name in map(os.path.normpath, names) if name in self._paths]
        bases = [base for base in map(os.path.basename, names) if base in self._named]
        found = found[:1] or [path for base in bases[:1] for path in self._named[base]]
        if len(found) > 1 and self._near is not None:
            most = max(common := [self._num_common(path) for path in found])
            found = [path for path, number in zip(found, common, strict=True) if number == most]
        if len(found) == 1:
            return str(self._root / found[0]), ""
        return None, "several images have its name" if found else "its image does not exist"

    def _num_common(self, path: str) -> int:
        pairs = zip(Path(path).parts, self._near or (), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{place}: has to be an object, not {type(value).__name__}; check the kind of the file")
    return value


def _field(record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise RecipeError(f"{place}: has no {name!r}; its fields are {', '.join(record) or 'none'}; check the kind of "
            "the file")
    return record[name]


def _first(record: Mapping[str, Any], names: Sequence[str], place: str) -> Any:
    return _field(record, next((name for name in names if name in record), names[0]), place)


def _answers(value: object, name: str, place: str) -> list[str]:
    """All answers, each as often as it was given."""
    some = value if isinstance(value, list) else [value]
    some = [one.get("answer") if isinstance(one, dict) else one for one in some]
    if not all(isinstance(one, str) for one in some):
        raise RecipeError(f"{place}: {name!r} has to be a text, or a list of texts or of objects with 'answer'")
    return [text for one in some if (text := str(one).strip())]


def _id(value: object, is_number: bool) -> object:
    """An image id, which may be a number or a text. Raises ValueError and TypeError."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(value)
    return int(value) if is_number else value
