"""Stage 2: the query tokens become prompts of a frozen language model (section 3.2 and Figure 3 of the paper).

    OPT   [queries][</s>][prompt][target]            other decoders likewise; the loss is on the target and its end
    T5    [queries][prompt][</s>]  ->  [target]      a caption is split: beginning as prompt, rest as target

Several texts about an image share its query tokens. For a decoder they are packed into one row. Each is masked from
the others and has the positions right after the query tokens. The result equals that of one row for each text, and is
several times faster.

B images, Q query tokens, T text tokens of a row, S queries and text, N target tokens (or T5's rows), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.config import DecoderConfig, LanguageConfig, OPTConfig, T5Config
from blip2.dropout import dropout_by_rows
from blip2.language import OPT, T5, Decoder
from blip2.model import Blip2
from blip2.train.flops import Texts
from blip2.train.group import Step
from blip2.train.losses import language_modelling


class Text(NamedTuple):
    """One text about an image: the prompt of the language model, and the target."""

    kind: str
    prompt_ids: list[int]
    target_ids: list[int]
    read_ids: Sequence[int] = ()
    """Input of an InstructBLIP's Q-Former beside the image."""


class Targets(NamedTuple):
    """For each target token: its place in the flattened text tokens, its id, and the text that it belongs to."""

    place_N: Tensor
    token_N: Tensor
    text_N: Tensor


class PackedTexts(NamedTuple):
    """For a decoder: all texts of an image in one row. ``segment_BT`` numbers the texts from 1; 0 is padding."""

    token_BT: Tensor
    segment_BT: Tensor
    position_BT: Tensor
    is_packed: bool
    targets: Targets


class SplitTexts(NamedTuple):
    """For T5: a row for each text, image by image; ``prompt_MT`` with ``length_M`` tokens each, and the decoder
    inputs."""

    prompt_MT: Tensor
    length_M: Tensor
    decoder_MT: Tensor
    texts_per_image: int
    targets: Targets


class ReadTexts(NamedTuple):
    """Input of an InstructBLIP's Q-Former: a row for each text, image by image. Each text then has query tokens of its
    own and a row of its own in the language model."""

    token_MT: Tensor
    mask_MT: Tensor
    """True for tokens, False for padding."""
    texts_per_image: int

    def wider(self, width: int) -> ReadTexts:
        """Pad to ``width`` tokens, so that dropout masks of a row have a fixed shape."""
        missing = width - self.token_MT.shape[1]
        token_MT, mask_MT = (F.pad(each_MT, (0, missing)) for each_MT in self[:2])
        return ReadTexts(token_MT, mask_MT, self.texts_per_image)


class Stage2Losses(NamedTuple):
    lm: Tensor
    is_right_N: Tensor
    """Whether each target token is the most likely one, given the tokens before it."""


class Part(NamedTuple):
    """Some images of a batch with their texts, and their indices ``place_B`` in the global batch."""

    features_BPD: Tensor
    """Before the image encoder's last norm, ``float[B, 1 + P, D]``."""
    texts: PackedTexts | SplitTexts
    place_B: Tensor
    read: ReadTexts | None = None


def losses(
    model: Blip2,
    features_BPD: Tensor,
    texts: PackedTexts | SplitTexts,
    read: ReadTexts | None = None,
    *,
    count: int | None = None,
) -> Stage2Losses:
    """The mean loss over all target tokens, or with ``count`` this part's share of the mean over a batch of ``count``
    tokens.

    ``features_BPD`` float[B, 1 + P, D]: before the image encoder's last norm. ``read``: input of the Q-Former, if it
    reads text; then each text has a row of its own in ``texts``.
    """
    patches_BPD = model.vision.post_norm(features_BPD.to(model.vision.post_norm.weight.dtype))
    prompt_BQD = model.prompt(model.look(patches_BPD) if read is None else _look_and_read(model, patches_BPD, read))
    if isinstance(texts, PackedTexts):
        assert isinstance(model.language, OPT | Decoder)
        hidden_BTD = _read_packed(model.language, prompt_BQD, texts)
    else:
        assert isinstance(model.language, T5)
        prompts_MQD = prompt_BQD.repeat_interleave(texts.texts_per_image, dim=0)
        read_MSD = torch.cat([prompts_MQD, model.language.embed(texts.prompt_MT)], dim=1)
        hidden_BTD = model.language(read_MSD, texts.length_M + prompts_MQD.shape[1], texts.decoder_MT)
    # The vocabulary is large, so logits are computed only for target tokens.
    logits_NV = model.language.logits(hidden_BTD.flatten(0, 1)[texts.targets.place_N])
    lm = language_modelling(logits_NV, texts.targets.token_N, count=count)
    return Stage2Losses(lm, logits_NV.detach().argmax(dim=-1) == texts.targets.token_N)


def backward(model: Blip2, parts: Iterable[Part], step: Step, count: int) -> dict[str, Tensor]:
    """This process's share of a step's loss; adds its share of the gradient to ``.grad``, part by part.

    The sums over all processes are the loss and the gradient of the global batch. Each of its ``count`` target tokens
    has the same weight, whatever part it is in.
    """
    share = torch.zeros((), device=model.qformer.query_tokens.device)
    for part in parts:
        row_B = part.place_B
        if part.read is not None:  # a row for each text
            number = part.read.texts_per_image
            row_B = (row_B[:, None] * number + torch.arange(number, device=row_B.device)).flatten()
        with step.autocast(), dropout_by_rows((step.seed,), row_B):
            loss = losses(model, part.features_BPD, part.texts, part.read, count=count).lm
        loss.backward()
        share += loss.detach()
    return {"lm": share}


def num_tokens(texts: PackedTexts | SplitTexts) -> int:
    """Number of tokens of all texts without padding, both prompts and targets."""
    if isinstance(texts, SplitTexts):
        return int(texts.length_M.sum()) + len(texts.targets.token_N)
    return int((texts.segment_BT > 0).sum())


def sizes(texts: PackedTexts | SplitTexts) -> Texts:
    num_targets = len(texts.targets.token_N)
    if isinstance(texts, PackedTexts):
        return Texts(len(texts.token_BT), texts.token_BT.shape[1], num_targets)
    rows, width = texts.prompt_MT.shape
    return Texts(rows // texts.texts_per_image, width, num_targets, texts.decoder_MT.shape[1], rows)


def _look_and_read(model: Blip2, patches_BPD: Tensor, read: ReadTexts) -> Tensor:
    """One pass of the Q-Former for each text: ``float[M, Q, D]``."""
    patches_MPD = patches_BPD.to(model.qformer.query_tokens).repeat_interleave(read.texts_per_image, dim=0)
    seen = model.qformer(image_BPD=patches_MPD, text_BT=read.token_MT, text_mask_BT=read.mask_MT)
    return seen.hidden_BSD[:, : model.config.qformer.num_query_tokens]


def _read_packed(language: OPT | Decoder, prompt_BQD: Tensor, texts: PackedTexts) -> Tensor:
    """Hidden states of the text tokens ``float[B, T, D]``."""
    num_queries = prompt_BQD.shape[1]
    embedded_BSD = torch.cat([prompt_BQD, language.embed(texts.token_BT)], dim=1)
    if not texts.is_packed:
        return language(embedded_BSD)[:, num_queries:]
    rows = len(prompt_BQD)
    query_positions_BQ = torch.arange(num_queries, device=prompt_BQD.device).expand(rows, -1)
    position_BS = torch.cat([query_positions_BQ, texts.position_BT + num_queries], dim=1)
    segment_BS = F.pad(texts.segment_BT, (num_queries, 0), value=-1)
    may_see_BSS = (segment_BS[:, :, None] == segment_BS[:, None]) | (segment_BS[:, None] == -1)
    causal_SS = torch.ones_like(may_see_BSS[0]).tril()
    hidden_BSD = language(embedded_BSD, positions_BT=position_BS, mask=(may_see_BSS & causal_SS)[:, None])
    return hidden_BSD[:, num_queries:]


# ---- batches ------------------------------------------------------------------------------------------


def collate(texts: Sequence[Sequence[Text]], config: LanguageConfig) -> PackedTexts | SplitTexts:
    """Texts of each image, equally many, to tensors in the layout of the language model's family."""
    return _split(texts, config) if isinstance(config, T5Config) else _pack(texts, config)


def collate_read(texts: Sequence[Sequence[Text]]) -> ReadTexts:
    """Input of the Q-Former for the texts."""
    rows = [text.read_ids for row in texts for text in row]
    token_MT = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask_MT = np.zeros(token_MT.shape, dtype=bool)
    for number, ids in enumerate(rows):
        token_MT[number, : len(ids)] = ids
        mask_MT[number, : len(ids)] = True
    return ReadTexts(torch.from_numpy(token_MT), torch.from_numpy(mask_MT), len(texts[0]))


def _pack(texts: Sequence[Sequence[Text]], config: OPTConfig | DecoderConfig) -> PackedTexts:
    # The last token of a text is only predicted, not read.
    lengths = [sum(len(text.prompt_ids) + len(text.target_ids) - 1 for text in row) for row in texts]
    width = max(lengths)
    token_BT = np.full((len(texts), width), config.pad_token_id)
    segment_BT = np.zeros_like(token_BT)
    position_BT = np.zeros_like(token_BT)
    targets = _TargetList()
    for number, row in enumerate(texts):
        start = 0
        for segment, text in enumerate(row, start=1):
            read = text.prompt_ids + text.target_ids[:-1]
            end = start + len(read)
            token_BT[number, start:end] = read
            segment_BT[number, start:end] = segment
            position_BT[number, start:end] = np.arange(len(read))
            targets.add(number * width + start + len(text.prompt_ids) - 1, text.target_ids)
            start = end
    is_packed = any(len(row) > 1 for row in texts)
    tokens, segments, positions = map(torch.from_numpy, (token_BT, segment_BT, position_BT))
    return PackedTexts(tokens, segments, positions, is_packed, targets.tensors())


def _split(texts: Sequence[Sequence[Text]], config: T5Config) -> SplitTexts:
    rows = [text for row in texts for text in row]
    assert len({len(row) for row in texts}) == 1, "each image has the same number of texts"
    length_M = np.array([len(text.prompt_ids) for text in rows])
    prompt_MT = np.full((len(rows), length_M.max()), config.pad_token_id)
    width = max(len(text.target_ids) for text in rows)
    decoder_MT = np.full((len(rows), width), config.pad_token_id)
    targets = _TargetList()
    for number, text in enumerate(rows):
        prompt_MT[number, : len(text.prompt_ids)] = text.prompt_ids
        decoder_MT[number, : len(text.target_ids)] = [config.decoder_start_token_id, *text.target_ids[:-1]]
        targets.add(number * width, text.target_ids)
    prompts, lengths, decoded = map(torch.from_numpy, (prompt_MT, length_M, decoder_MT))
    return SplitTexts(prompts, lengths, decoded, len(texts[0]), targets.tensors())


class _TargetList:
    def __init__(self) -> None:
        self._places: list[int] = []
        self._tokens: list[int] = []
        self._texts: list[int] = []
        self._count = 0

    def add(self, first_place: int, target_ids: list[int]) -> None:
        """Add a text whose first token is predicted at ``first_place``, and the others right after it."""
        self._places += range(first_place, first_place + len(target_ids))
        self._tokens += target_ids
        self._texts += [self._count] * len(target_ids)
        self._count += 1

    def tensors(self) -> Targets:
        return Targets(*(torch.tensor(values) for values in (self._places, self._tokens, self._texts)))
