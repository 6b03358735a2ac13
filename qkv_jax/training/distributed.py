"""Several processes that are one run: how they find each other, and what one does for all."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qkv_jax.training.errors import RunError

_MESSAGE_BYTES = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of a run find each other; part of no run's identity.

    Attributes:
        coordinator: host:port of process 0, which all processes can reach; None: a cluster's
            environment says it, or there is one process.
        processes: their number.
        index: of this process, from 0.
        detect: ask JAX to find the cluster (SLURM, Open MPI, Kubernetes, TPU pods); None: where
            the environment shows one with more than one process.
    """

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None
    detect: bool | None = None

    def __post_init__(self):
        given = [self.coordinator, self.processes, self.index]
        if any(x is not None for x in given) and None in given:
            raise ValueError(
                "distributed.coordinator, distributed.processes and distributed.index go "
                f"together; got {self.coordinator}, {self.processes} and {self.index}."
            )
        if self.coordinator is None or self.processes is None or self.index is None:
            return
        if self.detect:
            raise ValueError(
                "distributed.detect asks the cluster for what distributed.coordinator says: "
                "give one of them."
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                f"distributed.coordinator must be host:port; got {self.coordinator!r}."
            )
        if not 0 <= self.index < self.processes:
            raise ValueError(
                "distributed.index must be in 0 .. distributed.processes - 1; "
                f"got {self.index} of {self.processes}."
            )


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the run; does nothing where there is one, or has joined.

    To be called before anything asks JAX for its devices.

    Raises:
        RunError: the others cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    detect = _cluster() is not None if config.detect is None else config.detect
    if config.coordinator is None and not detect:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.index,
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator or _cluster() or "the cluster"
        raise RunError(
            f"distributed: cannot join the other processes at {where} ({error}): start all of "
            "them with one coordinator and different indices, or give "
            "--distributed.detect False to run alone."
        ) from error


def is_first() -> bool:
    """Whether this process writes for all."""
    return jax.process_index() == 0


def on_first(action: Callable[[], Any]) -> None:
    """Runs an action on process 0 while the others wait; its RunError is raised in all."""
    if jax.process_count() == 1:
        action()
        return
    message = b""
    if is_first():
        try:
            action()
        except RunError as error:
            message = str(error).encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    text = told.tobytes().rstrip(b"\0").decode(errors="ignore")
    if text:
        raise RunError(text)


def check_same(what: str, digest: str) -> None:
    """Makes sure that all processes hold the same.

    Args:
        what: for the message.
        digest: hexadecimal, equally long everywhere.

    Raises:
        RunError: in all processes, where one differs.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(digest.encode(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(own))
    other = [i for i, row in enumerate(rows) if (row != rows[0]).any()]
    if other:
        raise RunError(
            f"processes {', '.join(map(str, other))} have another {what} than process 0: give "
            "all of them the same files and options."
        )


def all_told_to_stop(point: int) -> bool:
    """Whether this is the point at which all processes stop, as one of them was sent SIGTERM.

    Args:
        point: a number that grows from call to call, alike in all processes.
    """
    return multihost_utils.reached_preemption_sync_point(point)


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole in every process that holds a part of them."""
    if all(array.is_fully_addressable for array in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _cluster() -> str | None:
    """The launcher that started more than one process, by what it sets for them."""
    variables = os.environ
    if int(variables.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    if "JOB_COMPLETION_INDEX" in variables and "KUBERNETES_SERVICE_HOST" in variables:
        return "Kubernetes"
    return None
