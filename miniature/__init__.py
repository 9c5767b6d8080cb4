"""How the bundled miniature is made: the picture world, its frozen parts, its evaluation."""
