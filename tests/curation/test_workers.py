"""The same tasks here and on a Ray cluster, of which a worker is killed: the same result."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from curation.folder import Folder, Stage
from curation.near import search
from curation.neighbours import SearchSpec, pairs_above, unit_rows
from curation.workers import HereWorkers, RayWorkers
from data.errors import InputError

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `cluster`)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayWorkers]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield RayWorkers("local")
    ray.shutdown()


def note(folder: Path, number: int, out: Path) -> None:
    """Write who did a task; the first to come to task 3 is killed over it."""
    mark = folder / "killed"
    if number == 3 and not mark.exists():
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    out.write_text(str(number))


def fail(number: int) -> None:
    raise InputError(f"task {number} cannot be done")


def test_a_task_whose_worker_is_killed_is_done_by_another(cluster: RayWorkers, tmp_path: Path) -> None:
    tasks = [(number, tmp_path / f"{number}.txt") for number in range(8)]
    cluster.run("noting", note, (tmp_path,), tasks)
    assert (tmp_path / "killed").is_file()
    assert [path.read_text() for _, path in tasks] == [str(number) for number in range(8)]


def test_what_a_task_raises_is_raised_to_whoever_asked(cluster: RayWorkers) -> None:
    with pytest.raises(InputError, match="task 1 cannot be done"):
        cluster.run("failing", fail, (), [(1,)])


def features_stage(folder: Folder) -> Stage:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40_000, 16))
    rows[20_000:22_000] = rows[:2000] + 0.05 * rng.normal(size=(2000, 16))
    stage = folder.stage("features")
    np.save(stage.path / "features.npy", unit_rows(rows))
    return stage


def test_a_search_on_the_cluster_with_a_worker_killed_finds_what_one_process_finds(
    cluster: RayWorkers, tmp_path: Path
) -> None:
    found = []
    for name, workers in (("here", HereWorkers()), ("ray", KillingWorkers(cluster))):
        folder = Folder(tmp_path / name)
        stage = features_stage(folder)
        files = search("pairs", stage, stage, 9, 0.9, SearchSpec(flat_below=1000), folder, workers)  # type: ignore[arg-type]
        found.append([np.concatenate(part) for part in zip(*pairs_above(files, 0.9, of_one_set=True), strict=True)])
    assert len(found[0][0]) >= 2000
    assert np.array_equal(found[0][0], found[1][0])
    assert np.allclose(found[0][1], found[1][1], atol=1e-6)


class KillingWorkers:
    """A cluster whose workers are killed once while they are at it."""

    def __init__(self, cluster: RayWorkers) -> None:
        self.cluster = cluster

    def run(self, what: str, function: object, shared: tuple, tasks: list) -> None:
        out = tasks[0][-1]
        self.cluster.run(what, _killed_once, (function, out.parent / "killed", *shared), tasks)
        assert (out.parent / "killed").is_file()


def _killed_once(function, mark: Path, *arguments: object) -> None:  # type: ignore[no-untyped-def]
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    function(*arguments)
