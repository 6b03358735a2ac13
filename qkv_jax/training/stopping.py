"""SIGTERM and SIGINT: noted when they come, heeded where a run can be left."""

import contextlib
import contextvars
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

import jax

from qkv_jax.training.distributed import all_told_to_stop
from qkv_jax.training.errors import Interrupted


class Stopped(Exception):
    """A stop point was reached after a signal had come; whoever waits for signals catches it."""


class Signals:
    """Waits for signals, as a context manager; `stop_point` within it raises Stopped.

    Of several processes, it is enough that one is sent SIGTERM: JAX's preemption service tells the
    others, and all stop at the same point. A signal that comes while XLA compiles or a device
    computes is heeded after that. In a thread other than the main one, which cannot set handlers,
    a process of its own does not wait: signals do what they always do.
    """

    def __init__(self):
        self._noted: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> signal.Signals:
        """Which one came, to this process or to another."""
        return self._noted or signal.SIGTERM

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Of several processes, SIGTERM is JAX's own.
            alone = [signal.SIGTERM] if jax.process_count() == 1 else []
            for number in (*alone, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        self._token = _WAITING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _WAITING.reset(self._token)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self) -> bool:
        """Whether to stop now. All processes ask as often as each other, at the same points."""
        if jax.process_count() == 1:
            return self._noted is not None
        return all_told_to_stop(next(_POINTS))

    def _note(self, number: int, frame: object) -> None:
        del frame
        if self._noted is not None:
            os._exit(128 + number)
        self._noted = signal.Signals(number)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


# JAX's service knows points by numbers that grow as long as the process lives.
_POINTS = itertools.count(1)
_WAITING: contextvars.ContextVar[Signals | None] = contextvars.ContextVar(
    "waiting", default=None
)


def stop_point() -> None:
    """A place in a long loop where it can be left: between the batches of an evaluation.

    Does nothing unless `Signals` are waited for, and one came.

    Raises:
        Stopped: it did.
    """
    waiting = _WAITING.get()
    if waiting is not None and waiting.due():
        raise Stopped


@contextlib.contextmanager
def saved_at(step: int, directory: object) -> Iterator[None]:
    """Ends what a run does after its last checkpoint at the first stop point after a signal.

    Args:
        step: of that checkpoint.
        directory: of the run.

    Raises:
        Interrupted: a signal came.
    """
    with Signals() as signals:
        try:
            yield
        except Stopped:
            raise Interrupted(signals.received, directory, step) from None
