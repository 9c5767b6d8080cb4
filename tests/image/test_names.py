"""What messages call an image, and what they make of its name."""

import os

import pytest

from blip2.errors import ImageFormatError
from blip2.image import load_image, name_of


def test_a_text_that_is_called_a_picture(tmp_path):
    path = tmp_path / "a page .JPG"
    path.write_text("not found\n")
    with pytest.raises(ImageFormatError, match="but text; download it again, or remove it"):
        load_image(path)


def test_a_name_that_is_not_utf_8_is_told_as_shells_write_it():
    assert name_of(os.fsdecode(b"caf\xe9/\xd0\xb6.png")) == r"caf\xe9/ж.png"
    assert name_of("\ud800.png") == repr("\ud800.png")  # half of a character
