"""What processors and models give back: named values, by key and by attribute."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    """What a model computed, in order. What was not asked for is None as an attribute, and no key.

    ``output[0]`` is the first value there is, as Hugging Face has it.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(*values, **named)
        super().__init__({name: value for name, value in given.items() if value is not None})
        self.__dict__["absent"] = frozenset(name for name, value in given.items() if value is None)

    def __getattr__(self, name: str) -> Any:
        return None if name in self.__dict__.get("absent", ()) else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


class PartsOutput(ModelOutput):
    """Of a model of several parts: in its tuple the parts' outputs are tuples too."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def returned(output: ModelOutput, return_dict: bool | None, config: Any) -> Any:
    """An output as it was asked for: by name, or with ``return_dict=False`` (there or in the config) as a tuple."""
    by_name = config.return_dict if return_dict is None else return_dict
    return output if by_name else output.to_tuple()


class Prompt(NamedTuple):
    """What the language model reads, row by row, and the ids that the rows are made of."""

    embeddings_BSD: Tensor
    is_real_BS: Tensor
    ids_BT: Tensor
