"""Which formats are read, by which names their files go, and what a file is that is none of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import IO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from PIL.ImageFile import ImageFile

HEAD_BYTES = 1024
"""So much of a file tells what it is."""


@dataclass(frozen=True)
class Format:
    """A format that is read. `read` opens a stream of it without looking at Pillow's own limit of pixels."""

    name: str
    """Pillow's."""
    suffixes: tuple[str, ...]
    is_begun: Callable[[bytes], bool]
    """Whether a file begins so; it is given `HEAD_BYTES` of it."""
    read: Callable[[IO[bytes]], ImageFile]
    missing: Callable[[], str] = str
    """What to install for it; empty if all is there."""


def _begins(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(marks)


def _is_bitmap(head: bytes) -> bool:
    """BMP, or its content alone, as .dib files may have it: the size of a header that there is, and one plane."""
    size = int.from_bytes(head[:4], "little")
    plane = head[8:10] if size == 12 else head[12:14]
    return head.startswith(b"BM") or (size in (12, 40, 52, 56, 64, 108, 124) and plane == b"\1\0")


def _read_bitmap(stream: IO[bytes]) -> ImageFile:
    is_whole = stream.read(2) == b"BM"
    stream.seek(0)
    return BmpImagePlugin.BmpImageFile(stream) if is_whole else BmpImagePlugin.DibImageFile(stream)


def _brands(head: bytes) -> list[bytes]:
    """What a file of the family of MP4 says it is, the first most of all: HEIC, AVIF and films are told apart by it."""
    if head[4:8] != b"ftyp":
        return []
    length = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[start : start + 4] for start in range(16, length - 3, 4))]


def _is_avif(head: bytes) -> bool:
    return not _is_heic(head) and any(brand in (b"avif", b"avis") for brand in _brands(head))


def _is_heic(head: bytes) -> bool:
    first, *others = _brands(head) or [b""]
    if first in (b"mif1", b"mif2", b"msf1"):  # any coding: the others tell
        return not {b"avif", b"avis"} & {*others}
    return first in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def _read_heic(stream: IO[bytes]) -> ImageFile:
    """By what the program has registered with Pillow, or else by pillow-heif, without registering it."""
    if "HEIF" in Image.OPEN:
        return Image.OPEN["HEIF"][0](stream, "")
    from pillow_heif import HeifImageFile

    return HeifImageFile(stream)


def _missing_heic() -> str:
    return "" if "HEIF" in Image.OPEN or find_spec("pillow_heif") else "pip install pillow-heif"


def _missing_avif() -> str:
    return "" if features.check("avif") else "a Pillow with AVIF: pip install -U Pillow"


TABLE = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
           _begins(b"\xff\xd8\xff"), JpegImagePlugin.jpeg_factory),
    Format("PNG", (".png", ".apng"), _begins(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    Format("WEBP", (".webp",), lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
           WebPImagePlugin.WebPImageFile),
    Format("GIF", (".gif",), _begins(b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    Format("BMP", (".bmp", ".dib"), _is_bitmap, _read_bitmap),
    Format("TIFF", (".tif", ".tiff"),
           _begins(b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    Format("AVIF", (".avif", ".avifs"), _is_avif, AvifImagePlugin.AvifImageFile, _missing_avif),
    Format("HEIF", (".heic", ".heif", ".heics", ".heifs", ".hif"), _is_heic, _read_heic, _missing_heic),
)  # fmt: skip
"""Rasters only: Pillow would also run PostScript and open whole documents."""

FORMATS = tuple(format.name for format in TABLE)
SPOKEN = {"WEBP": "WebP", "HEIF": "HEIC"}
"""Formats whose name people write otherwise."""


def format_of(head: bytes) -> Format | None:
    """The format of a file that begins so."""
    return next((format for format in TABLE if format.is_begun(head)), None)


def readable(names: tuple[str, ...]) -> str:
    """JPEG, PNG or WebP."""
    spoken = [SPOKEN.get(name, name) for name in names]
    return " or ".join(filter(None, [", ".join(spoken[:-1]), spoken[-1]]))


def suffixes() -> tuple[frozenset[str], dict[str, str]]:
    """The suffixes of what can be read here; and of what cannot, with what has to be installed for it."""
    missing = {format: format.missing() for format in TABLE}
    found = frozenset(suffix for format in TABLE if not missing[format] for suffix in format.suffixes)
    return found, {suffix: needed for format, needed in missing.items() if needed for suffix in format.suffixes}


# ---- what is no image, or none that is read -------------------------------------------------------------

MP4 = {
    b"crx": "a camera's raw file (CR3)", b"qt": "a film (QuickTime)", b"M4A": "a sound (M4A)", b"jp2": "JPEG 2000",
}  # fmt: skip
KNOWN = (  # how files begin, what they are
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"II\xbc", "JPEG XR"),
    (rb"FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|\0MRM|FOVb", "a camera's raw file"),
    (rb"8BPS", "a Photoshop document (PSD)"),
    (rb"gimp xcf", "a GIMP document (XCF)"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"P[1-7]\s", "a portable pixmap (PPM)"),
    (rb"\0\0[\x01\x02]\0[^\0]", "an icon (ICO)"),
    (rb"icns", "an icon (ICNS)"),
    (rb"v/1\x01", "OpenEXR"),
    (rb"#\?(RADIANCE|RGBE)", "Radiance HDR"),
    (rb"\x1a\x45\xdf\xa3", "a film (Matroska or WebM)"),
    (rb"RIFF....AVI ", "a film (AVI)"),
    (rb"RIFF....WAVE|ID3|\xff[\xf2\xf3\xfb]|fLaC|OggS", "a sound"),
    (rb"\0\0\x01[\xb3\xba]|FLV\x01|G.{187}G", "a film"),
    (rb"version https://git-lfs\.github\.com", "a Git LFS pointer; git lfs pull gets the file itself"),
    (rb"[./]*(\.git)?/annex/objects/", "a git-annex pointer; git annex get gets the file itself"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "an archive; unpack it"),
    (rb"\0\x05\x16[\0\x07]", "what macOS keeps beside a file, without the file itself"),
    (rb"SIMPLE  =", "FITS"),
    (rb"\0+\Z", "only zeros, as a download that broke off leaves it; get it again"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*(<!doctype html|<html|<head|<body)",
     "a web page, such as a log-in or an error; download the image itself"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*(<!doctype svg.*?>\s*)?<svg", "an SVG drawing"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "XML, such as an error of a web store; download the image itself"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}]", "JSON, such as an error of a web service"),
)  # fmt: skip
TEXT = "text"
CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def foreign(head: bytes) -> str:
    """What a file is that begins so and is none of `TABLE`, with a remedy if there is a better one than to convert it;
    empty if it cannot be told."""
    if head[4:8] == b"ftyp":
        return MP4.get(head[8:12].strip(), "a film (MP4)")
    for pattern, what in KNOWN:
        if re.match(pattern, head, re.DOTALL):
            return what
    return "" if CONTROLS.search(head) or not _is_text(head) else TEXT


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) >= HEAD_BYTES  # a character that the end cuts
    return True


BITS, PHOTOMETRIC = 258, 262
MIN_IS_WHITE = 0


def grey_range(image: Image.Image) -> tuple[int, int]:
    """Which values of grey of more than 8 bits are black and white; Pillow leaves those of a TIFF as they are."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    most = 4095 if tags.get(BITS) == (12,) else 65535
    return (most, 0) if tags.get(PHOTOMETRIC) == MIN_IS_WHITE else (0, most)


RAW_TAGS = (50706, 50740)  # DNGVersion, DNGPrivateData
SUBFILE_TYPE, SUB_FILES = 254, 330


def is_raw_photo(image: ImageFile, head: bytes) -> bool:
    """Whether a TIFF is a camera's raw file, of which Pillow would read the small preview."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    is_preview = SUB_FILES in tags and bool(tags.get(SUBFILE_TYPE, 0) & 1)
    return head[8:10] == b"CR" or is_preview or any(tag in tags for tag in RAW_TAGS)
