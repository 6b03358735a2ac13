"""The error that tells a user what is wrong with their data, and the way out."""


class DataError(ValueError):
    """A file, corpus or data setting that cannot be used; the message is one line."""
