"""Language models to decode with: one that is a table, and tiny random ones of both families."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blip2.checkpoint.decoders import parse_decoder
from blip2.config import OPTConfig, T5Config
from blip2.language import build_language_model

EOS = 0


@dataclass
class TableState:
    previous_R: Tensor

    def select(self, rows_N):
        self.previous_R = self.previous_R[rows_N]

    def forget(self):
        pass

    def join(self, other):
        self.previous_R = torch.cat([self.previous_R, other.previous_R])


class TableLanguage:
    """The next token's logits depend on the last two tokens: ``table_VVV[before, last]``.

    A prompt is ``float[T, 1]``; its last value is the token that it ends with. What came before it counts as 0.
    """

    def __init__(self, table_VVV):
        self.table_VVV = table_VVV
        self.rows_of_calls = []

    def prefill(self, prompt_BTD, lengths_B, num_new_tokens):
        self.rows_of_calls.append(len(prompt_BTD))
        last_B = prompt_BTD[torch.arange(len(lengths_B)), lengths_B - 1, 0].long()
        return self.table_VVV[0, last_B], TableState(last_B)

    def step(self, tokens_B, state):
        self.rows_of_calls.append(len(tokens_B))
        logits_BV = self.table_VVV[state.previous_R, tokens_B]
        state.previous_R = tokens_B
        return logits_BV

    @staticmethod
    def prompt(*tokens):
        return torch.tensor(tokens, dtype=torch.float32)[:, None]

    def log_prob(self, prompt, tokens):
        """Of an answer, step by step and by itself."""
        before, last, total = 0, int(prompt[-1, 0]), 0.0
        for token in tokens:
            total += self.table_VVV[before, last].log_softmax(-1)[token].item()
            before, last = last, token
        return total


@pytest.fixture
def table_language():
    """A random table over so many tokens; token 0 is the end."""

    def make(vocabulary, seed=0, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        return TableLanguage(torch.randn(vocabulary, vocabulary, vocabulary, generator=generator) * scale)

    return make


def _randomise(model, seed):
    """Weights large enough that tokens differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name == "token_embedding.weight":
                parameter.copy_(values * 0.4)  # small beside what the blocks add: OPT's text should not repeat itself
            elif "embedding" in name or name.endswith("table.weight"):
                parameter.copy_(values)
            elif name == "output.weight":
                parameter.copy_(values * 0.7)
            elif name.endswith("attention.query.weight"):  # T5's, whose scores are not scaled
                parameter.copy_(values * 0.2)
            elif name.endswith("self_attention.qkv.weight"):
                third = len(parameter) // 3
                parameter.copy_(values * 1.5 * parameter.shape[1] ** -0.5)
                parameter[:third] = values[:third] * 0.2
            elif parameter.dim() == 2:
                parameter.copy_(values * 1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(values * 0.1)
            else:
                parameter.copy_(1 + 0.3 * values)
    return model.eval()


SEEDS = {"llama, tied": 3}  # of models that end their texts


@pytest.fixture(scope="session", params=["opt", "t5", "llama", "llama, tied"])
def language(request):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_heads": 3, "intermediate_size": 32}
    if request.param == "opt":
        config = OPTConfig(num_layers=2, max_position_embeddings=64, eos_token_id=EOS, **sizes)
    elif request.param.startswith("llama"):
        config = parse_decoder({
            "model_type": "gemma3_text", "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "head_dim": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
            "sliding_window": 5, "sliding_window_pattern": 2, "final_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 6, "eos_token_id": EOS, "tie_word_embeddings": request.param == "llama, tied",
        })  # fmt: skip
    else:
        config = T5Config(
            num_layers=2, num_decoder_layers=3, head_size=6, num_buckets=8, max_distance=12, eos_token_id=EOS,
            decoder_start_token_id=3, **sizes,
        )  # fmt: skip
    return _randomise(build_language_model(config), seed=SEEDS.get(request.param, 4))


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of mixed length."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(length, 24, generator=generator) for length in (3, 9, 1, 5, 5, 12, 2, 7)]
