"""What results are written as; each file of this room is one format, or a few of one kind."""
