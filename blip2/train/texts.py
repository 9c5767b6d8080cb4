"""Stage 2: from the texts of a row to prompts and targets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from blip2.config import LanguageConfig, QFormerConfig
from blip2.data import Row, Turn
from blip2.text import Tokenizer, caption_prompt, chat_prompt, checked_question, question_prompt
from blip2.train.recipes import DataRecipe
from blip2.train.stage2 import Text


class TextSource:
    """Draws texts of a row and tokenizes them. Tokenized texts are cached.

    ``num_cut`` counts texts that were longer than the recipe allows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: LanguageConfig,
        recipe: DataRecipe,
        reader: tuple[Tokenizer, QFormerConfig] | None = None,
    ) -> None:
        """``reader``: tokenizer and configuration of a Q-Former that reads the same prompts as the language model."""
        self._config = config
        self._manner = config.family if reader is None else "instruct"
        self._recipe = recipe
        self._weights = {
            "caption": recipe.mix.captions,
            "question": recipe.mix.questions,
            "dialogue": recipe.mix.dialogues,
        }
        self.num_cut = 0
        # The texts of a row return every epoch, and many questions are shared by many images.
        remember = lru_cache(maxsize=2**18)
        self._prompt_ids = remember(lambda text: tokenizer.prompt_ids(text, config))
        self._answer_ids = remember(lambda text: tokenizer.answer_ids(text, config))
        self._read_ids: Callable[[str], Sequence[int]] = lambda text: ()
        if reader is not None:
            self._read_ids = remember(lambda text: reader[0].instruction_ids(text, reader[1]))

    def draw(self, row: Row, count: int, chance: random.Random) -> list[Text]:
        """Draw ``count`` texts of the row, kinds by the recipe's mix; none is repeated before all were drawn."""
        choices = {"caption": row.captions, "question": row.questions, "dialogue": row.dialogues}
        kinds = [kind for kind, texts in choices.items() if texts and self._weights[kind] > 0]
        drawn = chance.choices(kinds, [self._weights[kind] for kind in kinds], k=count)
        left: dict[str, list[int]] = {kind: [] for kind in kinds}
        texts = []
        for kind in drawn:
            if not left[kind]:
                left[kind] = chance.sample(range(len(choices[kind])), len(choices[kind]))
            number = left[kind].pop()
            if kind == "caption":
                texts.append(self._caption(row.captions[number], chance))
            elif kind == "question":
                turn = row.questions[number]
                texts.append(self._answer(kind, (), turn._replace(answer=turn.drawn(chance))))
            else:
                dialogue = row.dialogues[number]
                place = chance.randrange(len(dialogue))
                texts.append(self._answer(kind, dialogue[:place], dialogue[place]))
        return texts

    def can_use(self, row: Row) -> bool:
        """Whether the row has a text of a kind with a weight in the recipe's mix."""
        return any(
            texts and self._weights[kind] > 0
            for kind, texts in (("caption", row.captions), ("question", row.questions), ("dialogue", row.dialogues))
        )

    def _caption(self, caption: str, chance: random.Random) -> Text:
        if prompt := caption_prompt(self._recipe.caption_prompt, self._manner):
            target_ids = self._shortened(self._answer_ids(caption))
            return Text("caption", self._prompt_ids(prompt), target_ids, self._read_ids(prompt))
        if not self._config.has_encoder:
            # After </s> a text starts without the space that precedes an answer.
            first, *ids = self._prompt_ids(caption)
            return Text("caption", [first], self._shortened([*ids, self._config.eos_token_id]))
        # The prompt is a beginning of random length, up to the middle; the target is the rest.
        ids = self._shortened(self._answer_ids(caption))
        middle = (len(ids) - 1) // 2
        split = chance.randint(1, middle) if middle else 0
        return Text("caption", [*ids[:split], self._config.eos_token_id], ids[split:])

    def _answer(self, kind: str, history: Sequence[Turn], turn: Turn) -> Text:
        prompt = self._prompt(kind, history, turn)
        prompt_ids = self._prompt_ids(prompt)
        most = self._recipe.max_prompt_tokens
        if len(prompt_ids) > most:
            self.num_cut += 1
            while len(prompt_ids) > most and history:
                history = history[1:]
                prompt = self._prompt(kind, history, turn)
                prompt_ids = self._prompt_ids(prompt)
            if len(prompt_ids) > most:  # one question that is too long: keep its end
                prompt_ids = [prompt_ids[0], *prompt_ids[1 - most :]]
        target_ids = self._shortened(self._answer_ids(turn.answer))
        return Text(kind, prompt_ids, target_ids, self._read_ids(prompt))

    def _prompt(self, kind: str, history: Sequence[Turn], turn: Turn) -> str:
        if kind == "dialogue":
            return chat_prompt([before[:2] for before in history], turn.question, self._manner)
        if template := self._recipe.question_prompt:
            return template.replace("{}", checked_question(turn.question, self._manner))
        return question_prompt(turn.question, self._manner)

    def _shortened(self, ids: list[int]) -> list[int]:
        """A target within the limit. A cut target has no end token, since the text does not end there."""
        if len(ids) > self._recipe.max_text_tokens:
            self.num_cut += 1
        return ids[: self._recipe.max_text_tokens]
