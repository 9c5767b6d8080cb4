"""What the head of a file tells, and nothing that it could be made to do."""

import pytest
from PIL import Image

from blip2.image import named_format, stored_size


def turned(path):
    image = Image.new("RGB", (8, 6))
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif", "a.avif"])
def test_size(tmp_path, name):
    Image.new("RGB", (8, 6)).save(tmp_path / name)
    assert stored_size(str(tmp_path / name)) == stored_size((tmp_path / name).read_bytes()) == (8, 6)


def test_size_is_as_stored(tmp_path):
    turned(tmp_path / "a.jpg")
    assert stored_size(str(tmp_path / "a.jpg")) == (8, 6)


def test_no_size(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    for source in (str(tmp_path / "a.jpg"), str(tmp_path / "none.jpg"), str(tmp_path), b"", "https://a/b.jpg", "-"):
        assert stored_size(source) is None


def test_format_by_content(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", "WEBP")
    assert named_format(str(tmp_path / "a.jpg")) == ("WebP", (".webp",))
    assert named_format(str(tmp_path / "none.jpg")) is None
