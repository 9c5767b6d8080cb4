"""Whole collections: images from any source, captioned or asked about, into any format, stopped and resumed at will.

    source -> records -> units -> work -> sink

A *record* is an image with its key, its text and its other columns. A *unit* is what is done or not done: a shard, or
a run of a folder's files. The *journal* keeps what was done, so that the same command goes on where it was stopped; a
*sink* writes the results in the format that was asked for, from the journal alone.
"""

from blip2.collection.journal import Journal
from blip2.collection.record import Record, Result, Source, Unit
from blip2.collection.run import Job, Sink, run
from blip2.collection.summary import Summary

__all__ = ["Job", "Journal", "Record", "Result", "Sink", "Source", "Summary", "Unit", "run"]
