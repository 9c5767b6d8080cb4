"""load_image reads everything that is an image and says of everything else what is wrong with it."""

import base64
import io
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2.errors import Blip2Error, ImageError, OptionError
from blip2.image import load_image, overlay, save_image, thumbnail, to_pixels
from tests.image.profiles import ADOBE_RGB, of_primaries

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made by hand, for what Pillow does not write. Colour: 0 grey, 2 RGB."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def pixels_of(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


PHOTO_HW3 = noise(6, 9)
PHOTO = Image.fromarray(PHOTO_HW3)
PNG = encoded(PHOTO)


# ---- sources ------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_picture(tmp_path, monkeypatch):
    path = tmp_path / "ein Bild é.png"
    path.write_bytes(PNG)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(PNG)))
    chw = torch.from_numpy(PHOTO_HW3).permute(2, 0, 1)
    data = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in [path, str(path), "-", data, PNG, bytearray(PNG), memoryview(PNG), PHOTO, PHOTO_HW3, chw]:
        np.testing.assert_array_equal(pixels_of(source), PHOTO_HW3)


def test_a_loaded_image_is_a_copy():
    image = PHOTO.copy()
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert image == PHOTO


def test_data_address_variants():
    text = base64.encodebytes(PNG).decode()  # with line breaks
    for header in ("data:;base64,", "DATA:image/png;charset=x;BASE64,"):
        np.testing.assert_array_equal(pixels_of(header + text), PHOTO_HW3)
    quoted = text.replace("+", "%2B").replace("=", "%3D")
    np.testing.assert_array_equal(pixels_of("data:;base64," + quoted), PHOTO_HW3)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PHOTO_HW3, PHOTO_HW3),
        (PHOTO_HW3[::-1, ::2], PHOTO_HW3[::-1, ::2]),  # not contiguous
        (PHOTO_HW3[..., 0], PHOTO_HW3[..., [0, 0, 0]]),
        (PHOTO_HW3[..., :1], PHOTO_HW3[..., [0, 0, 0]]),
        (np.dstack([PHOTO_HW3, np.full((6, 9), 255, np.uint8)]), PHOTO_HW3),
        (np.dstack([PHOTO_HW3, np.zeros((6, 9), np.uint8)]), np.full((6, 9, 3), 255)),
    ],
)
def test_arrays_and_tensors(array, expected):
    np.testing.assert_array_equal(pixels_of(array), expected)
    np.testing.assert_array_equal(pixels_of(torch.from_numpy(array.T.copy()).mT), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format):
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    read = pixels_of(encoded(smooth, format)).astype(int)
    assert np.abs(read - np.asarray(smooth)).max() <= (0 if format in ("PNG", "BMP", "TIFF", "GIF") else 16)


# ---- what cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/picture.png", "no such file"),
        ("", "''.*no such file"),
        (Path(__file__).parent, "folder"),
        (__file__, "not a JPEG"),
        ("a\0b.png", "cannot be opened"),
        ("x" * 10_000, "xxx\\.\\.\\.xxx.*cannot be opened"),
        ("two\nlines.png", r"two\\nlines"),
        (b"", "0 bytes: empty"),
        (b"\0" * 100, "100 bytes: not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
        (encoded(PHOTO, "PPM"), "not a JPEG"),  # Pillow can, but nobody asked for it
        (PNG[:20], "damaged"),
        (PNG[:-40], "damaged or truncated"),
        (encoded(PHOTO.resize((400, 400)), "JPEG")[:-2000], "truncated"),
        ("file:///etc/hosts", "only http"),
        ("ftp://127.0.0.1/x.png", "only http"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,", "empty"),
        ("http://[broken/x.png", "cannot be downloaded"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8\[3, 8, 8\].*\[H, W, 1"),
        (np.zeros((8, 8, 2), np.uint8), "shape"),
        (np.zeros(8, np.uint8), "shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "one image"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((8, 8, 3), np.float32), r"float32\[8, 8, 3\].*uint8"),
        (np.zeros((8, 8, 3), np.int64), "uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\[1 \| 3 \| 4, H, W\]"),
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "uint8"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (5, 5)), "floating-point"),
        (Image.new("I", (5, 5), -1), "outside 0..65535"),
        (None, "NoneType: not an image"),
        ([PHOTO], "list: not an image"),
    ],
    ids=lambda value: None,
)
def test_refused(source, words):
    with pytest.raises(ImageError, match=words) as caught:
        load_image(source)
    message = str(caught.value)
    assert isinstance(caught.value, Blip2Error | ValueError)
    assert "\n" not in message and len(message) < 400
    assert ": " in message, "names the source"


def test_empty_file_and_missing_rights(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: empty"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ImageError, match="loop: cannot be opened"):
        load_image(tmp_path / "loop")


@pytest.mark.parametrize(("width", "height"), [(15_812, 15_812), (20_000, 20_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width, height):
    bomb = png(width, height, 8, 2, b"")  # holds no pixels at all: only the header can tell
    with pytest.raises(ImageError, match=r"pixels.*smaller"):
        load_image(bomb)


def test_a_jpeg_that_goes_over_its_pixels_again_and_again_is_refused_unread():
    whole = encoded(Image.new("L", (7000, 7000), 128), "JPEG", progressive=True)
    scans = whole.split(b"\xff\xda")
    again = b"\xff\xda" + scans[-1].removesuffix(b"\xff\xd9")
    assert len(again) < 100  # and 60 ms of work
    assert load_image(whole).size == (7000, 7000)
    with pytest.raises(ImageError, match="more than 100 scans"):
        load_image(whole[:-2] + 200_000 * again + whole[-2:])


@pytest.mark.parametrize("is_progressive", [False, True])
def test_what_looks_like_a_scan_and_is_none_does_not_count(is_progressive):
    """In the metadata, as of a thumbnail, and behind the image, where telephones put films."""
    array = noise(40, 40)
    whole = encoded(Image.fromarray(array), "JPEG", progressive=is_progressive, quality=95)
    metadata = b"\xff\xe5\xf0\x02" + b"\xff\xda" * 0x7800
    found = load_image(whole[:2] + metadata + whole[2:] + b"\xff\xda" * 200)
    assert np.array_equal(np.asarray(found), np.asarray(load_image(whole)))


def test_max_pixels():
    assert load_image(PNG, max_pixels=54).size == (9, 6)
    for source in (PNG, PHOTO, PHOTO_HW3):
        with pytest.raises(ImageError, match="9x6 is more than 53 pixels"):
            load_image(source, max_pixels=53)


# ---- the image as people see it ---------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 255, 170, 85
    # How a camera that was held so stores the image: the inverse of what the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, quality=95)
    once = load_image(content)
    assert once.size == (32, 16)
    assert np.abs(np.asarray(once).astype(int) - upright).max() < 30
    np.testing.assert_array_equal(pixels_of(once), np.asarray(once))  # loading twice turns once


@pytest.mark.filterwarnings("error")
def test_broken_exif_does_not_spoil_sound_pixels():
    content = encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert load_image(content).size == PHOTO.size


def with_palette_alpha() -> Image.Image:
    image = PHOTO.quantize(4)
    image.info["transparency"] = bytes([0, 85, 170, 255])
    return image


def with_key(mode: str, key: object) -> Image.Image:
    image = Image.new(mode, (4, 4), key)
    image.info["transparency"] = key
    return image


RGBA = Image.fromarray(noise(6, 9, 4))


@pytest.mark.parametrize(
    "image",
    [
        RGBA,
        RGBA.convert("LA"),
        RGBA.quantize(8),
        with_palette_alpha(),
        with_key("RGB", (9, 8, 7)),
        with_key("L", 9),
    ],
    ids=["RGBA", "LA", "palette RGBA", "P + bytes", "RGB + key", "L + key"],
)
def test_transparency_on_white(image):
    levels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = levels[..., 3:] / 255
    on_white = levels[..., :3] * alpha + 255 * (1 - alpha)
    for source in (image, encoded(image)):
        assert np.abs(pixels_of(source) - on_white).max() <= 1


def test_opaque_black_under_full_transparency_is_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    for format in ("PNG", "WEBP", "TIFF", "GIF"):
        assert pixels_of(encoded(image, format)).min() == 255


GREY_16 = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
GREY_8 = np.array([[0, 0, 1, 1, 128, 254, 255, 255]], np.uint8)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    read = pixels_of(encoded(Image.fromarray(GREY_16), format))
    np.testing.assert_array_equal(read, np.repeat(GREY_8[..., None], 3, axis=2))


def test_32_bit_integers_that_fit_16():
    for source in (image := Image.fromarray(GREY_16.astype(np.int32)), encoded(image, "TIFF")):
        np.testing.assert_array_equal(pixels_of(source)[..., 0], GREY_8)
    np.testing.assert_array_equal(pixels_of(Image.fromarray(GREY_16.astype(">u2")))[..., 0], GREY_8)


def test_16_bit_grey_with_a_transparent_value():
    rows = b"\0" + struct.pack(">3H", 257, 258, 0)
    read = pixels_of(png(3, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 258))))
    assert read[0, :, 0].tolist() == [1, 255, 0]  # 258 is gone, 257 beside it stays


def test_16_bit_colour():
    rows = b"\0" + struct.pack(">6H", 0, 32896, 65535, 65535, 0, 0)
    assert pixels_of(png(2, 1, 16, 2, rows)).tolist() == [[[0, 128, 255], [255, 0, 0]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_modes_and_thin_pictures(mode, colour, expected, size):
    image = load_image(Image.new(mode, size, colour))
    assert image.size == size
    assert image.getpixel((0, 0)) == expected
    assert to_pixels([image], size=8, mean=CLIP_MEAN, std=CLIP_STD).shape == (1, 3, 8, 8)


def test_cmyk_jpeg():
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert np.abs(pixels_of(red).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels_of(content).astype(int) - (255, 0, 0)).max() < 8


# ---- addresses ----------------------------------------------------------------------------------------


class Site(BaseHTTPRequestHandler):
    """/ok.png, /page, /missing, /moved, /away (to ftp), /loop, /short, /large, /slow."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.path, self.headers["User-Agent"]))
        target = {"/moved": "/ok.png", "/away": "ftp://127.0.0.1/x.png", "/loop": "/loop"}.get(path)
        if target:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif path == "/missing":
            self.send_error(404)
        else:
            body = {"/page": b"<html>log in first</html>", "/short": PNG[:-40]}.get(path, PNG)
            self.send_response(200)
            self.end_headers()
            while path == "/large" or path == "/slow":
                time.sleep(0.02 if path == "/slow" else 0)
                try:
                    self.wfile.write(b"\x89PNG" * (1 if path == "/slow" else 10_000))
                except OSError:
                    return
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["/ok.png", "/moved", "/ok.png?a=1&b=%20", "/mit Leerzeichen/é.png"])
def test_download(site, path):
    np.testing.assert_array_equal(pixels_of(site.url + path), PHOTO_HW3)
    assert "blip2" in site.asked[-1][1]


def test_an_encoded_address_stays_as_it_is(site):
    load_image(site.url + "/a%20b/é?x=%2F&y=[1]")
    assert site.asked[-1][0] == "/a%20b/%C3%A9?x=%2F&y=[1]"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "answered 404"),
        ("/page", "/page: not a JPEG"),
        ("/short", "truncated"),
        ("/away", "302|ftp"),
        ("/loop", "302"),
        ("/large", "larger than 100,000 bytes"),
        ("/slow", "0.2 s"),
    ],
)
def test_download_refused(site, path, words):
    with pytest.raises(ImageError, match=words) as caught:
        load_image(site.url + path, max_bytes=100_000, timeout_s=0.2)
    assert str(caught.value).startswith(site.url) and "\n" not in str(caught.value)


def test_nobody_answers():
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        port = server.server_port
    with pytest.raises(ImageError, match=r"cannot be downloaded.*refused"):
        load_image(f"http://127.0.0.1:{port}/x.png")


# ---- bytes that nobody foresaw ------------------------------------------------------------------------

SEEDS = [encoded(PHOTO, format) for format in FORMATS] + [
    encoded(with_palette_alpha()),
    encoded(Image.fromarray(GREY_16)),
    encoded(RGBA, "TIFF"),
    encoded(PHOTO, "JPEG", exif=Image.Exif(), progressive=True),
    encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    encoded(PHOTO, "PNG", icc_profile=of_primaries(ADOBE_RGB, 2.2)),
    encoded(PHOTO, "DIB"),
]


def reads_or_refuses(content: bytes) -> None:
    try:
        image = load_image(content, max_pixels=100_000, allow_truncated=len(content) % 2 == 0)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB" and min(image.size) > 0


@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *(seed[:16] for seed in SEEDS)]))
def test_random_bytes(tail, head):
    reads_or_refuses(head + tail)


@pytest.mark.filterwarnings("error")
@settings(max_examples=600, deadline=None)
@given(st.data())
def test_mutated_files(data):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        content = content or bytearray(b"\0")
    reads_or_refuses(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))


# ---- pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 364, 32])
@pytest.mark.parametrize("shape", [(480, 640), (224, 224), (50, 333), (20, 16)])
def test_pixels_equal_the_reference(size, shape):
    processors = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    reference = processors.BlipImageProcessorPil(size={"height": size, "width": size})
    images = [Image.fromarray(noise(*shape)), Image.fromarray(noise(*shape, 4, seed=1))]
    expected = torch.cat([reference(image, return_tensors="pt").pixel_values for image in images])
    actual = to_pixels([load_image(image) for image in images], size=size, mean=CLIP_MEAN, std=CLIP_STD)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    assert torch.equal(actual, expected)


def test_pixels_by_hand():
    white, black = Image.new("RGB", (3, 7), "white"), Image.new("RGB", (7, 3))
    pixels_B3HW = to_pixels([white, black], size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    assert pixels_B3HW[:, :, 1, 2].tolist() == [[1.0, 1.5, 0.5], [-1.0, -0.5, 0.0]]
    assert to_pixels([], size=4, mean=CLIP_MEAN, std=CLIP_STD).shape == (0, 3, 4, 4)


def test_filters():
    image = load_image(PHOTO)
    square = {"size": 4, "mean": CLIP_MEAN, "std": CLIP_STD}
    assert not torch.equal(to_pixels([image], **square), to_pixels([image], **square, resample="nearest"))
    with pytest.raises(OptionError, match=r"'cubic' is not a filter.*bicubic"):
        to_pixels([image], **square, resample="cubic")


# ---- what is written ----------------------------------------------------------------------------------


def test_an_overlay_shows_the_picture_and_the_map():
    picture = Image.fromarray(noise(40, 60) // 4 + 90)
    heat = np.linspace(0, 1, 60, dtype=np.float32)[None].repeat(40, 0)
    drawn = overlay(picture, heat)
    assert drawn.mode == "RGB" and drawn.size == picture.size
    brightness, before = (np.asarray(image.convert("L"), dtype=float) for image in (drawn, picture))
    columns = brightness.mean(0)
    assert columns[0] < before.mean() - 20 and columns[-1] > before.mean() + 20  # dark to bright
    assert (np.diff(columns[::6]) > 0).mean() > 0.7
    for column in (0, 30, 59):  # and the image is seen through it everywhere
        assert np.corrcoef(brightness[:, column], before[:, column])[0, 1] > 0.95


@pytest.mark.parametrize("name", ["drawn.png", "drawn.JPG", "drawn.jpeg", "drawn.webp"])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path, name):
    save_image(Image.new("RGB", (30, 20), "red"), tmp_path / name)
    with Image.open(tmp_path / name) as read:
        assert read.size == (30, 20) and read.format == {"P": "PNG", "J": "JPEG", "W": "WEBP"}[name[6:7].upper()]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_where_no_picture_can_be_written(tmp_path):
    picture = Image.new("RGB", (3, 2))
    with pytest.raises(OptionError, match=r"drawn\.gif: images are written as \.png"):
        save_image(picture, tmp_path / "drawn.gif")
    with pytest.raises(ImageError, match=r"drawn\.png: cannot be written \(No such file"):
        save_image(picture, tmp_path / "missing/drawn.png")
    (tmp_path / "drawn.png").mkdir()
    with pytest.raises(ImageError, match=r"drawn\.png: cannot be written"):
        save_image(picture, tmp_path / "drawn.png")
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_a_thumbnail_keeps_the_proportions():
    small = load_image(thumbnail(np.zeros((300, 900, 3), np.uint8), 90))
    assert small.size == (90, 30)
    assert load_image(thumbnail(np.zeros((3, 9, 3), np.uint8), 90)).size == (9, 3)  # nothing is blown up
