"""How the bundled miniature is made: the miniature world, its frozen parts, its evaluation."""
