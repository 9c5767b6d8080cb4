"""An encoded image: a few vectors, enough for more questions without the image."""

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
    """The output of the Q-Former for an image, the only thing the language model reads of it. Encode once, ask often.

    ``queries_QD`` float[Q, D], before the projection to the language model's width: 48 KiB in half precision for the
    published models. For an InstructBLIP, whose Q-Former also reads the question, the patch features before the
    Q-Former, float[1 + P, D]: 724 KB. ``model`` identifies the model that made it (`model.identity`), or is "" if
    unknown; other models refuse it.
    """

    queries_QD: Tensor
    model: str = ""

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Write a safetensors file with the tensor ``queries`` and a checksum; ``half``: in float16, at half the size.

        Raises ImageError if it cannot be written; an existing file is then unchanged. Raises ImageNotFiniteError for
        values that are NaN or infinite, or too large for float16.
        """
        queries_QD = self.queries_QD.detach().to("cpu", torch.float16 if half else None)
        if not is_finite(queries_QD):
            overflow = (
                " in float16; save it without half" if is_finite(self.queries_QD) else "; encode the image again"
            )
            raise ImageNotFiniteError(
                f"{path}: not written, because the encoded image has values that are NaN or infinite{overflow}"
            )
        try:
            tensorfile.save(path, {"queries": queries_QD}, {"format": FORMAT, "model": self.model})
        except OSError as error:
            raise ImageError(f"{path}: cannot be written ({error}); check the folder and its free space") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedImage:
        """Read a file of `save`. Raises ImageError for other or damaged files, and for values that are NaN or
        infinite."""
        try:
            tensors, about = tensorfile.load(path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read as an encoded image ({error}); encode the image again") from None
        is_ours = about.keys() == {"format", "model"} and about["format"] == FORMAT and tensors.keys() == {"queries"}
        if not is_ours or tensors["queries"].dim() != 2 or not tensors["queries"].is_floating_point():
            raise ImageError(f"{path}: is a safetensors file, but not an encoded image; encode an image and save that")
        if not is_finite(tensors["queries"]):
            raise ImageNotFiniteError(f"{path}: has values that are NaN or infinite; encode the image again")
        return cls(tensors["queries"], about["model"])
