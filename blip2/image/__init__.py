"""Any image source -> RGB -> pixels, and images for display. The only package that uses Pillow.

    source   path, URL, bytes, "-", PIL image, array   load_image   ->  RgbImage, upright, opaque, 8 bits
    images   RgbImage, any sizes                       to_pixels    ->  float32[B, 3, size, size]
"""

from blip2.image.augment import augmented
from blip2.image.decode import MAX_PIXELS, RgbImage
from blip2.image.formats import suffixes
from blip2.image.measure import named_format, stored_size
from blip2.image.randaugment import randaugmented
from blip2.image.read import (
    DEFAULT_READING,
    PIXELS_VERSION,
    Reading,
    load_image,
    pixels_digest,
    seen_box,
    squared,
    to_array,
    to_pixels,
)
from blip2.image.show import check_writable, grey_address, overlay, save_image, shrunk, thumbnail
from blip2.image.sources import Source, name_of
from blip2.image.vary import as_jpeg, cut, turned

__all__ = [
    "DEFAULT_READING", "MAX_PIXELS", "PIXELS_VERSION", "Reading", "RgbImage", "Source", "as_jpeg", "augmented",
    "check_writable", "cut", "grey_address", "load_image", "name_of", "named_format", "overlay", "pixels_digest",
    "randaugmented", "save_image", "seen_box", "shrunk", "squared", "stored_size", "suffixes", "thumbnail", "to_array",
    "to_pixels", "turned",
]  # fmt: skip
