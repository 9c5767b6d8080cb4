"""Frozen features on disk: what the encoder says, computed once, and never for the wrong model."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2 import disk
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.data import Row, RowImages, frozen_features
from blip2.data.features import SingleProcess, fingerprint
from blip2.errors import ImageError, RecipeError
from blip2.vision import VisionTransformer
from tests import tiny
from tests.tiny import VISION


@pytest.fixture
def vision():
    torch.manual_seed(1)
    return VisionTransformer(VISION).eval()


@pytest.fixture
def shown(pictures):
    return RowImages([Row(path) for path in pictures], size=32, mean=CLIP_MEAN, std=CLIP_STD)


def test_they_are_the_encoders(vision, shown, tmp_path):
    file = frozen_features(vision, shown, tmp_path, "rows", batch_size=3)
    assert len(file) == 8
    numbers = torch.tensor([5, 0, 5])
    with torch.no_grad():
        wanted = vision.features(shown.pixels(numbers))
    found = file.read(numbers.numpy())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)


def test_they_are_computed_once(vision, shown, tmp_path, monkeypatch):
    done = []
    frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=lambda *counts: done.append(counts))
    assert done == [(3, 8), (6, 8), (8, 8)]
    monkeypatch.setattr(VisionTransformer, "features", None)
    vision.post_norm.weight.data += 1  # trained, and so no part of what is stored
    assert len(frozen_features(vision, shown, tmp_path, "rows")) == 8


def test_what_was_interrupted_goes_on(vision, shown, tmp_path):
    whole = frozen_features(vision, shown, tmp_path / "whole", "rows", batch_size=3).read(shown.number_of_row)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=interrupt)
    assert not (tmp_path / "rows.bin").exists()
    with (tmp_path / "rows.bin.partial").open("ab") as partial:
        partial.write(b"half a picture")
    done = []
    file = frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=lambda *c: done.append(c))
    assert done == [(6, 8), (8, 8)]
    assert torch.equal(file.read(shown.number_of_row), whole)


def test_another_encoder_and_other_pictures_are_refused(vision, shown, pictures, tmp_path):
    frozen_features(vision, shown, tmp_path, "rows")
    fewer = RowImages([Row(path) for path in pictures[:4]], size=32, mean=CLIP_MEAN, std=CLIP_STD)
    with pytest.raises(RecipeError, match="other images"):
        frozen_features(vision, fewer, tmp_path, "rows")
    vision.blocks[0].fc1.bias.data[0] += 1
    with pytest.raises(RecipeError, match="another image encoder"):
        frozen_features(vision, shown, tmp_path, "rows")


@pytest.mark.parametrize("earlier", [0, None])
def test_other_pixels_of_the_same_files_are_seen_anew(vision, shown, tmp_path, earlier):
    """When the reading of images has changed: colours, orientation."""
    frozen_features(vision, shown, tmp_path, "rows")
    about = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(about | {"pixels": earlier}))
    assert computed(vision, shown, tmp_path)[-1] == (8, 8)
    assert json.loads((tmp_path / "rows.json").read_text()) == about
    assert computed(vision, shown, tmp_path) == []


def test_features_of_which_less_was_told_once_serve_on(vision, shown, tmp_path):
    frozen_features(vision, shown, tmp_path, "rows")
    about = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps({key: about[key] for key in about if key != "settings"}))
    assert computed(vision, shown, tmp_path) == []
    assert json.loads((tmp_path / "rows.json").read_text()) == about


def test_a_folder_that_only_the_first_process_sees_is_refused(vision, shown, tmp_path):
    class Second(SingleProcess):
        is_first = False

    with pytest.raises(RecipeError, match=r"rows\.json: this process cannot see what the first process wrote there"):
        frozen_features(vision, shown, tmp_path, "rows", workers=Second())


def test_one_run_at_a_time(vision, shown, tmp_path):
    with disk.locked(tmp_path / "rows.lock"), pytest.raises(RecipeError, match="rows: another run is computing these"):
        frozen_features(vision, shown, tmp_path, "rows")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.lock"]
    assert len(frozen_features(vision, shown, tmp_path, "rows")) == 8


def test_a_file_that_was_cut_is_refused(vision, shown, tmp_path):
    frozen_features(vision, shown, tmp_path, "rows")
    path = tmp_path / "rows.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RecipeError, match=r"rows\.bin: does not have the size"):
        frozen_features(vision, shown, tmp_path, "rows")
    assert json.loads((tmp_path / "rows.json").read_text())["shape"] == [8, 5, 16]


def computed(vision, shown, folder) -> list[tuple[int, int]]:
    """What a further start reports that it computes."""
    done = []
    frozen_features(vision, shown, folder, "rows", batch_size=1, report=lambda *counts: done.append(counts))
    return done


def replace_keeping_size_and_time(path):
    """As ``cp -p`` or ``rsync -t`` of another image leaves it."""
    before = os.stat(path)
    tiny.picture(77).save(path)
    assert os.path.getsize(path) <= before.st_size
    os.truncate(path, before.st_size)  # filled up with zeros
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_features_belong_to_the_content_and_not_to_the_name(vision, pictures, tmp_path):
    paths = [shutil.copy(path, tmp_path) for path in pictures[:3]]
    size = max(os.path.getsize(path) for path in paths) + 200
    for path in paths:  # room for any image, and what an image's file may end with
        os.truncate(path, size)
    shown = RowImages([Row(path) for path in paths], size=32, mean=CLIP_MEAN, std=CLIP_STD)
    before = frozen_features(vision, shown, tmp_path, "rows").read(np.arange(3))
    replace_keeping_size_and_time(paths[1])
    os.utime(paths[2])  # touched, which changes nothing
    assert computed(vision, shown, tmp_path) == [(3, 3)]
    after = frozen_features(vision, shown, tmp_path, "rows").read(np.arange(3))
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])
    with torch.no_grad():
        assert torch.equal(after, vision.features(shown.pixels(range(3))).half())
    assert computed(vision, shown, tmp_path) == []
    os.unlink(paths[0])  # what was in it is still known
    assert computed(vision, shown, tmp_path) == []


def test_without_records_nobody_knows_what_was_seen(vision, shown, tmp_path):
    whole = frozen_features(vision, shown, tmp_path, "rows").read(shown.number_of_row)
    (tmp_path / "rows.seen").unlink()
    assert computed(vision, shown, tmp_path) != []
    assert torch.equal(frozen_features(vision, shown, tmp_path, "rows").read(shown.number_of_row), whole)


@pytest.mark.parametrize("ending", ["bin", "seen", "json"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(vision, shown, tmp_path, ending):
    whole = frozen_features(vision, shown, tmp_path, "rows").read(shown.number_of_row)
    path = tmp_path / f"rows.{ending}"
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 40):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert torch.equal(frozen_features(vision, shown, tmp_path, "rows").read(shown.number_of_row), whole)
            assert ending != "bin"
        except RecipeError as error:
            assert f"rows.{ending}" in str(error) and "delete" in str(error)


def test_one_that_is_cut_while_it_is_open_is_refused(vision, shown, tmp_path):
    file = frozen_features(vision, shown, tmp_path, "rows")
    os.truncate(tmp_path / "rows.bin", 100)
    with pytest.raises(RecipeError, match=r"rows\.bin: is damaged .*delete it"):
        file.read(shown.number_of_row)
    (tmp_path / "rows.bin").unlink()
    assert computed(vision, shown, tmp_path)[-1] == (8, 8)


def test_features_beyond_half_precision_are_refused(vision, shown, tmp_path):
    vision.blocks[0].fc2.bias.data[0] = 1e6
    with pytest.raises(RecipeError, match="half precision"):
        frozen_features(vision, shown, tmp_path, "rows")


def test_a_fingerprint_is_of_the_values(vision):
    before = fingerprint(vision)
    assert fingerprint(VisionTransformer(VISION)) != before
    vision.post_norm.bias.data += 1
    assert fingerprint(vision) == before


def test_a_damaged_encoder_is_named(vision, shown, tmp_path):
    vision.blocks[0].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"blocks.0.fc1.weight of the image encoder is NaN or infinite"):
        frozen_features(vision, shown, tmp_path, "rows")


def test_a_picture_that_cannot_be_read_is_seen_once_it_can(vision, pictures, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, picture in zip(paths, pictures, strict=False):
        shutil.copy(picture, path)
    Path(paths[1]).write_bytes(b"broken")
    shown, told = RowImages([Row(path) for path in paths], size=32, mean=CLIP_MEAN, std=CLIP_STD), []
    with pytest.raises(ImageError, match=r"1\.png: not a JPEG"):
        frozen_features(vision, shown, tmp_path, "rows")
    file = frozen_features(vision, shown, tmp_path, "rows", on_bad=lambda path, error: told.append(path))
    assert told == [paths[1]]
    assert file.read(shown.number_of_row).isnan().flatten(1).all(1).tolist() == [False, True, False]
    shutil.copy(pictures[1], paths[1])
    file = frozen_features(vision, shown, tmp_path, "rows", on_bad=lambda path, error: told.append(path))
    assert told == [paths[1]] and not file.read(shown.number_of_row).isnan().any()
