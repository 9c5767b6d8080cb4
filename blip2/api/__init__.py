"""The front door for Python: `load` a model, and ask it about images.

    blip = load()                                       # the bundled miniature, or a folder, or a hub name
    blip.caption("beach.jpg")                           # 'a woman sitting on the beach with a dog'
    blip.caption(["a.jpg", "b.jpg"])                    # a list in, a list out, in order
    blip.ask("beach.jpg", "how many dogs are there?")   # 'one'

    matcher = load("miniature-itm")
    matcher.match("beach.jpg", ["a dog", "a cat"])      # how well each text fits
    matcher.explain("beach.jpg", "a dog").overlay()     # where it looks; a Pipeline explains answers and words

One image gives one answer, a list gives a list. Wherever an image is taken, an encoded one may stand in its
place, and the image encoder does not run again.
"""

from blip2.api.loading import find_device, find_dtype, load
from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline

__all__ = ["Matcher", "Pipeline", "find_device", "find_dtype", "load"]
