"""Results of processors and models: named values, by key and by attribute."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip2.compat.loading import Device, device_and_dtype


class Record(dict[str, Any]):
    """A dictionary whose entries are also attributes: ``record.logits`` is ``record["logits"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name} here; there are {', '.join(self)}") from None


class BatchFeature(Record):
    """The result of a processor: ``input_ids``, ``attention_mask``, ``pixel_values``, as requested."""

    def to(
        self,
        device: Device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Move all tensors to ``device`` and cast floating-point ones to ``dtype``, in place; either may be left out.

        Raises OptionError for a device that does not exist.
        """
        place, asked = device_and_dtype(device, dtype)
        for name, value in self.items():
            if isinstance(value, Tensor):
                cast = asked if value.is_floating_point() else None
                self[name] = value.to(device=place, dtype=cast, non_blocking=non_blocking)
        return self


class ModelOutput(Record):
    """The result of a model, in order. What was not requested is None as an attribute, and not a key.

    ``output[0]`` is the first value that is present, as in Hugging Face.
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
    """The result of a model of several parts: in its tuple the parts' results are also tuples."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def returned(output: ModelOutput, return_dict: bool | None, config: Any) -> Any:
    """The output as requested: by name, or with ``return_dict=False`` (as an argument or in the config) as a tuple."""
    by_name = config.return_dict if return_dict is None else return_dict
    return output if by_name else output.to_tuple()


class Prompt(NamedTuple):
    """The language model's input, row by row, and the ids of the rows."""

    embeddings_BSD: Tensor
    is_real_BS: Tensor
    ids_BT: Tensor
