"""The error for a user's mistake with a run directory or a checkpoint."""


class RunError(ValueError):
    """A run directory or checkpoint cannot be used as asked.

    The message is one line that names the directory and says the way out; the
    command line prints it as it is and exits with code 2.
    """
