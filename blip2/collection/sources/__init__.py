"""Where records come from; each file of this room is one kind of source."""
