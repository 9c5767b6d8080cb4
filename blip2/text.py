"""Tokenization in the layout that each model expects, and prompts in the wording that it was trained with.

The layout of ids is defined here. The settings of a tokenizer.json for special tokens, padding and truncation are not
used, because published files disagree about them.

    text        "how many dogs are there?"
    prompt      "Question: how many dogs are there? Answer:"      question_prompt
    ids         [2, 45641, 35, 141, 171, ...]                     Tokenizer.prompt_ids
    text        "two"                                             Tokenizer.decode, or a TextStream
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from blip2.config import LanguageConfig, QFormerConfig, T5Config
from blip2.errors import CheckpointError, OptionError
from blip2.plaintext import NotTextError, read_text

QUESTION_TEMPLATES = {
    "opt": "Question: {} Answer:", "decoder": "Question: {} Answer:", "t5": "Question: {} Short answer:",
    "instruct": "{}",
}  # fmt: skip
"""Templates of zero-shot questions, by family of language model (paper, section 4.1). An InstructBLIP takes any
wording."""
CAPTION_INSTRUCTION = "A short image caption."
"""Prompt for captions from an InstructBLIP; one of those that it was trained with (its paper, appendix)."""
INSTRUCTION_TOKENS = 128
"""Number of prompt tokens that an InstructBLIP's Q-Former reads, the last ones (``max_txt_len`` in the authors' code,
whose tokenizer truncates on the left)."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what incomplete or invalid UTF-8 decodes to


SPACES = ("\u2581", "\u0120")  # how tokens mark a preceding space

LONG_TEXT = 4096  # characters, a few milliseconds


class Tokenizer:
    """A model's tokenizer.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # "<image>" or "</s>" in a user's text means these characters, not the token.
        tokenizer.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer.json in a checkpoint's folder. Raises CheckpointError if it is missing or invalid."""
        path = Path(folder) / "tokenizer.json"
        try:
            content = read_text(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; the tokenizer belongs beside the weights") from None
        except (OSError, NotTextError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error
        try:
            return cls(tokenizers.Tokenizer.from_str(content))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library has no specific error, and its panics are not Exceptions
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: is not a tokenizer that tokenizers {tokenizers.__version__} can read ({reason}); download "
                "the file again, or install a newer version of tokenizers"
            ) from error

    @classmethod
    def from_json(cls, content: str) -> Tokenizer:
        """From the content of a valid tokenizer.json."""
        return cls(tokenizers.Tokenizer.from_str(content))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made from the file's content: the library's own copies read "</s>" as a token."""
        return Tokenizer.from_json, (self.to_json(),)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text only: no special tokens, no padding, no truncation.

        Raises OptionError for unpaired surrogates, which broken JSON may contain.
        """
        return [token for token, _ in self.encode_with_places(text)]

    def encode_with_places(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """As `encode`, each id with its range of characters: the first, and the one after the last."""
        try:
            if len(text) > LONG_TEXT:  # the batch call releases the GIL
                [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
            else:
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            whole = text.encode("utf-8", "replace").decode()
            raise OptionError(f"the text {shortened(whole)!r} has unpaired surrogates; write it as Unicode") from None
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the file adds before a text and after it."""
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
        before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return tuple(whole[:before]), tuple(whole[before + len(plain) :])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and without white space at either end."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def decode_all(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids with all white space."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find(self, token: str) -> int | None:
        """The id of a token by its name, or None."""
        return self._tokenizer.token_to_id(token)

    def add(self, tokens: list[Any], *, special: bool) -> int:
        """Add tokens to the vocabulary, by name or as objects of the library; returns how many were added."""
        return self._tokenizer.add_special_tokens(tokens) if special else self._tokenizer.add_tokens(tokens)

    def name_of(self, token_id: int) -> str | None:
        """The name of a token by its id, or None."""
        return self._tokenizer.id_to_token(token_id)

    def vocabulary(self, *, with_added: bool = True) -> dict[str, int]:
        """All names with their ids, including those added to the trained vocabulary."""
        return self._tokenizer.get_vocab(with_added_tokens=with_added)

    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(each for each, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def special_names(self) -> frozenset[str]:
        """The names of special tokens."""
        return frozenset(name for each in self.special_ids() if (name := self.name_of(each)) is not None)

    def to_json(self) -> str:
        """The content of an equivalent tokenizer.json."""
        return self._tokenizer.to_str()

    def reading_tokens(self) -> Tokenizer:
        """The same vocabulary, but a "</s>" in a text is read as that token."""
        other = Tokenizer.from_json(self.to_json())
        other._tokenizer.encode_special_tokens = False
        return other

    def token_id(self, token: str) -> int:
        """The id of a token by its name. Raises CheckpointError if the tokenizer does not have it."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token}; this is not the model's tokenizer.json")
        return found

    def prompt_ids(self, text: str, config: LanguageConfig) -> list[int]:
        """Token ids of a prompt after the image: ``[bos] + ids``, for an encoder (T5) ``ids + [eos]``.

        Raises CheckpointError if the text has a token that the model lacks.
        """
        ids = self.known(self.encode(text), config)
        return [*ids, config.eos_token_id] if isinstance(config, T5Config) else [config.bos_token_id, *ids]

    def answer_ids(self, text: str, config: LanguageConfig) -> list[int]:
        """Token ids of an answer as the model would generate it after a prompt: ``ids + [eos]``.

        A decoder continues "Answer:" with a space that belongs to the first word, unless its tokenizer begins every
        text with one. Raises as `prompt_ids` does.
        """
        ids = self.encode(text if config.has_encoder or self._begins_with_space() else f" {text}")
        return [*self.known(ids, config), config.eos_token_id]

    def _begins_with_space(self) -> bool:
        """Whether the tokenizer adds a space before the first word, as SentencePiece does."""
        ids = self.encode("a")
        return bool(ids) and (self.name_of(ids[0]) or "").startswith(SPACES)

    def matching_ids(self, text: str, max_tokens: int, *, truncate: bool = False) -> list[int]:
        """A text for the Q-Former: ``[CLS] ids [SEP]``, at most ``max_tokens`` in all.

        A longer text is an OptionError, unless ``truncate`` is set (as in training), which keeps its beginning.
        """
        ids = self.encode(text)
        if len(ids) + 2 > max_tokens and not truncate:
            raise OptionError(
                f"the text {shortened(text)!r} has {len(ids)} tokens, but at most {max_tokens - 2} are read; shorten it"
            )
        return [self.token_id("[CLS]"), *ids[: max_tokens - 2], self.token_id("[SEP]")]

    def instruction_ids(self, text: str, config: QFormerConfig) -> list[int]:
        """A prompt for the Q-Former of an InstructBLIP: ``[CLS] ids [SEP]``, at most `INSTRUCTION_TOKENS` in all.

        Of a longer prompt the end is kept, which has the question; the language model reads all of it.
        """
        ids = self.encode(text)
        num_kept = max(0, min(INSTRUCTION_TOKENS, config.max_position_embeddings) - 2)
        ids = [self.token_id("[CLS]"), *ids[max(0, len(ids) - num_kept) :], self.token_id("[SEP]")]
        return self.known(ids, config)

    def known(self, ids: list[int], config: LanguageConfig | QFormerConfig) -> list[int]:
        """The ids. Raises CheckpointError if one is outside of the model's vocabulary."""
        if ids and max(ids) >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, but the model has only {config.vocab_size}; tokenizer.json and "
                "the weights belong to different models"
            )
        return ids


class TextStream:
    """Tokens in, one by one; text out as soon as it is final.

    The pieces joined equal `Tokenizer.decode` of all tokens. A character of several tokens is emitted whole, and a
    space together with the following word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text_sent = ""

    def push(self, token: int) -> str:
        """The text that became final with this token, which may be empty."""
        self._ids.append(token)
        return self._new_part(self._tokenizer.decode(self._ids).rstrip(UNFINISHED).rstrip())

    def finish(self) -> str:
        """The remaining text after the last token."""
        return self._new_part(self._tokenizer.decode(self._ids))

    def _new_part(self, text: str) -> str:
        # Some decoders join earlier pieces later ("do n't"); then wait until both agree again.
        if not text.startswith(self._text_sent):
            return ""
        piece, self._text_sent = text[len(self._text_sent) :], text
        return piece


# ---- prompts ------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One line: no white space at either end, single spaces within. Raises OptionError for a value that is not a
    text."""
    if not isinstance(text, str):
        raise OptionError(f"{reprlib.repr(text)} is not a text (type {type(text).__name__}); give a text, or a list of "
            "texts")
    return " ".join(text.split())


def shortened(text: str, length: int = 60) -> str:
    """A text as quoted in an error message."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def question_prompt(question: str, manner: str) -> str:
    """A question in the template that the model was evaluated with (`QUESTION_TEMPLATES`).

    Raises OptionError for an empty question, and for one that already has the template: applied twice, it silently
    makes answers worse.
    """
    return QUESTION_TEMPLATES[manner].format(checked_question(question, manner))


def caption_prompt(prompt: str, manner: str) -> str:
    """The prompt of a caption. For an InstructBLIP, which was always trained with instructions, an empty prompt becomes
    one. Raises OptionError for a value that is not a text."""
    return clean(prompt) or (CAPTION_INSTRUCTION if manner == "instruct" else "")


def chat_prompt(turns: Sequence[tuple[str, str]], question: str, manner: str = "opt") -> str:
    """A question after earlier turns (question, answer): ``Question: q1 Answer: a1. Question: q2 Answer:``.

    The same for all families, as in the authors' demonstration. For an InstructBLIP the turns precede the plain
    question, in the format of its authors' visual dialog: ``dialog history: Question: q1 Answer: a1.``, a newline,
    ``q2``. Raises OptionError as `question_prompt` does.
    """
    history = [f"Question: {clean(asked)} Answer: {clean(answer).removesuffix('.')}. " for asked, answer in turns]
    if manner == "instruct":
        before = f"dialog history: {''.join(history).rstrip()}\n" if turns else ""
        return before + question_prompt(question, manner)
    return f"{''.join(history)}Question: {checked_question(question, manner)} Answer:"


def checked_question(question: str, manner: str = "opt") -> str:
    """The question on one line. Raises OptionError as `question_prompt` does."""
    question = clean(question)
    if not question:
        raise OptionError("the question is empty; write one, such as 'how many dogs are there?', or ask for a caption")
    if manner != "instruct" and re.fullmatch(r"question:.*answer:", question, re.IGNORECASE):
        raise OptionError(
            f"the question {shortened(question)!r} already contains the words 'Question:' and 'Answer:', which are "
            "added automatically; give the question alone"
        )
    return question


def added_token(content: str, token: str) -> tuple[str, int]:
    """A valid tokenizer.json with a special token added if it is missing, and the token's id."""
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.add_special_tokens([token])
    [token_id] = tokenizer.encode(token, add_special_tokens=False).ids
    return tokenizer.to_str(pretty=True), token_id
