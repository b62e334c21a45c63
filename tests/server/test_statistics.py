"""Counters and their Prometheus page."""

import random
import re
from dataclasses import replace
from pathlib import Path

import httpx
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.admission import Admission, AdmissionSpec
from server.artifacts import Loaded
from server.batcher import Execution
from server.config import ServerConfig
from server.run import Running
from server.statistics import Histogram, Times
from tests.server.conftest import config_of
from tests.server.gate import GatedRuntime, ask

BOUNDS = (0.001, 0.5, 1, 30)


def page(registry: CollectorRegistry) -> list[str]:
    """Its lines, but for the times at which the client library's own histograms were made."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_histogram_shows_what_the_client_librarys_own_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    labelled = Histogram("of_models", "By model", BOUNDS, "model")
    plain = Histogram("plain", "Without a label", BOUNDS)
    ours.register(labelled)
    ours.register(plain)
    their_labelled = prometheus_client.Histogram("of_models", "By model", ["model"], registry=theirs, buckets=BOUNDS)
    their_plain = prometheus_client.Histogram("plain", "Without a label", registry=theirs, buckets=BOUNDS)
    assert page(ours) == page(theirs)

    rng = random.Random(0)
    for value in [*BOUNDS, 0.0, *(rng.expovariate(1) for _ in range(100)), 31.0]:
        model = rng.choice(["backbone", "depth"])
        labelled.observe(value, model)
        their_labelled.labels(model).observe(value)
        plain.observe(value)
        their_plain.observe(value)
    assert page(ours) == page(theirs)


@pytest.mark.parametrize(
    ("batch_rows", "copies", "wanted_s"),
    [(1, 1, 20), (8, 1, 3), (8, 2, 2), (1, 4, 5)],
)
def test_a_full_queue_is_gone_when_all_copies_have_run_its_rows_in_such_batches(
    batch_rows: int, copies: int, wanted_s: int
) -> None:
    """A run of 0.2 s, whatever is in it; 100 rows wait. What needed no run says nothing of it."""
    admission = Admission(AdmissionSpec(max_rows=100))
    for _ in range(200):
        admission.learn(Times(executions=[Execution(batch_rows, 200_000_000)]), copies)
        admission.learn(Times(), copies)
    with admission.hold(100, 0):
        assert admission.retry_after_s() == pytest.approx(wanted_s, abs=1)


def counted(running: Running) -> tuple[int, list[int], dict[str, int]]:
    """Of `backbone`: rows and sizes of batches in the statistics, and nv_inference_count by version."""
    at = running.addresses
    found = httpx.get(f"{at.http}/v2/models/backbone/stats").json()["model_stats"][0]
    assert bool(found["last_inference"]) == bool(found["inference_stats"]["success"]["count"])
    page = re.findall(r'nv_inference_count{model="backbone",version="(.*)"} (.*)', httpx.get(at.metrics).text)
    sizes = [one["batch_size"] for one in found["batch_stats"]]
    return found["inference_count"], sizes, {version: int(count) for version, count in page}


def test_a_version_is_counted_from_its_load_and_its_metrics_run_on_over_its_loads(tmp_path: Path) -> None:
    """As a real Triton 2.51 was seen to count; what is no longer served leaves the page."""
    runtime, versions = GatedRuntime(), iter("11712")

    def load(config: ServerConfig) -> Loaded:
        return replace(runtime.load(config), version=next(versions))

    with Running(config_of(tmp_path, tmp_path / "state"), load) as running:
        at = f"{running.addresses.http}/v2/repository/models/backbone"
        ask(running, 0, rows=2)
        assert counted(running) == (2, [2], {"1": 2})
        httpx.post(f"{at}/load").raise_for_status()
        assert counted(running) == (0, [], {"1": 2}), "the same version once more"
        ask(running, 0)
        assert counted(running) == (1, [1], {"1": 3})
        httpx.post(f"{at}/load").raise_for_status()
        assert counted(running) == (0, [], {"7": 0})
        ask(running, 0)
        assert counted(running) == (1, [1], {"7": 1})
        httpx.post(f"{at}/load").raise_for_status()
        assert counted(running) == (0, [], {"1": 0}), "it had left"
        httpx.post(f"{at}/unload").raise_for_status()
        assert 'nv_inference_count{model="backbone"' not in httpx.get(running.addresses.metrics).text
        httpx.post(f"{at}/load").raise_for_status()
        assert counted(running) == (0, [], {"2": 0})
