"""What is kept of a picture once it was seen: a few vectors, to be asked again without the picture."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2 import tensorfile
from blip2.errors import ImageError, ImageNotFiniteError
from blip2.finite import is_finite

FORMAT = "blip2 encoded image"


@dataclass(frozen=True)
class EncodedImage:
    """The output of the Q-Former for an image: all that the language model gets to see of it. Encode once, ask often.

    ``queries_QD`` float[Q, D], before the projection to the language model's width: 48 KiB in half precision for the
    published models. In an InstructBLIP, whose Q-Former also reads the question, they are the patch features before
    the Q-Former, float[1 + P, D]: 724 KB. ``model`` identifies the model that made it (`model.identity`), or is ""
    if unknown; another model refuses it.
    """

    queries_QD: Tensor
    model: str = ""

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Write a safetensors file with the tensor ``queries`` and a checksum; ``half``: in float16, at half the size.

        Raises ImageError if it cannot be written; an existing file is then unchanged. Raises ImageNotFiniteError for
        a value that is NaN or infinite, or too large for float16.
        """
        queries_QD = self.queries_QD.detach().to("cpu", torch.float16 if half else None)
        if not is_finite(queries_QD):
            overflow = (
                " in float16; save it without half" if is_finite(self.queries_QD) else "; encode the picture again"
            )
            raise ImageNotFiniteError(
                f"{path}: not written, since the encoded image has values that are NaN or infinite{overflow}"
            )
        try:
            tensorfile.save(path, {"queries": queries_QD}, {"format": FORMAT, "model": self.model})
        except OSError as error:
            raise ImageError(f"{path}: cannot be written ({error}); check the folder and the space on it") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedImage:
        """Read what `save` wrote. Raises ImageError for any other or damaged file, and for values that are NaN or
        infinite."""
        try:
            tensors, about = tensorfile.load(path)
        except OSError as error:
            raise ImageError(f"{path}: no encoded image can be read ({error}); encode the picture again") from None
        is_ours = about.keys() == {"format", "model"} and about["format"] == FORMAT and tensors.keys() == {"queries"}
        if not is_ours or tensors["queries"].dim() != 2 or not tensors["queries"].is_floating_point():
            raise ImageError(f"{path}: is another safetensors file, no encoded image; encode a picture and save that")
        if not is_finite(tensors["queries"]):
            raise ImageNotFiniteError(f"{path}: has values that are NaN or infinite; encode the picture again")
        return cls(tensors["queries"], about["model"])
