"""Throughput and latency of `blip2 serve` at 1 to 32 clients, beside the obvious server in the same run.

    python benchmarks/serve.py [--models miniature,random] [--clients 1,4,32] [--seconds 10] [--json OUT]

The obvious server is FastAPI around `transformers` with a lock: one request after the other. Both answer the same
request (a greedy caption, --tokens new tokens) with the same weights. ``random`` is a model with 300 million
parameters and more, made for the run. Ours is asked in three ways: about three images in turn, which it encodes
once; the same streamed, with the time to the first token; about new images, each request another. The obvious server
does not stream and encodes whatever it is given, so one way tells all. Everything happens on 127.0.0.1, in a bounded
time, and clients and servers share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = [ROOT / f"examples/{name}.png" for name in ("picture", "flowers", "cats")]
WAYS = ("seen", "streamed", "new")
Row = dict[str, Any]

OBVIOUS = """
import base64, io, sys, threading
import torch, transformers, uvicorn
from fastapi import FastAPI
from PIL import Image
folder, port, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
processor = transformers.Blip2Processor.from_pretrained(folder)
app, lock = FastAPI(), threading.Lock()

@app.get("/ready")
def ready(): return {}

@app.post("/caption")
def caption(body: dict):
    image = Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB")
    with lock, torch.inference_mode():
        inputs = processor(images=image, return_tensors="pt").to(model.dtype)
        tokens = body["max_tokens"]
        out = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return {"text": processor.batch_decode(out, skip_special_tokens=True)[0]}

uvicorn.run(app, port=port, log_level="error")
"""


def make_random(folder: Path) -> None:
    """A model of an OPT with 24 layers of 1024, the published Q-Former, and a small image encoder."""
    import torch

    from benchmarks.random_checkpoint import opt_tokenizer
    from blip2 import checkpoint
    from blip2.config import Blip2Config, OPTConfig, QFormerConfig, VisionConfig
    from blip2.model import Blip2

    torch.manual_seed(0)
    language = OPTConfig(vocab_size=50304, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096,
                         max_position_embeddings=512, eos_token_id=50118)  # fmt: skip
    vision = VisionConfig(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1536, image_size=224,
                          patch_size=14)  # fmt: skip
    qformer = QFormerConfig(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1536,
                            encoder_hidden_size=384)  # fmt: skip
    model = Blip2(Blip2Config(vision, qformer, language, image_token_id=50265)).eval()
    # Beside these the positions decide, so that each token is another one, and has a text that can be streamed.
    torch.nn.init.normal_(model.language.token_embedding.weight, std=0.02)
    print(f"random model: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters", flush=True)
    checkpoint.save(model, folder, tokenizer=opt_tokenizer().to_str())


@contextmanager
def server(command: list[str], url: str) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


class Connection:
    """One client that keeps its connection: as little as HTTP needs, since clients and servers share the cores."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> tuple[float, float]:
        """Seconds until the first byte of the answer's body, and until the last."""
        began_s = time.perf_counter()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"the server answered {head.decode()}")
        if found := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            await self._reader.readexactly(int(found[1]))
            first_s = time.perf_counter()
        else:  # in chunks
            first_s = 0.0
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                first_s = first_s or time.perf_counter()
                await self._reader.readexactly(size + 2)
            await self._reader.readexactly(2)
        return first_s - began_s, time.perf_counter() - began_s

    def close(self) -> None:
        self._writer.close()


Requests = Callable[[int], bytes]
"""The request of a number, ready to be sent."""


def requests(is_ours: bool, way: str, tokens: int) -> Requests:
    """For a caption of an image, by the ``WAYS`` to ask."""
    pictures = [gif(picture) for picture in PICTURES]
    fields: dict[str, Any] = {"max_tokens": tokens}
    if is_ours:
        fields |= {"min_new_tokens": tokens, "num_beams": 1}
    image: Any = "IMAGE"
    path, name = "/caption", "image"
    if way == "streamed":
        path, name = "/v1/chat/completions", "messages"
        url = {"url": "data:image/gif;base64,IMAGE"}
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
        fields["stream"] = True
    before, after = json.dumps({**fields, name: image}).encode().split(b"IMAGE")

    def request(number: int) -> bytes:
        picture = pictures[number % len(pictures)]
        if way == "new":  # another first colour of the palette
            picture = picture[:13] + number.to_bytes(3, "big") + picture[16:]
        content = before + base64.b64encode(picture) + after
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    return request


def gif(path: Path) -> bytes:
    """With a palette at a known place, so that another image is quickly made of it."""
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(stream, "GIF")
    return stream.getvalue()


async def load(port: int, request: Requests, numbers: Iterator[int], num_clients: int, seconds: float) -> Row:
    """So many clients, each asking again as soon as it is answered."""
    found: list[tuple[float, float]] = []
    connections = [await Connection.open(port) for _ in range(num_clients)]
    for _ in PICTURES:
        await connections[0].ask(request(next(numbers)))
    began_s = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - began_s < seconds:
            found.append(await connections[number].ask(request(next(numbers))))

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    took_s = time.perf_counter() - began_s
    for connection in connections:
        connection.close()
    firsts, wholes = (sorted(column) for column in zip(*found, strict=True))
    row: Row = {"clients": num_clients, "requests": len(found), "requests_per_s": len(found) / took_s}
    for name, values in (("first_token_s", firsts), ("answer_s", wholes)):
        row |= {f"{name}_p50": statistics.median(values), f"{name}_p99": values[int(0.99 * (len(values) - 1))]}
    return row


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def line(row: Row) -> str:
    found = (
        f"{row['model']:10} {row['server']:25} {row['way']:9} {row['clients']:3} clients  "
        f"{row['requests_per_s']:7.2f} requests/s ({row['times']:.1f} x)  "
        f"answer p50 {row['answer_s_p50']:.3f} s p99 {row['answer_s_p99']:.3f} s"
    )
    if row["way"] == "streamed":
        found += f"  first token p50 {row['first_token_s_p50']:.3f} s p99 {row['first_token_s_p99']:.3f} s"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="miniature,random")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models.split(","):
            folder = ROOT / "blip2/miniature/generative"
            if model == "random":
                make_random(folder := Path(scratch) / "random")
            for name in ("blip2 serve", "transformers with a lock"):
                port = free_port()
                is_ours, url = name == "blip2 serve", f"http://127.0.0.1:{port}"
                ours = [sys.executable, "-m", "blip2", "serve", "--port", str(port), "-m", str(folder)]
                obvious = [sys.executable, "-c", OBVIOUS, str(folder), str(port), "float32"]
                with server([*ours, "--dtype", "float32"] if is_ours else obvious, url):
                    for way in WAYS if is_ours else ("new",):
                        request = requests(is_ours, way, args.tokens)
                        alone = 0.0
                        for clients in map(int, args.clients.split(",")):
                            row = asyncio.run(load(port, request, numbers, clients, args.seconds))
                            alone = alone or row["requests_per_s"]
                            row |= {"model": model, "server": name, "way": way}
                            rows.append(row | {"times": row["requests_per_s"] / alone})
                            print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"threads": os.cpu_count(), "tokens": args.tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
