"""The figure of the architecture (the paper's Figure 1 to 3 in one), drawn as SVG.

    python -m docs.generate.figure > docs/architecture.svg

The colours are the site's own where it is part of a page, and those of a light page elsewhere.
"""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT = 880, 350
TEXT = "var(--color-foreground-primary, #1f2328)"
DIM = "var(--color-foreground-secondary, #57606a)"
PAGE = "var(--color-background-primary, #ffffff)"
FROZEN = "#5b8fc7"
TRAINED = "#d9822b"
NUMBERS = {"patches": "257 x 1408", "queries": "32 x 768", "prefix": "32 x 2560"}
"""Of the published models with EVA-CLIP g/14 and OPT-2.7b."""


def box(x: int, y: int, width: int, height: int, title: str, *lines: str, colour: str) -> str:
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" fill-opacity="0.14" '
        f'stroke="{colour}" stroke-width="2"/>',
        _text(x + width // 2, y + 27, title, size=15, weight=600),
    ]
    parts += [_text(x + width // 2, y + 48 + 18 * n, line, colour=DIM) for n, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(x: int, y: int, length: int, label: str, numbers: str = "") -> str:
    end = x + length
    parts = [
        f'<path d="M{x} {y}H{end - 7}" stroke="{DIM}" stroke-width="2" fill="none"/>',
        f'<path d="M{end} {y}l-9 -5v10z" fill="{DIM}"/>',
        _text(x + length // 2, y - 10, label, colour=DIM),
    ]
    if numbers:
        parts.append(_text(x + length // 2, y + 19, numbers, colour=DIM))
    return "\n".join(parts)


def up(x: int, y: int, length: int, label: str) -> str:
    parts = [
        f'<path d="M{x} {y}V{y - length + 7}" stroke="{DIM}" stroke-width="2" fill="none"/>',
        f'<path d="M{x} {y - length}l-5 9h10z" fill="{DIM}"/>',
        _text(x, y + 16, label, colour=DIM),
    ]
    return "\n".join(parts)


def svg() -> str:
    top, high = 70, 110
    middle = top + high // 2
    parts = [
        box(60, top, 150, high, "Image encoder", "a vision transformer", "EVA-CLIP g/14", colour=FROZEN),
        box(302, top, 160, high, "Q-Former",
            "32 query tokens", "read the patches by", "cross-attention", colour=TRAINED),
        box(548, top, 98, high, "Projection", "one linear", "layer", colour=TRAINED),
        box(718, top, 156, high, "Language model", "OPT, Flan-T5,", "Llama, ...", colour=FROZEN),
        arrow(6, middle, 52, "image"),
        arrow(212, middle, 88, "patches", NUMBERS["patches"]),
        arrow(464, middle, 82, "queries", NUMBERS["queries"]),
        arrow(648, middle, 68, "prefix", NUMBERS["prefix"]),
        up(382, top + high + 62, 60, "stage 1: a text beside the queries"),
        up(796, top + high + 62, 60, "prompt"),
        f'<path d="M796 {top}V{top - 33}" stroke="{DIM}" stroke-width="2" fill="none"/>',
        f'<path d="M796 {top - 40}l-5 9h10z" fill="{DIM}"/>',
        _text(796, top - 48, "caption or answer", weight=600),
        _text(382, top + high + 100, "contrast (ITC), matching (ITM), captioning (ITG)", colour=DIM),
        _text(796, top + high + 100, "stage 2: language", colour=DIM),
        _text(796, top + high + 117, "modelling loss", colour=DIM),
        _key(60, HEIGHT - 24, FROZEN, "frozen: as it was pretrained"),
        _key(284, HEIGHT - 24, TRAINED, "trained: less than 3 % of the parameters"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="BLIP-2: a frozen image encoder, a trained Q-Former and projection, a frozen language model" '
        'font-family="system-ui, sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAGE}"/>', *parts, "</svg>", ""])


def _text(x: int, y: int, words: str, *, colour: str = TEXT, size: int = 13, weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="middle" fill="{colour}" font-size="{size}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def _key(x: int, y: int, colour: str, words: str) -> str:
    return (
        f'<rect x="{x}" y="{y - 12}" width="16" height="16" rx="3" fill="{colour}" fill-opacity="0.14" '
        f'stroke="{colour}" stroke-width="2"/>'
        f'<text x="{x + 24}" y="{y + 1}" fill="{DIM}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    print(svg(), end="")
