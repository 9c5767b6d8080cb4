"""Comparing images with texts: by their vectors, which is fast (ITC), or processed together, which is accurate (ITM).

Section 3.1 of the paper. N images, M texts, B pairs, P patches, Q query tokens, T tokens, D and E widths.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blip2 import threads
from blip2.checkpoint import why_not_finite
from blip2.errors import NotFiniteError, OptionError
from blip2.finite import is_finite
from blip2.layers import without_autocast
from blip2.model import Blip2Matcher, similarity
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.speaker import chunks
from blip2.text import Tokenizer, clean

PORTION_TEXTS, PORTION_TOKENS = 16, 512
"""Texts per portion, where other work runs in between; a long text is processed alone."""


@dataclass(frozen=True)
class ImageFeatures:
    """What a matching model keeps of an image, to compare it with any text.

    ``patches_PD`` float[1 + P, D]: input of the Q-Former, class token first. ``vectors_QE`` float[Q, E]: one unit
    vector per query token.
    """

    patches_PD: Tensor
    vectors_QE: Tensor


@dataclass(frozen=True)
class Matches:
    """N images compared with M texts, each ``float32[N, M]`` on the CPU.

    ``itm_probability`` (0 to 1): the probability that image and text belong together (ITM), for each pair on its
    own. ``itm_logits`` float32[N, M, 2]: the logits of it; [..., 1] is a match. ``itc_cosine`` (-1 to 1): the
    similarity of their vectors (ITC). ``itc_probability`` (rows sum to 1): the probability of each text among all,
    with the learned temperature; None where the files have no temperature, such as the published ones on the Hugging
    Face hub.
    """

    itm_logits: Tensor
    itc_cosine: Tensor
    itc_probability: Tensor | None

    @property
    def itm_probability(self) -> Tensor:
        return self.itm_logits.softmax(dim=-1)[..., 1]

    @property
    def score(self) -> Tensor:
        """The authors' ranking score: the match logit plus the cosine (``compute_sim_matrix``)."""
        return self.itm_logits[..., 1] + self.itc_cosine


@dataclass(frozen=True)
class Match:
    """One image with one text; the numbers are those of `Matches`."""

    text: str
    itm_probability: float
    itc_cosine: float
    itc_probability: float | None


@dataclass(frozen=True)
class Reader:
    """A matching model and its tokenizer: processes texts, alone or with an image.

    All methods but `itm_logits` and `cosines` raise NotFiniteError if the model's numbers are NaN or infinite.
    """

    model: Blip2Matcher
    tokenizer: Tokenizer

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """``[CLS] ids [SEP]`` of each text, not truncated. Raises OptionError for an empty or too long text."""
        if isinstance(texts, str):
            raise OptionError(f"the texts are a single text, {texts!r}; give a list")
        if not texts:
            raise OptionError("there is no text; give at least one to compare with")
        for text in texts:
            check_text(text)
        config = self.model.config.qformer
        limit = config.max_position_embeddings
        return [self.tokenizer.known(self.tokenizer.matching_ids(clean(text), limit), config) for text in texts]

    @torch.no_grad()
    def embed_texts(self, ids: list[list[int]], batch_size: int = BATCH_SIZE) -> Tensor:
        """The unit vectors of texts, given by their `ids`: ``float[M, E]``."""
        with threads.fitting(self.model):
            return self._sound(self._scattered(ids, batch_size, self.model.embed_text))

    @torch.no_grad()
    def itm_logits(self, images: Sequence[ImageFeatures], ids: list[list[int]], batch_size: int = BATCH_SIZE) -> Tensor:
        """The matching head's logits of each image with each text, ``float[N, M, 2]``."""
        with threads.fitting(self.model):
            return self._itm_logits(images, ids, batch_size)

    def _itm_logits(self, images: Sequence[ImageFeatures], ids: list[list[int]], batch_size: int) -> Tensor:
        if len(ids) == 1:
            text_1T, mask_1T = self._padded(ids)
            rows = []
            for some in chunks(images, batch_size):
                patches_BPD = torch.stack([image.patches_PD for image in some])
                rows.append(self.model.match(patches_BPD, text_1T.expand(len(some), -1), mask_1T.expand(len(some), -1)))
            return torch.cat(rows)[:, None]
        return torch.stack(
            [self._scattered(ids, batch_size, partial(self.model.match, image.patches_PD[None])) for image in images]
        )

    @torch.no_grad()
    def embed_pairs(self, pairs: Sequence[tuple[ImageFeatures, str]], batch_size: int = BATCH_SIZE) -> Tensor:
        """The query tokens after attending to image and text: the multimodal feature, ``float[B, Q, D]``."""
        ids = self.ids([text for _, text in pairs])
        found = []
        for some in chunks(list(zip(pairs, ids, strict=True)), batch_size):
            text_BT, mask_BT = self._padded([row for _, row in some])
            patches_BPD = torch.stack([image.patches_PD for (image, _), _ in some])
            with threads.fitting(self.model):
                fused = self.model.qformer(image_BPD=patches_BPD, text_BT=text_BT, text_mask_BT=mask_BT)
            found.append(fused.hidden_BSD[:, : self.model.config.qformer.num_query_tokens])
        return self._sound(torch.cat(found))

    def compare(
        self, images: Sequence[ImageFeatures], ids: list[list[int]], texts_ME: Tensor, batch_size: int = BATCH_SIZE
    ) -> Matches:
        """All numbers of N images and M texts, given by `ids` and `embed_texts`."""
        return self._matches(images, texts_ME, self.itm_logits(images, ids, batch_size))

    def comparing(self, image: ImageFeatures, ids: list[list[int]]) -> Generator[None, None, Matches]:
        """As `compare` for one image, in portions of the texts, so that other work can run in between. Returns the
        matches."""
        vectors, logits, order = [], [], []
        for some in portions(ids):
            own = [ids[number] for number in some]
            vectors.append(self.embed_texts(own, len(own)))
            logits.append(self.itm_logits([image], own, len(own)))
            order += some
            yield
        back = torch.tensor(order, device=vectors[0].device).argsort()
        return self._matches([image], torch.cat(vectors)[back], torch.cat(logits, dim=1)[:, back])

    def embedding_texts(self, ids: list[list[int]]) -> Generator[None, None, Tensor]:
        """As `embed_texts`, in portions as in `comparing`."""
        vectors, order = [], []
        for some in portions(ids):
            vectors.append(self.embed_texts([ids[number] for number in some], len(some)))
            order += some
            yield
        return torch.cat(vectors)[torch.tensor(order, device=vectors[0].device).argsort()]

    def _matches(self, images: Sequence[ImageFeatures], texts_ME: Tensor, itm_logits_NM2: Tensor) -> Matches:
        cosine_NM = self.cosines(images, texts_ME)
        probability_NM = self.itc_probability(cosine_NM)
        return Matches(
            self._sound(itm_logits_NM2.float().cpu()),
            self._sound(cosine_NM.cpu()),
            None if probability_NM is None else self._sound(probability_NM.cpu()),
        )

    def classify(
        self,
        image: ImageFeatures,
        texts: Sequence[str],
        ids: list[list[int]],
        texts_ME: Tensor,
        *,
        top: int,
        candidates: int,
        batch_size: int = BATCH_SIZE,
    ) -> list[Match]:
        """The ``top`` texts for an image, best first by `Matches.score`.

        Only the ``candidates`` texts with the highest cosine (or ``top``, if that is more) are processed together with
        the image, as in the authors' ranking (section 4.4 of the paper). ``itc_probability`` is that among all texts.
        """
        cosine_M = self.cosines([image], texts_ME)[0]
        probability = self.itc_probability(cosine_M[None])
        if probability is not None:
            self._sound(probability)
        nearest = cosine_M.topk(min(max(top, candidates), len(ids))).indices.tolist()
        logits_C2 = self.itm_logits([image], [ids[number] for number in nearest], batch_size)[0].float()
        score_C = self._sound(logits_C2[:, 1] + cosine_M[nearest])
        matching_C = logits_C2.softmax(dim=-1)[:, 1]
        best = score_C.argsort(descending=True, stable=True)[:top].tolist()
        return [
            Match(
                text=texts[number],
                itm_probability=float(matching_C[place]),
                itc_cosine=float(cosine_M[number]),
                itc_probability=None if probability is None else float(probability[0, number]),
            )
            for place, number in ((place, nearest[place]) for place in best)
        ]

    def cosines(self, images: Sequence[ImageFeatures], texts_ME: Tensor) -> Tensor:
        """``float32[N, M]``, for the most similar of each image's vectors."""
        with without_autocast(texts_ME.device):  # differences between good matches are small
            return similarity(torch.stack([image.vectors_QE for image in images]).float(), texts_ME.float())

    def itc_probability(self, cosine_NM: Tensor) -> Tensor | None:
        """The probability of each text among all M with the learned temperature; None if there is none."""
        temperature = self.model.temperature
        if temperature is None:
            return None
        return (cosine_NM / self._sound(temperature.detach())).softmax(dim=1)  # if it were infinite, all would be equal

    def _sound(self, values: Tensor) -> Tensor:
        if not is_finite(values):
            raise NotFiniteError(
                f"the model's numbers for an image and a text are NaN or infinite: {why_not_finite(self.model)}"
            )
        return values

    def _scattered(self, ids: list[list[int]], batch_size: int, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``read`` applied to each text, in order; texts of similar length share a batch, so that padding is small."""
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        found = [read(*self._padded([ids[number] for number in some])) for some in chunks(order, batch_size)]
        back = torch.tensor(order, device=found[0].device).argsort()
        return torch.cat(found)[back]

    def _padded(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids ``int64[M, T]``, right-padded, and their mask, ``bool[M, T]``."""
        device = self.model.qformer.query_tokens.device
        rows = [torch.tensor(row, device=device) for row in ids]
        lengths_M1 = torch.tensor([[len(row)] for row in ids], device=device)
        text_MT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return text_MT, torch.arange(text_MT.shape[1], device=device) < lengths_M1


def portions(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The indices of texts, short ones first, in portions."""
    some: list[int] = []
    for number in sorted(range(len(ids)), key=lambda number: len(ids[number])):
        if some and (len(some) == PORTION_TEXTS or (len(some) + 1) * len(ids[number]) > PORTION_TOKENS):
            yield some
            some = []
        some.append(number)
    if some:
        yield some


def check_text(text: str) -> None:
    """OptionError for an empty text."""
    if not clean(text):
        raise OptionError("one of the texts is empty; write one, or remove it")
