"""``processor.tokenizer``: texts to ids and back, with Hugging Face's arguments.

A text's ids are between the special tokens of its family, and padding is where the model needs it, whatever the files
say; ``padding_side`` may be set.

    OPT          pad  pad  </s>  a  photo
    others       pad  pad  a  photo               with what the tokenizer's own file puts around a text
    T5           a  photo  </s>  pad  pad
    matching     [CLS]  a  photo  [SEP]  pad  pad
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blip2.checkpoint.settings import read_json
from blip2.compat.loading import check_names, find_folder
from blip2.compat.records import BatchFeature
from blip2.compat.rows import (
    PADDINGS,
    TRUNCATIONS,
    Layout,
    Row,
    TokenIds,
    checked_side,
    chosen,
    filled,
    plain,
    rounded,
    tensors,
    texts_of,
)  # fmt: skip
from blip2.compat.vocabulary import SETTABLE, SPECIAL, Vocabulary
from blip2.disk import write_bytes
from blip2.errors import OptionError
from blip2.text import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COLUMNS = ("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping")
# For pairs of texts, pre-split words, and rows split into several: no model here uses them.
NOT_DONE = ("text_pair", "text_pair_target", "is_split_into_words", "return_overflowing_tokens")
ARGUMENTS = (
    "add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side", *COLUMNS,
    "return_length", "split_special_tokens", "stride", "verbose", "clean_up_tokenization_spaces", *NOT_DONE,
)  # fmt: skip
# Replacements of clean_up_tokenization_spaces.
TIDY = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
        (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class Blip2Tokenizer(Vocabulary):
    """The tokenizer of a model; `from_pretrained` returns one."""

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True
    truncation_side: str
    chat_template = None

    def __init__(self, tokenizer: Tokenizer, *, files: Mapping[str, bytes] | None = None, name: str = "") -> None:
        self._layout = Layout.of(tokenizer)
        self._files = dict(files or {})
        self.name_or_path = name
        config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        token_names = {purpose: config.get(f"{purpose}_token") for purpose in SPECIAL}
        super().__init__(tokenizer, {key: each or self._layout.names.get(key) for key, each in token_names.items()})
        self.model_max_length: int = config.get("model_max_length") or int(1e30)
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        self.truncation_side = config.get("truncation_side") or "right"
        self._padding_side = "left" if self._layout.pads_left else "right"

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Blip2Tokenizer:
        """The tokenizer of a model's folder or on the hub; ``padding_side`` and tokens may be given beside the usual
        options."""
        settings = {each: options.pop(each) for each in SETTABLE if each in options}
        made = cls.from_folder(find_folder(name, options))
        for each, value in settings.items():
            setattr(made, each, value)
        return made

    @classmethod
    def from_folder(cls, folder: Path) -> Blip2Tokenizer:
        """The tokenizer in a folder. Raises CheckpointError for missing or damaged files."""
        if (folder / "tokenizer_config.json").exists():
            read_json(folder / "tokenizer_config.json")  # raises the error, if it is damaged
        files = {file: (folder / file).read_bytes() for file in FILES if (folder / file).exists()}
        return cls(Tokenizer.from_folder(folder), files=files, name=str(folder))

    @classmethod
    def of(cls, tokenizer: Any) -> Blip2Tokenizer:
        """Convert a tokenizer of this class or of transformers."""
        if isinstance(tokenizer, cls):
            return tokenizer
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise OptionError(f"tokenizer is a {type(tokenizer).__name__}; give that of a Blip2Processor")
        made = cls(Tokenizer.from_json(tokenizer.backend_tokenizer.to_str()), name=tokenizer.name_or_path)
        made.model_max_length = tokenizer.model_max_length
        made.truncation_side = tokenizer.truncation_side
        return made

    # ---- texts to ids ----

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """``input_ids`` and ``attention_mask`` of one or more texts, as lists or with ``return_tensors`` int64[M, T].

        Unlike in the processor's ``text``, "</s>" or "<image>" in a text is the token of that name, unless
        ``split_special_tokens`` is set. ``text_target``: labels, alone or beside ``text``.
        Raises OptionError for lists that cannot be stacked, and for unsupported options.
        """
        if text is None and text_target is None:
            raise OptionError("neither text nor text_target is given; give a text, or a list of texts")
        options = options | {"text_pair": text_pair}
        reads_tokens = not options.get("split_special_tokens")
        made = BatchFeature()
        for each, name in ((text, "input_ids"), (text_target, "labels")):
            if each is not None:
                columns = self.columns(texts_of(each), reads_tokens=reads_tokens, options=options)
                if isinstance(each, str) and return_tensors is None:
                    columns = {key: values if key == "length" else values[0] for key, values in columns.items()}
                made |= columns if not made else {name: columns["input_ids"]}
        return tensors(made, return_tensors)

    def encode(self, text: str, *, return_tensors: str | None = None, **options: Any) -> Any:
        """The ids of one text: a list, or int64[1, T]."""
        return self(text, return_tensors=return_tensors, **options)["input_ids"]

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """The names of a text's tokens."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))

    def columns(
        self, texts: list[str], *, reads_tokens: bool, options: Mapping[str, Any], num_before: int = 0
    ) -> dict[str, list[Any]]:
        """The columns for the options; ``max_length`` includes ``num_before`` tokens that will precede each row."""
        check_names("the tokenizer", options, ARGUMENTS)
        for name in NOT_DONE:
            if options.get(name):
                raise OptionError(f"{name} is {options[name]!r}; only single texts are supported, leave it out")
        padding, is_cut = chosen("padding", PADDINGS, options), chosen("truncation", TRUNCATIONS, options)
        longest, adds_special = options.get("max_length"), options.get("add_special_tokens", True)
        is_cut = is_cut if is_cut is not None else longest is not None and padding is None
        special = (len(self._layout.before) + len(self._layout.after)) * bool(adds_special)
        num_left = longest - num_before if longest is not None else self.model_max_length
        if num_left < special:
            image = f"{num_before} image tokens and " if num_before else ""
            raise OptionError(
                f"max_length is {longest}, which leaves no text: it needs {image}{special} special tokens; raise it"
            )
        rows = [self._row(text, reads_tokens, adds_special, num_left - special if is_cut else None) for text in texts]
        if padding == "max_length" and longest is None:
            raise OptionError("padding is 'max_length', but there is no max_length; give it, or use padding=True")
        width = None
        if padding is not None:
            if self.pad_token_id is None:
                raise OptionError("this tokenizer has no padding token; set one: tokenizer.pad_token = ...eos_token")
            width = num_left if padding == "max_length" else max(len(row.ids) for row in rows)
            width = rounded(width, options.get("pad_to_multiple_of"))
        return self._filled(rows, width, options)

    def _row(self, text: str, reads_tokens: bool, adds_special: bool, most: int | None) -> Row:
        tokenizer = self._reading_tokens if reads_tokens else self._tokenizer
        pairs = tokenizer.encode_with_places(text)
        if most is not None:
            pairs = pairs[max(0, len(pairs) - most) :] if self.truncation_side == "left" else pairs[:most]
        is_special = [0] * len(pairs)
        if adds_special:
            before, after = ([(token, (0, 0)) for token in some] for some in (self._layout.before, self._layout.after))
            pairs = [*before, *pairs, *after]
            is_special = [*[1] * len(before), *is_special, *[1] * len(after)]
        return Row([token for token, _ in pairs], is_special, [place for _, place in pairs])

    def _filled(self, rows: list[Row], width: int | None, options: Mapping[str, Any]) -> dict[str, list[Any]]:
        side = checked_side(options.get("padding_side") or self.padding_side)
        width = width or 0
        columns = {"input_ids": filled([row.ids for row in rows], width, self.pad_token_id, side)}
        if options.get("return_token_type_ids"):
            columns["token_type_ids"] = filled([[0] * len(row.ids) for row in rows], width, 0, side)
        if options.get("return_attention_mask", True) is not False:
            columns["attention_mask"] = filled([[1] * len(row.ids) for row in rows], width, 0, side)
        if options.get("return_special_tokens_mask"):
            columns["special_tokens_mask"] = filled([row.is_special for row in rows], width, 1, side)
        if options.get("return_offsets_mapping"):
            columns["offset_mapping"] = filled([row.places for row in rows], width, (0, 0), side)
        lengths: dict[str, Any] = {"length": [len(ids) for ids in columns["input_ids"]]}
        return columns | (lengths if options.get("return_length") else {})

    def _changed(self) -> None:
        self.__dict__.pop("_reading_tokens", None)
        self._files.pop("tokenizer.json", None)

    @cached_property
    def _reading_tokens(self) -> Tokenizer:
        return self._tokenizer.reading_tokens()

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchFeature:
        """Pad rows of ids to equal length: a dictionary of lists, or a list of dictionaries.

        ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``special_tokens_mask`` are padded; the rest is
        unchanged.
        """
        if not isinstance(encoded_inputs, Mapping):
            of_rows = list(encoded_inputs)
            encoded_inputs = {key: [row[key] for row in of_rows] for key in (of_rows[0] if of_rows else ())}
        if "input_ids" not in encoded_inputs:
            raise OptionError(f"pad got {', '.join(encoded_inputs) or 'nothing'}; give input_ids")
        first = encoded_inputs["input_ids"]
        first = first[0] if isinstance(first, list | tuple) and first else first
        if return_tensors is None:
            return_tensors = "pt" if isinstance(first, Tensor) else "np" if isinstance(first, np.ndarray) else None
        columns = {key: plain(values) for key, values in encoded_inputs.items()}
        ids = columns["input_ids"]
        is_one = bool(ids) and not isinstance(ids[0], list)
        if is_one:
            columns = {key: [values] for key, values in columns.items()}
            ids = columns["input_ids"]
        kind = chosen("padding", PADDINGS, {"padding": padding})
        side = checked_side(padding_side or self.padding_side)
        longest = max(map(len, ids), default=0)
        width = rounded(max_length if kind == "max_length" and max_length is not None else longest, pad_to_multiple_of)
        if return_attention_mask is not False:
            columns.setdefault("attention_mask", [[1] * len(row) for row in ids])
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
        for key in fills.keys() & columns.keys() if kind is not None else ():
            columns[key] = filled(columns[key], width, fills[key], side)
        if is_one:
            columns = {key: values[0] for key, values in columns.items()}
        return tensors(BatchFeature(columns), return_tensors)

    # ---- ids to texts ----

    def decode(
        self,
        token_ids: TokenIds,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of token ids ``int[T]``, or the texts of ``int[B, T]``.

        White space is kept; ``clean_up_tokenization_spaces`` removes it before full stops and the like, except for
        byte-pair encodings, whose spaces are part of the text.
        """
        ids: Any = plain(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        text = self._tokenizer.decode_all(ids, skip_special_tokens=skip_special_tokens)
        tidies = clean_up_tokenization_spaces
        if (self.clean_up_tokenization_spaces if tidies is None else tidies) and not self._is_byte_pairs:
            for apart, together in TIDY:
                text = text.replace(apart, together)
        return text

    def batch_decode(
        self,
        sequences: TokenIds,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of rows of token ids."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    @cached_property
    def _is_byte_pairs(self) -> bool:
        return json.loads(self._tokenizer.to_json())["model"].get("type") == "BPE"

    @property
    def padding_side(self) -> str:
        """ "left" or "right"; initially where the model needs it."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = checked_side(side)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self._layout.before) + len(self._layout.after)

    # ---- files ----

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` and transformers read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_bytes(Path(folder) / name, content)

    def files(self) -> dict[str, bytes]:
        """Content by name, as it was, with changed settings."""
        files = {"tokenizer.json": self._tokenizer.to_json().encode(), **self._files}
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        was = Blip2Tokenizer(self._tokenizer, files=self._files)
        changed = {f"{name}_token": token for name, token in self._names.items() if token != was._names[name]}
        if self.padding_side != was.padding_side:
            changed["padding_side"] = self.padding_side
        if changed:
            files["tokenizer_config.json"] = (json.dumps(config | changed, indent=2) + "\n").encode()
        return files

    def __repr__(self) -> str:
        return f"Blip2Tokenizer({len(self)} tokens, padding_side={self.padding_side!r}, {self.special_tokens_map})"
