"""Whole collections: caption or question images from any source, write any format, stop and resume at any time.

    source -> records -> units -> work -> sink

A *record* is an image with its key, text and other columns. A *unit* is the smallest piece of finished work: a shard,
or a range of a folder's files. The *journal* stores results, so that the same command resumes. A *sink* writes them in
the requested format, from the journal alone.
"""

from blip2.collection.journal import Journal
from blip2.collection.record import Record, Result, Source, Unit
from blip2.collection.run import Job, Sink, run
from blip2.collection.summary import Summary

__all__ = ["Job", "Journal", "Record", "Result", "Sink", "Source", "Summary", "Unit", "run"]
