"""Where records come from: `open_source` looks at what was named; each kind of source has a file of its own."""

from blip2.collection.sources.files import Files
from blip2.collection.sources.opening import open_source
from blip2.collection.sources.rows import Rows
from blip2.collection.sources.shards import Shards

__all__ = ["Files", "Rows", "Shards", "open_source"]
