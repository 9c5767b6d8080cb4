"""``Blip2Processor``: images and texts to tensors, and token ids back to text.

A row of ``input_ids`` is ``[image token] * Q``, then the text with the special tokens of its family; Q is the number of
query tokens. Padding is put where the model needs it, whatever the files say: between image and text for an OPT, which
continues from its last token, else at the end.

    OPT          image ... image  pad  pad  </s>  a  photo
    T5           image ... image  a  photo  </s>  pad  pad
    matching     image ... image  [CLS]  a  photo  [SEP]  pad  pad
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from blip2 import checkpoint
from blip2.checkpoint.settings import read_json
from blip2.compat import pixels, tokenizer
from blip2.compat.loading import check_names, find_folder
from blip2.compat.pixels import BlipImageProcessor
from blip2.compat.records import BatchFeature
from blip2.compat.rows import TokenIds, tensors, texts_of
from blip2.compat.tokenizer import Blip2Tokenizer
from blip2.compat.vocabulary import SETTABLE
from blip2.disk import write_bytes
from blip2.errors import OptionError
from blip2.image import Source

FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE_TOKEN = "<image>"
NESTED = ("text_kwargs", "images_kwargs", "common_kwargs")


class Blip2Processor:
    """The tokenizer and image settings of a model; `from_pretrained` returns one.

    ``num_query_tokens`` is None for an old revision without an image token: then rows are text only, and the model puts
    the image before them.
    """

    chat_template = None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_query_tokens: int | None = None,
        *,
        image_token_id: int | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tokenizer = Blip2Tokenizer.of(tokenizer)
        self.image_processor = BlipImageProcessor.of(image_processor)
        self.num_query_tokens = num_query_tokens
        self._image_token_id = image_token_id
        self._files = dict(files or {})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Blip2Processor:
        """The processor of a model, by its folder or its name on the hub; ``revision``, ``local_files_only``.

        The number and id of image tokens come from config.json; in a folder with only a processor, from
        processor_config.json and its tokenizer. Steps of the image processor and settings of the tokenizer
        (``do_rescale``, ``padding_side``, ``pad_token``, ...) may be given too. Raises CheckpointError for missing
        files.
        """
        steps = {each: options.pop(each) for each in pixels.STEPS if each in options}
        settings = {each: options.pop(each) for each in SETTABLE if each in options}
        folder = find_folder(name, options)
        words = Blip2Tokenizer.from_folder(folder)
        for each, value in settings.items():
            setattr(words, each, value)
        image_token_id = None
        if (folder / "config.json").exists():
            config = checkpoint.read_config(folder)
            num_query_tokens: int | None = config.qformer.num_query_tokens
            image_token_id = config.image_token_id
            if image_token_id is None:
                num_query_tokens = None
        else:
            path = folder / "processor_config.json"
            num_query_tokens = read_json(path).get("num_query_tokens") if path.exists() else None
        return cls(
            BlipImageProcessor.from_folder(folder, **steps),
            words,
            num_query_tokens=num_query_tokens,
            image_token_id=image_token_id,
            **cls._others(folder),
            files={file: (folder / file).read_bytes() for file in FILES if (folder / file).exists()},
        )

    @classmethod
    def _others(cls, folder: Path) -> dict[str, Any]:
        """Further components."""
        return {}

    def __call__(
        self,
        images: Source | Sequence[Source] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: Literal["pt", "np"] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """The input of `generate` and of the models.

        ``images``: one image or a list, each as for `image.load_image`, or an array or tensor of several, integers or
        floats, channels first or last. ``text``: one or a list. Either may be left out. Returns ``pixel_values``
        float32[N, 3, size, size], and ``input_ids`` and ``attention_mask`` int64[M, T]; lists without
        ``return_tensors``.

        ``padding``: True to the longest text, "max_length" to that length. ``max_length`` includes the image tokens, if
        any; without ``padding`` it truncates longer texts, as ``truncation=True`` does. Further options are those of
        the tokenizer and the image processor, for this call; they may also be in ``text_kwargs``, ``images_kwargs`` and
        ``common_kwargs``.

        Raises ImageError for an unreadable image, OptionError for everything else.
        """
        if images is None and text is None:
            raise OptionError("neither images nor text is given; give one of them, or both")
        if _are_texts(images) and text is not None and not _are_texts(text):
            warnings.warn("text is given before images; write processor(images=..., text=...)", stacklevel=2)
            images, text = text, images
        of_text, of_images, in_common = _sorted(options)
        return_tensors = in_common.get("return_tensors", return_tensors)
        made = tensors(BatchFeature(), return_tensors)
        if text is not None:
            has_image_tokens = images is not None and self.image_token_id is not None
            made.update(self._rows(texts_of(text), has_image_tokens, of_text))
            tensors(made, return_tensors)
        if images is not None:
            made.update(self.image_processor(images, return_tensors=return_tensors, **of_images))
        return made

    def decode(self, ids: TokenIds, skip_special_tokens: bool = False, **options: Any) -> Any:
        """The text of token ids ``int[T]``, or the texts of ``int[B, T]``; see `Blip2Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens, **options)

    def batch_decode(self, ids: TokenIds, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The texts of rows of token ids."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: TokenIds, skip_special_tokens: bool = True, **options: Any
    ) -> Any:
        """The texts of the result of ``generate``."""
        return self.decode(generated_outputs, skip_special_tokens, **options)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.image_processor.model_input_names, *self.tokenizer.model_input_names]

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for a query token; None if there is none."""
        if self.num_query_tokens is None or self._image_token_id is not None:
            return None if self.num_query_tokens is None else self._image_token_id
        return self.tokenizer.find(IMAGE_TOKEN)

    @property
    def image_token(self) -> str | None:
        """The name of the token that stands for a query token; None if there is none."""
        return None if self.image_token_id is None else IMAGE_TOKEN

    def to_dict(self) -> dict[str, Any]:
        """The settings, without the vocabulary."""
        return {
            "processor_class": type(self).__name__,
            "num_query_tokens": self.num_query_tokens,
            "image_processor": self.image_processor.to_dict(),
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__}:\n- image_processor: {self.image_processor}\n- tokenizer: {self.tokenizer}\n"

    def apply_chat_template(self, *_: Any, **__: Any) -> NoReturn:
        """Raises OptionError with the known prompt format, since a BLIP-2 has no chat template."""
        raise OptionError(
            "this processor has no chat template, as for every BLIP-2; write the prompt yourself, such as "
            '"Question: how many dogs are there? Answer:"'
        )

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Raises OptionError with the way to upload."""
        raise OptionError(
            "uploading is not supported; use save_pretrained(folder), then `hf upload`"
        )

    def save_pretrained(self, folder: str | Path, push_to_hub: bool = False) -> None:
        """Write the files for `from_pretrained`: the original ones with changed settings."""
        if push_to_hub:
            self.push_to_hub()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_bytes(folder / name, content)

    def files(self) -> dict[str, bytes]:
        """The files of `save_pretrained`: content by name."""
        contents = {name: json.loads(self._files.get(name, b"{}")) for name in FILES}
        contents["preprocessor_config.json"] |= self.image_processor.to_dict()
        contents["processor_config.json"] |= {
            "processor_class": type(self).__name__,
            "num_query_tokens": self.num_query_tokens,
        }
        if "image_processor" in contents["processor_config.json"]:
            contents["processor_config.json"]["image_processor"] = contents["preprocessor_config.json"]
        ours = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}
        return self.tokenizer.files() | ours

    def _rows(self, texts: list[str], has_image_tokens: bool, options: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The columns of the texts, each row after its image tokens."""
        number = (self.num_query_tokens or 0) if has_image_tokens else 0
        columns = self.tokenizer.columns(texts, reads_tokens=False, options=options, num_before=number)
        size = len(IMAGE_TOKEN)
        image: dict[str, list[Any]] = {
            "input_ids": [self.image_token_id] * number,
            "attention_mask": [1] * number,
            "token_type_ids": [0] * number,
            "special_tokens_mask": [0] * number,
            "offset_mapping": [(each * size, (each + 1) * size) for each in range(number)],
        }
        lengths = {"length": [length + number for length in columns["length"]]} if "length" in columns else {}
        whole = {key: [[*image[key], *row] for row in rows] for key, rows in columns.items() if key in image}
        return whole | lengths


BlipProcessor = Blip2Processor
"""The name in the model card; the same processor for a BLIP-2 model."""


def _are_texts(given: Any) -> bool:
    """Whether it is one text or several; a path is one, too."""
    return isinstance(given, str) or (
        isinstance(given, list | tuple) and bool(given) and all(isinstance(each, str) for each in given)
    )


def _sorted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options of the tokenizer, of the image processor, and of both."""
    known = (*tokenizer.ARGUMENTS, *pixels.ARGUMENTS, *NESTED)
    check_names("the processor", options, known)
    of_text, of_images, in_common = (dict(options.get(name) or {}) for name in NESTED)
    for name, value in options.items():
        for names, some in ((tokenizer.ARGUMENTS, of_text), (pixels.ARGUMENTS, of_images)):
            if name in names and some.setdefault(name, value) is not value:
                raise OptionError(f"{name} is given twice, as {value!r} and {some[name]!r}; give it once")
    for some in (of_text, of_images):
        in_common |= {"return_tensors": some.pop("return_tensors")} if "return_tensors" in some else {}
    check_names("common_kwargs", in_common, ("return_tensors",))
    return of_text, of_images, in_common
