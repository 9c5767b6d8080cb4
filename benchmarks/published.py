"""This package beside `transformers` on one checkpoint of a published shape: speed, memory, loading.

    python benchmarks/random_checkpoint.py flan-t5-xl /tmp/flan-t5-xl
    python benchmarks/published.py /tmp/flan-t5-xl [--sides transformers,bfloat16,int8,int4] [--what token,captions]
                                   [--rounds 3] [--json OUT]

Without a folder: the bundled miniature, in a minute. A side is `transformers` (bfloat16, its own `generate`, default
attention), `transformers-float32`, or a precision of ours. Each runs in a process of its own. Prints for every
measure the median of the rounds, their least and most, and how many times the first side's figure it is worth:

    token      ms per decoded token, one row, greedy: the median time between two of the 33 tokens of an answer; the
               bytes of weights that it reads, and the share of the machine's memory speed at which it reads them
    first      seconds from an image and a question to the first token of the answer
    second     the same for another question about the same image (transformers has to see it again)
    captions   images per second, 16 at once, greedy, 20 tokens each
    load       from files that are not in memory: seconds to load, seconds until the first token, and the
               most memory that was resident, mapped files included; beside it, seconds to read the files once

Sides that fit into memory together are asked in turn, round by round; otherwise one is closed before the next one
loads. The first tokens of the sides are compared, so that the work is known to be the same. The machine's limits
(see limits.py) are taken in every round. A sample during which others kept the machine busy is
taken again, and counts only where there is no better one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import limits
import torch

WHAT = ("load", "token", "first", "second", "captions")
QUESTION, SECOND_QUESTION = "how many dogs are there?", "what is in this picture?"
NUM_TOKENS, NUM_CAPTIONS, CAPTION_TOKENS = 33, 16, 20
UNDISTURBED, NUM_TRIES, PAUSE_S = 0.05, 3, 3  # the share of the processors that others may have during a sample
READ_BYTES = 2**24
COARSE = 100  # in fewer ticks of the system's clock than that, shares are not known
# The weights that one more token reads: the decoder's, but for the keys and values of the prompt, which are kept.
READ_A_TOKEN = re.compile(
    r"language\.(decoder|blocks|output)|language_model\.(lm_head|decoder\.block|model\.decoder\.layers)"
)
NOT_READ = re.compile(r"cross_attention\.(key|value)|EncDecAttention\.[kv]$")


# ---- the sides: each answers in tokens, and tells when each one came -----------------------------------------


class Ours:
    """The public interface; a precision is a dtype, or int8 or int4 for the language model with the rest in bf16."""

    def __init__(self, folder: str, precision: str) -> None:
        blip2 = importlib.import_module("blip2")
        self.GenerateOptions = importlib.import_module("blip2.generation").GenerateOptions
        is_quantized = precision.startswith("int")
        keywords = {"dtype": "bfloat16", "quantize": precision} if is_quantized else {"dtype": precision}
        self.pipeline = blip2.load(folder, device="cpu", **keywords)
        self.model = self.pipeline.speaker.model
        self.seen: Any = None

    def answer(self, image: Any, question: str, num_tokens: int) -> tuple[list[int], list[float]]:
        """The tokens, and the time at which each was there."""
        self.seen = self.pipeline.encode(image)
        return self.again(image, question, num_tokens)

    def again(self, image: Any, question: str, num_tokens: int) -> tuple[list[int], list[float]]:
        text = importlib.import_module("blip2.text").question_prompt(question, self.model.config.language.family)
        options = self.GenerateOptions(max_new_tokens=num_tokens, min_new_tokens=num_tokens)
        speaker = self.pipeline.speaker
        times: list[float] = []
        found = speaker.engine.generate(
            [speaker.prompt(self.seen, text, num_tokens)],
            options,
            on_token=lambda row, token: times.append(time.perf_counter()),
        )
        return list(found[0][0].tokens), times

    def captions(self, images: list[Any], num_tokens: int) -> list[list[int]]:
        found = self.pipeline.each_caption(
            images, num_beams=1, max_new_tokens=num_tokens, min_new_tokens=num_tokens, batch_size=len(images)
        )
        return [answers[0].tokens for answers in found]


class Transformers:
    """The reference as its documentation shows it, in bfloat16."""

    def __init__(self, folder: str, precision: str) -> None:
        transformers = importlib.import_module("transformers")
        self.dtype = getattr(torch, precision)
        model_class = transformers.Blip2ForConditionalGeneration
        self.model = model_class.from_pretrained(folder, dtype=self.dtype, local_files_only=True).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.criteria = transformers.StoppingCriteriaList

    def _inputs(self, images: list[Any], texts: list[str] | None) -> Any:
        return self.processor(images=images, text=texts, return_tensors="pt").to(self.dtype)

    @torch.inference_mode()
    def answer(self, image: Any, question: str, num_tokens: int) -> tuple[list[int], list[float]]:
        is_t5 = self.model.config.text_config.model_type == "t5"
        inputs = self._inputs([image], [f"Question: {question} {'Short answer' if is_t5 else 'Answer'}:"])
        times: list[float] = []

        def clock(tokens_BT: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens_BT), dtype=torch.bool)

        found = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            stopping_criteria=self.criteria([clock]),
        )  # fmt: skip
        return found[0, -num_tokens:].tolist(), times

    again = answer  # it keeps nothing of an image

    @torch.inference_mode()
    def captions(self, images: list[Any], num_tokens: int) -> list[list[int]]:
        inputs = self._inputs(images, None)
        found = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=num_tokens, min_new_tokens=num_tokens
        )
        return found[:, -num_tokens:].tolist()


def bytes_a_token(model: torch.nn.Module) -> int:
    """Of the linear layers that one more token goes through, as they are stored."""
    layers = {
        name: layer for name, layer in model.named_modules() if READ_A_TOKEN.match(name) and not NOT_READ.search(name)
    }
    total = sum(_stored_bytes(layer) for layer in layers.values())
    has_head = any(name.endswith(("lm_head", "language.output")) for name in layers)
    return total if has_head else total + model.get_parameter("language.token_embedding.weight").nbytes


def _stored_bytes(layer: torch.nn.Module) -> int:
    if not hasattr(layer, "in_features"):
        return 0
    if hasattr(layer, "codes"):
        return layer.codes.nbytes + layer.scales.nbytes
    return layer.weight.nbytes


def build(side: str, folder: str) -> Ours | Transformers:
    if side.startswith("transformers"):
        return Transformers(folder, side.removeprefix("transformers").lstrip("-") or "bfloat16")
    return Ours(folder, side)


# ---- the child: one side, which does what it reads from the parent, a line at a time ---------------------------


def pictures(number: int) -> list[Any]:
    """Different images, decoded: noise in large squares."""
    image = importlib.import_module("PIL.Image")
    random = importlib.import_module("numpy").random.default_rng(0)
    squares = random.integers(0, 256, (number, 8, 8, 3), "uint8")
    return [image.fromarray(picture.repeat(60, 0).repeat(60, 1)) for picture in squares]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def child(side: str, folder: str) -> None:
    """Load, say how long that took, and then measure what is asked for."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not a reply
    importlib.import_module("transformers" if side.startswith("transformers") else "blip2")
    images = pictures(NUM_CAPTIONS)
    load_s, made = seconds(lambda: build(side, folder))

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    reply(load_s=load_s, bytes_a_token=bytes_a_token(made.model))
    for line in sys.stdin:
        what = line.strip()
        started = time.perf_counter()
        if what == "captions":
            rows = made.captions(images, CAPTION_TOKENS)
            reply(captions_s=time.perf_counter() - started, tokens=rows)
            continue
        question, number = (QUESTION, NUM_TOKENS) if what == "token" else (QUESTION, 1)
        if what == "second":
            tokens, times = made.again(images[0], SECOND_QUESTION, 1)
        else:
            tokens, times = made.answer(images[0], question, number)
        between = [later - earlier for earlier, later in pairwise(times)]
        reply(
            first_s=times[0] - started,
            token_s=statistics.median(between) if between else None,
            tokens=tokens,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def processors() -> tuple[int, int]:
    """Ticks that all processors were at work, and ticks that passed, since the machine started."""
    spent = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(spent) - spent[3] - spent[4], sum(spent)


class Worker:
    """A side in a process of its own."""

    def __init__(self, side: str, folder: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, __file__, folder, "--child", side]
        self.side = side
        before = (*processors(), 0)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.loaded = self._reply()
        self.loaded["others"] = self._others(before)

    def ask(self, what: str) -> dict[str, Any]:
        """Do it; again, after a while, if somebody else kept the machine busy meanwhile. The least disturbed counts."""
        assert self.process.stdin is not None
        answers: list[dict[str, Any]] = []
        while not answers or (answers[-1]["others"] > UNDISTURBED and len(answers) < NUM_TRIES):
            if answers:
                time.sleep(PAUSE_S)
            before = self._ticks()
            print(what, file=self.process.stdin, flush=True)
            answer = self._reply()
            answers.append(answer | {"others": self._others(before)})
        return min(answers, key=lambda answer: answer["others"])

    def _ticks(self) -> tuple[int, int, int]:
        """Of the processors' time: spent by everybody, passed altogether, spent by this side."""
        own = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (*processors(), int(own[11]) + int(own[12]))

    def _others(self, before: tuple[int, int, int]) -> float:
        """The share of the processors that others have had since then."""
        everybody, passed, own = (later - earlier for earlier, later in zip(before, self._ticks(), strict=True))
        return max(everybody - own, 0) / passed if passed > COARSE else 0.0

    def close(self) -> None:
        self.process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side}: ended without an answer (status {self.process.wait()})")
        return json.loads(line)


# ---- the parent ----------------------------------------------------------------------------------------------


def weight_files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def forget(folder: str) -> None:
    """Take the files out of the page cache, as far as nobody has them mapped."""
    for path in weight_files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: str) -> float:
    """Seconds to read the weights from the disk, by as many threads as it takes to keep it busy."""
    forget(folder)
    starts = [(path, start) for path in weight_files(folder) for start in range(0, path.stat().st_size, READ_BYTES)]

    def read(place: tuple[Path, int]) -> None:
        with open(place[0], "rb", buffering=0) as file:
            file.seek(place[1])
            file.readinto(bytearray(READ_BYTES))

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, starts))
    return time.perf_counter() - started


def available_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def needed_bytes(side: str, folder: str) -> float:
    """About what a side holds when loaded, if the files are in 16 bits."""
    times = next(
        (times for ending, times in (("float32", 2.0), ("int8", 0.7), ("int4", 0.5)) if side.endswith(ending)), 1.0
    )
    return times * sum(path.stat().st_size for path in weight_files(folder)) + 1e9


def groups(sides: Sequence[str], folder: str) -> list[list[str]]:
    """The sides in turn, as many at a time as memory has room for."""
    found: list[list[str]] = []
    room = 0.0
    for side in sides:
        needed = needed_bytes(side, folder)
        if not found or needed > room:
            found.append([])
            room = 0.9 * available_bytes()
        found[-1].append(side)
        room -= needed
    return found


def add(samples: dict[str, list[Any]], others: float = 0.0, **values: Any) -> None:
    """Keep samples by name; those during which others had the machine, apart."""
    for name, value in values.items():
        samples.setdefault(name if others <= UNDISTURBED else f"{name} disturbed", []).append(value)


def kept(samples: dict[str, list[Any]], name: str) -> tuple[list[float], bool]:
    """The samples that count: those that nobody disturbed, or all that there are (and then True)."""
    return (samples[name], False) if samples.get(name) else (samples.get(f"{name} disturbed", []), True)


def measure_loads(folder: str, sides: Sequence[str], threads: int, rounds: int, found: dict[str, Any]) -> None:
    for _ in range(rounds):
        add(found["limits"], read_s=read_once(folder))
        for side in sides:
            forget(folder)
            worker = Worker(side, folder, threads)
            answered = worker.ask("first")
            worker.close()
            add(
                found["sides"][side],
                max(worker.loaded["others"], answered["others"]),
                load_s=worker.loaded["load_s"],
                start_s=worker.loaded["load_s"] + answered["first_s"],
                peak_bytes=answered["peak_bytes"],
            )


def measure_work(folder: str, sides: Sequence[str], what: Sequence[str], threads: int, found: dict[str, Any]) -> None:
    """One round: everything of every side."""
    add(found["limits"], **limits.measure())
    workers = [Worker(side, folder, threads) for side in sides]
    for worker in workers:
        worker.ask("first")  # brings the weights into memory
    for name in what:
        for worker in workers:
            answered = worker.ask(name)
            keep = partial(add, found["sides"][worker.side], answered["others"])
            found["tokens"].setdefault(name, {})[worker.side] = answered["tokens"]
            if name == "captions":
                keep(captions_a_s=NUM_CAPTIONS / answered["captions_s"])
            else:
                keep(**{f"{name}_s": answered["token_s" if name == "token" else "first_s"]})
    for worker in workers:
        found["sides"][worker.side]["bytes_a_token"] = [worker.loaded["bytes_a_token"]]
        worker.close()


# name of the samples: what is printed, unit, how many of it in one, whether more is better
ROWS: dict[str, tuple[str, str, float, bool]] = {
    "token_s": ("a token, one row", "ms", 1e3, False),
    "first_s": ("picture to first token", "s", 1, False),
    "second_s": ("second question", "s", 1, False),
    "captions_a_s": ("captions, 16 at once", "images/s", 1, True),
    "load_s": ("load, files not in memory", "s", 1, False),
    "start_s": ("load to first token", "s", 1, False),
    "peak_bytes": ("most memory resident", "GB", 1e-9, False),
}


def show(found: dict[str, Any]) -> None:
    sides = found["sides"]
    reference, *others = sides
    for name, (label, unit, scale, is_more_better) in ROWS.items():
        if not kept(sides[reference], name)[0]:
            continue
        base = statistics.median(kept(sides[reference], name)[0])
        print(f"\n{label}, {unit}")
        for side, samples in sides.items():
            values, is_disturbed = kept(samples, name)
            middle = statistics.median(values)
            worth = middle / base if is_more_better else base / middle
            spread = f"({min(values) * scale:.4g} to {max(values) * scale:.4g})"
            line = f"  {side:21} {middle * scale:9.4g}  {spread:20}  {worth:6.2f} x"
            if name == "token_s":
                read = samples["bytes_a_token"][0]
                share = read / middle / statistics.median(found["limits"]["memory"])
                line += f"  reads {read / 1e9:.2f} GB, {read / middle / 1e9:.1f} GB/s, {share:.0%} of the machine's"
            print(f"{line}  (others kept the machine busy)" if is_disturbed else line)
        if name == "load_s":
            print(f"  reading the files once: {statistics.median(found['limits']['read_s']):.4g}")
    print()
    for what, tokens in found["tokens"].items():
        for side in others:
            same, number = same_tokens(tokens[reference], tokens[side])
            print(f"{what}: {side} writes the first {same} of {number} tokens as {reference} does")


def same_tokens(left: list[Any], right: list[Any]) -> tuple[int, int]:
    """How many tokens agree from the start of each row on, and of how many."""
    rows = [(left, right)] if not isinstance(left[0], list) else list(zip(left, right, strict=True))
    same = 0
    for first, second in rows:
        for one, other in zip(first, second, strict=True):
            if one != other:
                break
            same += 1
    return same, sum(len(first) for first, _ in rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", help="of a checkpoint; without one, the bundled miniature")
    parser.add_argument(
        "--sides", default="transformers,bfloat16", help="the first is what the others are held against"
    )
    parser.add_argument("--what", default=",".join(WHAT), help=f"some of {','.join(WHAT)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where to write every sample")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args.child, args.folder)
    folder = args.folder or str(importlib.import_module("blip2.checkpoint").BUNDLED["miniature"])
    sides, what = args.sides.split(","), args.what.split(",")
    found: dict[str, Any] = {
        "name": Path(folder).name,
        "command": f"python benchmarks/published.py {Path(folder).name} --sides {args.sides} --what {args.what} "
        f"--rounds {args.rounds} --threads {args.threads}",
        "threads": args.threads,
        "limits": {},
        "sides": {side: {} for side in sides},
        "tokens": {},
    }
    if "load" in what:
        measure_loads(folder, sides, args.threads, args.rounds, found)
    work = [name for name in WHAT if name in what and name != "load"]
    for _ in range(args.rounds if work else 0):
        for together in groups(sides, folder):
            measure_work(folder, together, work, args.threads, found)
    print(f"{found['name']}, {args.threads} threads, {args.rounds} rounds")
    if "memory" in found["limits"]:
        limits.show({name: statistics.median(values) for name, values in found["limits"].items() if name != "read_s"})
    show(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
