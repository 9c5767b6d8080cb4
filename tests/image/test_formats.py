"""Which files are read, and what is said of the others; sound images with odd things in them; images cut short."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from blip2.errors import ImageError, ImageFormatError, ImageSizeError
from blip2.image import formats, load_image, suffixes
from blip2.image.decode import webp_size

GRADIENT_HW3 = np.stack(np.meshgrid(np.arange(96), np.arange(64)), axis=-1)[..., [0, 1, 0]].astype(np.uint8) * 2
GRADIENT = Image.fromarray(GRADIENT_HW3)
has_heif = pytest.mark.skipif(not find_spec("pillow_heif"), reason="pillow-heif is not installed")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def heic(image: Image.Image, **options) -> bytes:
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


# ---- formats ------------------------------------------------------------------------------------------


def test_every_suffix_that_is_listed_is_read(tmp_path):
    found, missing = suffixes()
    assert {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
    } <= found
    writes = {format.name: format.name for format in formats.TABLE} | {"HEIF": ""}
    for format in formats.TABLE:
        for suffix in format.suffixes:
            if suffix in missing:
                continue
            path = tmp_path / f"picture{suffix}"
            content = heic(GRADIENT) if not writes[format.name] else encoded(GRADIENT, writes[format.name])
            path.write_bytes(content)
            assert load_image(path).size == GRADIENT.size
    assert np.array_equal(load_image(encoded(GRADIENT, "DIB")), GRADIENT)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}, {"save_all": True}])
def test_the_size_of_a_webp_is_known_from_its_head(options):
    content = encoded(GRADIENT, "WEBP", **options)
    assert webp_size(content[:1024]) == GRADIENT.size
    assert webp_size(content[:15]) is webp_size(encoded(GRADIENT, "PNG")) is None
    with pytest.raises(ImageSizeError, match="is more than 5 pixels"):
        load_image(content, max_pixels=5)


@has_heif
def test_heic_is_read_upright_and_registered_or_not():
    content = heic(GRADIENT, quality=100, chroma=444)
    assert "HEIF" not in Image.OPEN, "reading it registers nothing"
    assert np.abs(np.asarray(load_image(content)).astype(int) - GRADIENT_HW3).max() <= 4
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = heic(GRADIENT, exif=exif.tobytes())
    assert b"irot" in turned and load_image(turned).size == (64, 96)


def test_heic_that_a_program_has_registered_is_read_by_that(monkeypatch):
    class Registered(ImageFile.ImageFile):
        def _open(self):
            self._size, self._mode, self.tile = (2, 3), "L", [("raw", (0, 0, 2, 3), 0, ("L", 0, 1))]

    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ImageFormatError, match="HEIC, which needs pip install pillow-heif; or convert it"):
        load_image(head)
    assert suffixes()[1][".heic"] == "pip install pillow-heif"
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda stream, name: Registered(stream), None))
    assert load_image(head).size == (2, 3)
    assert ".heic" in suffixes()[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera's raw"),
        (b"FUJIFILMCCD-RAW 0201", "camera's raw"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video"),
        (b"\x1a\x45\xdf\xa3\x9f", "video"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><head>", "web page"),
        (b"\n<HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'{"error": "not found"}', "JSON"),
        (b"PK\3\4\x14\0", "archive; unpack it"),
        (b"a.png\nb.png\n", "but text"),
        (b"\0" * 5000, "only zeros"),
        (b"\x93\x81\x03\x02" * 9, "or damaged"),
    ],
)
def test_what_a_file_is_that_is_no_picture(content, words):
    with pytest.raises(ImageFormatError, match=words) as caught:
        load_image(content)
    assert "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image" in str(caught.value)


def test_the_preview_in_a_raw_photo_is_not_taken_for_the_picture():
    preview = TAGS = Image.new("RGB", (16, 12))
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    with pytest.raises(ImageFormatError, match="raw file"):
        load_image(encoded(preview, "TIFF", tiffinfo=tags))
    assert load_image(encoded(TAGS, "TIFF")).size == (16, 12)


def test_other_formats_are_named_where_only_some_are_read():
    with pytest.raises(ImageFormatError, match="not a JPEG or PNG image, but TIFF; convert it"):
        load_image(encoded(GRADIENT, "TIFF"), formats=("JPEG", "PNG"))


# ---- what is no file ----------------------------------------------------------------------------------


def test_a_pipe_is_read_and_waited_for_only_where_somebody_writes(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"pipe\.png: a pipe without a writer"):
        load_image(pipe)
    held = os.open(pipe, os.O_RDWR)
    with pytest.raises(ImageError, match=r"without data for 0\.1 s"):
        load_image(pipe, timeout_s=0.1)
    assert time.monotonic() - started < 5

    def write():
        content = encoded(Image.effect_noise((300, 300), 90))
        with open(held, "wb") as stream:
            stream.write(content[:1000])
            stream.flush()
            time.sleep(0.05)
            stream.write(content[1000:])

    writer = threading.Thread(target=write)
    writer.start()
    assert load_image(pipe).size == (300, 300)
    writer.join()


def test_devices_and_links_to_nothing(tmp_path):
    with pytest.raises(ImageError, match="/dev/zero: a device"):
        load_image("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"gone\.png: a broken link"):
        load_image(tmp_path / "gone.png")


# ---- sound images -----------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(content: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks, behind its header and before its end."""
    return content[:33] + b"".join(chunks) + content[33:-12] + b"".join(chunks) + content[-12:]


PNG = encoded(GRADIENT)
LONG = b"x" * (20 << 20)
TURN = b'<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"tEXt", b"parameters\0" + LONG * 4),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"profile\0\0" + b"no zlib stream"),
        chunk(b"iCCP", b""),
        chunk(b"gAMA", b"\0"),
        chunk(b"tEXt", b"transparency\0x"),
        chunk(b"tEXt", b"icc_profile\0x"),
        b"\0\0\0\1tEXtabroken checksum"[:13],
    ],
    ids=["zTXt", "iTXt", "tEXt", "long iCCP", "broken iCCP", "empty iCCP", "gAMA", "transparency", "icc", "checksum"],
)
def test_what_stands_beside_the_pixels_of_a_png_does_not_matter(odd):
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert np.array_equal(load_image(with_chunks(PNG, odd)), GRADIENT)
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize(
    "turning",
    [
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\"6\"/>"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TURN + b" " * (2 << 20))),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
            b"\nexif\n      26\n4d4d002a00000008000101120003000000010006000000000000\n")),
    ],
    ids=["XMP", "packed XMP", "raw EXIF"],
)  # fmt: skip
def test_a_png_is_turned_by_its_texts(turning):
    assert load_image(with_chunks(PNG, turning)).size == (64, 96)


def test_a_thousand_packed_texts_are_not_unpacked_a_thousand_times(monkeypatch):
    unpacked = []
    monkeypatch.setattr("blip2.image.png._unpacked", lambda data: unpacked.append(len(data)) or b"x")
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG))
    assert load_image(with_chunks(PNG, *[text, profile] * 500)).size == GRADIENT.size
    assert len(unpacked) == 2


def test_pictures_of_telephones_pass():
    """200 megapixels, of which only the header is there: it is not the number of pixels that is complained about."""
    header = struct.pack(">IIBBBBB", 16320, 12240, 8, 2, 0, 0, 0)
    with pytest.raises(ImageError, match="damaged or truncated"):
        load_image(PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def test_a_large_picture_is_made_strip_by_strip_to_the_same(monkeypatch):
    clear = Image.fromarray(np.dstack([GRADIENT_HW3, np.arange(96, dtype=np.uint8)[None].repeat(64, 0)]))
    deep = Image.fromarray((np.arange(96 * 64, dtype=np.uint16) * 10).reshape(64, 96))
    contents = [encoded(clear), encoded(clear.quantize(32)), encoded(deep), encoded(GRADIENT.convert("CMYK"), "TIFF")]
    whole = [np.asarray(load_image(content)) for content in contents]
    monkeypatch.setattr("blip2.image.decode.STRIP_PIXELS", 700)
    monkeypatch.setattr("blip2.image.decode.LARGE_PIXELS", 700)
    for content, expected in zip(contents, whole, strict=True):
        assert np.array_equal(load_image(content), expected)


def grey_tiff(bits: int, photometric: int, row: bytes, width: int) -> bytes:
    """A TIFF of one row, made by hand: width, height, bits, no compression, what black is, and where the row is."""
    tags = ((256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4), (277, 1),
            (278, 1), (279, len(row)))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + row


def test_grey_of_more_bits_is_scaled_from_black_to_white():
    deep = struct.pack("<3H", 0, 32896, 65535)
    for bits, photometric, row, expected in (
        (16, 1, deep, [0, 128, 255]),
        (16, 0, deep, [255, 127, 0]),  # 0 is white: X-rays and facsimiles
        (12, 1, bytes([0x00, 0x08, 0x08, 0xFF, 0xF0, 0x00]), [0, 128, 255]),
        (8, 0, bytes([0, 128, 255]), [255, 127, 0]),
    ):
        assert np.asarray(load_image(grey_tiff(bits, photometric, row, 3)))[0, :, 0].tolist() == expected
    assert np.asarray(load_image(Image.new("LA", (1, 1), (0, 51)).convert("La"))).tolist() == [[[204, 204, 204]]]


# ---- images cut short -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {})]
)
def test_what_lacks_its_end_is_read_if_that_is_allowed(format, options):
    content = encoded(GRADIENT, format, **options)
    whole = np.asarray(load_image(content))
    with pytest.raises(ImageError, match="allow_truncated=True"):
        load_image(content[: -len(content) // 4])
    read = np.asarray(load_image(content[: -len(content) // 4], allow_truncated=True))
    assert read.shape == whole.shape
    if not options:
        assert 8 <= (read == whole).all(axis=(1, 2)).sum() < 64
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_jpeg_without_its_last_marker_has_all_its_pixels():
    content = encoded(GRADIENT, "JPEG")
    assert np.array_equal(load_image(content[:-2], allow_truncated=True), load_image(content))
    with pytest.raises(ImageError, match="damaged"):
        load_image(content[:200], allow_truncated=True)


# ---- warnings -----------------------------------------------------------------------------------------


def test_warnings_of_pillow_do_not_appear_and_those_of_others_do(recwarn):
    broken = bytearray(encoded(GRADIENT, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff\xff\xff\7\0\6\0\0"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(broken)).getexif()
    assert caught, "the file is one that Pillow warns of"
    is_over = threading.Event()

    def read():
        for _ in range(200):
            load_image(bytes(broken))
        is_over.set()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = threading.Thread(target=read)
        reader.start()
        told = 0
        while not is_over.is_set():
            warnings.warn("mine", stacklevel=1)
            told += 1
        reader.join()
    assert {str(warning.message) for warning in caught} == {"mine"} and len(caught) == told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(bytes(broken)).size == GRADIENT.size
        with pytest.raises(UserWarning):
            warnings.warn("mine", stacklevel=1)


def test_pillow_logs_nothing_of_a_broken_picture(caplog):
    content = encoded(GRADIENT, "TIFF").replace(
        struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 999)
    )
    with pytest.raises(ImageError, match="damaged"):
        load_image(content)
    assert not caplog.records
    with pytest.raises(OSError):
        Image.open(io.BytesIO(content))
    assert caplog.records


def test_a_line_longer_than_memory_is_an_error_of_this_picture():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 200_000_000, 1, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="needs more memory than there is"):
        load_image(content)


def test_a_name_with_a_space_at_its_end_is_quoted():
    with pytest.raises(ImageError, match=r"^'cat.png  ': no such file"):
        load_image("cat.png  ")
