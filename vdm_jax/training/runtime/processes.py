"""Runs of one or several processes, on one or several machines: all compute, the first one writes."""

import contextlib
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vdm_jax.training.runtime.devices import batch_sharding, make_global, replicated
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.metric_buffer import MAX_STEPS_AHEAD

DISTRIBUTED = "VDM_JAX_DISTRIBUTED"  # declares several processes where no launcher does
LOST_PROCESS_ERRORS = (
    "Gloo",
    "NCCL",
    "oordination",
    "barrier",
    "Barrier",
)  # in errors of JAX and Orbax after a process died
HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT = 60, 15  # seconds


def initialize_processes() -> None:
    """Connect the processes of this job, if there are several; call it before any other JAX function.

    Slurm (srun), Open MPI and TPU pods on Kubernetes are detected. Otherwise set JAX_COORDINATOR_ADDRESS=host:port,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; on TPU virtual machines VDM_JAX_DISTRIBUTED=1 is enough.

    Raises:
        UserError: the processes could not connect, or the environment variables are inconsistent.
    """
    if not is_multiprocess(os.environ):
        return
    number, place = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        print(
            f"Process {place} of {number} connects to the others at {address} (timeout: five minutes).", file=sys.stderr
        )
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if place is None else int(place),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The processes of this job could not connect ({first_line}). Set the same "
            "JAX_COORDINATOR_ADDRESS=host:port and JAX_NUM_PROCESSES for all of them, and for each a JAX_PROCESS_ID of "
            "its own, from 0."
        ) from error
    if not is_first_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  only the first prints results; all print errors


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Exit this process at once on an error if there are several: waiting for the others could block for ever.

    The others notice in their next step, or within a minute, and exit as well.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            _exit(error.code)
        print(_lost_process_message(error) if _lost(error) else traceback.format_exc(), file=sys.stderr)
        _exit(1)


def _lost(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or any(sign in str(error) for sign in LOST_PROCESS_ERRORS)


def _lost_process_message(error: BaseException) -> str:
    return (
        f"Process {jax.process_index()} of {jax.process_count()} lost its connection to another process "
        f"({str(error).splitlines()[0]}). Saved checkpoints are kept: restart all processes, in any number, to resume."
    )


def _exit(code) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if is_first_process():  # the others are connected to it, so it exits last
        time.sleep(1.0)
    os._exit(code if isinstance(code, int) else int(code is not None))


def is_multiprocess(environment) -> bool:
    """Whether the environment variables declare more than one process."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    return (
        any(environment.get(name, "1") not in ("", "1") for name in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or environment.get(DISTRIBUTED) == "1"
    )


def is_first_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier() -> None:
    """Wait until all processes reach this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("barrier")


def on_first_process(act: Callable[[], object]) -> None:
    """Call a function on the first process only, while the others wait.

    Raises:
        UserError: the function raised it; the other processes raise one that refers to the first.
    """
    error = None
    if is_first_process():
        try:
            act()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(error is not None)))
        if failed and error is None:
            raise UserError("The first process of this job failed; see its message.")
    if error is not None:
        raise error


def all_processes_agree(condition: bool) -> bool:
    """Whether a condition, which each process evaluates for itself, holds in all of them."""
    return (
        condition if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(condition)).all())
    )


class DelayedMax:
    """The maximum of a number over all processes, a few calls late, so that no process waits for another.

    Args:
        mesh: a mesh of the devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._pending = mesh, deque()
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def __call__(self, number: int) -> int:
        """Submit a number; returns the maximum of those submitted some calls ago, at once for a single process."""
        if jax.process_count() == 1:
            return number
        own = np.full(len(self._mesh.local_devices), number, np.int32)
        self._pending.append(self._largest(make_global(own, batch_sharding(self._mesh))))
        return int(self._pending.popleft()) if len(self._pending) > MAX_STEPS_AHEAD else 0
