"""NVIDIA's own load generator against our server: it must run to the end, and count what we count (`make test-perf-analyzer`)."""

import base64
import csv
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from server.run import Running
from tests.server.conftest import config_of
from tests.server.images import jpeg

PROGRAM = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "dinoscope" / "venvs" / "perf_analyzer" / "perf_analyzer"
)  # fmt: skip
pytestmark = [
    pytest.mark.perf_analyzer,
    pytest.mark.skipif(not PROGRAM.is_file(), reason="perf_analyzer is not here; `make test-perf-analyzer` fetches it"),
]
SHORT = ("--measurement-mode", "count_windows", "--measurement-request-count", "40", "-r", "3", "-s", "900")
"""Three windows of 40 requests, and no complaint about a busy machine."""


@pytest.fixture(scope="module")
def server(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(config_of(network, tmp_path_factory.mktemp("perf"), max_size_px=128)) as running:
        yield running


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image as the program takes BYTES: base64 of a length and the file."""
    data = jpeg(0)
    path = tmp_path_factory.mktemp("input") / "image.json"
    content = base64.b64encode(struct.pack("<I", len(data)) + data).decode()
    path.write_text(json.dumps({"data": [{"image": {"content": {"b64": content}, "shape": [1]}}]}))
    return path


@pytest.fixture(scope="module")
def shades_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "pixels.json"
    values = np.zeros((3, 32, 32), np.float32).ravel().tolist()
    path.write_text(json.dumps({"data": [{"pixels": {"content": values, "shape": [3, 32, 32]}}]}))
    return path


def successes(server: Running, model: str) -> int:
    stats = httpx.get(f"{server.addresses.http}/v2/models/{model}/stats").json()["model_stats"][0]
    return stats["inference_stats"]["success"]["count"]


def perf(server: Running, out: Path, wire: str, model: str, *words: str) -> list[dict[str, str]]:
    """The rows of its table, one for each load, after it ended well and our counter agreed with its own."""
    where = server.addresses.grpc if wire == "grpc" else server.addresses.http.removeprefix("http://")
    before = successes(server, model)
    done = subprocess.run(
        [str(PROGRAM), "-m", model, "-i", wire, "-u", where, "-f", str(out), *SHORT, *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Failed" not in done.stdout
    assert successes(server, model) - before >= 120
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["Inferences/Second"]) > 0 for row in rows)
    return rows


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_a_sweep_of_concurrency_gives_the_servers_own_split_of_time(server, tmp_path, wire):
    rows = perf(
        server, tmp_path / "out.csv", wire, "backbone", "--shape", "pixels:3,32,32", "--concurrency-range", "1:5:2"
    )
    assert {row["Concurrency"] for row in rows} == {"1", "3", "5"}
    for row in rows:
        assert float(row["Server Compute Infer"]) > 0
        assert float(row["Server Queue"]) >= 0


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_batches_are_counted_in_rows(server, tmp_path, wire):
    assert perf(server, tmp_path / "out.csv", wire, "backbone", "--shape", "pixels:3,32,32", "-b", "4")


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_images_as_files(server, tmp_path, wire, image_file):
    for model in ("embedding", "attention", "depth"):
        assert perf(server, tmp_path / f"{model}.csv", wire, model, "--input-data", str(image_file))


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_shared_memory_of_the_system(server, tmp_path, wire):
    words = ("--shape", "pixels:3,32,32", "--shared-memory", "system", "--output-shared-memory-size", "65536")
    assert perf(server, tmp_path / "out.csv", wire, "backbone", *words)
    status = httpx.get(f"{server.addresses.http}/v2/systemsharedmemory/status").json()
    assert status == [], "it let go of its regions"


def test_json_instead_of_binary_tensors(server, tmp_path, shades_file):
    words = ("--input-data", str(shades_file), "--input-tensor-format", "json", "--output-tensor-format", "json")
    assert perf(server, tmp_path / "out.csv", "http", "backbone", *words)


def test_streams(server, tmp_path):
    assert perf(server, tmp_path / "out.csv", "grpc", "backbone", "--shape", "pixels:3,32,32", "--streaming")


def test_asynchronous_clients_and_a_rate_of_arrivals(server, tmp_path):
    words = ("--shape", "pixels:3,32,32", "--async", "--request-rate-range", "30", "--request-distribution", "poisson")
    assert perf(server, tmp_path / "out.csv", "grpc", "backbone", *words)
