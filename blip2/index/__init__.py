"""An index of images: encoded once, searched by text or image, asked without opening the images."""

from blip2.index.file import FORMAT, is_index
from blip2.index.index import Hit, Index
from blip2.index.update import Changes, update

__all__ = ["FORMAT", "Changes", "Hit", "Index", "is_index", "update"]
