"""Decoder-only language models with layers of the Llama or GPT-2 architecture.

B rows, T tokens of this call, S tokens so far, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from blip2.config import DecoderConfig
from blip2.language import gpt, llama
from blip2.language.decoding import placed, prefill, step
from blip2.language.norm import RMSNorm
from blip2.language.rotary import View, turns
from blip2.language.stepping import as_plane, program_for, run
from blip2.layers import KVCache
from blip2.linear import Linear, Table
from blip2.native.program import Planes, Program


class Decoder(nn.Module):
    """For the protocol see `blip2.language`; a prompt is the beginning of the text."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        table = Table if config.is_tied else nn.Embedding
        self.token_embedding = table(config.vocab_size, config.hidden_size)
        self.position_embedding, self.embedding_norm = None, None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.has_embedding_norm:
            self.embedding_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        block = llama.Block if config.make == "llama" else gpt.Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.final_norm = (
            RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
            if config.make == "llama"
            else nn.LayerNorm(config.hidden_size, config.norm_eps)
        )
        self.output: nn.Module | None = None
        """With tied embeddings: their quantised copy as output layer, or None."""
        if not config.is_tied:
            self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation; the embeddings may have a lower precision."""
        return self.final_norm.weight.dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``."""
        embedded_BTD = self.token_embedding(tokens_BT).to(self.dtype)
        if self.config.embedding_scale == 1:
            return embedded_BTD
        # Rounded as in Gemma's training: the root of 3072 is 55.5 in bfloat16.
        return embedded_BTD * float(torch.tensor(self.config.embedding_scale, dtype=self.dtype))

    def forward(
        self,
        embeddings_BTD: Tensor,
        cache: KVCache | None = None,
        *,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``float[B, T, D]`` after the final norm; each token attends to those before it in its row.

        With a cache the tokens continue the cached rows. Rows of different lengths are right-padded by the caller.
        ``positions_BT`` and ``mask`` bool[B, 1, T, T] (without a cache) override this: training packs several texts
        behind one prefix.
        """
        positions_BT, mask = placed(embeddings_BTD, cache, positions_BT, mask)
        keys_BS = None if cache is not None else positions_BT
        far_and_near = self._far_and_near(positions_BT, mask, keys_BS, embeddings_BTD.dtype)
        x_BTD = self.entered(embeddings_BTD, positions_BT)
        if (program := program_for(x_BTD, cache, self.blocks, self._write_step)) is not None:
            assert cache is not None
            planes = [plane for view in far_and_near for plane in _planes(view)]
            return self.final_norm(run(program, x_BTD, positions_BT, [*planes, *cache.planes()]))
        for layer, block in enumerate(self.blocks):
            view = self._view(layer, far_and_near)
            x_BTD = block(x_BTD, layer=layer, cache=cache, positions_BT=positions_BT, view=view)
        return self.final_norm(x_BTD)

    def entered(self, embeddings_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """The input of the first layer."""
        x_BTD = embeddings_BTD if self.config.input_scale == 1 else embeddings_BTD * self.config.input_scale
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_BT).to(x_BTD.dtype)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def views(
        self, positions_BT: Tensor, mask: Tensor | None, keys_BS: Tensor | None, dtype: torch.dtype
    ) -> list[View]:
        """The view of each layer. ``keys_BS``: the positions of visible tokens; None with a cache, where each has its
        slot."""
        far_and_near = self._far_and_near(positions_BT, mask, keys_BS, dtype)
        return [self._view(layer, far_and_near) for layer in range(len(self.blocks))]

    def _view(self, layer: int, far_and_near: tuple[View, View]) -> View:
        view = far_and_near[self._is_near(layer)]
        return view if self._is_turned(layer) else view._replace(turn=None)

    def _far_and_near(
        self, positions_BT: Tensor, mask: Tensor | None, keys_BS: Tensor | None, dtype: torch.dtype
    ) -> tuple[View, View]:
        """The views of layers with full attention, and of layers with a sliding window."""
        config = self.config
        if config.positions == "slopes":
            return (View(self._sloping(positions_BT, mask, keys_BS, dtype), None),) * 2
        if config.rotary is None:
            return (View(mask, None),) * 2
        far = near = View(mask, turns(config.rotary, positions_BT, dtype))
        if any(config.window_layers):
            turn = far.turn if config.window_rotary is None else turns(config.window_rotary, positions_BT, dtype)
            near = View(self._windowed(positions_BT, mask, keys_BS), turn)
        return far, near

    def _is_near(self, layer: int) -> bool:
        return bool(self.config.window_layers) and self.config.window_layers[layer]

    def _is_turned(self, layer: int) -> bool:
        is_unturned = bool(self.config.layers_without_rotary) and self.config.layers_without_rotary[layer]
        return self.config.rotary is not None and not is_unturned

    def _write_step(self, program: Program) -> None:
        """Planes: mask, cosines and sines of full attention, then of the sliding window; each layer's keys and
        values."""
        has_bool_mask = self.config.positions != "slopes"
        for layer, block in enumerate(self.blocks):
            mask = 3 * self._is_near(layer)
            planes = Planes(6 + 2 * layer, 7 + 2 * layer, mask, has_bool_mask=has_bool_mask)
            if self._is_turned(layer):
                planes = planes._replace(cos=mask + 1, sin=mask + 2)
            block.write_step(program, planes)  # type: ignore[operator]

    def _windowed(self, positions_BT: Tensor, mask: Tensor | None, keys_BS: Tensor | None) -> Tensor | None:
        """The mask of a layer with a sliding window."""
        window = self.config.window
        assert window is not None
        if (positions_BT.shape[1] if mask is None else mask.shape[-1]) <= window:
            return mask
        distance_B1TS = _distances(positions_BT, mask, keys_BS)
        return (distance_B1TS < window) & _seen(distance_B1TS, mask)

    def _sloping(
        self, positions_BT: Tensor, mask: Tensor | None, keys_BS: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The mask with ALiBi slopes (Press et al., 2022): ``float[B, H, T, S]``."""
        distance_B1TS = _distances(positions_BT, mask, keys_BS)
        find = remembered_slopes if type(positions_BT) is Tensor else slopes  # as in `turns`
        slopes_H11 = find(self.config.num_heads, positions_BT.device)[:, None, None]
        bias_BHTS = (-slopes_H11 * distance_B1TS).to(dtype)
        return bias_BHTS.masked_fill(~_seen(distance_B1TS, mask), float("-inf"))

    def logits(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``."""
        if self.output is not None:
            scores = self.output(hidden)
        else:
            assert isinstance(self.token_embedding, Table)
            scores = self.token_embedding.scores(hidden.to(self.token_embedding.weight.dtype))
        if self.config.logit_scale != 1:
            scores = scores * self.config.logit_scale
        cap = self.config.logit_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def prefill(self, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Read right-padded prompts; returns the logits of each row's next token ``float[B, V]``, and the state."""
        return prefill(self, prompt_BTD, lengths_B, num_new_tokens)

    def step(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row; returns the logits of the next one, ``float[B, V]``."""
        return step(self, tokens_B, cache)


def _planes(view: View) -> list[Tensor]:
    """What a program reads of a view; a placeholder without rotary positions."""
    assert view.mask is not None
    mask = as_plane(view.mask)
    return [mask, mask, mask] if view.turn is None else [mask, view.turn.cos, view.turn.sin]


def _distances(positions_BT: Tensor, mask: Tensor | None, keys_BS: Tensor | None) -> Tensor:
    """The distance of each token from another in tokens: ``int64[B, 1, T, S]``."""
    if keys_BS is None:
        assert mask is not None
        keys_BS = torch.arange(mask.shape[-1], device=positions_BT.device)[None]
    return (positions_BT[..., None] - keys_BS[:, None])[:, None]


def _seen(distance_B1TS: Tensor, mask: Tensor | None) -> Tensor:
    return distance_B1TS >= 0 if mask is None else mask


def slopes(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi's slope of each head: ``float32[H]``."""
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2 ** (-8 * number / power) for number in range(1, power + 1)]
    others = [2 ** (-4 * number / power) for number in range(1, 2 * (num_heads - power), 2)]
    with torch.inference_mode(False):
        return torch.tensor(first + others, dtype=torch.float32, device=device)


remembered_slopes = cache(slopes)  # a recorded GPU step must not compute it
