"""Errors for people: one line that says what was wrong, with which file or value, and what to do."""


class Blip2Error(ValueError):
    """What was given cannot be used; the command line prints this line and no traceback."""


class ImageError(Blip2Error):
    """A picture that cannot be read."""


class ImageFormatError(ImageError):
    """Bytes that are no picture, or one of a format that is not read."""


class ImageSizeError(ImageError):
    """A picture with more pixels than are allowed."""


class CheckpointError(Blip2Error):
    """A model that cannot be found, or whose files do not hold what its configuration promises."""


class NotFiniteError(Blip2Error):
    """Numbers that are NaN or infinite where a model computes: damaged weights, or an overflow."""


class ImageNotFiniteError(ImageError, NotFiniteError):
    """A picture of which a model computes what is NaN or infinite."""


class RecipeError(Blip2Error):
    """A training recipe or its data that cannot be carried out."""


class OptionError(Blip2Error):
    """An option outside what it may be, or options that exclude each other."""


class IndexFileError(Blip2Error):
    """An index of pictures that cannot be read or written, or that another model made."""
