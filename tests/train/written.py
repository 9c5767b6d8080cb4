"""Recipes of tiny runs that learn from collections."""


def write(path, data, start, stage=1, steps=8):
    path.write_text(
        f"""
        stage = {stage}
        start = "{start}"
        out = "{path.stem}"
        precision = "fp32"
        threads = 1
        checkpoint_every = 3
        {data}
        [optim]
        steps = {steps}
        batch_size = 4
        warmup_steps = 2
        """
    )
    return path
