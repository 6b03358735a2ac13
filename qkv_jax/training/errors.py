"""What ends a run before its time, and the mistakes with run directories and checkpoints."""


class RunError(ValueError):
    """A run directory or checkpoint cannot be used as asked.

    The message is one line that names the directory and says the way out; the
    command line prints it as it is and exits with code 2.
    """


class NotFinite(RunError):
    """Too many losses or gradients in a row were not finite."""


class DamagedCheckpoint(RunError):
    """A checkpoint is cut short or corrupted."""


class Interrupted(Exception):
    """A signal ended the run between two steps, and the last of them is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int, directory: object, step: int):
        super().__init__(
            f"interrupted: step {step} is saved in {directory}; the same command goes on from it"
        )
        self.signal = int(signal)
