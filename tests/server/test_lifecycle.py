"""Start, stop, kill and start again: what was acknowledged stays, and what cannot work is told in one line."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from geventhttpclient.response import HTTPParseError

from benchmarks.reliability_messages import image_request
from data.errors import InputError
from server.collections import Collections
from server.errors import StorageFailed
from server.run import Running
from server.samples import item_ids
from tests.server.conftest import config_of
from tests.server.gate import wait_for
from tests.server.http2 import TAKE_NOTHING, send_call
from tests.server.images import png
from tests.server.wires import Refused, images, open_wire, refused

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def process(network, state, *flags):
    """`python -m server` on free ports; yields the process and what it announced."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--threads", "1", "--device", "cpu")
    command = (sys.executable, "-m", "server", "--models", network, "--collections", state, *ports, *flags)
    started = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.stdout is not None
        for_people, for_programs = started.stdout.readline(), started.stdout.readline()
        assert for_people.startswith("ready: page and REST http://127.0.0.1:")
        yield started, json.loads(for_programs)
    finally:
        started.kill()
        started.communicate()


def run(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "server", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_what_was_acknowledged_survives_a_kill_and_work_survives_a_term(network, tmp_path):
    """Start, add item after item, kill -9; start again: all are there. Then SIGTERM amid requests: none is lost."""
    state = tmp_path / "state"
    acknowledged = []
    with process(network, state, "--samples", "none") as (started, at):
        for n in range(5):
            answer = httpx.post(
                f"{at['http']}/v1/collections/birds/items", files={"file": png(n)}, data={"id": f"b{n}"}, timeout=60
            )
            acknowledged += answer.json()["ids"]
        started.send_signal(signal.SIGKILL)
        assert started.wait(60) == -signal.SIGKILL

    with process(network, state, "--samples", "none", "--log-level", "warning") as (started, at):
        found = httpx.get(f"{at['http']}/v1/collections/birds/items").json()["items"]
        assert [one["id"] for one in found] == acknowledged == [f"b{n}" for n in range(5)]
        search = httpx.post(f"{at['http']}/v1/collections/birds/search?k=1", files={"file": png(3)}, timeout=60)
        assert search.json()["results"][0]["neighbours"][0]["id"] == "b3"

        sent = image_request("embedding", png(0)).SerializeToString()
        with send_call(
            at["grpc"], "ModelInfer", sent, settings=TAKE_NOTHING
        ):  # one that leaves before it took its reply
            answered = 'nv_inference_request_success{model="embedding",version="1"} 1'
            wait_for(lambda: answered in httpx.get(at["metrics"]).text)

        answered = []

        def ask_until_refused(name):
            wire = open_wire(name, Announced(at))
            try:
                while True:
                    answered.append(wire.infer("embedding", images(png(0)))["embedding"].shape == (1, 48))
            except Refused as refusal:
                return refusal.kind
            except (OSError, HTTPParseError):  # an idle connection that the server closed
                return "closed"
            finally:
                wire.close()

        with ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(ask_until_refused, name) for name in ("grpc", "http") * 2]
            while len(answered) < 20:
                assert not any(asker.done() for asker in askers)
                time.sleep(0.01)
            started.send_signal(signal.SIGTERM)
            ends = {asker.result() for asker in askers}
        assert started.wait(60) == 0
        assert all(answered)
        assert ends <= {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "503", "closed"}
        assert started.stderr is not None
        assert "Traceback" not in started.stderr.read()


class Announced:
    """Addresses as a program reads them from the line on stdout."""

    def __init__(self, line):
        self.http, self.grpc = line["http"], line["grpc"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_database_that_stalls_does_not_keep_a_server_that_leaves(method, network, database_url, tmp_path):
    import psycopg

    flags = ("--samples", "none", "--grace-s", "0.5", "--database", database_url)
    with process(network, tmp_path / "state", *flags) as (started, at), ThreadPoolExecutor(1) as pool:
        path, item = f"{at['http']}/v1/collections/birds/items", {"items": [{"embedding": [1.0] * 48}]}
        httpx.post(path, json=item).raise_for_status()
        with psycopg.connect(database_url, autocommit=True) as other:
            mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            backends = [pid for (pid,) in other.execute(mine)]
        for pid in backends:
            os.kill(pid, signal.SIGSTOP)
        try:
            asked = pool.submit(httpx.request, method, path, json=item, timeout=60)
            time.sleep(0.5)  # on its way
            started.send_signal(signal.SIGTERM)
            assert started.wait(60) == 0
            assert asked.exception() is not None or asked.result().status_code == 503
        finally:
            for pid in backends:
                os.kill(pid, signal.SIGCONT)


def test_every_line_of_the_log_is_json_whatever_the_libraries_would_say(network, colours, tmp_path):
    """An evaluation is a process of its own: gRPC has a word to say of forks."""
    flags = ("--samples", "none", "--evaluation-data", f"colours={colours}")
    with process(network, tmp_path / "state", *flags) as (started, at), httpx.Client(base_url=at["http"]) as http:
        with contextlib.ExitStack() as stack:
            wire = open_wire("grpc", Announced(at))
            stack.callback(wire.close)
            wire.infer("embedding", images(png(0)))
            run = http.post("/v1/evaluations", json={"evaluator": "knn", "data": "colours", "options": {"k": [99]}})
            wait_for(lambda: http.get(run.headers["location"]).json()["state"] != "running")
            assert http.get(run.headers["location"]).json()["error"].startswith("k 99: ")
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
        lines = started.stderr.read().splitlines()
        assert [line for line in lines if not line.startswith('{"time": ')] == []
        assert "evaluation" in {json.loads(line)["event"] for line in lines}


def test_help_lists_every_flag():
    status, out, _ = run("--help")
    assert status == 0
    for flag in (
        "models",
        "host",
        "http-port",
        "grpc-port",
        "metrics-port",
        "collections",
        "samples",
        "evaluation-data",
    ):
        assert f"--{flag}" in out
    for flag in ("instances", "threads", "max-batch-rows", "batch-delay-us", "queue-rows", "grace-s", "log-level"):
        assert f"--{flag}" in out


def test_a_bad_flag_ends_with_status_2_and_one_line(tmp_path):
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    status, out, err = run("--models", str(tmp_path / "missing"), "--collections", str(tmp_path), *ports)
    assert (status, out) == (2, "")
    assert err.startswith("error: --models ")
    assert err.count("\n") == 1


FLAGS = {
    "port": ({"http_port": 70_000}, "--http-port 70000: wanted 0 to 65535"),
    "instances": ({"instances": 0}, "--instances 0: wanted at least 1"),
    "threads": ({"threads": 0}, "--threads 0: wanted at least 1"),
    "rows": ({"max_batch_rows": 0}, "--max-batch-rows 0: wanted at least 1"),
    "no grace at all": ({"grace_s": float("nan")}, "--grace-s nan: wanted at least 0"),
    "grace without end": ({"grace_s": float("inf")}, "--grace-s inf: wanted a time that ends"),
    "messages that gRPC has not": ({"max_message_mb": 2048}, "--max-message-mb 2048: wanted at most 2047"),
    "no address": ({"host": "", "public": True}, "--host '': wanted an address"),
    "data named twice": ({"evaluation_data": ("a=/x", "a=/y")}, "--evaluation-data a=/y: 'a' is /x already"),
    "other machines": ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could reach"),
    "device": ({"device": "tpu"}, "--device 'tpu' is unknown"),
    "samples": ({"samples": "/nothing/here"}, "/nothing/here"),
    "evaluation data": ({"evaluation_data": ("colours",)}, "--evaluation-data colours: wanted NAME=PATH"),
}


@pytest.mark.parametrize("what", FLAGS)
def test_a_bad_setting_is_refused_before_anything_listens(network, tmp_path, what):
    changes, words = FLAGS[what]
    with pytest.raises(InputError) as caught, Running(config_of(network, tmp_path / "state", **changes)):
        pass
    assert words in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/state: cannot write there"):
        Running(config_of(network, tmp_path / "file" / "state")).__enter__()


def test_a_port_that_is_taken_is_named(network, server, tmp_path):
    taken = int(server.addresses.http.rpartition(":")[2])
    with pytest.raises(InputError, match=f"--http-port {taken}: cannot listen"):
        Running(config_of(network, tmp_path / "state", http_port=taken)).__enter__()
    taken = int(server.addresses.grpc.rpartition(":")[2])
    with pytest.raises(InputError, match=f"--grpc-port {taken}: cannot listen"):
        Running(config_of(network, tmp_path / "state", grpc_port=taken)).__enter__()


def test_a_request_that_is_never_finished_does_not_hold_the_server_up(network, tmp_path):
    """Half a body, then SIGTERM: the server tells it, and leaves long before the grace is over, without a traceback."""
    with process(network, tmp_path / "state", "--samples", "none", "--grace-s", "60") as (started, at):
        host, port = at["http"].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nx"
            )
            wait_for(lambda: httpx.get(f"{at['http']}/v2/health/ready").status_code == 200)
            began = time.monotonic()
            started.send_signal(signal.SIGTERM)
            _, said = started.communicate(timeout=50)
            assert time.monotonic() - began < 30
            half.settimeout(5)
            assert half.recv(1000).startswith(b"HTTP/1.1 503")
        assert started.returncode == 0
        assert "Traceback" not in said


def test_a_client_who_leaves_amid_the_body_is_no_error(network, tmp_path):
    with process(network, tmp_path / "state", "--samples", "none") as (started, at):
        host, port = at["http"].removeprefix("http://").split(":")
        for path in ("/v1/embeddings", "/v2/models/embedding/infer", "/v1/evaluations"):
            with socket.create_connection((host, int(port))) as half:
                half.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx".encode())
        time.sleep(0.5)
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=50)
        assert "Traceback" not in said
        assert '"level": "error"' not in said


@pytest.mark.parametrize(
    ("model", "form", "queue_mb", "needed_mb"),
    [
        ("attention", "onnx_file", 1, 3),  # 1025 tokens of width 48, 16 times, in float32: 3.1 MB
        (
            "depth",
            "network",
            30,
            51,
        ),  # 1024 patches enlarged 16 times, 256 bins, three times, in float32: 53.5e6 bytes with the tokens
    ],
)
def test_an_image_that_the_network_has_no_memory_for_is_refused(request, tmp_path, model, form, queue_mb, needed_mb):
    config = config_of(request.getfixturevalue(form), tmp_path / "state", queue_mb=queue_mb)
    with Running(config) as running:
        wire = open_wire("grpc", running.addresses)
        assert wire.infer(model, images(png(0)), (), {"size": 64})[model].shape[0] == 1
        with pytest.raises(Refused, match=f"256: one such image needs about {needed_mb} MB inside the network"):
            wire.infer(model, images(png(0)), (), {"size": 256})
        wire.close()


def test_a_folder_serves_one_server_at_a_time(network, tmp_path):
    state = tmp_path / "state"
    second = Running(config_of(network, state))
    with Running(config_of(network, state)), pytest.raises(InputError, match="another server has it open"):
        second.__enter__()
    with Running(config_of(network, state)) as again:
        assert httpx.get(f"{again.addresses.http}/v2/health/ready").status_code == 200


def test_another_network_cannot_search_this_ones_collection(network, other_network, colours, tmp_path):
    """Its vectors mean something else; the samples, which the server makes itself, are made anew."""
    state = tmp_path / "state"
    scores = []
    for models in (network, other_network, network):
        with Running(config_of(models, state, samples=str(colours / "val"))) as running:
            at = running.addresses.http
            wire = open_wire("grpc", running.addresses)
            scores.append(wire.infer("knn", images(png(0)), parameters={"k": 12})["scores"])
            if models is network:
                vectors = {"items": [{"embedding": [1.0] * 48}]}
                assert httpx.post(f"{at}/v1/collections/mine/items", json=vectors).status_code == 201
            else:
                with pytest.raises(Refused, match="was made with weights") as caught:
                    wire.infer("knn", images(png(0)), parameters={"collection": "mine"})
                assert caught.value.kind == "conflict"
                assert httpx.post(f"{at}/v1/collections/mine/search", files={"file": png(0)}).status_code == 409
                mine = httpx.get(f"{at}/v1/collections").json()["collections"][0]
                assert (mine["name"], mine["usable"]) == ("mine", False)
            wire.close()
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-6)
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_a_store_that_fails_while_samples_are_built_ends_the_start_in_one_line(network, colours, tmp_path, monkeypatch):
    def full(*_):
        raise StorageFailed("the collections cannot be read or written: disk I/O error")

    monkeypatch.setattr(Collections, "replace", full)
    config = config_of(network, tmp_path / "state", samples=str(colours / "val"))
    with pytest.raises(InputError, match=r"^--samples .*: the collections cannot be read or written"), Running(config):
        pass


def test_samples_that_cannot_be_decoded_are_left_out(network, colours, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "good.png").write_bytes(png(0))
    (folder / "bad.jpg").write_bytes(b"no image")
    with Running(config_of(network, tmp_path / "state", samples=str(folder))) as running:
        items = httpx.get(f"{running.addresses.http}/v1/collections/samples/items").json()["items"]
    assert [one["id"] for one in items] == ["good"]
    (folder / "good.png").write_bytes(b"no image either")
    with pytest.raises(InputError, match="none of its 2 images can be used"):
        Running(config_of(network, tmp_path / "state", samples=str(folder))).__enter__()


def test_samples_may_have_any_names_that_files_have(network, tmp_path):
    """Equal but for the ending, no UTF-8, a line break, longer than an id may be."""
    folder, deep = tmp_path / "samples", "d" * 200
    names = [b"a.png", b"a.bmp", b"caf\xe9.png", b"two\nlines.png", f"{deep}/{'f' * 100}.png".encode()]
    for seed, name in enumerate(names):
        path = os.fsencode(folder) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(seed))
    with (
        Running(config_of(network, tmp_path / "state", samples=str(folder))) as running,
        httpx.Client(base_url=running.addresses.http, timeout=60) as http,
    ):
        items = http.get("/v1/collections/samples/items").json()["items"]
        assert all(http.get(one["thumbnail"]).status_code == 200 for one in items)
        assert http.post("/v1/collections/samples/search?k=5", files={"file": png(0)}).status_code == 200
    ids = {one["id"] for one in items}
    assert {"a.png", "a.bmp", r"caf\udce9", r"two\x0alines"} < ids
    (long,) = (one for one in ids if len(one) > 20)
    assert long.startswith("...ddd")
    assert long.endswith(f":{'f' * 100}")


def test_more_neighbours_than_there_is_memory_for_are_refused_before_they_are_sought(network, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((400, 48), dtype=np.float32)
    with Running(config_of(network, tmp_path, queue_mb=1)) as running:
        items = [{"embedding": vector.tolist()} for vector in vectors]
        url = f"{running.addresses.http}/v1/collections/large/items"
        httpx.post(url, json={"items": items}, timeout=60).raise_for_status()
        wire = open_wire("grpc", running.addresses)
        parameters = {"collection": "large", "k": 400}
        assert wire.infer("knn", {"embedding": vectors[:2]}, parameters=parameters)["ids"].shape == (2, 400)
        kind, line = refused(wire.infer, "knn", {"embedding": vectors[:32]}, parameters=parameters)
        assert (kind, "400 neighbours of each of 32 rows take about 12 MB" in line) == ("too large", True)
        wire.close()


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["red/7.png", "blue/7.png"], ["red:7", "blue:7"]),
        (["x.png", "x.jpg", "y.jpg"], ["x.png", "x.jpg", "y"]),
        (["a:b.png", "a/b.png"], ["a:b.png", "a:b.png#2"]),
        (["x.png.jpg", "x.png", "x.bmp"], ["x.png", "x.png#2", "x.bmp"]),
        (["same.png", "same.png"], ["same.png", "same.png#2"]),
        (["..png"], ["..png"]),
    ],
)
def test_every_sample_has_an_id_of_its_own(names, ids):
    assert item_ids(names) == ids


def test_the_collector_passes_over_what_was_loaded_by_the_time_a_server_is_ready(network, tmp_path):
    """It holds the interpreter's lock for as long as it walks, and nobody is answered meanwhile."""
    code = (
        "import gc, os, signal, server.run\n"
        "def print_ready(_):\n"
        "    print(len(gc.get_objects()), gc.get_freeze_count(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "server.run.print_ready = print_ready\n"
        "from server.__main__ import serve_from_command_line\n"
        "serve_from_command_line()\n"
    )
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--samples", "none")
    command = (sys.executable, "-c", code, "--models", network, "--collections", tmp_path / "state", *ports)
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    walked, passed_over = map(int, done.stdout.split())
    assert done.returncode == 0
    assert walked < passed_over / 100
