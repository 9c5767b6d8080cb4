"""Alt texts for images in web pages and Markdown: find, describe, let a person review, and write in place.

    pages -> images (with exact offsets) -> images (a collection) -> report -> (review) -> edits

Pages are never parsed and serialised again: an edit inserts a few characters, and all other bytes stay.
"""

from blip2.alt.apply import Change, apply
from blip2.alt.image import Image
from blip2.alt.pages import Page, find_pages, read_page
from blip2.alt.report import Row, read_report
from blip2.alt.scan import images_in

__all__ = ["Change", "Image", "Page", "Row", "apply", "find_pages", "images_in", "read_page", "read_report"]
