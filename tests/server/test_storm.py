"""A few hundred of the requests that `make reliability` makes by the hundred thousand: good ones are right, hostile ones do no harm."""

import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.reliability_requests import GOOD, HOSTILE, Answers, Clients
from server.run import Running
from tests.server.conftest import config_of

CLIENTS, EACH = 4, 120


def test_good_and_hostile_requests_mixed_are_answered_rightly_on_both_wires(onnx_file: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(onnx_file, models / "backbone.onnx")
    answers = Answers(models)
    with Running(config_of(models, tmp_path / "state")) as running, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [Clients(asdict(running.addresses), answers, seed, hostile=0.3) for seed in range(CLIENTS)]
        for one in clients:
            one.run(10)
        threads = threading.active_count()
        found = sum(pool.map(lambda one: one.run(EACH), clients), Counter())
        assert [line for one in clients for line in one.wrong] == []
        assert threading.active_count() < threads + 30
    assert found.total() >= CLIENTS * EACH
    assert set(found) == {f"good: {kind.__name__.strip('_')}" for kind in GOOD} | {
        f"hostile: {kind.__name__.strip('_')}" for kind in HOSTILE
    }
