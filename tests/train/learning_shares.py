"""What one of several processes does in a test: a few steps of an image encoder that learns, of which it has a share.

    python -m tests.train.learning_shares out.pt
"""

import sys
from pathlib import Path

import torch
from torch import nn

from blip2.config import VisionConfig
from blip2.train.group import joined
from blip2.train.optim import build_optimizer, clip_gradients, sum_gradients, trained_parameters
from blip2.train.recipes import DataRecipe, OptimRecipe, Recipe
from blip2.train.shard import any_shares, gather, shard
from blip2.train.state import load_state, save_state
from blip2.vision import VisionTransformer

CONFIG = VisionConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, image_size=32, patch_size=16)


def made():
    torch.manual_seed(0)
    model = nn.Module()
    model.vision = VisionTransformer(CONFIG)
    model.head = nn.Linear(16, 3)
    return model


if __name__ == "__main__":
    out = Path(sys.argv[1])
    cpu = torch.device("cpu")
    optim = OptimRecipe(steps=9, batch_size=6, peak_lr=0.01)
    recipe = Recipe(1, "", out.with_suffix(""), DataRecipe(), optim)
    with joined(cpu) as group:

        def begin():
            model = made()
            shard(model, ["vision"], group, cpu)
            parameters = trained_parameters(model)
            return model, parameters, build_optimizer(parameters, optim)

        model, parameters, optimizer = begin()
        norms = []
        for step in range(3):
            pixels_BCHW = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            for rows in pixels_BCHW[group.share(6)].split(2 if group.size == 1 else 1):  # two or more parts
                (model.head(model.vision(rows)).square().sum() / 6).backward()
            sum_gradients(group, parameters, torch.zeros(1))
            norms.append(clip_gradients(group, parameters, 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        save_state(recipe.out, parameters, optimizer, recipe, step=3, is_writer=group.is_first)
        has_shares = any_shares(parameters.values())
        group.objects(None)
        other, others, another = begin()
        first = load_state(recipe.out, others, another, recipe, group)
        save_state(recipe.out / "again", others, another, recipe, step=3, is_writer=group.is_first)
        gather(model, group, needs_frozen=True)
        if group.is_first:
            from safetensors.torch import load_file

            state, again = (load_file(folder / "state.safetensors") for folder in (recipe.out, recipe.out / "again"))
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
            found = {"norms": norms, "first": first, "shares": has_shares}
            torch.save(found | {"weights": weights, "state": state, "again": again}, out)
