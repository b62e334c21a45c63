"""Evaluators on the served network: one at a time, in a thread beside serving, through the server's own batcher.

Only data sets that the operator named at start can be evaluated, by their names: a client never sends a path. The same
functions as `python -m evaluators.knn|linear` compute the figures, so they can be compared with a result file.
"""

import asyncio
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.errors import CheckFailed, InputError
from evaluators import knn, linear
from evaluators.classification import describe_data, describe_model, table_notes
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.results import Context, Measurement, describe_environment, result_json
from evaluators.splits import labelled, open_splits
from runtimes.runtime import Runtime
from server.engine import Engine
from server.errors import Conflict, NotFound, ServerError
from server.statistics import Times

log = logging.getLogger("server")

EvaluatorName = Literal["knn", "linear"]
EVALUATORS: dict[str, Callable[[FeatureTable, FeatureTable], Measurement]] = {
    "knn": knn.evaluate,
    "linear": linear.evaluate,
}


class Stopped(Exception):
    """Somebody cancelled the evaluation, or the server leaves."""


@dataclass
class Evaluation:
    """One run, as clients watch it."""

    id: str
    evaluator: str
    data: str
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    part: str = "opening"
    """What it is doing: opening, train, val (images go through the network), evaluating."""
    done: int = 0
    total: int = 0
    error: str | None = None
    result: dict[str, Any] | None = None

    def to_json(self, full: bool) -> dict[str, Any]:
        """For a list without the result, for one evaluation with it."""
        return {name: value for name, value in vars(self).items() if full or name != "result"}


class EngineRuntime(Runtime):
    """The engine as evaluators see a network: `run` from any thread goes through the batcher like every request."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, check: Callable[[], None]) -> None:
        self.manifest = engine.manifest
        self.name = engine.name
        self.device = engine.runtimes[0].device
        self.outputs = tuple(engine.shapes)
        self._engine, self._loop, self._check = engine, loop, check

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """As `Runtime.run`."""
        self._check()
        work = self._engine.run(pixels_NCHW, outputs, Times())
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Evaluations:
    """All runs of this server, those of earlier starts included; their results lie in `folder` as JSON."""

    def __init__(self, engine: Engine, allowed: Mapping[str, str], folder: Path) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._allowed = dict(allowed)
        self._folder = folder
        self._runs = _load(folder)
        self._number = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def use(self, engine: Engine) -> None:
        """Evaluate this network from now on."""
        self._engine = engine

    @property
    def running(self) -> bool:
        """Whether an evaluation is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def data_names(self) -> list[str]:
        """Names that clients may give as `data`."""
        return sorted(self._allowed)

    def runs(self) -> list[Evaluation]:
        """All runs, the newest first."""
        return sorted(self._runs.values(), key=lambda run: run.id, reverse=True)

    def get(self, run_id: str) -> Evaluation:
        """One run. Raises NotFound."""
        if run_id not in self._runs:
            raise NotFound(f"there is no evaluation {run_id!r:.80}")
        return self._runs[run_id]

    def start(self, evaluator: EvaluatorName, data: str) -> Evaluation:
        """Begin a run. Raises NotFound for data that was not allowed, Conflict while another one runs."""
        if data not in self._allowed:
            there = ", ".join(self.data_names) or "none; start the server with --evaluation-data NAME=PATH"
            raise NotFound(f"there is no evaluation data {data!r:.80}; there is: {there}")
        running = next((run.id for run in self._runs.values() if run.state == "running"), None)
        if running:
            raise Conflict(f"evaluation {running} is running, and there is one at a time; wait for it or cancel it")
        run = Evaluation(
            f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{next(self._number):03d}-{evaluator}-{data}", evaluator, data
        )
        self._runs[run.id] = run
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"evaluation-{run.id}", daemon=True)
        self._thread.start()
        return run

    def cancel(self, run_id: str) -> Evaluation:
        """Ask a run to stop; it does so before its next batch. One that has ended stays as it is."""
        run = self.get(run_id)
        if run.state == "running":
            self._stop.set()
        return run

    async def close(self) -> None:
        """Stop what runs, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _work(self, run: Evaluation) -> None:
        began = time.perf_counter()
        try:
            run.result = self._evaluate(run)
            run.state = "done"
        except Stopped:
            run.state = "cancelled"
        except (InputError, CheckFailed, ServerError) as error:
            run.error, run.state = str(error).replace(self._allowed[run.data], run.data), "failed"
        except Exception:
            log.exception("evaluation failed", extra={"fields": {"id": run.id}})
            run.error, run.state = "the evaluator failed; the server's log has the details", "failed"
        run.seconds = round(time.perf_counter() - began, 3)
        _save(self._folder, run)
        log.info("evaluation", extra={"fields": run.to_json(full=False)})

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _evaluate(self, run: Evaluation) -> dict[str, Any]:
        """The result as `python -m evaluators.NAME` would write it, with this server as the network."""
        splits = labelled(open_splits(self._allowed[run.data]), run.data)
        runtime = EngineRuntime(self._engine, self._loop, self._check)
        spec = ExtractSpec(group_column=splits.group_column, batch_size=self._engine.spec.batching.max_rows * 2)
        tables = []
        for part, dataset in (("train", splits.train), ("val", splits.val)):
            run.part = part
            tables.append(extract(runtime, dataset, spec, lambda done, total: self._show(run, done, total)))
        run.part = "evaluating"
        measurement = EVALUATORS[run.evaluator](*tables)
        self._check()
        for part, table in zip(("train", "val"), tables, strict=True):
            measurement.notes.extend(table_notes(part, table))
        return result_json(measurement, _context(run, runtime, splits, tables))

    def _show(self, run: Evaluation, done: int, total: int) -> None:
        run.done, run.total = done, total
        self._check()


def _context(run: Evaluation, runtime: Any, splits: Any, tables: Sequence[FeatureTable]) -> Context:
    train, val = tables
    classes = sorted({str(label) for table in tables for label in table.labels})
    counts = {"n_train": len(train), "n_val": len(val), "n_classes": len(classes), "classes": classes}
    return Context(
        model=describe_model("served", runtime),
        data=describe_data(run.data, splits, counts),
        preprocess=runtime.manifest.preprocess.to_json() | {"view": "center"},
        timing={},
        environment=describe_environment(runtime.device, None),
    )


def _save(folder: Path, run: Evaluation) -> None:
    """Keep a run that has ended, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{run.id}.tmp"
    with temporary.open("w") as file:
        json.dump(run.to_json(full=True), file, default=float)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"{run.id}.json")


def _load(folder: Path) -> dict[str, Evaluation]:
    runs: dict[str, Evaluation] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = Evaluation(**json.loads(path.read_text()))
            runs[run.id] = run
        except (OSError, ValueError, TypeError) as error:
            log.warning("an evaluation cannot be read back", extra={"fields": {"file": path.name, "error": str(error)}})
    return runs
