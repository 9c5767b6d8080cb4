"""A token's way through a quantised language model in one call of C: what its layers compute, one after the other."""

from __future__ import annotations

import random

import pytest
import torch

from blip2 import checkpoint, native
from blip2.language import pad_rows, stepping
from blip2.layers import recorded_attention
from blip2.native import program

transformers = pytest.importorskip("transformers")

from tests.parity.decoders import ENCODER_DECODERS, FAMILIES, redraw, reference  # noqa: E402

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the C kernels are not compiled here")

ALL = ["opt", *FAMILIES, *ENCODER_DECODERS]
LENGTHS = (7, 1, 12, 4)
# A number of another last bit may be rounded to the next of the 15 bits that activations have.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@pytest.fixture
def runs(monkeypatch):
    """How many tokens have gone through a program."""
    counted = []
    once = program.Program.run
    monkeypatch.setattr(program.Program, "run", lambda self, *what: (counted.append(len(what[0])), once(self, *what)))
    return counted


def model_of(family, seed, folder, bits):
    if family == "opt":
        chance = random.Random(seed)
        heads = chance.randint(1, 5)
        config = transformers.OPTConfig(
            vocab_size=60, hidden_size=heads * 2 * chance.randint(2, 9), ffn_dim=chance.randint(9, 50),
            num_hidden_layers=chance.randint(1, 4), num_attention_heads=heads, max_position_embeddings=64,
        )  # fmt: skip
        config.word_embed_proj_dim = config.hidden_size
        redraw(transformers.AutoModelForCausalLM.from_config(config), seed).save_pretrained(folder)
    else:
        reference(family, seed).save_pretrained(folder)
    return checkpoint.load_language(folder, quantize=f"int{bits}").eval()


@torch.inference_mode()
def steps(model, dtype):
    """Logits of steps, with rows of mixed length that are chosen, split and joined in between."""
    ids = [[(7 * row + 3 * place + 5) % 37 for place in range(length)] for row, length in enumerate(LENGTHS)]
    prompts = [model.embed(torch.tensor(row)).to(dtype) for row in ids]
    states = []
    for some in (prompts[:3], prompts[3:]):
        states.append(model.prefill(*pad_rows(some), 10)[1])
    found = []

    def go(tokens, state):
        found.append(model.step(torch.tensor(tokens), state).float())

    go([3, 4, 5], states[0])
    go([6], states[1])
    states[0].select(torch.tensor([2, 0, 2]))
    go([8, 9, 10], states[0])
    states[0].join(states[1])
    go([11, 12, 13, 14], states[0])
    states[0].select(torch.tensor([3, 1]))
    go([15, 16], states[0])
    return torch.cat(found)


def check(family, seed, folder, bits, dtype, runs):
    model = model_of(family, seed, folder, bits).to(dtype)
    ours = steps(model, dtype)
    assert runs, family
    runs.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "is_plain", lambda *_: False)
        plain = steps(model, dtype)
    assert not runs
    worst = ((ours - plain).abs().max() / max(1.0, plain.abs().max())).item()
    assert worst < TOLERANCES[dtype], (family, seed, bits, dtype)
    return worst


@pytest.mark.parametrize("family", ALL)
def test_a_program_computes_what_the_layers_do(family, tmp_path, runs):
    for bits, dtype in ((8, torch.float32), (4, torch.float32), (8, torch.bfloat16)):
        check(family, 0, tmp_path / f"{bits} {dtype}", bits, dtype, runs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("bits", [8, 4])
def test_forty_of_each(family, bits, tmp_path, runs):
    for dtype in TOLERANCES:
        worst = max(check(family, seed, tmp_path / f"{dtype} {seed}", bits, dtype, runs) for seed in range(40))
        print(f"\n{family} {bits} bits {dtype}: {worst:.1e}")


@pytest.mark.parametrize("family", ["opt", "llama", "t5", "bloom"])
def test_the_same_numbers_on_every_processor_and_by_any_number_of_threads(family, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "BYTES_A_THREAD", 0)
    model = model_of(family, 3, tmp_path, 4)
    expected = steps(model, torch.float32)
    library, threads = native.kernels(), torch.get_num_threads()
    try:
        for level in range(len(native.LEVELS)):
            library.blip2_prepare(level)
            found = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(steps(model, torch.float32))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
            # Sums of attention are in another order, and what is rounded to 15 bits then is another number at times.
            torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(threads)
        library.blip2_prepare(len(native.LEVELS) - 1)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_a_row_does_not_depend_on_its_company(family, tmp_path):
    model = model_of(family, 1, tmp_path, 8)
    with torch.inference_mode():
        prompts = [model.embed(torch.tensor(row)) for row in ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14])]
        states = [model.prefill(*pad_rows(some), 4)[1] for some in (prompts, *([one] for one in prompts))]
        for tokens in ([3, 4, 5], [6, 7, 8]):
            together = model.step(torch.tensor(tokens), states[0])
            alone = [model.step(torch.tensor([token]), state) for token, state in zip(tokens, states[1:], strict=True)]
            assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
@pytest.mark.parametrize("rows", [1, 40])
def test_operations_that_threads_share(family, rows, tmp_path, runs):
    """Widths of several pieces, and so many rows and slots that every kind of operation is divided."""
    sizes = {
        "llama": {"hidden_size": 1536, "intermediate_size": 2304, "num_hidden_layers": 2, "num_attention_heads": 12,
                  "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 256},
        "opt": {"hidden_size": 1280, "word_embed_proj_dim": 1280, "ffn_dim": 2500, "num_hidden_layers": 2,
                "num_attention_heads": 10, "vocab_size": 64, "max_position_embeddings": 256},
        "t5": {"d_model": 1280, "d_kv": 96, "d_ff": 2100, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 11,
               "vocab_size": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    }[family]  # fmt: skip
    config = {"llama": transformers.LlamaConfig, "opt": transformers.OPTConfig, "t5": transformers.T5Config}[family]
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    redraw(kind.from_config(config(**sizes)), 1).save_pretrained(tmp_path)
    model = checkpoint.load_language(tmp_path, quantize="int8").eval()
    threads = torch.get_num_threads()

    def logits():
        with torch.inference_mode():
            prompts_BTD = model.embed((torch.arange(rows * 30).view(rows, 30) * 7) % 60)
            state = model.prefill(prompts_BTD, torch.arange(rows) % 20 + 10, 3)[1]
            return torch.stack([model.step((torch.arange(rows) + step) % 60, state) for step in range(2)])

    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(logits())
            assert runs
        assert torch.equal(*found)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stepping, "is_plain", lambda *_: False)
            plain = logits()
    finally:
        torch.set_num_threads(threads)
    assert (found[0] - plain).abs().max() < TOLERANCES[torch.float32] * max(1.0, plain.abs().max())


def test_whoever_looks_into_the_layers_still_sees_them(tmp_path, runs):
    """Attention weights, hooks, gradients, and layers that are no longer those that were loaded."""
    model = model_of("llama", 0, tmp_path, 8)
    first = model.blocks[0]

    def step():
        with torch.inference_mode():
            state = model.prefill(model.embed(torch.tensor([[5, 6, 7]])), torch.tensor([3]), 2)[1]
            return model.step(torch.tensor([4]), state)

    expected = step()
    assert runs
    runs.clear()
    with recorded_attention() as seen:
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-3)
    assert seen
    called = []
    handle = first.output.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-3)
    handle.remove()
    assert len(called) == 2  # the prompt, the token
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(step().float(), expected, rtol=0.1, atol=0.1)
    whole = first.down
    first.down = torch.nn.Linear(whole.in_features, whole.out_features, bias=whole.bias is not None)
    bias = {} if whole.bias is None else {"bias": whole.bias}
    first.down.load_state_dict({"weight": whole.dequantized(), **bias})
    torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-3)
    first.down = whole
    with torch.enable_grad():
        embedded = model.embed(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
        state = model.prefill(embedded, torch.tensor([3]), 2)[1]
        model.step(torch.tensor([4]), state).sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    assert not runs


def test_a_number_that_is_none_stays_so(tmp_path, runs):
    model = model_of("llama", 0, tmp_path, 8)
    with torch.inference_mode():
        model.blocks[-1].feed_forward_norm.weight[0] = float("nan")
        state = model.prefill(model.embed(torch.tensor([[5, 6, 7]])), torch.tensor([3]), 2)[1]
        assert model.step(torch.tensor([4]), state).isnan().all()
    assert runs
