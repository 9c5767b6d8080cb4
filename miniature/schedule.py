"""The loop that both frozen parts are made with."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2.train.loop import autocast_for

autocast, _ = autocast_for("auto", torch.device("cpu"))
"""bfloat16, where the processor has instructions for it: elsewhere it is tens of times slower than float32."""
Batch = tuple[Tensor, ...]


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    losses: Callable[[nn.Module, Batch], dict[str, Tensor]],
    *,
    steps: int,
    peak: float,
    checkpoint: Path,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """AdamW, linear warm-up, cosine to a fiftieth; a progress line; a checkpoint that a second start goes on from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"going on from step {first} of {checkpoint}", flush=True)
    started, running = time.time(), defaultdict(float)
    for step in range(first, steps):
        rate = min((step + 1) / 200, 0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        with autocast():
            named = losses(model, next(batches))
        optimizer.zero_grad()
        sum(named.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, loss in named.items():
            running[name] += loss.item() / 50
        if (step + 1) % 50 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            text = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            left = pace * (steps - step - 1) / 60
            print(f"step {step + 1}/{steps}  {text}  {pace:.2f} s a step, {left:.0f} min left", flush=True)
            running.clear()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            model.eval()
            print(json.dumps(evaluate(model)), flush=True)
            model.train()
