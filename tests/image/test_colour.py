"""What a file's colour profile says is heeded; what a program hands over is taken as it is."""

from __future__ import annotations

import io
import threading
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageCms

from blip2.image import load_image
from tests.image import profiles

COLOURS = np.array([[[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128], [255, 255, 255]]], np.uint8)
ADOBE_RGB = profiles.of_primaries(profiles.ADOBE_RGB, 2.19921875)
DISPLAY_P3 = profiles.of_primaries(profiles.DISPLAY_P3, 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS = [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels_of(content, **options) -> np.ndarray:
    return np.asarray(load_image(content, **options)).astype(int)


def by_hand(colours_HW3: np.ndarray, primaries: tuple, gamma: float) -> np.ndarray:
    """To sRGB by the matrices alone."""
    xyz_HW3 = (colours_HW3 / 255) ** gamma @ np.array(primaries)
    linear_HW3 = np.clip(xyz_HW3 @ np.linalg.inv(np.array(profiles.SRGB)), 0, 1)
    return np.where(linear_HW3 <= 0.0031308, 12.92 * linear_HW3, 1.055 * linear_HW3 ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize(("format", "options"), LOSSLESS)
@pytest.mark.parametrize(
    ("profile", "primaries", "gamma"),
    [(ADOBE_RGB, profiles.ADOBE_RGB, 2.19921875), (DISPLAY_P3, profiles.DISPLAY_P3, 2.2)],
    ids=["Adobe RGB", "Display P3"],
)
def test_wide_colours_become_srgb(format, options, profile, primaries, gamma):
    read = pixels_of(encoded(Image.fromarray(COLOURS), format, icc_profile=profile, **options))
    expected = by_hand(COLOURS, primaries, gamma)
    assert np.abs(expected - COLOURS).max() > 10
    assert np.abs(read - expected).max() <= 2


def test_jpeg_and_heic():
    flat = Image.new("RGB", (64, 64), (200, 40, 40))
    expected = by_hand(np.array([[[200, 40, 40]]]), profiles.ADOBE_RGB, 2.19921875)
    contents = [encoded(flat, "JPEG", icc_profile=ADOBE_RGB, quality=100, subsampling=0)]
    if find_spec("pillow_heif"):
        from pillow_heif import from_pillow

        buffer = io.BytesIO()
        from_pillow(Image.open(io.BytesIO(contents[0]))).save(buffer, quality=100, chroma=444)
        contents.append(buffer.getvalue())
    for content in contents:
        assert np.abs(pixels_of(content) - expected).max() <= 4


def test_srgb_by_any_name_leaves_every_pixel_as_it_is():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for profile in (SRGB, None):
        assert np.array_equal(pixels_of(encoded(noise, icc_profile=profile)), np.asarray(noise))


def test_transparency_and_palettes_keep_their_colours():
    clear = Image.fromarray(np.dstack([COLOURS, np.full((1, 5), 128, np.uint8)]))
    opaque = pixels_of(encoded(Image.fromarray(COLOURS), icc_profile=ADOBE_RGB))
    assert np.abs(pixels_of(encoded(clear, icc_profile=ADOBE_RGB)) - (opaque * 128 + 255 * 127) / 255).max() <= 1
    palette = Image.fromarray(COLOURS).quantize(8, dither=Image.Dither.NONE)
    assert np.array_equal(pixels_of(encoded(palette)), COLOURS)
    assert np.array_equal(pixels_of(encoded(palette, icc_profile=ADOBE_RGB)), opaque)


def test_grey():
    levels = np.arange(0, 256, 5, dtype=np.uint8)[None]
    linear = (levels / 255) ** 1.8
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    profile = profiles.of_grey(1.8)
    assert np.abs(pixels_of(encoded(Image.fromarray(levels), icc_profile=profile))[..., 1] - expected).max() <= 2
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    assert np.abs(pixels_of(encoded(deep, icc_profile=profile))[..., 1] - expected).max() <= 2
    clear = Image.merge("LA", [Image.fromarray(levels), Image.new("L", (52, 1), 255)])
    assert np.abs(pixels_of(encoded(clear, icc_profile=profile))[..., 1] - expected).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks(format):
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    profile = profiles.of_inks(lightness=50)
    assert np.abs(pixels_of(encoded(inks, format)) - (0, 255, 255)).max() <= 3
    assert np.abs(pixels_of(encoded(inks, format, icc_profile=profile)) - 119).max() <= 3  # L* 50


def test_lab():
    lab = Image.merge("LAB", [Image.new("L", (4, 4), 128)] * 3)
    assert np.abs(pixels_of(encoded(lab, "TIFF")) - 119).max() <= 2


@pytest.mark.parametrize(
    "profile",
    [b"", b"no profile", ADOBE_RGB[:200], ADOBE_RGB[:127], b"\0" * 3000, profiles.of_grey(1.8), profiles.of_inks(50)],
)
def test_a_profile_that_is_broken_or_of_other_pixels_is_passed_over(profile):
    assert np.array_equal(pixels_of(encoded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)


def test_what_a_program_hands_over_is_taken_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(COLOURS), icc_profile=ADOBE_RGB, exif=exif)))
    assert np.array_equal(pixels_of(image), COLOURS)
    assert pixels_of(encoded(image, exif=exif)).shape == (5, 1, 3)


def test_threads_share_what_a_profile_means():
    content = encoded(Image.fromarray(np.tile(COLOURS, (50, 10, 1))), icc_profile=DISPLAY_P3)
    expected, found = pixels_of(content), []
    threads = [threading.Thread(target=lambda: found.append(pixels_of(content))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(np.array_equal(pixels, expected) for pixels in found)
