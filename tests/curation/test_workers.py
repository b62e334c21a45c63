"""The same tasks here and on a Ray cluster, of which a worker is killed: the same result."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from curation.folder import Folder, Stage
from curation.near import search
from curation.neighbours import SearchSpec, pairs_above, unit_rows
from curation.workers import HereWorkers, RayWorkers
from data.errors import InputError
from tests.evaluators.fakes import small_checkpoint

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("deduplicate", ["--evaluation", "{heap}/0_evaluation", "--threshold", "0.9", "--eval-threshold", "0.95"]),
        ("retrieve", ["--queries", "samples/samples.csv", "--k", "1"]),
        ("balance", ["--keep", "1000"]),
    ],
)
def test_a_command_on_a_local_cluster_of_which_a_worker_is_killed_gives_the_same_list(
    command: str, words: list[str], tmp_path: Path
) -> None:
    """The commands themselves, as processes; the worker that is killed is whichever first does anything."""
    heap, ckpt = many_images(tmp_path / "heap", 2100), small_checkpoint(tmp_path / "small.safetensors")
    said, kept = {}, {}
    for name in ("here", "ray"):
        out = tmp_path / name
        argv = ["--ckpt", str(ckpt), "--data", str(heap), "--out", str(out), "--threads", "1"]
        argv += [word.format(heap=heap) for word in words] + ["--ray", "local"] * (name == "ray")
        with (tmp_path / f"{name}.log").open("w") as log:  # a pipe that nobody empties would stop it
            process = subprocess.Popen([sys.executable, "-m", f"curation.{command}", *argv], stderr=log)
            killed = kill_a_worker(process) if name == "ray" else None
            assert process.wait(timeout=900) == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
        assert name == "here" or killed
        kept[name] = (out / "kept.csv").read_bytes()
        said[name] = decisions_of(out / "decisions.csv")
    assert 0 < len(kept["here"].splitlines()) - 1 < 2100
    assert kept["ray"] == kept["here"]
    assert [row[:-1] for row in said["ray"]] == [row[:-1] for row in said["here"]]
    scores = np.array([[float(row[-1] or 0) for row in said[name]] for name in ("ray", "here")])
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-4)


def many_images(root: Path, n: int) -> Path:
    """Pictures of random blocks in three blocks of work, a fifth of them recompressed copies; the first hundred are in a folder."""
    rng = np.random.default_rng(0)
    root.mkdir()
    (root / "0_evaluation").mkdir()
    for i in range(n):
        if i % 5 or i == 0:
            picture = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        folder = root / "0_evaluation" if i < 100 else root
        cv2.imwrite(str(folder / f"{i:05d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90 - 30 * (i % 5 == 0)])
    return root


def kill_a_worker(process: "subprocess.Popen[bytes]") -> bool:
    """Kill a worker of the cluster that a command started, while it is at a task; its command line then names the task (Linux)."""
    while process.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"ray::_nothing_back" in (folder / "cmdline").read_bytes() and descends(folder.name, process.pid):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return True
        time.sleep(0.05)
    return False


def descends(pid: str, ancestor: int) -> bool:
    """Whether a process was started by another, or by one that it started."""
    while int(pid) > 1:
        # pid (name) state parent ...; the name may hold anything
        pid = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
        if int(pid) == ancestor:
            return True
    return False


def decisions_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]
