"""Language models of the Llama make, alone: this package beside `transformers` and beside llama.cpp.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python gguf    # compiled for this processor
    python benchmarks/decoders.py 1.1b /tmp/llama-1.1b --llama /tmp/llama/bin/python [--json OUT]
        [--sides transformers,bfloat16,int8,Q8_0,int4,Q4_0] [--rounds 5] [--threads 2]

Writes a model of that shape with random weights (once), and the same weights as GGUF. A side is `transformers`
(bfloat16), a precision of ours, or a type of llama.cpp, each in a process of its own; all are asked in turn, round by
round. Prints the median of the rounds, their least and most:

    token        ms per decoded token, one row, greedy, 64 of them after a prompt of 33; the bytes of weights that it
                 reads, and the share of the machine's memory speed at which it reads them
    prompt 33    ms to read a prompt of so many tokens, up to the first new one
    prompt 512   the same

The first tokens are compared, so that the work is known to be the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS, NUM_TOKENS = (33, 512), 64
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
         "torch_dtype": "bfloat16"}  # fmt: skip
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
NAMES = {"embed_tokens": "token_embd", "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
         "v_proj": "attn_v", "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down", "norm": "output_norm", "lm_head": "output"}  # fmt: skip
"""The last part of a weight's name here, and that of llama.cpp."""


def prompt(number: int, vocab_size: int) -> list[int]:
    return [(7919 * (place + 1)) % (vocab_size - 3) + 3 for place in range(number)]


# ---- the sides: each reads a prompt, and goes on ---------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, side: str) -> None:
        self.torch = importlib.import_module("torch")
        load_language = importlib.import_module("blip2.checkpoint").load_language
        dtype = self.torch.bfloat16
        self.model = load_language(folder, dtype=dtype, quantize=side if side.startswith("int") else None)

    def read(self, tokens: list[int]) -> int:
        with self.torch.inference_mode():
            embedded_BTD = self.model.embed(self.torch.tensor([tokens]))
            scores, self.cache = self.model.prefill(embedded_BTD, self.torch.tensor([len(tokens)]), NUM_TOKENS)
            return int(scores.argmax(-1))

    def go_on(self, token: int) -> int:
        with self.torch.inference_mode():
            return int(self.model.step(self.torch.tensor([token]), self.cache).argmax(-1))


class Transformers:
    def __init__(self, folder: Path, side: str) -> None:
        self.torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch.bfloat16)

    def read(self, tokens: list[int]) -> int:
        self.past = None
        return self._next(tokens)

    def go_on(self, token: int) -> int:
        return self._next([token])

    def _next(self, tokens: list[int]) -> int:
        with self.torch.inference_mode():
            said = self.model(
                self.torch.tensor([tokens]), past_key_values=self.past, use_cache=True, logits_to_keep=1
            )
            self.past = said.past_key_values
            return int(said.logits[0, -1].argmax())


class LlamaCpp:
    """By its C interface: a call of Python's for each token, as on the other sides."""

    def __init__(self, file: Path, threads: int) -> None:
        self.lib = lib = importlib.import_module("llama_cpp")
        self.numpy = importlib.import_module("numpy")
        self.log = lib.llama_log_callback(lambda level, text, data: None)  # kept: it is called later
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        model_options = lib.llama_model_default_params()
        self.model = lib.llama_load_model_from_file(str(file).encode(), model_options)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def read(self, tokens: list[int]) -> int:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._next(tokens)

    def go_on(self, token: int) -> int:
        return self._next([token])

    def _next(self, tokens: list[int]) -> int:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp: llama_decode failed")
        scores = self.lib.llama_get_logits_ith(self.context, -1)
        return int(self.numpy.ctypeslib.as_array(scores, (self.size,)).argmax())


def child(side: str, folder: Path, threads: int) -> None:
    """Load, say so, and then measure what is asked for: a line at a time."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    made: Any
    if side.startswith("Q"):
        made = LlamaCpp(gguf_file(folder, side), threads)
    else:
        made = (Transformers if side == "transformers" else Ours)(folder, side)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    print(json.dumps({"bytes_a_token": bytes_a_token(made, folder, side)}), file=replies, flush=True)
    for line in sys.stdin:
        what, number = line.split()
        started = time.perf_counter()
        tokens = [made.read(prompt(int(number), vocab_size))]
        read_s = time.perf_counter() - started
        times = []
        if what == "token":
            for _ in range(NUM_TOKENS - 1):
                started = time.perf_counter()
                tokens.append(made.go_on(tokens[-1]))
                times.append(time.perf_counter() - started)
        seconds = statistics.median(times) if times else read_s
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=replies, flush=True)


def bytes_a_token(made: Any, folder: Path, side: str) -> int:
    """Of all weights but the table of tokens, of which a token reads one row."""
    if side.startswith("Q"):
        reader = importlib.import_module("gguf").GGUFReader(gguf_file(folder, side))
        return sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name != "token_embd.weight")
    tensors = {**dict(made.model.named_parameters()), **dict(made.model.named_buffers())}
    return sum(tensor.nbytes for name, tensor in tensors.items() if "embed" not in name)


# ---- the model ---------------------------------------------------------------------------------------------------


def gguf_file(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}-{kind}.gguf")


def write_model(folder: Path, shape: str) -> None:
    import torch
    import transformers
    from random_checkpoint import write_json, write_weights

    folder.mkdir(parents=True)
    config = LLAMA | SHAPES[shape]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    write_weights(folder, {name: tensor.shape for name, tensor in model.state_dict().items()}, "bfloat16")
    write_json(folder / "config.json", config)


def write_gguf(folder: Path, kind: str) -> None:
    """The same weights for llama.cpp; run by the Python that has `gguf`."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = gguf_file(folder, kind)
    temporary = out.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            begin = stream.tell()
        header.pop("__metadata__", None)
        content = np.memmap(file, np.uint16, "r", offset=begin)
        for name, entry in header.items():
            first, last = (place // 2 for place in entry["data_offsets"])
            values = (content[first:last].astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
            parts = name.removeprefix("model.").split(".")
            known = NAMES[parts[-2]]
            if known in heads:  # pairs of a head stand side by side there
                values = values.reshape(heads[known], 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
            type_ = gguf.GGMLQuantizationType[kind] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                f"{prefix}{known}.weight", gguf.quants.quantize(np.ascontiguousarray(values), type_), raw_dtype=type_
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, out)


# ---- the parent --------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, side: str, args: argparse.Namespace) -> None:
        python = args.llama if side.startswith("Q") else sys.executable
        command = [python, __file__, args.shape, str(args.folder), "--child", side, "--threads", str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1",
                       "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.side = side
        self.bytes_a_token = self._reply()["bytes_a_token"]

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.side}: ended without an answer (status {self.process.wait()})")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--sides", default="transformers,bfloat16,int8,Q8_0,int4,Q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "gguf":
        for kind in args.sides.split(","):
            write_gguf(args.folder, kind)
        return
    if args.child:
        child(args.child, args.folder, args.threads)
        return
    import limits

    if not args.folder.exists():
        write_model(args.folder, args.shape)
    sides = args.sides.split(",")
    if missing := [side for side in sides if side.startswith("Q") and not gguf_file(args.folder, side).exists()]:
        kinds = ["--child", "gguf", "--sides", ",".join(missing)]
        subprocess.run([args.llama, __file__, args.shape, str(args.folder), *kinds], check=True)
    workers = [Worker(side, args) for side in sides]
    whats = [f"token {PROMPTS[0]}", *(f"prompt {number}" for number in PROMPTS)]
    found: dict[str, dict[str, list[float]]] = {side: {what: [] for what in whats} for side in sides}
    memory: list[float] = []
    tokens: dict[str, list[int]] = {}
    for number in range(args.rounds + 1):
        memory.append(limits.memory_read())
        for what in whats:
            for worker in workers:
                said = worker.ask(what)
                if number:  # the first round brings the weights into memory
                    found[worker.side][what].append(said["seconds"])
                if what == whats[0]:
                    tokens[worker.side] = said["tokens"]
    read = {worker.side: worker.bytes_a_token for worker in workers}
    for worker in workers:
        worker.process.communicate()
    show(found, read, statistics.median(memory), tokens)
    if args.json:
        content = {"shape": args.shape, "threads": args.threads, "memory": memory, "bytes_a_token": read, "s": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(
    found: dict[str, dict[str, list[float]]], read: dict[str, int], memory: float, tokens: dict[str, list[int]]
) -> None:
    print(f"memory is read at {memory / 1e9:.1f} GB/s")
    for what in next(iter(found.values())):
        print(f"\n{what}, ms")
        for side, samples in found.items():
            taken = statistics.median(samples[what])
            spread = f"({min(samples[what]) * 1e3:.4g} to {max(samples[what]) * 1e3:.4g})"
            line = f"  {side:13} {taken * 1e3:8.4g}  {spread:20}"
            if what.startswith("token"):
                rate = read[side] / taken
                line += f"  reads {read[side] / 1e9:.3f} GB, {rate / 1e9:.1f} GB/s, {rate / memory:.0%} of memory's"
            print(line)
    first, *others = tokens
    for side in others:
        same = sum(1 for _ in iter_same(tokens[first], tokens[side]))
        print(f"{side} writes the first {same} of {NUM_TOKENS} tokens as {first} does")


def iter_same(left: list[int], right: list[int]) -> Any:
    for one, other in zip(left, right, strict=True):
        if one != other:
            return
        yield one


if __name__ == "__main__":
    main()
