"""Checkpoints: finding, reading, loading and saving them, all in the published layout."""

from blip2.checkpoint.damage import damage, why_not_finite
from blip2.checkpoint.encoders import Encoder, load_encoder, open_encoder
from blip2.checkpoint.files import QFORMER_TOKENIZER
from blip2.checkpoint.load import load, load_language
from blip2.checkpoint.names import BUNDLED, resolve
from blip2.checkpoint.preprocessor import ImageSettings, image_settings
from blip2.checkpoint.quantize import Quantization, quantization
from blip2.checkpoint.save import save
from blip2.checkpoint.settings import read_config, read_language

__all__ = [
    "BUNDLED", "QFORMER_TOKENIZER", "Encoder", "ImageSettings", "Quantization", "damage", "image_settings", "load",
    "load_encoder", "load_language", "open_encoder", "quantization", "read_config", "read_language", "resolve", "save",
    "why_not_finite",
]  # fmt: skip
