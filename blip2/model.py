"""The complete models, as in Figure 1 of the paper.

    pixels_BCHW --image encoder--> patches_BPD --QFormer--> queries_BQD --projection--> prompt_BQD
                                                                (EncodedImage)

The Q-Former of an InstructBLIP also reads the prompt; its EncodedImage has the patch features.

B images, C colours, H, W pixels, P patches (class token first), Q query tokens, T text tokens, D width of the
respective part, E width of the joint space of images and texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import Blip2Config, ConvolutionalConfig, MatcherConfig, VisionConfig
from blip2.convolutional import ConvolutionalEncoder
from blip2.language import Language, build_language_model
from blip2.layers import freeze
from blip2.qformer import Memory, QFormer, QFormerOutput
from blip2.vision import VisionTransformer

Vision = VisionTransformer | ConvolutionalEncoder
"""An image encoder: pixels to patch features. Its last norm is BLIP-2's own."""


def build_image_encoder(config: VisionConfig | ConvolutionalConfig) -> Vision:
    """An image encoder with uninitialised weights."""
    return ConvolutionalEncoder(config) if isinstance(config, ConvolutionalConfig) else VisionTransformer(config)


class Blip2(nn.Module):
    """Image encoder, Querying Transformer, projection, language model."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = build_image_encoder(config.vision)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.hidden_size, config.language.hidden_size)
        self.language: Language = build_language_model(config.language)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels ``float[B, 3, H, W]`` to the content of an `EncodedImage`: ``float[B, Q, D]``, or for an
        InstructBLIP, whose Q-Former needs the prompt, patch features ``float[B, 1 + P, D]``."""
        return self.kept(self.vision(pixels_BCHW))

    def kept(self, patches_BPD: Tensor) -> Tensor:
        """As `encode`, from patch features ``float[B, 1 + P, D]``."""
        return patches_BPD if self.config.reads_prompt else self.look(patches_BPD)

    def patches(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels ``float[B, 3, H, W]`` to patch features ``float[B, 1 + P, D]`` in the Q-Former's dtype."""
        return self.vision(pixels_BCHW).to(self.qformer.query_tokens.dtype)

    def look(
        self,
        patches_BPD: Tensor,
        image_bias: Tensor | None = None,
        instruction: Sequence[int] | None = None,
    ) -> Tensor:
        """Patch features ``float[B, 1 + P, D]`` to the Q-Former's output ``float[B, Q, D]``; ``image_bias``: see
        `QFormer`.

        ``instruction``: token ids that the Q-Former of an InstructBLIP reads as well.

        Each part may have its own dtype and device; here and in `prompt` the tensors are converted.
        """
        patches_BPD = patches_BPD.to(self.qformer.query_tokens)
        text_BT = None
        if instruction is not None:
            text_BT = torch.tensor([*instruction], device=patches_BPD.device).expand(len(patches_BPD), -1)
        seen = self.qformer(image_BPD=patches_BPD, text_BT=text_BT, image_bias=image_bias)
        return seen.hidden_BSD[:, : self.config.qformer.num_query_tokens]

    def prompt(self, queries_BQD: Tensor) -> Tensor:
        """Q-Former output ``float[..., Q, D]`` to soft prompts ``float[..., Q, D]`` of the language model's width."""
        projected_BQD = self.projection(queries_BQD.to(self.projection.weight))
        return projected_BQD.to(self.language.token_embedding.weight.device, self.language.dtype)

    def freeze_pretrained(self) -> None:
        """Freeze all but the Q-Former, the projection and the norm of the patch features, as in both training
        stages."""
        freeze(self.vision)
        self.vision.post_norm.requires_grad_(True)
        freeze(self.language)


class QFormerLMHead(nn.Module):
    """BERT's prediction head, with which the Q-Former generates captions in stage 1.

    The output layer is tied to the word embeddings; ``decoder_bias`` is the only additional parameter.
    """

    def __init__(self, width: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder_bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, word_table_VD: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_table_VD, self.decoder_bias)


class Blip2Matcher(nn.Module):
    """Image encoder and Q-Former with text: compares, matches, and (stage 1) captions."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        width = config.qformer.hidden_size
        self.vision = build_image_encoder(config.vision)
        self.qformer = QFormer(config.qformer)
        self.vision_projection = nn.Linear(width, config.projection_size)
        self.text_projection = nn.Linear(width, config.projection_size)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07)) if config.has_lm_head else None
        self.lm_head = (
            QFormerLMHead(width, config.qformer.vocab_size, config.qformer.layer_norm_eps)
            if config.has_lm_head
            else None
        )

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels ``float[B, 3, H, W]`` to patch features ``float[B, 1 + P, D]`` in the Q-Former's dtype."""
        return self.vision(pixels_BCHW).to(self.qformer.query_tokens.dtype)

    def embed_image(self, patches_BPD: Tensor) -> tuple[Tensor, QFormerOutput]:
        """The image's unit vectors ``float[B, Q, E]``, one for each query token, and the Q-Former pass that gave
        them."""
        seen = self.qformer(image_BPD=patches_BPD)
        return F.normalize(self.vision_projection(seen.hidden_BSD), dim=-1), seen

    def embed_text(self, text_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """The text's unit vector ``float[B, E]``, from its first token."""
        read = self.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT)
        return F.normalize(self.text_projection(read.hidden_BSD[:, 0]), dim=-1)

    def match(
        self,
        patches_BPD: Tensor | None,
        text_BT: Tensor,
        text_mask_BT: Tensor,
        *,
        image_bias: Tensor | None = None,
        image_keys: Memory | None = None,
    ) -> Tensor:
        """Logits ``float[B, 2]`` of pairs: [:, 1] is the score of a match. The mean over the query tokens (section
        3.1).

        ``patches_BPD`` may be a single image for many texts. ``image_keys`` replace it; for these and ``image_bias``
        see `QFormer`.
        """
        fused = self.qformer(
            image_BPD=patches_BPD, image_keys=image_keys, text_BT=text_BT, text_mask_BT=text_mask_BT,
            image_bias=image_bias,
        )  # fmt: skip
        return self.itm_head(fused.hidden_BSD[:, : self.config.qformer.num_query_tokens]).mean(dim=1)

    def caption_logits(self, text_BT: Tensor, text_mask_BT: Tensor, seen: QFormerOutput) -> Tensor:
        """Next-token logits ``float[B, T, V]`` of a text that starts with the [DEC] token, given the image pass."""
        written = self.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT, memory=seen.memory)
        assert self.lm_head is not None and self.qformer.word_embedding is not None, "no caption head"
        return self.lm_head(written.hidden_BSD, self.qformer.word_embedding.weight)

    def freeze_pretrained(self) -> None:
        """Freeze all but the Q-Former, its heads and the norm of the patch features."""
        freeze(self.vision)
        self.vision.post_norm.requires_grad_(True)


def similarity(images_NQE: Tensor, texts_ME: Tensor) -> Tensor:
    """Cosine of every image with every text ``float[N, M]``: the maximum over the image's query tokens (section
    3.1)."""
    return torch.einsum("nqe,me->nmq", images_NQE, texts_ME).amax(dim=-1)


def identity(model: Blip2 | Blip2Matcher) -> str:
    """Identifies a model by its Q-Former, in 16 hexadecimal digits, independent of dtype and device.

    Features of two models can be compared or exchanged only if this is equal.
    """
    qformer = model.qformer
    digest = hashlib.sha256(repr((type(model).__name__, model.config.vision, qformer.config)).encode())
    digest.update(model.config.adapted.encode())  # adapters change matrices, which are not hashed
    # Norms and biases identify a model as well as its matrices, and are read much faster.
    vectors = [weight for weight in qformer.parameters() if weight.dim() == 1]
    for weight in (qformer.query_tokens, *vectors):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
