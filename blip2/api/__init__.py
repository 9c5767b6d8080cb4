"""The Python API: `load` a model, then give it images.

    blip = load()                                       # the bundled miniature, or a folder, or a hub name
    blip.caption("beach.jpg")                           # 'a woman sitting on the beach with a dog'
    blip.caption(["a.jpg", "b.jpg"])                    # a list in, a list out, in order
    blip.ask("beach.jpg", "how many dogs are there?")   # 'one'

    matcher = load("miniature-itm")
    matcher.match("beach.jpg", ["a dog", "a cat"])      # how well each text matches
    matcher.explain("beach.jpg", "a dog").overlay()     # a heat map; a Pipeline explains answers and words

One image gives one answer, a list gives a list. An encoded image is accepted wherever an image is, and skips the image
encoder.
"""

from blip2.api.loading import find_device, find_dtype, load
from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline

__all__ = ["Matcher", "Pipeline", "find_device", "find_dtype", "load"]
