"""Checkpoints: where they are, what is in them, loading and saving. One layout, the published one."""

from blip2.checkpoint.load import load
from blip2.checkpoint.names import BUNDLED, resolve
from blip2.checkpoint.save import save
from blip2.checkpoint.settings import ImageSettings, image_settings, read_config

__all__ = ["BUNDLED", "ImageSettings", "image_settings", "load", "read_config", "resolve", "save"]
