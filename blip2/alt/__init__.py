"""Images without alt text in web pages and Markdown: found, described, looked over by a person, and written in place.

    pages -> images (with exact places) -> images (a collection) -> report -> (a person) -> edits

No page is ever parsed and written anew: an edit is a few characters put in at an exact place, and all other bytes stay.
"""

from blip2.alt.apply import Change, apply
from blip2.alt.pages import Page, find_pages, read_page
from blip2.alt.picture import Image
from blip2.alt.report import Row, read_report
from blip2.alt.scan import images_in

__all__ = ["Change", "Image", "Page", "Row", "apply", "find_pages", "images_in", "read_page", "read_report"]
