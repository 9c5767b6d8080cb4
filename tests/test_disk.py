"""What is written is whole and on the disk before it has its name; what is there is known by its content."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip2 import checkpoint, disk
from blip2.checkpoint.lavis import convert_to_lavis
from blip2.cli.search import _write
from blip2.encoded import EncodedImage
from blip2.image import save_image
from tests import tiny


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_or_nothing(tmp_path):
    path = tmp_path / "a.txt"
    disk.write_text(path, "the first\n")
    assert path.read_bytes() == b"the first\n"
    with pytest.raises(RuntimeError), disk.written(path) as unfinished:
        unfinished.write_text("half of the sec")
        raise RuntimeError
    assert (path.read_text(), names(tmp_path)) == ("the first\n", ["a.txt"])


def test_as_many_letters_as_a_name_may_have(tmp_path):
    disk.write_text(tmp_path / ("a" * 255), "whole")
    assert (tmp_path / ("a" * 255)).read_text() == "whole"


def test_what_is_private_stays_so(tmp_path):
    disk.write_text(tmp_path / "a.txt", "the first")
    (tmp_path / "a.txt").chmod(0o600)
    disk.write_text(tmp_path / "a.txt", "the second")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "within").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "within" / "file")
    disk.write_text(tmp_path / "link", "whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "within" / "file").read_text() == "whole"
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=disk.write_text, args=(tmp_path / "pipe", "whole"))
    writer.start()
    assert (tmp_path / "pipe").read_text() == "whole"
    writer.join()
    assert names(tmp_path) == ["link", "pipe", "within"]


def save_a_model(folder: Path) -> None:
    checkpoint.save(tiny.generative("opt"), folder / "model", tokenizer=tiny.opt_tokenizer().to_str())


WRITERS = {
    "text": lambda folder: disk.write_text(folder / "a.txt", "whole"),
    "page": lambda folder: _write(folder / "page.html", "<p>"),
    "picture": lambda folder: save_image(Image.new("RGB", (8, 8)), folder / "heat.png"),
    "encoded image": lambda folder: EncodedImage(torch.zeros(2, 3)).save(folder / "a.safetensors"),
    "model": save_a_model,
    "LAVIS": lambda folder: (save_a_model(folder), convert_to_lavis(folder / "model", folder / "stage2.pth")),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_renamed_was_synced_before(kind, tmp_path, monkeypatch):
    """After a loss of power a name stands for the earlier file or for the new one, never for an empty one."""
    synced, renamed, folders = set(), [], set()
    fsync, replace = os.fsync, os.replace

    def noting(handle):
        fsync(handle)
        found = os.fstat(handle)
        (folders if os.path.isdir(f"/proc/self/fd/{handle}") else synced).add((found.st_ino, found.st_size))

    def checking(source, target):
        found = os.stat(source)
        assert (found.st_ino, found.st_size) in synced
        folders.clear()
        replace(source, target)
        renamed.append(Path(target))

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    WRITERS[kind](tmp_path)
    assert renamed
    assert renamed[-1].parent.stat().st_ino in {number for number, _ in folders}
    assert all(path.exists() for path in renamed)


def test_a_stamp_tells_a_change_that_keeps_size_and_time(tmp_path):
    """As ``cp -p``, ``rsync -t`` and ``mv`` of a prepared file leave it."""
    path = tmp_path / "a.png"
    path.write_bytes(b"the first")
    stamp, digest = disk.stamp_of(path), disk.digest_of(path)
    assert stamp.is_still(disk.stamp_of(path)) and disk.digest_since(path, stamp) == digest
    while disk.stamp_of(path).ctime_ns == stamp.ctime_ns:  # a tick of the system's clock, some milliseconds
        path.write_bytes(b"the other")
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    now = disk.stamp_of(path)
    assert now[:2] == stamp[:2] and not stamp.is_still(now)
    assert disk.digest_since(path, stamp) == "" != digest
    assert disk.digest_since(path, now) not in ("", digest)
    assert disk.Stamp(*stamp[:2]).is_still(now)  # from a file of an earlier version: there is no more to go by
    assert not stamp.is_still(None) and disk.stamp_of(tmp_path / "gone") is None
