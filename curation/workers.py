"""A function and a list of tasks in, each task done once out: in this process, or on the workers of a Ray cluster.

Tasks write their results as files into a stage's folder, whole or not at all, and return at once where the file is there. So it does not
matter who does a task, how often it is tried, or whether a worker dies over it; the result is the same. On a cluster all machines see the
same folders (a network file system).
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from data.errors import InputError

MAX_TRIES = 5
"""A task whose worker died is tried again so many times."""


class Workers(Protocol):
    """Whoever does tasks."""

    def run(
        self, what: str, function: Callable[..., object], shared: Sequence[Any], tasks: Sequence[tuple[Any, ...]]
    ) -> None:
        """Call `function(*shared, *task)` for every task; `what` names the work for whoever watches."""


class HereWorkers:
    """This process, one task after another."""

    def run(
        self, what: str, function: Callable[..., object], shared: Sequence[Any], tasks: Sequence[tuple[Any, ...]]
    ) -> None:
        """See `Workers.run`."""
        for task in progress(what, tasks):
            function(*shared, *task)


class RayWorkers:
    """The workers of a Ray cluster (Moritz et al. 2018)."""

    def __init__(self, address: str, threads: int = 1) -> None:
        """Join the cluster at `address`, or start one on this machine for `local`; each task takes `threads` cores. Raises InputError."""
        if importlib.util.find_spec("ray") is None:
            raise InputError(
                "--ray: Ray is not installed; run: .venv/bin/pip install -c constraints.txt -e '.[cluster]'"
            )
        import ray  # an optional dependency, and slow to import

        self._ray, self._threads = ray, threads
        if not ray.is_initialized():
            try:
                ray.init(
                    address=None if address == "local" else address,
                    log_to_driver=False,
                    include_dashboard=False if address == "local" else None,
                    runtime_env={"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}},
                )
            except Exception as error:  # Ray has no class of its own for a start that fails or takes too long
                raise InputError(
                    f"--ray {address}: no cluster answers or starts there ({error}); look at it, and run the command again"
                ) from error

    def run(
        self, what: str, function: Callable[..., object], shared: Sequence[Any], tasks: Sequence[tuple[Any, ...]]
    ) -> None:
        """See `Workers.run`. Errors of a task are raised here as they were there."""
        ray = self._ray
        remote = ray.remote(num_cpus=self._threads, max_retries=MAX_TRIES)(_nothing_back)
        held = [ray.put(value) for value in (function, *shared)]
        waiting = [remote.remote(*held, *task) for task in tasks]
        for _ in progress(what, tasks):
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                for left in waiting:
                    ray.cancel(left)
                raise error.as_instanceof_cause() from error


def _nothing_back(function: Callable[..., object], *arguments: Any) -> None:
    function(*arguments)


def progress(what: str, tasks: Sequence[tuple[Any, ...]]) -> "tqdm[tuple[Any, ...]]":
    """A bar on a terminal; in a log, a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        tasks, desc=what, unit="block", disable=not tasks, mininterval=0.1 if terminal else 15.0, file=sys.stderr
    )


def make_workers(ray: str | None, threads: int | None) -> Workers:
    """Ray's workers where a cluster is named, else this process."""
    return HereWorkers() if ray is None else RayWorkers(ray, threads or 1)
