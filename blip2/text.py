"""Text in and out: token ids in the layout that each model expects, prompts in the words that it knows.

The layout of ids is written here in code; what a tokenizer.json says about special tokens, padding and
truncation is not used, because published files disagree about it.

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
"""The wording of the zero-shot questions, by family of language model (paper, section 4.1). An InstructBLIP is asked
in any words."""
CAPTION_INSTRUCTION = "A short image caption."
"""With which an InstructBLIP is asked for a caption; one of those that it was trained with (its paper, appendix)."""
INSTRUCTION_TOKENS = 128
"""So many tokens of a prompt the Q-Former of an InstructBLIP reads, the last ones (``max_txt_len`` in the authors'
code, whose tokenizer cuts on the left)."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character (yet) decode to


SPACES = ("\u2581", "\u0120")  # how tokens with a space before them are written

LONG_TEXT = 4096  # characters, which take a few milliseconds


class Tokenizer:
    """A model's tokenizer.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A person who writes "<image>" or "</s>" means these letters, and not the token.
        tokenizer.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer.json of a checkpoint's folder. Raises CheckpointError if there is none, or no valid one."""
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
        except BaseException as error:  # the library raises nothing more specific, and a panic of its is no Exception
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: not a tokenizer that tokenizers {tokenizers.__version__} can read ({reason}); "
                "download the file again, or install a newer tokenizers"
            ) from error

    @classmethod
    def from_json(cls, content: str) -> Tokenizer:
        """Of the content of a sound tokenizer.json."""
        return cls(tokenizers.Tokenizer.from_str(content))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made of the file's content: the library's own copies read "</s>" as a token."""
        return Tokenizer.from_json, (self.to_json(),)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, and nothing else: no special tokens, no padding, never cut.

        Raises OptionError for a text with halves of characters (lone surrogates), as broken JSON may have them.
        """
        return [token for token, _ in self.encode_with_places(text)]

    def encode_with_places(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """As `encode`, each id with the characters that it stands for: the first, and the one after the last."""
        try:
            if len(text) > LONG_TEXT:  # of one alone it would not let other threads run meanwhile
                [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
            else:
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            whole = text.encode("utf-8", "replace").decode()
            raise OptionError(f"the text {shortened(whole)!r} has halves of characters; write it as Unicode") from None
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the file puts before a text, and after it."""
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
        before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return tuple(whole[:before]), tuple(whole[before + len(plain) :])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and without white space at either end."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def decode_all(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids as it is, with its white space."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find(self, token: str) -> int | None:
        """The id of a token by its name; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def add(self, tokens: list[Any], *, special: bool) -> int:
        """Add tokens, by name or as the library has them, to the vocabulary; how many were added."""
        return self._tokenizer.add_special_tokens(tokens) if special else self._tokenizer.add_tokens(tokens)

    def name_of(self, token_id: int) -> str | None:
        """The name of a token by its id; None if there is none."""
        return self._tokenizer.id_to_token(token_id)

    def vocabulary(self, *, with_added: bool = True) -> dict[str, int]:
        """All names with their ids; those added to the trained vocabulary too."""
        return self._tokenizer.get_vocab(with_added_tokens=with_added)

    def special_ids(self) -> frozenset[int]:
        """The ids of tokens that stand for no text."""
        return frozenset(each for each, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def special_names(self) -> frozenset[str]:
        """The names of tokens that stand for no text."""
        return frozenset(name for each in self.special_ids() if (name := self.name_of(each)) is not None)

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives this tokenizer again."""
        return self._tokenizer.to_str()

    def reading_tokens(self) -> Tokenizer:
        """The same vocabulary, but a "</s>" in a text is the token of that name."""
        other = Tokenizer.from_json(self.to_json())
        other._tokenizer.encode_special_tokens = False
        return other

    def token_id(self, token: str) -> int:
        """The id of a token by its name. Raises CheckpointError if the tokenizer has none of that name."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token}; this is not the model's tokenizer.json")
        return found

    def prompt_ids(self, text: str, config: LanguageConfig) -> list[int]:
        """What follows the image for the language model: ``[bos] + ids``, for an encoder (T5) ``ids + [eos]``.

        Raises CheckpointError if the text has a token that the model has not.
        """
        ids = self.known(self.encode(text), config)
        return [*ids, config.eos_token_id] if isinstance(config, T5Config) else [config.bos_token_id, *ids]

    def answer_ids(self, text: str, config: LanguageConfig) -> list[int]:
        """An answer as the model would write it after a prompt, its end included: ``ids + [eos]``.

        A decoder goes on after "Answer:" with a space that belongs to the first word, unless its tokenizer begins every
        text so. Raises as `prompt_ids` does.
        """
        ids = self.encode(text if config.has_encoder or self._begins_with_space() else f" {text}")
        return [*self.known(ids, config), config.eos_token_id]

    def _begins_with_space(self) -> bool:
        """Whether a text's first word is a word after a space, as SentencePiece has it."""
        ids = self.encode("a")
        return bool(ids) and (self.name_of(ids[0]) or "").startswith(SPACES)

    def matching_ids(self, text: str, max_tokens: int, *, truncate: bool = False) -> list[int]:
        """A text for the Q-Former: ``[CLS] ids [SEP]``, at most ``max_tokens`` in all.

        What is longer is an OptionError, unless ``truncate`` asks for its beginning (as training does).
        """
        ids = self.encode(text)
        if len(ids) + 2 > max_tokens and not truncate:
            raise OptionError(
                f"the text {shortened(text)!r} has {len(ids)} tokens, {max_tokens - 2} are read at most; shorten it"
            )
        return [self.token_id("[CLS]"), *ids[: max_tokens - 2], self.token_id("[SEP]")]

    def instruction_ids(self, text: str, config: QFormerConfig) -> list[int]:
        """A prompt for the Q-Former of an InstructBLIP: ``[CLS] ids [SEP]``, at most `INSTRUCTION_TOKENS` in all.

        Of what is longer the end is read, in which the question stands; the language model reads all of it.
        """
        ids = self.encode(text)
        room = max(0, min(INSTRUCTION_TOKENS, config.max_position_embeddings) - 2)
        ids = [self.token_id("[CLS]"), *ids[max(0, len(ids) - room) :], self.token_id("[SEP]")]
        return self.known(ids, config)

    def known(self, ids: list[int], config: LanguageConfig | QFormerConfig) -> list[int]:
        """The ids. Raises CheckpointError if the model's table has no row for one of them."""
        if ids and max(ids) >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, the model has only {config.vocab_size}; "
                "tokenizer.json and the weights are not of one model"
            )
        return ids


class TextStream:
    """Tokens in, one by one; text out as soon as it is certain.

    The pieces joined are what `Tokenizer.decode` makes of all tokens. A character that takes several tokens
    comes whole, and a space comes with the word after it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain; sometimes nothing."""
        self._ids.append(token)
        return self._say(self._tokenizer.decode(self._ids).rstrip(UNFINISHED).rstrip())

    def finish(self) -> str:
        """What was held back, after the last token."""
        return self._say(self._tokenizer.decode(self._ids))

    def _say(self, text: str) -> str:
        # Some decoders join what they had set apart ("do n't"); then wait until the two agree again.
        if not text.startswith(self._said):
            return ""
        piece, self._said = text[len(self._said) :], text
        return piece


# ---- prompts ------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One line: no white space at either end, single spaces within. Raises OptionError for what is no text."""
    if not isinstance(text, str):
        raise OptionError(f"{reprlib.repr(text)} is no text (a {type(text).__name__}); give a text, or a list of texts")
    return " ".join(text.split())


def shortened(text: str, length: int = 60) -> str:
    """A text as an error message quotes it."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def question_prompt(question: str, manner: str) -> str:
    """A question in the words that the model was evaluated with (`QUESTION_TEMPLATES`).

    Raises OptionError for an empty question, and for one that already carries the template: asked twice over,
    the model answers worse, and nothing would tell.
    """
    return QUESTION_TEMPLATES[manner].format(checked_question(question, manner))


def caption_prompt(prompt: str, manner: str) -> str:
    """What a caption goes on from; an InstructBLIP, which was always asked something, has an instruction in the place
    of nothing. Raises OptionError for what is no text."""
    return clean(prompt) or (CAPTION_INSTRUCTION if manner == "instruct" else "")


def chat_prompt(turns: Sequence[tuple[str, str]], question: str, manner: str = "opt") -> str:
    """A question after earlier turns (question, answer): ``Question: q1 Answer: a1. Question: q2 Answer:``.

    The same for all families, as in the authors' demonstration. For an InstructBLIP the turns stand before the
    question as it is, as its authors' code has a visual dialog: ``dialog history: Question: q1 Answer: a1.``, a line's
    end, ``q2``. Raises OptionError as `question_prompt` does.
    """
    said = [f"Question: {clean(asked)} Answer: {clean(answer).removesuffix('.')}. " for asked, answer in turns]
    if manner == "instruct":
        before = f"dialog history: {''.join(said).rstrip()}\n" if turns else ""
        return before + question_prompt(question, manner)
    return f"{''.join(said)}Question: {checked_question(question, manner)} Answer:"


def checked_question(question: str, manner: str = "opt") -> str:
    """In one line. Raises OptionError as `question_prompt` does."""
    question = clean(question)
    if not question:
        raise OptionError("the question is empty; write one, such as 'how many dogs are there?', or ask for a caption")
    if manner != "instruct" and re.fullmatch(r"question:.*answer:", question, re.IGNORECASE):
        raise OptionError(
            f"the question {shortened(question)!r} already has the words 'Question:' and 'Answer:' around it, "
            "which are added for you; give the question alone"
        )
    return question


def added_token(content: str, token: str) -> tuple[str, int]:
    """The content of a sound tokenizer.json with a special token, if it lacks it, and the token's id."""
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.add_special_tokens([token])
    [token_id] = tokenizer.encode(token, add_special_tokens=False).ids
    return tokenizer.to_str(pretty=True), token_id
