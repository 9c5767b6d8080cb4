"""What one of several processes does in a test: how much memory it needs for a language model of 200 MB.

    python -m tests.train.memory_of_shares language        # or nothing, for all of it in each
"""

import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

from blip2.config import OPTConfig
from blip2.language import build_language_model
from blip2.train.group import joined
from blip2.train.shard import shard

CONFIG = OPTConfig(vocab_size=1000, hidden_size=1024, num_layers=4, num_heads=8, intermediate_size=4096)


def memory_mb():
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


if __name__ == "__main__":
    with joined(torch.device("cpu")) as group:
        import torch.distributed.fsdp  # which takes memory by itself
        import torch.distributed.tensor
        model = nn.Module()
        parts = [part for part in sys.argv[1:] if part]
        queries = nn.Parameter(torch.randn(2, 8, 1024))

        def compute():
            model.language(queries).square().sum().backward()

        with group.in_turn("made"):
            model.language = build_language_model(CONFIG).requires_grad_(False)
            size = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
            if parts:
                shard(model, parts, group, torch.device("cpu"))
        compute()
        compute()
        print(json.dumps({"mb": memory_mb(), "model_mb": size}))
