"""Evaluators on the served network: one at a time, in a process of their own beside serving.

The process runs what `python -m evaluators.NAME` runs, on this server (see `evaluation_wire`), at low priority: what it decodes and fits
takes nothing from the server's interpreter, and it can be stopped at any moment. Only data sets that the operator named at start can be
evaluated, by their names: a client never sends a path, and no path comes back. Read in this order: EVALUATORS, Evaluation, Evaluations.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from server.errors import Conflict, NotFound
from server.evaluation_process import Job
from server.service import Service

log = logging.getLogger("server")

EvaluatorName = Literal[
    "knn",
    "linear",
    "logistic",
    "ridge",
    "retrieval",
    "copies",
    "attention",
    "segmentation",
    "depth",
    "video_objects",
    "video_actions",
]
EVALUATORS: dict[EvaluatorName, tuple[str, tuple[str, ...], str]] = {
    "knn": ("Weighted k-NN accuracy", ("embedding",), "images with classes"),
    "linear": ("Accuracy of a linear classifier", ("embedding",), "images with classes"),
    "logistic": ("Accuracy of logistic regression", ("embedding",), "images with classes"),
    "ridge": ("Accuracy of ridge regression from few images a class", ("embedding",), "images with classes"),
    "retrieval": ("How well images of the same thing find each other", ("embedding",), "images with classes or groups"),
    "copies": ("How well altered copies are found", ("embedding",), "a table with a column `group`, or Copydays"),
    "attention": ("How well the attention covers the objects", ("attention",), "images with object masks"),
    "segmentation": ("Overlap (mIoU) of a linear probe's classes", ("patches",), "images with class masks"),
    "depth": ("Error of a linear probe's depth", ("embedding", "patches"), "images with depth maps"),
    "video_objects": ("How well objects are followed through videos", ("patches",), "videos with object masks"),
    "video_actions": ("Accuracy of classes of short videos", ("embedding",), "videos with classes"),
}
"""Name: what it measures, the outputs of the network that it reads, the data that it wants."""
INTERRUPTED = "the server ended before the evaluation did; start it again"
FEATURES = "features"
"""Folder of the features that evaluators of one life of the server share."""
STOP_GRACE_S, END_GRACE_S = 5.0, 60.0
ROOT = str(Path(__file__).resolve().parents[1])


@dataclass
class Evaluation:
    """One run, as clients watch it."""

    id: str
    evaluator: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the evaluator that were asked for."""
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    part: str = "opening"
    """What it is doing: opening, train, val, ... (images go through the network), evaluating."""
    done: int = 0
    total: int = 0
    error: str | None = None
    result: dict[str, Any] | None = None
    report: str | None = None
    """Where the page of a run that is done can be read."""

    def to_json(self, full: bool) -> dict[str, Any]:
        """For a list without the result, for one evaluation with it."""
        return {name: value for name, value in asdict(self).items() if full or name != "result"}


class Evaluations:
    """All runs of this server, those of earlier starts included: each is a JSON file in `folder`, and a folder with result and report."""

    def __init__(
        self,
        service: Service,
        wire: Callable[[], AbstractAsyncContextManager[str]],
        allowed: Mapping[str, str],
        folder: Path,
    ) -> None:
        self._service, self._wire, self._allowed, self._folder = service, wire, dict(allowed), folder
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        self._runs = _load(folder)
        self._number = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = self._leaving = False

    @property
    def running(self) -> bool:
        """Whether an evaluation is under way."""
        return self._task is not None and not self._task.done()

    @property
    def data_names(self) -> list[str]:
        """Names that clients may give as `data`."""
        return sorted(self._allowed)

    def evaluators(self) -> list[dict[str, Any]]:
        """All evaluators, and why those that the served network lacks outputs for cannot run."""
        found = []
        for name, (summary, outputs, data) in EVALUATORS.items():
            reason = self._missing(name)
            one = {"name": name, "summary": summary, "data": data, "outputs": list(outputs)}
            found.append(one | {"available": reason is None, "reason": reason})
        return found

    def _missing(self, evaluator: EvaluatorName) -> str | None:
        lacking = [one for one in EVALUATORS[evaluator][1] if not self._service.engine.has(one)]
        return f"the served network has no {' and no '.join(lacking)}" if lacking else None

    def runs(self) -> list[Evaluation]:
        """All runs, the newest first."""
        return sorted(self._runs.values(), key=lambda run: run.id, reverse=True)

    def get(self, run_id: str) -> Evaluation:
        """One run. Raises NotFound."""
        if run_id not in self._runs:
            raise NotFound(f"there is no evaluation {run_id!r:.80}")
        return self._runs[run_id]

    def report(self, run_id: str) -> Path:
        """The page of a run that is done. Raises NotFound."""
        run = self.get(run_id)
        page = self._folder / run.id / "report.html"
        if run.state != "done" or not page.is_file():
            raise NotFound(f"evaluation {run_id!r:.80} is {run.state} and has no report")
        return page

    def start(self, evaluator: EvaluatorName, data: str, options: dict[str, Any]) -> Evaluation:
        """Begin a run with options that `check_options` found good.

        Raises NotFound for data that was not allowed, Conflict while one runs or where the network lacks outputs.
        """
        if data not in self._allowed:
            there = ", ".join(self.data_names) or "none; start the server with --evaluation-data NAME=PATH"
            raise NotFound(f"there is no evaluation data {data!r:.80}; there is: {there}")
        if reason := self._missing(evaluator):
            raise Conflict(f"{evaluator} cannot run: {reason}")
        running = next((run.id for run in self._runs.values() if run.state == "running"), None)
        if running or self.running:
            raise Conflict(f"evaluation {running} is running, and there is one at a time; wait for it or cancel it")
        run = Evaluation(
            f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{next(self._number):03d}-{evaluator}-{data}", evaluator, data, options
        )
        self._runs[run.id] = run
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._work(run))
        return run

    def cancel(self, run_id: str) -> Evaluation:
        """Stop a run. One that has ended stays as it is."""
        run = self.get(run_id)
        if run.state == "running":
            self._stop()
        return run

    async def close(self) -> None:
        """Stop what runs, and wait for it: nobody has cancelled it, and it says so after a restart."""
        self._leaving = not self._stopping
        self._stop()
        if self._task is not None:
            await self._task

    def _stop(self) -> None:
        self._stopping = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def _work(self, run: Evaluation) -> None:
        began = time.perf_counter()
        ticking = asyncio.ensure_future(_tick(run, began))
        try:
            await asyncio.to_thread(_save, self._folder, run)
            async with self._wire() as address:
                complaint = await self._run_process(run, address)
            if self._leaving:
                ended = replace(run, state="failed", error=INTERRUPTED)
            elif self._stopping:
                ended = replace(run, state="cancelled")
            elif complaint is not None:
                ended = replace(run, state="failed", error=complaint)
            else:
                result = json.loads((self._folder / run.id / "result.json").read_text(encoding="utf-8"))
                ended = replace(run, state="done", result=result, report=f"/v1/evaluations/{run.id}/report")
        except Exception:
            log.exception("evaluation failed", extra={"fields": {"id": run.id}})
            ended = replace(run, state="failed", error="the evaluator failed; the server's log has the details")
        finally:
            ticking.cancel()
        ended.seconds = round(time.perf_counter() - began, 3)
        await asyncio.to_thread(self._finish, ended)
        vars(run).update(vars(ended))  # only now: whoever sees that it ended may start the next one
        log.info("evaluation", extra={"fields": run.to_json(full=False)})

    def _finish(self, run: Evaluation) -> None:
        try:
            if run.state != "done":
                shutil.rmtree(self._folder / run.id, ignore_errors=True)
            _save(self._folder, run)
        except OSError:  # a full disk; the run can still be read until the server ends
            log.exception("evaluation not kept", extra={"fields": {"id": run.id}})

    async def _run_process(self, run: Evaluation, address: str) -> str | None:
        """Run the evaluator to its end; what it complained about, or None."""
        folder = self._folder / run.id
        folder.mkdir(parents=True)
        threads = max(1, (os.cpu_count() or 1) // 2)
        job = Job(
            evaluator=run.evaluator,
            options=run.options,
            address=address,
            data=self._allowed[run.data],
            data_name=run.data,
            folder=str(folder),
            cache=str(self._folder / FEATURES),
            threads=threads,
        )
        with (folder / "log.txt").open("wb") as errors:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "server.evaluation_process", json.dumps(asdict(job))),
                stdin=asyncio.subprocess.PIPE,  # its end tells the process that the server is gone
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
            )
        if self._stopping:  # asked while the process was being made
            self._stop()
        try:
            complaint = await _follow(run, process)
        finally:
            await _ended(process, STOP_GRACE_S if self._stopping else END_GRACE_S)
            self._process = None
        if complaint is None and process.returncode and not self._stopping:
            told = (folder / "log.txt").read_text(errors="replace")[-4000:]
            log.error("evaluator crashed", extra={"fields": {"id": run.id, "status": process.returncode, "said": told}})
            return f"the evaluator ended with status {process.returncode}; the server's log has the details"
        return complaint


async def _follow(run: Evaluation, process: asyncio.subprocess.Process) -> str | None:
    """Show the process's progress until it ends; what it complained about."""
    assert process.stdout is not None
    complaint = None
    async for line in process.stdout:
        said = json.loads(line)
        complaint = said.pop("error", complaint)
        for name, value in said.items():
            setattr(run, name, value)
    return complaint


async def _ended(process: asyncio.subprocess.Process, grace_s: float) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _tick(run: Evaluation, began: float) -> None:
    while True:
        run.seconds = round(time.perf_counter() - began, 1)
        await asyncio.sleep(0.5)


def _save(folder: Path, run: Evaluation) -> None:
    """Keep a run, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{run.id}.tmp"
    with temporary.open("w") as file:
        json.dump(run.to_json(full=True), file, default=float)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"{run.id}.json")


def _load(folder: Path) -> dict[str, Evaluation]:
    runs: dict[str, Evaluation] = {}
    known = {one.name for one in fields(Evaluation)}
    for path in sorted(folder.glob("*.json")):
        try:
            read = json.loads(path.read_text())
            run = Evaluation(**{name: value for name, value in read.items() if name in known})
            if run.state == "running":
                run.state, run.error = "failed", INTERRUPTED
                shutil.rmtree(folder / run.id, ignore_errors=True)
            runs[run.id] = run
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("an evaluation cannot be read back", extra={"fields": {"file": path.name, "error": str(error)}})
    return runs
