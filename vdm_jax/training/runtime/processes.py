"""One process, or several that train one run together, on one machine or many: all compute, the first one writes."""

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

from vdm_jax.training.runtime.devices import put, replicated, split
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.metric_buffer import AHEAD

MANY = "VDM_JAX_DISTRIBUTED"  # says that there are several processes, where nothing else does
LOST = ("Gloo", "NCCL", "oordination", "barrier", "Barrier")  # what JAX and Orbax say of when others are gone
HEARTBEAT, GOODBYE = 60, 15  # seconds without a sign of life after which a process is lost; to wait for all at the end


def join() -> None:
    """Find the other processes of this job, if it has any; to be called before anything else of JAX.

    Slurm (srun), Open MPI and the pods of TPUs on Kubernetes tell of themselves. Elsewhere the environment does:
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or VDM_JAX_DISTRIBUTED=1 where JAX can find
    the rest by itself (TPU virtual machines).

    Raises:
        UserError: the others did not come, or the environment makes no sense.
    """
    if not several(os.environ):
        return
    number, place = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        print(f"Process {place} of {number} meets the others at {address}, for five minutes.", file=sys.stderr)
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if place is None else int(place),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=GOODBYE,
        )
    except (ValueError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"This is one of several processes, and they did not find each other ({first_line}). Give each the same "
            "JAX_COORDINATOR_ADDRESS=host:port and JAX_NUM_PROCESSES, and a JAX_PROCESS_ID of its own, from 0."
        ) from error
    if not is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  one voice; errors of any process are still heard


@contextlib.contextmanager
def together_or_not_at_all() -> Iterator[None]:
    """Where there are several processes, end this one at once when something goes wrong: the others may never come.

    They notice in their next step, or within a minute, and end as well.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            _leave(error.code)
        print(_farewell(error) if _lost(error) else traceback.format_exc(), file=sys.stderr)
        _leave(1)


def _lost(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or any(sign in str(error) for sign in LOST)


def _farewell(error: BaseException) -> str:
    return (
        f"Process {jax.process_index()} of {jax.process_count()} has lost another ({str(error).splitlines()[0]}). What "
        "was saved is kept: start all processes again, as many as you like, and they go on from there."
    )


def _leave(code) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if is_first():  # it is the one the others are connected to: the last to go
        time.sleep(1.0)
    os._exit(code if isinstance(code, int) else int(code is not None))


def several(environment) -> bool:
    """Whether the environment tells of more than one process."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    return (
        any(environment.get(name, "1") not in ("", "1") for name in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or environment.get(MANY) == "1"
    )


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def meet() -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def by_first(act: Callable[[], object]) -> None:
    """Have the first process act on files while the others wait.

    Raises:
        UserError: the first process's; in the others, one that refers to it.
    """
    error = None
    if is_first():
        try:
            act()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(error is not None)))
        if failed and error is None:
            raise UserError("The first process of this job cannot go on; see its message.")
    if error is not None:
        raise error


def everyone(done: bool) -> bool:
    """Whether all processes have done something that each does by itself."""
    return done if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(done)).all())


class Agreement:
    """What any process was asked, known to all of them at the same step, without waiting for it.

    Args:
        mesh: of the devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._given = mesh, deque()
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def __call__(self, number: int) -> int:
        """Give a number, and get the largest that any process gave some calls ago; at once, where there is one."""
        if jax.process_count() == 1:
            return number
        own = np.full(len(self._mesh.local_devices), number, np.int32)
        self._given.append(self._largest(put(own, split(self._mesh))))
        return int(self._given.popleft()) if len(self._given) > AHEAD else 0
