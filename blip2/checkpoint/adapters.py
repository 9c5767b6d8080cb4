"""Adapters in `peft`'s format (LoRA, rsLoRA and DoRA), merged into the weights while these are read.

An adapter is a folder with adapter_config.json and adapter_model.safetensors, trained on the reference's model, so its
module names are those of the published files. It adds s B A to a weight W (Hu et al., 2021), with s = alpha / r, or
alpha / sqrt(r) (rsLoRA). A DoRA also gives each row of the sum a trained length (Liu et al., 2024). An adapter may
contain whole weights that were trained as well. Everything is computed in float32, then cast or quantised.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blip2.checkpoint.keys import ALIASES
from blip2.checkpoint.reader import Place, places_in
from blip2.checkpoint.settings import read_json
from blip2.disk import replace as replace_files
from blip2.errors import CheckpointError, OptionError, option

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Asked = str | Path | Sequence[str | Path] | Mapping[Any, float]
PREFIXES = ("", "language_model.")
"""Prefixes of names: trained on the whole model, or on its language model alone."""
ALSO_CALLED = {name for names in ALIASES.values() for name in names}
"""Other names of the token embeddings, if they are not separate weights."""
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector)(\.weight)?")
LORA = {"A": "first", "B": "second", "magnitude_vector": "lengths"}
# Settings of adapter_config.json that are not supported: the field, and the values that do not use the feature.
ONLY: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    # Other methods also change the weights that the adapter belongs to.
    ("init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal")),
    ("lora_bias", (False, None)),
    ("use_qalora", (False, None)),
    ("use_bdlora", (False, None)),
    ("alora_invocation_tokens", (None,)),
    ("arrow_config", (None,)),
    ("kasa_config", (None,)),
    ("monteclora_config", (None,)),
    ("layer_replication", (None,)),
    ("trainable_token_indices", (None,)),
    ("target_parameters", (None, [])),
)


@dataclass(frozen=True)
class LowRank:
    """The change of a weight ``float[N, D]``: ``first`` float[r, D], ``second`` float[N, r], ``lengths`` float[N]."""

    scale: float
    first: Place
    second: Place
    lengths: Place | None

    def applied(self, weight_ND: Tensor) -> Tensor:
        """The changed weight, in float32."""
        changed_ND = weight_ND.float() + self.scale * (self.second.read().float() @ self.first.read().float())
        if self.lengths is None:
            return changed_ND
        lengths_N = self.lengths.read().float().view(-1) / torch.linalg.vector_norm(changed_ND, dim=1)
        return lengths_N[:, None] * changed_ND


@dataclass(frozen=True)
class Adapter:
    """An adapter with its ``weight``: 1 is as trained. Changes by the published names of the weights."""

    path: Path
    weight: float
    changes: Mapping[str, LowRank | Place]
    kind: str = "LoRA"

    @property
    def ranks(self) -> list[int]:
        """All ranks that occur."""
        return sorted({change.first.shape[0] for change in self.changes.values() if isinstance(change, LowRank)})

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        places = (
            (each.first, each.second, each.lengths) if isinstance(each, LowRank) else (each,)
            for each in self.changes.values()
        )
        return sum(math.prod(place.shape) for several in places for place in several if place is not None)


class Adapters:
    """Several adapters, each with its weight; their changes are added."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = list(adapters)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters)

    @classmethod
    def of(cls, asked: Asked | None) -> Adapters | None:
        """From a folder or a name on the hub, several of them, or each with its weight; None for none.

        Raises `CheckpointError` if it is not an adapter, or of an unsupported kind.
        """
        if asked is None:
            return None
        if isinstance(asked, str | os.PathLike):
            asked = [asked]
        weights = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(asked, 1.0)
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise OptionError(
                    f"{option('adapter')}: the weight of {name} is {weight!r}; give a number, such as 0.5"
                )
        return cls([read_adapter(folder_of(name), weight) for name, weight in weights.items()]) if weights else None

    def fitted(self, shapes: Mapping[str, tuple[int, ...]], tables: set[str], folder: Path) -> Adapters:
        """The same for a model whose weights have these published names and shapes; ``tables``: the token embeddings.

        Raises `CheckpointError` that names a module that is unknown or does not fit.
        """
        return Adapters([_fitted(adapter, shapes, tables, folder) for adapter in self._adapters])

    @property
    def digest(self) -> str:
        """Identifies the changes to image encoder and Q-Former, 16 hexadecimal digits; "" if only the language model
        changes."""
        seeing = [
            adapter for adapter in self._adapters if any(not name.startswith("language_") for name in adapter.changes)
        ]
        if not seeing:
            return ""
        digest = hashlib.sha256()
        for adapter in seeing:
            digest.update(repr(float(adapter.weight)).encode())
            for name in (CONFIG, WEIGHTS):
                digest.update((adapter.path / name).read_bytes())
        return digest.hexdigest()[:16]

    def merged(self, rows: Mapping[str, int], tensor: Tensor) -> Tensor:
        """A tensor with all changes applied; ``rows``: the names and row counts of its parts, in order."""
        if not any(name in adapter.changes for name in rows for adapter in self._adapters):
            return tensor
        if len(rows) == 1:
            return self._merged(next(iter(rows)), tensor)
        parts = zip(rows, tensor.split(list(rows.values())), strict=True)
        return torch.cat([self._merged(name, part) for name, part in parts]).view(tensor.shape)

    def _merged(self, name: str, before: Tensor) -> Tensor:
        changing = [adapter for adapter in self._adapters if name in adapter.changes]
        merged = before = before.float()
        for adapter in changing:
            change = adapter.changes[name]
            after = change.applied(before) if isinstance(change, LowRank) else change.read().float().view(before.shape)
            is_all = len(changing) == 1 and adapter.weight == 1
            merged = after if is_all else merged + adapter.weight * (after - before)
        return merged


def folder_of(name: str | Path) -> Path:
    """The folder of an adapter, downloaded if it is a name on the hub. Raises `CheckpointError`."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder; give the folder of an adapter, or its name on the hub")
    from blip2.checkpoint import hub  # slow to import, and not needed for a folder

    return hub.fetch_files(name, (CONFIG, WEIGHTS))


def read_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Read an adapter. Raises `CheckpointError` for missing files and unsupported kinds."""
    if not (folder / WEIGHTS).exists():
        pickled = (folder / WEIGHTS).with_suffix(".bin").exists()
        hint = "; save it as safetensors (pickles are not read)" if pickled else "; is it the folder of an adapter?"
        raise CheckpointError(f"{folder}: there is no {WEIGHTS}{hint}")
    config = read_json(folder / CONFIG)
    for name, known in ONLY:
        if (value := config.get(name)) not in known:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {reprlib.repr(value)}; this kind of adapter is not supported here: "
                "merge it with the program that made it"
            )
    found: dict[str, dict[str, Place]] = {}
    changes: dict[str, LowRank | Place] = {}
    for key, place in places_in(folder / WEIGHTS).items():
        if (match := KEY.fullmatch(key)) is not None:
            found.setdefault(match["module"], {})[LORA[match["kind"]]] = place
        elif key.startswith("base_model.model.") and ".lora_" not in key:
            changes[key.removeprefix("base_model.model.").replace(".base_layer.", ".")] = place
        else:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is of a kind that is not supported here, such as an embedding"
            )
    for module, parts in found.items():
        if not {"first", "second"} <= parts.keys() or ("lengths" in parts) != bool(config.get("use_dora")):
            raise CheckpointError(f"{folder / WEIGHTS}: {module} lacks one of its parts; the file is incomplete")
        first, second, lengths = parts["first"], parts["second"], parts.get("lengths")
        rank = first.shape[0]
        shapes = (len(first.shape), second.shape[1:], lengths.shape if lengths else second.shape[:1])
        if shapes != (2, (rank,), second.shape[:1]):
            raise CheckpointError(f"{folder / WEIGHTS}: {module} has parts that do not fit together, or that are not "
                "matrices")
        alpha = _alpha(config, module, folder)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[f"{module}.weight"] = LowRank(scale, first, second, lengths)
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    return Adapter(folder, weight, changes, kind)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter in `peft`'s format; ``tensors`` by their names in the reference's model.

    Both files are written atomically. Raises `CheckpointError` if they cannot be written.
    """
    parts = [folder / f"{name}.part" for name in (WEIGHTS, CONFIG)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        near = {f"base_model.model.{name}": each.detach().to("cpu").contiguous() for name, each in tensors.items()}
        save_file(near, parts[0], metadata={"format": "pt"})
        parts[1].write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(parts[1], parts[0])  # safetensors gives access to the owner only
        replace_files([(part, part.with_suffix("")) for part in parts])
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: the adapter cannot be written ({reason}); free some space there") from None
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()


def _alpha(config: Mapping[str, Any], module: str, folder: Path) -> float:
    """The alpha of a module, with name patterns matched as in `peft`."""
    patterns = config.get("alpha_pattern") or {}
    patterns = patterns.items() if isinstance(patterns, dict) else ()
    alpha = next(
        (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha", 8)
    )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{folder / CONFIG}: lora_alpha is {reprlib.repr(alpha)}; it should be a number")
    return float(alpha)


def _fitted(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], tables: set[str], folder: Path) -> Adapter:
    prefix = next((each for each in PREFIXES if all(each + name in shapes for name in adapter.changes)), "")
    changes = {prefix + name: change for name, change in adapter.changes.items()}
    unknown = [name for name in changes if name not in shapes]
    for name, change in changes.items():
        # The Q-Former's head, if any, follows its tied embeddings, which are trained as a whole.
        is_alone = isinstance(change, LowRank) or name.startswith("language_")
        if (name in tables and is_alone) or (name in unknown and name in ALSO_CALLED):
            raise CheckpointError(
                f"{adapter.path}: {name.rpartition('.')[0]} shares its weights with another layer of the model and "
                "cannot be changed alone; train the adapter without it"
            )
    if unknown:
        module, _, last = unknown[0].rpartition(".")
        raise CheckpointError(
            f"{adapter.path}: there is no {module if last == 'weight' else unknown[0]} in "
            f"{folder}{_and_more(len(unknown) - 1, len(changes))}; the adapter belongs to another model"
        )
    for name, change in changes.items():
        module = name.rpartition(".")[0]
        have = (change.second.shape[0], change.first.shape[1]) if isinstance(change, LowRank) else change.shape
        if math.prod(have) != math.prod(shapes[name]) or have[:1] != shapes[name][:1]:
            raise CheckpointError(
                f"{adapter.path}: {module} has shape {list(have)}, but {list(shapes[name])} in {folder}; the adapter "
                "belongs to another model"
            )
    return replace(adapter, changes=changes)


def _and_more(number: int, of: int) -> str:
    return f" ({number} more of {of} are missing as well)" if number else ""
