"""The drawings of the miniature world: emoji of Noto Color Emoji (`apt-get install fonts-noto-color-emoji`).

Each kind has one drawing of its own (`miniature.texts.KINDS`), which is all that its test knows. Training knows others
of some kinds, and *strangers*, which have no name here: they are for the image encoder alone, which otherwise learns
from 24 kinds what stands beside what.
"""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from miniature.texts import KINDS

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only bitmap size in the font

OTHERS = {
    "dog": "🐶🐩",
    "cat": "🐈😺",
    "horse": "🐴",
    "bird": "🦜🐤",
    "fish": "🐟🐡",
    "rabbit": "🐰",
    "pig": "🐷",
    "apple": "🍏",
    "car": "🚙🚘",
    "bus": "🚍🚎",
    "tree": "🌲🌴",
    "flower": "🌷🌹🌼",
    "house": "🏡",
    "boat": "🚤🛥",
    "airplane": "🛩",
    "ball": "🏀🏐",
    "umbrella": "☔⛱",
    "clock": "🕰",
}
STRANGERS = (
    "🦁🐯🦊🐻🐼🐨🐮🐐🐫🦒🦏🐭🦔🐍🦎🐸🐳🐬🐙🦀🐌🐝🐞🕷🦂"
    "🌽🥕🍆🍓🍇🍉🍊🍋🍐🍒🍪🍩🎂🍦🍔🍕🧀🥐🌵🍀🍁"
    "🚁🚂🚊🚚🚜🚒🚑🏍🛴🚀🛸🛰⚓🏰⛪⛺🏭🗽🚪🪑🛏🗿"
    "🎸🎺🥁📷📺💻☎🔑🔒✂✏📚🎁🎈👑🎩👕👟👓💡🔨🔧🎲🧸🎯🧲🪁"
    "⭐🌙☁⚡❄🔥💧🌈❤💀🤖👽👻🎃🌍"
)


@functools.cache
def sprite(drawing: str, angle: int = 0, flip: bool = False) -> Image.Image:
    """The emoji of a kind, or one by its character: turned and perhaps mirrored, cropped to what is visible (RGBA)."""
    if not FONT_PATH.exists():
        raise FileNotFoundError(f"{FONT_PATH} is missing: apt-get install fonts-noto-color-emoji")
    if angle or flip:
        image = sprite(drawing)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    else:
        character = chr(KINDS[drawing].code_point) if drawing in KINDS else drawing
        font = ImageFont.truetype(str(FONT_PATH), FONT_SIZE)
        image = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(image).text((20, 20), character, font=font, embedded_color=True)
    return image.crop(image.getchannel("A").getbbox())
