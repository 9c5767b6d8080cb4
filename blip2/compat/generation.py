"""``generate`` with Hugging Face's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blip2 import checkpoint, threads
from blip2.compat.lockstep import DecodingSettings, Written, write
from blip2.compat.options import Decoding, decoding, effective, from_config, is_watched, merged
from blip2.compat.records import ModelOutput, Prompt
from blip2.compat.scores import Prompted, build_criteria, build_filters, longest_of, own
from blip2.compat.states import states_of
from blip2.config import T5Config
from blip2.errors import NotFiniteError, OptionError
from blip2.generation import Engine
from blip2.model import Blip2


# Results of ``generate`` with ``return_dict_in_generate``, under the names that programs check.
class GenerateDecoderOnlyOutput(ModelOutput): ...


class GenerateEncoderDecoderOutput(ModelOutput): ...


class GenerateBeamDecoderOnlyOutput(ModelOutput): ...


class GenerateBeamEncoderDecoderOutput(ModelOutput): ...


OUTPUTS_OF: dict[tuple[bool, bool], type[ModelOutput]] = {
    (False, False): GenerateDecoderOnlyOutput,
    (True, False): GenerateEncoderDecoderOutput,
    (False, True): GenerateBeamDecoderOnlyOutput,
    (True, True): GenerateBeamEncoderDecoderOutput,
}
"""By whether the language model has an encoder, and whether beams are used."""


class Writer(Protocol):
    """What ``generate`` needs of a model."""

    model: Blip2
    generation_config: Any
    language_model: Any

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def _prompt(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        interpolate: bool,
        inputs_embeds: Tensor | None,
        /,
    ) -> Prompt: ...


class Generates:
    """Adds ``generate`` to a model that has these parts and `_prompt`."""

    @torch.no_grad()
    def generate(
        self: Writer,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        generation_config: Any = None,
        **options: Any,
    ) -> Tensor | ModelOutput:
        """Generate after images and prompts: ``int64[B * num_return_sequences, ...]``, padded.

        For a decoder, rows are the prompt's ids and the new ones; for a T5, the start token and the new ones. The end
        token is included where it was generated. Without ``input_ids`` the prompt is the image and the BOS token, or
        ``inputs_embeds`` float[M, T, D], in which the image replaces the vectors of its token. N images can be paired
        with N prompts, with one, or one with many.

        Options (default): max_new_tokens (20) or max_length, which counts the prompt's ids too, min_new_tokens (0) or
        min_length, num_beams (1), length_penalty (1), early_stopping (False), num_return_sequences (1), do_sample
        (False), temperature (1), top_k (50), top_p (1), min_p, typical_p, epsilon_cutoff, eta_cutoff,
        repetition_penalty (1), no_repeat_ngram_size (0), bad_words_ids, sequence_bias, suppress_tokens,
        begin_suppress_tokens, forced_bos_token_id, forced_eos_token_id, exponential_decay_length_penalty,
        renormalize_logits, max_time (seconds), stop_strings (with ``tokenizer``), eos_token_id (one or several) and
        pad_token_id (the model's); or these in a ``generation_config``, a dictionary or an object with to_dict().

        ``logits_processor`` and ``stopping_criteria`` are callables with (ids int[R, T], scores float[R, V]), and with
        (ids, the scores so far or None); ids are those of the prompt and the new ones. ``streamer``: its ``put`` gets
        the prompt's ids and then each token; its ``end`` is called at the end.

        With ``return_dict_in_generate``: ``sequences``, and if requested ``scores`` and ``logits`` (of each step,
        float[R, V]); with beams also ``sequences_scores`` and ``beam_indices``. Attentions and hidden states
        (``output_attentions``, ``output_hidden_states``) are those of each step, computed by a second pass of the
        language model.

        Raises OptionError for an image that would be ignored, numbers that do not pair up, and invalid options;
        TypeError for an unknown option.
        """
        prompt = self._prompt(pixel_values, input_ids, attention_mask, interpolate_pos_encoding, inputs_embeds)
        language = self.model.language.config
        ends = list(language.end_token_ids)
        family_tokens = {
            "eos_token_id": ends if len(ends) > 1 else language.eos_token_id, "pad_token_id": language.pad_token_id
        }  # fmt: skip
        given = {} if generation_config is None else from_config(generation_config)
        asked = merged(family_tokens, from_config(self.generation_config), given, effective("generate", options))

        before_BT, counted = prompt.ids_BT, prompt.ids_BT.shape[1] or prompt.is_real_BS.shape[1]
        if not isinstance(language, T5Config):
            num_left = language.max_position_embeddings - prompt.is_real_BS.shape[1]
        else:
            start = language.decoder_start_token_id
            if asked.get("decoder_start_token_id", start) != start:
                raise OptionError(f"decoder_start_token_id is {asked['decoder_start_token_id']}, this model's {start}")
            before_BT, counted, num_left = before_BT.new_full((len(prompt.is_real_BS), 1), start), 1, None
        how = decoding(asked, prompt_length=counted, num_left=num_left)
        engine = Engine(
            self.model.language,
            eos_token_ids=_known(how.eos_token_ids, language.vocab_size),
            damage=partial(checkpoint.damage, self.model),
        )
        if not is_watched(asked, how):
            return _by_the_engine(engine, prompt, before_BT, how)
        way = _watched(asked, how, prompt, before_BT, language.vocab_size)
        try:
            with threads.fitting(self.model.language):
                written = write(self.model.language, rows_of(prompt), before_BT, way)
        except NotFiniteError as error:
            raise engine.explained(error, rows_of(prompt)) from None
        if not asked.get("return_dict_in_generate"):
            return written.sequences
        states: dict[str, Any] = {}
        if written.ids is not None:
            states = states_of(
                self.language_model,
                prompt,
                written.ids,
                has_encoder=language.has_encoder,
                attentions=bool(asked.get("output_attentions")),
                hidden_states=bool(asked.get("output_hidden_states")),
            )
        return _output(written, language.has_encoder, states)

    def compute_transition_scores(
        self: Writer,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token, float[rows, new tokens], from the result of ``generate`` with ``output_scores``.

        With beams, give ``beam_indices``; after the end of a row the score is 0. ``normalize_logits``: turn logits into
        log-probabilities.
        """
        scores_NRV = torch.stack(scores)
        if normalize_logits:
            scores_NRV = scores_NRV.log_softmax(-1)
        if beam_indices is None:
            rows_RN = torch.arange(scores_NRV.shape[1], device=sequences.device)[:, None].expand(-1, len(scores))
        else:
            rows_RN = beam_indices[:, : int((beam_indices >= 0).sum(dim=1).max())]
        steps_N = torch.arange(rows_RN.shape[1], device=sequences.device)
        tokens_RN = sequences[:, sequences.shape[1] - rows_RN.shape[1] :]
        return scores_NRV[steps_N, rows_RN.clamp(min=0).long(), tokens_RN].masked_fill(rows_RN < 0, 0)


def _by_the_engine(engine: Engine, prompt: Prompt, before_BT: Tensor, how: Decoding) -> Tensor:
    """Decoding that nothing watches: each row leaves the batch when it is finished."""
    (end,) = how.eos_token_ids
    answers = [
        torch.tensor([*answer.tokens, *[end] * (answer.finish_reason == "eos")], device=before_BT.device)
        for answers in engine.generate(rows_of(prompt), how.options)
        for answer in answers
    ]
    new_BT = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=how.fill_token_id)
    return torch.cat([before_BT.repeat_interleave(how.options.num_return, dim=0), new_BT], dim=1)


def _known(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The token ids that exist; programs give an end token of -1 for none."""
    return [token for token in tokens if 0 <= token < vocab_size]


def _watched(
    asked: Mapping[str, Any], how: Decoding, prompt: Prompt, before_BT: Tensor, vocab_size: int
) -> DecodingSettings:
    """Decoding with everything that watches it."""
    options, length = how.options, before_BT.shape[1]
    returns_dict = bool(asked.get("return_dict_in_generate"))
    streamer = asked.get("streamer")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise OptionError(f"streamer is {streamer!r}; give an object with put(ids) and end()")
    if streamer is not None and options.num_beams > 1:
        raise OptionError(f"a streamer needs num_beams=1, not {options.num_beams}; set num_beams=1")
    criteria = own("stopping_criteria", asked.get("stopping_criteria"))
    longest = longest_of(criteria)
    copies = max(options.num_beams, options.num_return)
    is_real_BT = prompt.is_real_BS[:, prompt.is_real_BS.shape[1] - length :]
    first_B1 = is_real_BT.long().cumsum(dim=1).eq(0).sum(dim=1, keepdim=True)
    prompted = Prompted(
        length=length,
        skipped_R1=first_B1.repeat_interleave(copies, dim=0) * (before_BT is prompt.ids_BT),
        eos_token_ids=torch.tensor(_known(how.eos_token_ids, vocab_size), dtype=torch.long, device=before_BT.device),
        num_ends=len(how.eos_token_ids),
        vocab_size=vocab_size,
        max_new_tokens=options.max_new_tokens if longest is None else max(1, longest - length),
        min_new_tokens=options.min_new_tokens,
        num_beams=options.num_beams,
    )
    return DecodingSettings(
        filters=build_filters(asked, prompted, own("logits_processor", asked.get("logits_processor"))),
        criteria=build_criteria(asked, prompted, asked.get("tokenizer"), criteria),
        max_new_tokens=prompted.max_new_tokens,
        num_ends=prompted.num_ends,
        fill_token_id=how.fill_token_id,
        sample=bool(asked.get("do_sample")),
        num_beams=options.num_beams,
        num_return=options.num_return,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        keeps_scores=returns_dict and bool(asked.get("output_scores")),
        keeps_logits=returns_dict and bool(asked.get("output_logits")),
        keeps_ids=returns_dict and bool(asked.get("output_attentions") or asked.get("output_hidden_states")),
        streamer=streamer,
    )


STATES = {
    False: ("attentions", "hidden_states"),
    True: (
        "encoder_attentions", "encoder_hidden_states",
        "decoder_attentions", "cross_attentions", "decoder_hidden_states",
    ),
}  # fmt: skip


def _output(written: Written, has_encoder: bool, states: Mapping[str, Any]) -> ModelOutput:
    """The result under the reference's names."""
    has_beams = written.beam_indices is not None
    values: dict[str, Any] = {"sequences": written.sequences}
    if has_beams:
        values["sequences_scores"] = written.sequences_scores
    values |= {"scores": written.scores, "logits": written.logits}
    if has_beams:
        values["beam_indices"] = written.beam_indices
    values |= {name: states.get(name) for name in STATES[has_encoder]}
    return OUTPUTS_OF[has_encoder, has_beams](**values, past_key_values=None)


def rows_of(prompt: Prompt) -> list[Tensor]:
    """Each row without its padding: ``float[S_i, D]``."""
    return [row_SD[real_S] for row_SD, real_S in zip(prompt.embeddings_BSD, prompt.is_real_BS, strict=True)]
