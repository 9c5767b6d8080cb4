"""A second miniature, between real frozen parts: cut-out photographs on photographs, tested on photographs."""
