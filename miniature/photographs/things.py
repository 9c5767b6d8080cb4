"""The test: photographs of GCompris in the public domain (or CC0), none of which any training has seen.

    python -m miniature.photographs.things --packages DIR --out DIR

Writes the pictures, ``labels.txt`` (every kind that the model knows, with its article), and rows for `blip2 evaluate`:
``caption.jsonl``, ``say.jsonl`` ("what do you see?") and ``exist.jsonl`` ("is there a hammer?", and as many whose
answer is no).

`TABLE` lists every photograph whose author, by the package's own README, gave it to the public; `KINDS` says
what stands in those that show a kind which the model has a word for, written by hand from looking at each. All others
(monuments, windmills, a crab, ...) show things that it has no word for.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from pathlib import Path

from PIL import Image

from blip2 import disk
from miniature.photographs.packages import GCOMPRIS
from miniature.photographs.rcc import files_in
from miniature.photographs.stamps import kinds
from miniature.texts import with_article

TABLE = """
categorization/fishes
  fish1 fish2 fish3 fish4 fish5 fish6 fish7 fish8 fish9 fish10 fish11 fish12 fish13 fish14 fish15 fish16 fish17
  fish18 fish19 fish20 fish21 fish22 fish23 fish24 fish25 fish26 fish27 fish28
categorization/monuments
  IndiaGate arcDeTriomphe bayterek brandenburgGate burj cathedral christTheRedeemer colosseum eiffelTower
  empireState greatPyramid greatWall jucheTower kutubMinar leMusee leaningTowerOfPisa monument1 monument2
  monument3 mountRushmore operaHouse parthenon statueOfLiberty tajMahal usCapitol victoriaMemorial zimniPalace
categorization/others
  baseball blackslate bucket buffetset bulb chair cup erasers igloo knife pan pencil pillow plate spoons
  volleyball weighingMachine
categorization/renewable
  dam1 dam2 dam3 dam4 dam5 geothermal solar1 solar2 solar3 solar4 solar5 solar6 solar7 solar8 windmill windmill1
  windmill11 windmill12 windmill13 windmill14 windmill15 windmill2 windmill3 windmill4 windmill5 windmill7
  windmill8 windmill9
categorization/tools
  cuttingTool hammer1 hammer2 hammer3 hammer4 hammer5 hammer6 hammer7 hammer8 hammer9 measuringTape1
  measuringTape2 measuringTape3 measuringTape4 measuringTape5 measuringTape6 multimeter1 multimeter2 multimeter3
  nailCutter plier1 plier2 plier3 plier4 scissors1 scissors2 scissors3 scissors4 screwDriver1 screwDriver2
  screwDriver3 sickle sideCutter1 spray tweezer tweezer1 wrench wrench1
erase
  crab giraffe kingfisher pika red_panda
explore_farm_animals
  cat chicken cow dog duck horse owl pig sheep
explore_monuments
  bentPyramid greatPyramidOfGiza meidumPyramid redPyramid arlesAmphitheater chateaudeChambord
  chateaudeChenonceau citedeCarcassonne eiffelTower montStMichel palaisdesPapes pontduGard reimsCathedral
  rocamadour berlinCathedral brandenburgGate neuschwansteinCastle schwerinPalace trierImperialBaths
  wormsCathedral ajantaCave charminar gatewayofIndia goldenTemple greatStupa hawaMahal konarkSunTemple
  mysorePalace qutubMinar rangGhar victoriaMemorial cabrillo canyondeChelly castillodeSanMarcos castleClinton
  fortSumter georgeWashingtonBirthplace lincolnMemorial mountRushmore navajo statueofLiberty colosseum
  greatWallofChina machuPicchu petra
explore_world_animals
  bison chameleon crocodile dragon giraffe hedgehog jaguar kangaroo koala lemur moose narwhal panda polar_bear
  scarlet_macaw
explore_world_music
  africa italy japan mexico middleeast orchestra
"""
"""By activity and folder of the package's resources; a photograph is called ``folder/name``."""


def _public_domain() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in TABLE.strip().splitlines():
        if line.startswith(" "):
            names += line.split()
        else:
            names = found[line] = []
    return found


PUBLIC_DOMAIN = _public_domain()
_TOOLS = "categorization/tools/"
KINDS: dict[str, list[str]] = {
    "fish": [f"categorization/fishes/{name}" for name in PUBLIC_DOMAIN["categorization/fishes"]],
    "light bulb": ["categorization/others/bulb"],
    "cup": ["categorization/others/cup", "categorization/others/buffetset"],
    "hammer": [f"{_TOOLS}hammer{number}" for number in range(1, 10)],
    "tape measure": [f"{_TOOLS}measuringTape{number}" for number in range(1, 7)],
    "pair of pliers": [f"{_TOOLS}plier{number}" for number in range(1, 5)],
    "pair of scissors": [f"{_TOOLS}scissors{number}" for number in range(1, 5)],
    "wrench": ["categorization/tools/wrench", "categorization/tools/wrench1"],
    "giraffe": ["erase/giraffe", "explore_world_animals/giraffe"],
    "chicken": ["explore_farm_animals/chicken"],
    "cow": ["explore_farm_animals/cow"],
    "dog": ["explore_farm_animals/dog"],
    "duck": ["explore_farm_animals/duck"],
    "horse": ["explore_farm_animals/horse"],
    "owl": ["explore_farm_animals/owl"],
    "pig": ["explore_farm_animals/pig"],
    "sheep": ["explore_farm_animals/sheep"],
    "bison": ["explore_world_animals/bison"],
    "kangaroo": ["explore_world_animals/kangaroo"],
    "koala": ["explore_world_animals/koala"],
    "bear": ["explore_world_animals/polar_bear"],
    "parrot": ["explore_world_animals/scarlet_macaw"],
    "drum": ["explore_world_music/africa"],
}
SEED = 7


def photographs() -> list[str]:
    """The names of all, in order."""
    return [f"{folder}/{name}" for folder, names in PUBLIC_DOMAIN.items() for name in names]


def shown() -> dict[str, str]:
    """The kind in each photograph that shows one which the model has a word for."""
    return {name: kind for kind, names in KINDS.items() for name in names}


def pictures(packages: Path) -> dict[str, bytes]:
    """The file of each, WebP, by its name. Raises ValueError if one is not in the package."""
    found: dict[str, bytes] = {}
    for activity in {name.partition("/")[0] for name in PUBLIC_DOMAIN}:
        for path, content in files_in(packages / GCOMPRIS / f"{activity}.rcc"):
            # gcompris/src/activities/categorization/resource/images/tools/hammer1.webp
            if path.endswith(".webp"):
                *_, folder, name = path.removesuffix(".webp").split("/")
                for place in (f"{activity}/{folder}/{name}", f"{activity}/{name}"):
                    found[place] = content
    if missing := [name for name in photographs() if name not in found]:
        raise ValueError(f"{packages / GCOMPRIS}: has no {missing[0]}.webp; fetch version 3.1 of gcompris-qt-data")
    return {name: found[name] for name in photographs()}


def write(packages: Path, out: Path) -> None:
    """Pictures, labels and rows."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in pictures(packages).items():
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.save(out / f"{name.replace('/', '-')}.png", compress_level=1)
    rng, captions, says, exists = random.Random(SEED), [], [], []
    names = list(kinds())
    for name, kind in shown().items():
        picture = f"{name.replace('/', '-')}.png"
        row = {"image": picture, "type": kind}
        captions.append(row | {"captions": [with_article(kind)]})
        says.append(row | {"question": "what do you see?", "answer": with_article(kind)})
        for asked, answer in ((kind, "yes"), (rng.choice([other for other in names if other != kind]), "no")):
            question = f"is there {with_article(asked)} in the picture?"
            exists.append(row | {"question": question, "answer": answer, "type": answer})
    disk.write_text(out / "labels.txt", "".join(f"{with_article(name)}\n" for name in names))
    for file, rows in (("caption", captions), ("say", says), ("exist", exists)):
        disk.write_text(out / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write(options.packages, options.out)
    print(f"{len(photographs())} photographs, {len(shown())} with a kind that the model has a word for")


if __name__ == "__main__":
    main()
