"""Sources of records. `open_source` detects the kind of what is named; each kind of source has its own file."""

from blip2.collection.sources.files import Files
from blip2.collection.sources.opening import open_source
from blip2.collection.sources.rows import Rows
from blip2.collection.sources.shards import Shards

__all__ = ["Files", "Rows", "Shards", "open_source"]
