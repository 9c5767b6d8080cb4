"""The photographs of tests/photographs (NOTICE names their authors), each with what the model says of it.

    python -m miniature.photographs.sheet -o miniature/photographs/answers.jpg [--model photographs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import blip2

FOLDER = Path(__file__).parents[2] / "tests/photographs"
COLUMNS, CELL_PX, LINE_PX = 8, 136, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="photographs")
    options = parser.parse_args()
    files = sorted(FOLDER.glob("*.jpg"))
    said = blip2.load(options.model).caption(files)
    rows = -(-len(files) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL_PX, rows * (CELL_PX + LINE_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (file, text) in enumerate(zip(files, said, strict=True)):
        image = Image.open(file)
        image.thumbnail((CELL_PX - 6, CELL_PX - 6))
        x, y = number % COLUMNS * CELL_PX, number // COLUMNS * (CELL_PX + LINE_PX)
        sheet.paste(image, (x + 3, y + 3 + (CELL_PX - 6 - image.height) // 2))
        pen.text((x + 3, y + CELL_PX - 3), text[:24], fill="black")
    sheet.save(options.out, quality=80, optimize=True)


if __name__ == "__main__":
    main()
