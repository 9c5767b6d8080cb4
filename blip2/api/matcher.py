"""`Matcher`: a matching model, which scores how well images and texts match."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from blip2.api.pipeline import Options, is_list, listed
from blip2.checkpoint import ImageSettings, damage
from blip2.errors import ImageError, OptionError, option
from blip2.generation import Engine
from blip2.image import DEFAULT_READING, Reading, Source
from blip2.model import Blip2Matcher, identity
from blip2.tasks.defaults import BATCH_SIZE, CAPTION, merged
from blip2.tasks.explain import Explanation, explain_match, image_patches
from blip2.tasks.match import ImageFeatures, Match, Matches, Reader, check_text
from blip2.tasks.see import ImageFrontend, OnError, Seen, checked, raising
from blip2.tasks.speaker import pairs
from blip2.tasks.write import QFormerWriter
from blip2.text import Tokenizer, clean

Encodable = Source | ImageFeatures


class Matcher:
    """A model that matches images with texts; `load` creates one.

    Images are paths, URLs, bytes, PIL images, arrays or tensors (see `image.load_image`), or `ImageFeatures`.
    ``reading``: limits for reading images. Can be pickled.
    """

    def __init__(
        self,
        model: Blip2Matcher,
        tokenizer: Tokenizer,
        settings: ImageSettings,
        *,
        name: str = "model",
        reading: Reading = DEFAULT_READING,
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.identity = identity(model)
        """Identity of the model that made the vectors (`model.identity`)."""
        self.reader = Reader(model, tokenizer)
        self.frontend = ImageFrontend(
            model.vision,
            self._see,
            ImageFeatures,
            **asdict(settings),
            reading=reading,
            damage=partial(damage, model),
        )

    def _see(self, pixels_BCHW: Tensor) -> list[ImageFeatures]:
        patches_BPD = self.model.encode(pixels_BCHW)
        vectors_BQE, _ = self.model.embed_image(patches_BPD)
        rows = zip(patches_BPD, vectors_BQE, strict=True)
        # Copies, so that keeping one image does not keep its whole batch.
        return [ImageFeatures(patches_PD.clone(), vectors_QE.clone()) for patches_PD, vectors_QE in rows]

    def __repr__(self) -> str:
        return f"<Matcher {self.name} on {self.model.qformer.query_tokens.device}>"

    # ---- images and texts separately ----

    def encode(self, images: Encodable | Sequence[Encodable], *, batch_size: int = BATCH_SIZE) -> Any:
        """`ImageFeatures` of an image, or a list for a list: encode once, compare often. Raises ImageError."""
        seen = list(self.each_encoded(listed(images), batch_size=batch_size))
        return seen if is_list(images) else seen[0]

    def embed_images(self, images: Encodable | Sequence[Encodable], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Unit vectors of images, one per query token: ``float32[N, Q, E]``, [N, 32, 256] in the published models.

        A single image gives ``float32[Q, E]``. The cosine of image and text is the maximum over the Q vectors.
        """
        seen = self.each_encoded(listed(images), batch_size=batch_size)
        vectors = [image.vectors_QE.float().cpu() for image in raising(seen)]
        return torch.stack(vectors) if is_list(images) else vectors[0]

    def embed_texts(self, texts: str | Sequence[str], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Unit vectors of texts: ``float32[M, E]``, or ``float32[E]`` for one. Raises OptionError.

        A text longer than the model's context (510 tokens in the published models) is refused, not truncated.
        """
        vectors = self.reader.embed_texts(self.reader.ids(listed(texts)), batch_size).float().cpu()
        return vectors if is_list(texts) else vectors[0]

    # ---- images and texts together ----

    def match(
        self,
        images: Encodable | Sequence[Encodable],
        texts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Matches:
        """Compare N images with M texts, all pairs: see `Matches`. Raises ImageError and OptionError.

        The features of an image are freed once it has been compared, so N may be large.
        """
        asked = listed(texts)
        ids = self.reader.ids(asked)
        texts_ME = self.reader.embed_texts(ids, batch_size)
        found = [
            self.reader.compare([image], ids, texts_ME, batch_size)
            for image in raising(self.each_encoded(listed(images), batch_size=batch_size))
        ]
        if not found:
            raise OptionError("there is no image; give at least one to compare with")
        probabilities = [matches.itc_probability for matches in found if matches.itc_probability is not None]
        return Matches(
            torch.cat([matches.itm_logits for matches in found]),
            torch.cat([matches.itc_cosine for matches in found]),
            torch.cat(probabilities) if probabilities else None,
        )

    def classify(
        self,
        images: Encodable | Sequence[Encodable],
        labels: Sequence[str],
        *,
        top: int = 5,
        template: str = "{}",
        candidates: int = 32,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Zero-shot classification: the ``top`` labels of an image as `Match`, best first; a list of such lists for a
        list.

        ``template`` is the text around each label ("a photo of a {}"). The ``candidates`` labels with the highest
        cosine are scored by ITM and ranked by that, so there may be thousands of labels. Raises ImageError and
        OptionError.
        """
        ranked = list(
            self.each_classified(
                listed(images), labels, top=top, template=template, candidates=candidates, batch_size=batch_size
            )
        )
        return ranked if is_list(images) else ranked[0]

    def each_classified(
        self,
        images: Sequence[Encodable],
        labels: Sequence[str],
        *,
        top: int = 5,
        template: str = "{}",
        candidates: int = 32,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Generator[list[Match] | ImageError, None, None]:
        """Like `classify`, but a generator that yields as batches finish."""
        if top < 1:
            raise OptionError(f"{option('top')} is {top}, use 1 or more")
        if isinstance(labels, str):
            raise OptionError(f"the labels are a single text, {labels!r}; give a list, such as ['cat', 'dog']")
        if not isinstance(template, str) or "{}" not in template:
            raise OptionError(
                f"{option('template')} is {template!r}, without a place for the label; add {{}} there"
            )
        labels = [] if labels is None else list(labels)
        for label in labels:
            check_text(label)
        texts = [template.replace("{}", clean(label)) for label in labels]
        ids = self.reader.ids(texts)
        texts_ME = self.reader.embed_texts(ids, batch_size)
        seen = self.each_encoded(images, on_error=on_error, batch_size=batch_size)
        return (
            image
            if isinstance(image, ImageError)
            else self.reader.classify(
                image, labels, ids, texts_ME, top=top, candidates=candidates, batch_size=batch_size
            )
            for image in seen
        )

    def embed_pairs(
        self,
        images: Encodable | Sequence[Encodable],
        texts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Tensor:
        """The multimodal feature of image-text pairs (N and N, one and N, N and one): ``float32[N, Q, D]``, D = 768.

        It is the output of the query tokens after image and text were processed together. A single pair gives
        ``float32[Q, D]``.
        """
        seen = self.encode(listed(images), batch_size=batch_size)
        fused = self.reader.embed_pairs(pairs(seen, listed(texts)), batch_size).float().cpu()
        return fused if is_list(images) or is_list(texts) else fused[0]

    def explain(self, image: Source, text: str) -> Explanation:
        """A heat map of the image regions that support the text, see `Explanation`.

        It is evidence, not proof. Raises ImageError and OptionError.
        """
        self.reader.ids([text])  # checks the text before the work begins
        return explain_match(self.reader, image_patches(image, self.frontend, self.model.encode), text)

    # ---- captions ----

    def caption(
        self, images: Encodable | Sequence[Encodable], *, batch_size: int = BATCH_SIZE, **options: Unpack[Options]
    ) -> Any:
        """Captions from the Q-Former alone, as trained in stage 1: a text for one image, a list for a list. Options are
        those of `GenerateOptions`.

        Raises OptionError if the files have no caption head (those on the Hugging Face hub have none).
        """
        if self.model.lm_head is None:
            raise OptionError(
                f"{self.name} cannot generate: its files lack the Q-Former's caption head, which only the authors' own "
                ".pth has (blip2 convert keeps it); for captions load a generative model"
            )
        tokenizer = self.reader.tokenizer
        engine = Engine(
            QFormerWriter(self.model),
            eos_token_ids=[tokenizer.token_id("[SEP]")],
            suppress_token_ids=[tokenizer.token_id(name) for name in ("[PAD]", "[CLS]", "[DEC]")],
            decode=tokenizer.decode,
            damage=partial(damage, self.model),
        )
        chosen = merged(CAPTION, options)
        texts: list[Any] = []
        seen = self.encode(listed(images), batch_size=batch_size)
        for start in range(0, len(seen), batch_size):
            prompts = [image.patches_PD for image in seen[start : start + batch_size]]
            for answers in engine.generate(prompts, chosen):
                captions = [tokenizer.decode(answer.tokens) for answer in answers]
                texts.append(captions if chosen.num_return > 1 else captions[0])
        return texts if is_list(images) else texts[0]

    # ---- shared by all tasks ----

    def each_encoded(
        self, images: Sequence[Encodable], *, on_error: OnError = "raise", batch_size: int = BATCH_SIZE
    ) -> Seen[ImageFeatures]:
        """Like `encode`, but a generator that yields as batches finish; ``on_error="return"``: errors in place."""
        return checked(self.frontend.see, images, on_error, batch_size)
