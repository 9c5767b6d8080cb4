"""Pictures and texts to tensors, and token ids back to text, as ``Blip2Processor`` does it.

A row of ``input_ids`` is ``[image token] * Q``, then the text with the special tokens of its family; Q is the number
of queries. Padding stands where the model needs it, whatever the files say: between image and text for an OPT, which
goes on from its last token, else at the end.

    OPT          image ... image  pad  pad  </s>  a  photo
    T5           image ... image  a  photo  </s>  pad  pad
    matching     image ... image  [CLS]  a  photo  [SEP]  pad  pad
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from blip2 import checkpoint
from blip2.checkpoint import ImageSettings
from blip2.checkpoint.settings import read_json
from blip2.compat.loading import find_folder
from blip2.compat.records import BatchFeature
from blip2.disk import write_bytes, write_text
from blip2.errors import CheckpointError, OptionError
from blip2.image import Source, load_image, to_pixels
from blip2.text import Tokenizer

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
IMAGE_TOKEN = "<image>"

TokenIds = int | Sequence[Any] | np.ndarray | Tensor


@dataclass(frozen=True)
class Layout:
    """Where the special tokens of a family stand, and where its padding goes."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int
    pads_left: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Layout:
        """The family that a tokenizer belongs to, by its special tokens."""
        if _find(tokenizer, "[CLS]") is not None:
            ends = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
            return cls(ends[:1], ends[1:], tokenizer.token_id("[PAD]"))
        end, pad = tokenizer.token_id("</s>"), tokenizer.token_id("<pad>")
        return cls((), (end,), pad) if end == 1 else cls((end,), (), pad, pads_left=True)


class Blip2Processor:
    """The tokenizer and the image settings of one model; `from_pretrained` makes one.

    ``image_token_id`` and ``num_query_tokens`` are None for an old revision that has no image token: then the rows
    are text alone, and the model puts the image before them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: ImageSettings,
        *,
        num_query_tokens: int | None,
        image_token_id: int | None,
        model_max_length: int | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        is_whole = num_query_tokens is not None and image_token_id is not None
        self.num_query_tokens = num_query_tokens if is_whole else None
        self.image_token_id = image_token_id if is_whole else None
        self._model_max_length = model_max_length
        self._layout = Layout.of(tokenizer)
        self._files = dict(files or {})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Blip2Processor:
        """The processor of a model, by its folder or its name on the hub; ``revision``, ``local_files_only``.

        How many image tokens there are, and which, is told by config.json; a folder that holds a processor alone
        tells it by processor_config.json and its tokenizer. Raises CheckpointError for files that are missing.
        """
        folder = find_folder(name, options)
        tokenizer = Tokenizer.from_folder(folder)
        if (folder / "config.json").exists():
            config = checkpoint.read_config(folder)
            num_query_tokens: int | None = config.qformer.num_query_tokens
            image_token_id = config.image_token_id
        else:
            num_query_tokens = _json(folder, "processor_config.json").get("num_query_tokens")
            image_token_id = _find(tokenizer, IMAGE_TOKEN)
        return cls(
            tokenizer,
            checkpoint.image_settings(folder),
            num_query_tokens=num_query_tokens,
            image_token_id=image_token_id,
            model_max_length=_json(folder, "tokenizer_config.json").get("model_max_length"),
            files={file: (folder / file).read_bytes() for file in FILES if (folder / file).exists()},
        )

    def __call__(
        self,
        images: Source | Sequence[Source] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: Literal["pt", "np"] | None = None,
        padding: bool | Literal["longest", "max_length"] = False,
        truncation: bool | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """What `generate` and the models take.

        ``images``: one or a list of whatever `image.load_image` reads, or an array or tensor of several. ``text``:
        one or a list. Either may be left out. Returns ``pixel_values`` float32[N, 3, size, size], and ``input_ids``
        and ``attention_mask`` int64[M, T]; without ``return_tensors`` lists.

        ``padding``: True to the longest text, "max_length" to that length. ``max_length`` counts the image tokens
        where there are any; without ``padding`` it alone makes what is longer be cut, as ``truncation=True`` does.

        Raises ImageError for a picture that cannot be read, OptionError for the rest.
        """
        if images is None and text is None:
            raise OptionError("neither images nor text is given; give one of them, or both")
        if return_tensors not in ("pt", "np", None):
            raise OptionError(f"return_tensors is {return_tensors!r}; it may be 'pt', 'np' or None")
        made = BatchFeature()
        if text is not None:
            is_cut = truncation if truncation is not None else max_length is not None and padding is False
            rows = self._rows(_texts(text), images is not None, padding, is_cut, max_length)
            made["input_ids"] = _integers([row for row, _ in rows], return_tensors)
            made["attention_mask"] = _integers([mask for _, mask in rows], return_tensors)
        if images is not None:
            settings = self.settings
            loaded = [load_image(image) for image in _listed(images)]
            if not loaded:
                raise OptionError("the list of images is empty; give at least one, or leave images out")
            pixels_BCHW = to_pixels(loaded, size=settings.size, mean=settings.mean, std=settings.std)
            array = pixels_BCHW.numpy()
            made["pixel_values"] = {"pt": pixels_BCHW, "np": array}.get(return_tensors or "", list(array))
        return made

    def decode(self, ids: TokenIds, skip_special_tokens: bool = False) -> Any:
        """The text of token ids ``int[T]``, or the texts of ``int[B, T]``. White space stays as the model wrote it."""
        plain = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
        if isinstance(plain, int):
            plain = [plain]
        if plain and not isinstance(plain[0], int):
            return [self.decode(row, skip_special_tokens) for row in plain]
        # The package's own decode trims the text and always leaves special tokens out.
        return self.tokenizer._tokenizer.decode(list(plain), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids: TokenIds, skip_special_tokens: bool = False) -> list[str]:
        """The texts of rows of token ids."""
        assert not isinstance(ids, int)
        return [self.decode(row, skip_special_tokens) for row in ids]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads, the files as they came."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = json.loads(self._files.get("processor_config.json", b"{}"))
        told |= {"processor_class": "Blip2Processor", "num_query_tokens": self.num_query_tokens}
        for name, content in self._files.items():
            write_bytes(folder / name, content)
        write_text(folder / "processor_config.json", json.dumps(told, indent=2) + "\n")

    def _rows(
        self,
        texts: list[str],
        has_images: bool,
        padding: bool | Literal["longest", "max_length"],
        is_cut: bool,
        max_length: int | None,
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and mask of each text."""
        if padding not in (True, False, "longest", "max_length"):
            raise OptionError(f"padding is {padding!r}; it may be True, False, 'longest' or 'max_length'")
        layout = self._layout
        image = []
        if has_images and self.image_token_id is not None and self.num_query_tokens is not None:
            image = [self.image_token_id] * self.num_query_tokens
        special = len(layout.before) + len(layout.after)
        longest = max_length - len(image) if max_length is not None else self._model_max_length
        if longest is not None and longest < special:
            raise OptionError(
                f"max_length is {max_length}, which leaves no room for text: {len(image)} tokens stand for the image "
                f"and {special} mark the text; raise it"
            )
        encoded = [self.tokenizer.encode(text) for text in texts]
        if is_cut and longest is not None:
            encoded = [ids[: longest - special] for ids in encoded]
        texts_ids = [[*layout.before, *ids, *layout.after] for ids in encoded]
        width = max(len(ids) for ids in texts_ids)
        if padding == "max_length":
            if max_length is None:
                raise OptionError("padding is 'max_length', but there is no max_length; give it, or use padding=True")
            width = max(width, max_length - len(image))
        rows = []
        for ids in texts_ids:
            pads = (width - len(ids)) if padding else 0
            fill, real = [layout.pad] * pads, [1] * len(ids)
            if layout.pads_left:
                rows.append(([*image, *fill, *ids], [*[1] * len(image), *[0] * pads, *real]))
            else:
                rows.append(([*image, *ids, *fill], [*[1] * len(image), *real, *[0] * pads]))
        return rows


BlipProcessor = Blip2Processor
"""The name that the model card uses; for a BLIP-2 model the same processor."""


def _find(tokenizer: Tokenizer, token: str) -> int | None:
    try:
        return tokenizer.token_id(token)
    except CheckpointError:
        return None


def _json(folder: Path, name: str) -> dict[str, Any]:
    """A file that may be absent."""
    return read_json(folder / name) if (folder / name).exists() else {}


def _texts(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise OptionError(f"text is {text!r}; give a text, or a list of at least one")
    return texts


def _listed(images: Any) -> list[Any]:
    """Several pictures are a list, a tuple, or an array with a dimension more than one picture has."""
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4):
        return list(images)
    return [images]


def _integers(rows: list[list[int]], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return rows
    if len(lengths := {len(row) for row in rows}) > 1:
        raise OptionError(
            f"the texts have {min(lengths)} to {max(lengths)} tokens, which make no tensor; pass padding=True"
        )
    return torch.tensor(rows) if return_tensors == "pt" else np.array(rows)
