"""The readable formats and their file suffixes, and the recognition of other files."""

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
"""Bytes of a file that are enough to recognise its format."""


@dataclass(frozen=True)
class Format:
    """A readable format. `read` opens a stream of it without Pillow's own limit on pixels."""

    name: str
    """Pillow's name of the format."""
    suffixes: tuple[str, ...]
    is_begun: Callable[[bytes], bool]
    """Whether a file begins like this format; gets `HEAD_BYTES` of it."""
    read: Callable[[IO[bytes]], ImageFile]
    missing: Callable[[], str] = str
    """What has to be installed for it; empty if nothing is missing."""


def _begins(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(marks)


def _is_bitmap(head: bytes) -> bool:
    """Whether it is a BMP, or a .dib without the BMP header: a known header size, and one plane."""
    size = int.from_bytes(head[:4], "little")
    plane = head[8:10] if size == 12 else head[12:14]
    return head.startswith(b"BM") or (size in (12, 40, 52, 56, 64, 108, 124) and plane == b"\1\0")


def _read_bitmap(stream: IO[bytes]) -> ImageFile:
    is_whole = stream.read(2) == b"BM"
    stream.seek(0)
    return BmpImagePlugin.BmpImageFile(stream) if is_whole else BmpImagePlugin.DibImageFile(stream)


def _brands(head: bytes) -> list[bytes]:
    """The brands of a file in the MP4 family, the main one first; they distinguish HEIC, AVIF and videos."""
    if head[4:8] != b"ftyp":
        return []
    length = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[start : start + 4] for start in range(16, length - 3, 4))]


def _is_avif(head: bytes) -> bool:
    return not _is_heic(head) and any(brand in (b"avif", b"avis") for brand in _brands(head))


def _is_heic(head: bytes) -> bool:
    first, *others = _brands(head) or [b""]
    if first in (b"mif1", b"mif2", b"msf1"):  # any codec: the compatible brands decide
        return not {b"avif", b"avis"} & {*others}
    return first in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def _read_heic(stream: IO[bytes]) -> ImageFile:
    """Uses a HEIF plugin registered with Pillow, or else pillow-heif without registering it."""
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
"""Only raster formats: Pillow would also run PostScript and open whole documents."""

FORMATS = tuple(format.name for format in TABLE)
SPOKEN = {"WEBP": "WebP", "HEIF": "HEIC"}
"""Formats with another name in messages."""


def format_of(head: bytes) -> Format | None:
    """The format of a file that begins like this."""
    return next((format for format in TABLE if format.is_begun(head)), None)


def readable(names: tuple[str, ...]) -> str:
    """The names as text: JPEG, PNG or WebP."""
    spoken = [SPOKEN.get(name, name) for name in names]
    return " or ".join(filter(None, [", ".join(spoken[:-1]), spoken[-1]]))


def suffixes() -> tuple[frozenset[str], dict[str, str]]:
    """The suffixes that can be read; and those that need something installed, with the command."""
    missing = {format: format.missing() for format in TABLE}
    found = frozenset(suffix for format in TABLE if not missing[format] for suffix in format.suffixes)
    return found, {suffix: needed for format, needed in missing.items() if needed for suffix in format.suffixes}


# ---- other files -------------------------------------------------------------

MP4 = {
    b"crx": "a camera's raw file (CR3)", b"qt": "a video (QuickTime)", b"M4A": "audio (M4A)", b"jp2": "JPEG 2000",
}  # fmt: skip
KNOWN = (  # beginning of the file, what it is
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
    (rb"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (rb"RIFF....AVI ", "a video (AVI)"),
    (rb"RIFF....WAVE|ID3|\xff[\xf2\xf3\xfb]|fLaC|OggS", "audio"),
    (rb"\0\0\x01[\xb3\xba]|FLV\x01|G.{187}G", "a video"),
    (rb"version https://git-lfs\.github\.com", "a Git LFS pointer; git lfs pull gets the file itself"),
    (rb"[./]*(\.git)?/annex/objects/", "a git-annex pointer; git annex get gets the file itself"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "an archive; unpack it"),
    (rb"\0\x05\x16[\0\x07]", "macOS metadata without the file itself"),
    (rb"SIMPLE  =", "FITS"),
    (rb"\0+\Z", "only zeros, as after an interrupted download; download it again"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*(<!doctype html|<html|<head|<body)",
     "a web page, such as a login or an error page; download the image itself"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*(<!doctype svg.*?>\s*)?<svg", "an SVG drawing"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "XML, such as an error of cloud storage; download the image itself"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}]", "JSON, such as an error of a web service"),
)  # fmt: skip
TEXT = "text"
CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def foreign(head: bytes) -> str:
    """What an unreadable file is, with a remedy if there is a better one than converting it; empty if it is unknown."""
    if head[4:8] == b"ftyp":
        return MP4.get(head[8:12].strip(), "a video (MP4)")
    for pattern, what in KNOWN:
        if re.match(pattern, head, re.DOTALL):
            return what
    return "" if CONTROLS.search(head) or not _is_text(head) else TEXT


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) >= HEAD_BYTES  # a character is cut off at the end of the head
    return True


BITS, PHOTOMETRIC = 258, 262
MIN_IS_WHITE = 0


def grey_range(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in grey of more than 8 bits. Pillow does not scale those of a TIFF."""
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
