"""The Querying Transformer (section 3 of the paper; ``Qformer.py`` in the authors' code).

A BERT encoder in which learned query tokens attend to the image by cross-attention in every second layer. Query
tokens and text share the self-attention; each has feed-forward layers of its own. The same weights have three uses,
which differ in the attention mask (rows attend to columns):

    image-text contrast        image-text matching        image-grounded generation
          Q Q T T                    Q Q T T                    Q Q T T
        Q 1 1 . .                  Q 1 1 1 1                  Q 1 1 . .
        Q 1 1 . .                  Q 1 1 1 1                  Q 1 1 . .
        T . . 1 1                  T 1 1 1 1                  T 1 1 1 .
        T . . 1 1                  T 1 1 1 1                  T 1 1 1 1

In the first, query tokens and text are two passes. In the third, the query tokens do not attend to the text, so their
keys and values are those of the first (`QFormerOutput.memory`) and only the text is computed.

B rows, Q query tokens, T text tokens, S both, P image patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import QFormerConfig
from blip2.dropout import drop
from blip2.layers import attend, split_heads
from blip2.linear import Linear

Memory = list[tuple[Tensor, Tensor]]


class QFormerOutput(NamedTuple):
    """``hidden_BSD``: query tokens first, then text. ``memory``: self-attention keys and values of each layer."""

    hidden_BSD: Tensor
    memory: Memory


class Attention(nn.Module):
    """BERT's attention with its output layer: residual, then layer norm."""

    def __init__(self, config: QFormerConfig, *, source_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = Linear(width, width)
        self.key = Linear(source_size, width)
        self.value = Linear(source_size, width)
        self.output = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.key(source), self.num_heads), split_heads(self.value(source), self.num_heads)

    def forward(self, x_BSD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = attend(split_heads(self.query(x_BSD), self.num_heads), key, value, mask=mask, dropout=dropout)
        return self.norm(x_BSD + drop(self.output(attended), dropout, self.training))


class FeedForward(nn.Module):
    """BERT's feed-forward layer: erf GELU, residual, then layer norm."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out = self.output(F.gelu(self.intermediate(x_BSD)))
        return self.norm(x_BSD + drop(out, self.dropout, self.training))


class Layer(nn.Module):
    """Self-attention over query tokens and text, cross-attention for the query tokens only, two feed-forward layers."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = Attention(config, source_size=config.hidden_size)
        self.cross_attention = (
            Attention(config, source_size=config.encoder_hidden_size) if has_cross_attention else None
        )
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if config.has_text else None

    def forward(
        self,
        x_BSD: Tensor,
        *,
        num_queries: int,
        image: Tensor | tuple[Tensor, Tensor] | None,
        image_bias: Tensor | None,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        key, value = own = self.self_attention.keys_values(x_BSD)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        x_BSD = self.self_attention(x_BSD, key, value, mask)
        queries_BQD, text_BTD = x_BSD[:, :num_queries], x_BSD[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None:
                assert image is not None, "query tokens need an image"
                key, value = image if isinstance(image, tuple) else self.cross_attention.keys_values(image)
                if len(key) != len(x_BSD):  # one image for many texts: computed once
                    key, value = (part.expand(len(x_BSD), -1, -1, -1) for part in (key, value))
                queries_BQD = self.cross_attention(queries_BQD, key, value, image_bias)
            parts.append(self.query_feed_forward(queries_BQD))
        if text_BTD.shape[1]:
            assert self.text_feed_forward is not None, "this Q-Former has no text branch"
            parts.append(self.text_feed_forward(text_BTD))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], own


class QFormer(nn.Module):
    """The query tokens, the embeddings of the text branch (if there is one), and the layers."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.word_embedding = nn.Embedding(config.vocab_size, width) if config.has_text else None
        self.position_embedding = (
            nn.Embedding(config.max_position_embeddings, width) if config.has_text else None
        )
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, has_cross_attention=index % config.cross_attention_frequency == 0)
            for index in range(config.num_layers)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """BERT's initialisation, also of the query tokens: equal ones would stay equal in training."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        *,
        image_BPD: Tensor | None = None,
        image_keys: Memory | None = None,
        text_BT: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        memory: Memory | None = None,
        image_bias: Tensor | None = None,
    ) -> QFormerOutput:
        """One pass, by what is given:

        - ``image_BPD`` alone: the query tokens attend to the image;
        - ``text_BT`` alone: the text by itself;
        - both: query tokens and text attend to each other (matching), text padding masked;
        - ``text_BT`` and ``memory`` of an image pass: the text attends to the query tokens and its past (generation).

        ``image_BPD`` float[B or 1, P, encoder_hidden_size], or its `image_keys`; ``text_BT`` int[B, T] token ids;
        ``text_mask_BT`` bool[B, T], True for real tokens (default: all). ``image_bias`` float[C, B or 1, H, Q, P] is
        added to the scores of the C layers with cross-attention: its gradient shows the influence of each patch, and
        minus infinity hides a patch.
        """
        embedded: list[Tensor] = []
        images = image_BPD if image_keys is None else image_keys[0][0]
        if images is not None:
            rows = len(images if text_BT is None else text_BT)
            embedded.append(self.query_tokens.expand(rows, -1, -1))
        if text_BT is not None:
            embedded.append(self._embed_text(text_BT))
        num_queries = self.config.num_query_tokens if images is not None else 0
        x_BSD = self.embedding_norm(torch.cat(embedded, dim=1) if len(embedded) > 1 else embedded[0])
        x_BSD = drop(x_BSD, self.config.dropout, self.training)

        mask = self._mask(num_queries, text_BT, text_mask_BT, memory)
        own: Memory = []
        biases: Iterator[Tensor] = iter(image_bias if image_bias is not None else ())
        keys: Iterator[tuple[Tensor, Tensor]] = iter(image_keys if image_keys is not None else ())
        for index, layer in enumerate(self.layers):
            x_BSD, keys_values = layer(
                x_BSD,
                num_queries=num_queries,
                image=next(keys, image_BPD) if layer.cross_attention is not None else None,
                image_bias=next(biases, None) if layer.cross_attention is not None else None,
                mask=mask,
                past=memory[index] if memory is not None else None,
            )
            own.append(keys_values)
        return QFormerOutput(x_BSD, own)

    def image_keys(self, image_BPD: Tensor) -> Memory:
        """Cross-attention keys and values of images for each layer, which do not depend on the text, to share them
        between passes. ``image_BPD`` as in `forward`."""
        looking = (layer.cross_attention for layer in self.layers if isinstance(layer, Layer))
        return [attention.keys_values(image_BPD) for attention in looking if attention is not None]

    def _embed_text(self, text_BT: Tensor) -> Tensor:
        """Word and position embeddings; positions count only text tokens, since query tokens have none."""
        assert self.word_embedding is not None and self.position_embedding is not None, "no text branch"
        if text_BT.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"the text has {text_BT.shape[1]} tokens, but the Q-Former reads at most "
                f"{self.config.max_position_embeddings}; shorten it"
            )
        return self.word_embedding(text_BT) + self.position_embedding.weight[: text_BT.shape[1]]

    def _mask(
        self, num_queries: int, text_BT: Tensor | None, text_mask_BT: Tensor | None, memory: Memory | None
    ) -> Tensor | None:
        """The masks above, as ``bool`` that broadcasts to [B, H, S, S]; None if nothing is masked."""
        if text_BT is None or (text_mask_BT is None and memory is None):
            return None
        rows, length = text_BT.shape
        if text_mask_BT is None:
            text_mask_BT = torch.ones_like(text_BT, dtype=torch.bool)
        visible_queries = memory[0][0].shape[2] if memory is not None else num_queries
        queries_BQ = torch.ones(rows, visible_queries, dtype=torch.bool, device=text_BT.device)
        mask_B11S = torch.cat([queries_BQ, text_mask_BT.bool()], dim=1)[:, None, None]
        if memory is None:
            return mask_B11S
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=text_BT.device).tril()
        return mask_B11S & F.pad(causal_TT, (visible_queries, 0), value=True)
