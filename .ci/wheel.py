"""Whether an installed wheel is whole: python .ci/wheel.py, in an environment that has it and nothing of a checkout.

It answers with the bundled model, and has compiled kernels that run exactly if its name says what machine it is for.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    import blip2
    from blip2.native import LEVELS, kernels
    from blip2.version import BUILT, told

    print(told())
    home = Path(blip2.__file__).resolve()
    if ROOT / "blip2" in home.parents:
        sys.exit(f"{home} is of the checkout, not of a wheel")
    distribution = metadata.distribution("blip2")
    if not BUILT.exists() or blip2.__version__ != distribution.version:
        sys.exit(f"blip2 says that it is {blip2.__version__}, its metadata say {distribution.version}")
    tags = [line for line in (distribution.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
    is_for_any = all(tag.endswith("-any") for tag in tags)
    library = kernels()
    if (library is None) != is_for_any:
        sys.exit(f"{', '.join(tags)}: kernels {'missing, or not loaded' if library is None else 'not expected'}")
    print("kernels:", "none" if library is None else LEVELS[library.blip2_prepare(len(LEVELS) - 1)])
    for quantize in (None, "int8"):
        caption = blip2.load(quantize=quantize).caption(ROOT / "examples" / "picture.png")
        print(f"{quantize or 'as stored'}: {caption}")
        if caption != "a boat and two dogs":
            sys.exit("that is not what the bundled model says of this picture")


if __name__ == "__main__":
    main()
