"""The error of this folder."""


class InteropError(ValueError):
    """A checkpoint cannot be used; the message says why, and the way out."""
