"""``save_pretrained``: its arguments, and settings that this package's own files do not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2 import checkpoint
from blip2.checkpoint.save import MAX_SHARD_SIZE_BYTES
from blip2.checkpoint.settings import read_json
from blip2.compat.loading import check_names, size_bytes
from blip2.disk import write_text
from blip2.errors import OptionError

WITHOUT_EFFECT = (
    "token", "use_auth_token", "save_peft_format", "save_original_format", "repo_id", "commit_message", "save_function",
)  # fmt: skip
HEEDED = ("max_shard_size", "is_main_process")
REFUSED = {
    "push_to_hub": "uploading is not supported; save it, and then: hf upload NAME FOLDER",
    "variant": "variants of files are not supported; save to another folder",
    "state_dict": "the model's own weights are saved; use load_state_dict for others",
}


def save(model: Any, folder: Path, options: Mapping[str, Any]) -> None:
    """Write a model in the published layout, with the current configuration.

    - ``max_shard_size``: maximum size of a file of weights, "5GB" (the default) or a number of bytes.
    - ``is_main_process=False`` writes nothing, for the other processes of a training.
    - ``safe_serialization=False``, ``push_to_hub``, ``variant``, ``state_dict``: not supported.

    Raises OptionError for these, TypeError for an unknown argument.
    """
    check_names("save_pretrained", options, (*HEEDED, *WITHOUT_EFFECT, *REFUSED, "safe_serialization"))
    for name, reason in REFUSED.items():
        if options.get(name) not in (None, False):
            raise OptionError(f"{name}: {reason}")
    if options.get("safe_serialization") is False:
        raise OptionError("safe_serialization=False would write a pickle; weights are always saved as safetensors")
    if not options.get("is_main_process", True):
        return
    model.sync()
    asked = options.get("max_shard_size")
    largest = MAX_SHARD_SIZE_BYTES if asked is None else size_bytes(asked)
    checkpoint.save(model.model, folder, max_shard_size_bytes=largest)
    content = model.config.to_dict() | read_json(folder / "config.json")
    for part, values in model.config.to_dict().items():
        if isinstance(values, dict) and isinstance(content.get(part), dict):
            content[part] = values | content[part]
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    _write(folder / "config.json", content)
    if model.preprocessor is not None:
        _write(folder / "preprocessor_config.json", model.preprocessor)
    if (settings := model.generation_settings()) is not None:
        _write(folder / "generation_config.json", settings)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
