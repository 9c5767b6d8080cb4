"""What processors and models give back: named values, by key and by attribute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip2.compat.loading import Device, device_and_dtype


class Record(dict[str, Any]):
    """A dictionary whose entries are attributes too: ``record.logits`` is ``record["logits"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name} here; there are {', '.join(self)}") from None


class BatchFeature(Record):
    """What a processor made: ``input_ids``, ``attention_mask``, ``pixel_values``, as far as they were asked for."""

    def to(
        self,
        device: Device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Move all tensors to ``device`` and cast the floating ones to ``dtype``, in place; either may stand alone.

        Raises OptionError for a device that is not there.
        """
        place, asked = device_and_dtype(device, dtype)
        for name, value in self.items():
            if isinstance(value, Tensor):
                cast = asked if value.is_floating_point() else None
                self[name] = value.to(device=place, dtype=cast, non_blocking=non_blocking)
        return self


class ModelOutput(Record):
    """What a model computed; ``output[0]`` is the first value that is not None, as Hugging Face has it."""

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(value for value in self.values() if value is not None)
