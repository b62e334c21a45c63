"""Counters and their Prometheus page."""

import random

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.admission import Admission, AdmissionSpec
from server.batcher import Execution
from server.statistics import Histogram, Times

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
