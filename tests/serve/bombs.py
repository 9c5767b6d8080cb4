"""Pictures that cost more than they look: each is small, or quickly made, and takes much memory or time to read."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

from PIL import Image

from tests.serve.conftest import PICTURES

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    image.save(content := io.BytesIO(), name, **options)
    return content.getvalue()


# ---- JPEG ----


EXIF = b"Exif\0\0" + b"A" * 10


def jpeg_of_segments(kind: bytes = b"\xff\xe1", content: bytes = EXIF, size: int = 3_500_000) -> bytes:
    """Pillow joins Exif segments one by one."""
    whole = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
    segment = kind + struct.pack(">H", 2 + len(content)) + content
    return whole[:2] + segment * (size // len(segment)) + whole[2:]


def jpeg_of_scans(number: int = 88, side: int = 5000) -> bytes:
    """Each scan goes over all pixels again."""
    content = saved(Image.new("L", (side, side), 99), "JPEG", progressive=True).removesuffix(b"\xff\xd9")
    return content + content[content.rindex(b"\xff\xda") :] * number + b"\xff\xd9"


def jpeg_large(turned: bool = False) -> bytes:
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    return saved(Image.new("L", (15_000, 15_000), 99), "JPEG", exif=exif)


def jpeg_claiming(width: int, height: int) -> bytes:
    """A header of that size, with the scan of another image."""
    whole = bytearray(saved(Image.new("RGB", (16, 16), "red"), "JPEG"))
    place = whole.index(b"\xff\xc0") + 5
    whole[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


def jpeg_of_pictures() -> bytes:
    """An MPO: its index says that there are thousands of images."""
    whole = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
    number = 2000
    entries = b"".join(struct.pack("<LLLHH", 0x030000, len(whole), 0, 0, 0) for _ in range(number))
    index = b"II*\0" + struct.pack("<L", 8) + struct.pack("<H", 3)
    index += struct.pack("<HHL4s", 0xB000, 7, 4, b"0100") + struct.pack("<HHLL", 0xB001, 4, 1, number)
    index += struct.pack("<HHLL", 0xB002, 7, len(entries), 50) + struct.pack("<L", 0) + entries
    segment = b"MPF\0" + index
    return whole[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(segment)) + segment + whole[2:]


# ---- PNG ----


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def zeros(number: int) -> bytes:
    """So many of them, packed."""
    packer, parts = zlib.compressobj(1), []
    for start in range(0, number, 2**24):
        parts.append(packer.compress(bytes(min(2**24, number - start))))
    return b"".join(parts) + packer.flush()


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, interlaced: bool = False, before: bytes = b"",
        pixels: bytes | None = None) -> bytes:  # fmt: skip
    """All pixels 0."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    number = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        number += rows * (1 + -(-columns * samples * bits // 8)) if columns > 0 else 0
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    content = chunk(b"IDAT", zeros(number)) if pixels is None else pixels
    return SIGNATURE + header + before + palette + content + chunk(b"IEND", b"")


def png_of_texts(number: int = 60, size: int = 100_000_000) -> bytes:
    one = zlib.compress(bytes(size), 9)
    return png(8, 8, before=b"".join(chunk(b"zTXt", b"Comment%d\0\0" % each + one) for each in range(number)))


def png_of_profile() -> bytes:
    return png(8, 8, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(300_000_000), 9)))


def png_of_chunks(kind: bytes = b"tEXt", number: int = 600_000) -> bytes:
    return png(8, 8, before=chunk(kind, b"a\0b") * number)


def png_of_tiny_pieces() -> bytes:
    packed = zlib.compressobj(0)
    raw = packed.compress(bytes(1000 * 1001)) + packed.flush()
    return png(1000, 1000, pixels=b"".join(chunk(b"IDAT", raw[place : place + 1]) for place in range(len(raw))))


def png_animated() -> bytes:
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 1, 0, 0))
    return png(8, 8, before=chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + frame * 300_000)


# ---- others ----


def gif_large() -> bytes:
    return saved(Image.new("L", (9000, 9000), 0), "GIF")


def gif_claiming() -> bytes:
    """A frame of one pixel on a screen of 200 million."""
    small = bytearray(saved(Image.new("L", (1, 1), 0), "GIF"))
    small[6:10] = struct.pack("<HH", 15_000, 14_000)
    return bytes(small)


def gif_of_comments() -> bytes:
    """Pillow joins them one by one."""
    small = saved(Image.new("L", (1, 1), 0), "GIF")
    place = small.index(b",", 13)
    return small[:place] + b"!\xfe\x01a\0" * 1_500_000 + small[place:]


def gif_of_frames() -> bytes:
    small = saved(Image.new("L", (1, 1), 0), "GIF")
    place = small.index(b",", 13)
    return small[:place] + small[place:-1] * 300_000 + b";"


def webp_flat(shade: int = 0, side: int = 7070) -> bytes:
    return saved(Image.new("RGBA", (side, side), (0, 0, shade, 0)), "WEBP", lossless=True, quality=0, method=0)


def webp_canvas() -> bytes:
    """A canvas of 240 million pixels with one small frame, and thousands after it."""
    first = Image.new("RGB", (8, 8), "red")
    small = bytearray(saved(first, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")] * 2000))
    place = small.index(b"VP8X") + 12
    small[place : place + 6] = (15_491).to_bytes(3, "little") + (15_491).to_bytes(3, "little")
    return bytes(small)


def avif_large(side: int = 4000) -> bytes:
    return saved(Image.new("RGB", (side, side), "red"), "AVIF", speed=10, quality=1)


def heic_large(side: int = 3000) -> bytes:
    import pillow_heif

    pillow_heif.from_pillow(Image.new("RGB", (side, side), "red")).save(content := io.BytesIO(), quality=1)
    return content.getvalue()


def bmp_runs() -> bytes:
    """240 million pixels in runs, which Pillow unpacks in Python."""
    width = height = 15_490
    row = b"\xff\x00" * (width // 255) + bytes((width % 255, 0)) + b"\0\0"
    content = row * height + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 1, 1, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(content), 0, 0, 14 + len(info)) + info + content


def bmp_claiming() -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, 15_000, 15_000, 1, 1, 0, 0, 1, 1, 2, 0) + bytes(8)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 14 + len(info)) + info


Entry = tuple[int, int, int, int]
"""Of a TIFF's directory: tag, type, number of values, value or place."""


def tiff(entries: list[Entry], content: bytes = b"", following: int = 0) -> bytes:
    """A directory at 8, and after it ``content``, which begins at 8 + 6 + 12 for each entry."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", following) + content


def tiff_of(width: int, height: int, *more: Entry, compression: int = 1, rows: int | None = None, place: int = 8,
            size: int = 0, content: bytes = b"", following: int = 0) -> bytes:  # fmt: skip
    basic = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
             (273, 4, 1, place), (277, 3, 1, 1), (278, 4, 1, rows or height), (279, 4, 1, size)]  # fmt: skip
    chosen = {entry[0]: entry for entry in [*basic, *more]}
    return tiff(list(chosen.values()), content, following)


def tiff_of_strips(number: int = 1_000_000) -> bytes:
    """A strip of one row each, all at the same place."""
    start = 8 + 6 + 12 * 9
    places = struct.pack("<L", start) * number
    return tiff_of(100, number, (273, 4, number, start), (279, 4, number, start + len(places)), rows=1,
                   content=places + struct.pack("<L", 100) * number)  # fmt: skip


def tiff_packed() -> bytes:
    """Deflate: 225 million pixels of 0."""
    packed, start = zeros(15_000 * 15_000), 8 + 6 + 12 * 9
    return tiff_of(15_000, 15_000, compression=8, place=start, size=len(packed), content=packed)


def tiff_of_tags() -> bytes:
    """As many as a directory can have, each of which says that all of the file is its value."""
    number, size = 60_000, 2_000_000
    start = 8 + 6 + 12 * number
    return tiff_of(8, 8, *((1000 + each, 7, size, start) for each in range(number - 9)), content=bytes(size))


def tiff_in_a_ring() -> bytes:
    return tiff_of(8, 8, (34665, 4, 1, 8), (34853, 4, 1, 8), (330, 4, 1, 8), following=8)


def tiff_claiming() -> bytes:
    return tiff_of(8, 8, (273, 4, 2**30, 8), (279, 4, 2**30, 8), (320, 3, 2**31, 8), content=bytes(4000))


PICTURE_BOMBS: dict[str, Callable[[], bytes]] = {
    "jpeg of Exif segments": jpeg_of_segments,
    "jpeg of profile segments": lambda: jpeg_of_segments(b"\xff\xe2", b"ICC_PROFILE\0\1\1a"),
    "jpeg of Photoshop segments": lambda: jpeg_of_segments(b"\xff\xed", b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\0"),
    "jpeg of comments": lambda: jpeg_of_segments(b"\xff\xfe", b"a" * 10),
    "jpeg of empty segments": lambda: jpeg_of_segments(b"\xff\xe5", b"", 8_000_000),
    "jpeg of tables": lambda: jpeg_of_segments(b"\xff\xdb", b"\0" + bytes(range(1, 65)), 8_000_000),
    "jpeg of scans": jpeg_of_scans,
    "jpeg of 225 million pixels": jpeg_large,
    "jpeg of 225 million pixels, turned": lambda: jpeg_large(True),
    "jpeg that claims 240 million pixels": lambda: jpeg_claiming(15_490, 15_490),
    "jpeg of fill bytes": lambda: jpeg_of_segments(b"\xff" * 1000 + b"\xe5", b"", 14_000_000),
    "jpeg with an index of pictures": jpeg_of_pictures,
    "png of 225 million bits": lambda: png(15_000, 15_000, bits=1),
    "png of 80 million colours": lambda: png(9000, 9000, colour=2),
    "png of 16 bits and transparency": lambda: png(7000, 7000, bits=16, colour=6),
    "png interlaced": lambda: png(14_000, 14_000, interlaced=True),
    "png interlaced, below the large ones": lambda: png(5400, 5400, bits=16, colour=6, interlaced=True),
    "png one pixel wide": lambda: png(1, 240_000_000, bits=1),
    "png one pixel high": lambda: png(240_000_000, 1, bits=1),
    "png palette": lambda: png(15_000, 15_000, bits=1, colour=3),
    "png claims": lambda: png(2**31 - 1, 2**31 - 1, pixels=b""),
    "png cut": lambda: png(15_000, 15_000)[:5000],
    "png of texts": png_of_texts,
    "png of a profile": png_of_profile,
    "png of chunks": png_of_chunks,
    "png of critical chunks": lambda: png_of_chunks(b"QQQQ"),
    "png of pieces of one byte": png_of_tiny_pieces,
    "png of frames": png_animated,
    "gif of 81 million pixels": gif_large,
    "gif that claims": gif_claiming,
    "gif of comments": gif_of_comments,
    "gif of frames": gif_of_frames,
    "webp of 34 bytes": webp_flat,
    "webp of 29 million pixels": lambda: webp_flat(1, 5380),
    "webp canvas": webp_canvas,
    "avif": avif_large,
    "bmp of runs": bmp_runs,
    "bmp that claims": bmp_claiming,
    "tiff of strips": tiff_of_strips,
    "tiff packed": tiff_packed,
    "tiff of tags": tiff_of_tags,
    "tiff in a ring": tiff_in_a_ring,
    "tiff that claims": tiff_claiming,
}  # fmt: skip


def pictures() -> Iterator[tuple[str, bytes]]:
    for name, make in PICTURE_BOMBS.items():
        yield name, make()


@cache
def innocent() -> bytes:
    return PICTURES[0].read_bytes()
