"""An index of images: seen once, searched by words or by image, asked without the images."""

from blip2.index.file import FORMAT, is_index
from blip2.index.index import Hit, Index
from blip2.index.update import Changes, update

__all__ = ["FORMAT", "Changes", "Hit", "Index", "is_index", "update"]
