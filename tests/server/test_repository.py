"""Versions, load and unload, and changing the network under way."""

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import numpy_helper
from tritonclient.utils import InferenceServerException

from data.decode import decode_image
from data.errors import InputError
from data.preprocess import center_view
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from server.artifacts import Loaded, load_artifacts
from server.collections import Collections
from server.config import ServerConfig
from server.engine import Engine
from server.neighbours import Snapshot
from server.run import Running
from server.samples import build_samples
from tests.server.conftest import PREPROCESS, config_of
from tests.server.gate import GatedRuntime, Held, gauge, wait_for
from tests.server.images import png


@pytest.fixture(scope="module")
def files(network: Path, other_network: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two networks as .onnx, and what each says of an image."""
    folder = tmp_path_factory.mktemp("versions")
    for name, source in (("1", network), ("2", other_network)):
        export_onnx(source / "backbone.safetensors", folder / f"{name}.onnx", source / "depth.safetensors")
    return {name: folder / f"{name}.onnx" for name in ("1", "2")}


@pytest.fixture(scope="module")
def embeddings(files: dict[str, Path]) -> dict[str, np.ndarray]:
    pixels = center_view(decode_image(png(0)), PREPROCESS)[None]
    found = {}
    for name, path in files.items():
        with open_runtime(path, device="cpu", threads=1) as runtime:
            found[name] = runtime.run(pixels)["embedding"][0]
    return found


@pytest.fixture
def models(files: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "backbone" / "1").mkdir(parents=True)
    shutil.copy(files["1"], folder / "backbone" / "1" / "model.onnx")
    return folder


def test_a_network_that_another_took_the_place_of_leaves_memory(network: Path, tmp_path: Path) -> None:
    """At once, and without Python's collector, which passes over whatever was loaded when the server was ready."""
    engines: list[weakref.ref] = []
    weights: list[weakref.ref] = []

    def load(config: ServerConfig) -> Loaded:
        loaded = load_artifacts(config)
        engines.append(weakref.ref(loaded.runtimes[0]))
        weights.append(weakref.ref(loaded.runtimes[0]._network))  # type: ignore[attr-defined]
        return loaded

    gc.disable()
    try:
        with (
            Running(config_of(network, tmp_path / "state"), load) as running,
            httpx.Client(base_url=running.addresses.http, timeout=60) as http,
        ):
            for _ in range(2):
                embed(http)
                http.post("/v2/repository/models/backbone/load").raise_for_status()
            embed(http)
            wait_for(lambda: [one() is None for one in weights] == [True, True, False])
            gc.enable()
            wait_for(lambda: gc.collect() >= 0 and engines[1]() is None)
    finally:
        gc.enable()


def add_version(models: Path, version: str, file: Path) -> None:
    (models / "backbone" / version).mkdir(parents=True)
    shutil.copy(file, models / "backbone" / version / "model.onnx")


@pytest.fixture
def running(models: Path, colours: Path, tmp_path: Path) -> Iterator[Running]:
    with Running(config_of(models, tmp_path / "state", samples=str(colours / "val"))) as server:
        yield server


def embed(http: httpx.Client) -> np.ndarray:
    answer = http.post("/v1/embeddings", files={"file": ("a.png", png(0), "image/png")})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["items"][0]["embedding"])


def test_a_new_version_is_loaded_and_the_old_one_can_be_had_back(
    running: Running, models: Path, files: dict[str, Path], embeddings: dict[str, np.ndarray]
) -> None:
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        np.testing.assert_allclose(embed(http), embeddings["1"], atol=1e-5)
        add_version(models, "7", files["2"])
        index = http.post("/v2/repository/index").json()
        assert {"name": "backbone", "version": "7", "state": "UNAVAILABLE", "reason": "not loaded"} in index
        assert http.post("/v2/repository/models/backbone/load").status_code == 200
        np.testing.assert_allclose(embed(http), embeddings["2"], atol=1e-5)
        assert http.get("/v2/models/embedding").json()["versions"] == ["7"]
        assert http.get("/v2/models/embedding/versions/1").status_code == 404
        back = {"parameters": {"version": "1"}}
        assert http.post("/v2/repository/models/embedding/load", json=back).status_code == 200
        np.testing.assert_allclose(embed(http), embeddings["1"], atol=1e-5)


def test_samples_follow_the_network_and_other_collections_stay_with_theirs(
    running: Running, models: Path, files: dict[str, Path]
) -> None:
    file = {"file": ("a.png", png(0), "image/png")}
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        assert http.post("/v1/collections/mine/items", files=file).status_code == 201
        add_version(models, "2", files["2"])
        http.post("/v2/repository/models/backbone/load").raise_for_status()
        assert len(http.post("/v1/collections/samples/search?k=3", files=file).json()["results"][0]["neighbours"]) == 3
        refused = http.post("/v1/collections/mine/search", files=file)
        assert refused.status_code == 409
        http.post("/v2/repository/models/backbone/load", json={"parameters": {"version": "1"}}).raise_for_status()
        assert http.post("/v1/collections/mine/search", files=file).status_code == 200


def test_samples_are_searched_while_a_new_network_makes_its_own(
    running: Running, models: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there before it answers, and the old one has its own to the last; also where in the end it stays."""
    add_version(models, "2", files["2"])
    answers: list[httpx.Response] = []
    vector = {"name": "embedding", "datatype": "FP32", "shape": [1, 48], "data": [1.0] * 48}
    url = f"{running.addresses.http}/v2/models/knn/infer"

    async def then_ask(engine: Engine, store: Collections, data: str) -> int:
        made = await build_samples(engine, store, data)
        answers.append(await asyncio.to_thread(httpx.post, url, json={"inputs": [vector]}, timeout=60))
        if len(answers) == 1:
            raise InputError("refused at last")
        return made

    monkeypatch.setattr("server.repository.build_samples", then_ask)
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        assert http.post("/v2/repository/models/backbone/load").status_code == 400
        answers.append(http.post(url, json={"inputs": [vector]}))
        assert http.post("/v2/repository/models/backbone/load").status_code == 200
        answers.append(http.post(url, json={"inputs": [vector]}))
    assert [one.status_code for one in answers] == [200] * 4
    assert [one.json()["model_version"] for one in answers] == ["1", "1", "1", "2"]


def test_what_one_network_made_is_never_kept_as_anothers(
    running: Running, models: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images wait to be written, behind another write, while a new network takes the place of theirs."""
    add_version(models, "2", files["2"])
    held = Held(Collections.add)
    monkeypatch.setattr(Collections, "add", lambda *args: held(*args))
    image = {"file": ("a.png", png(0), "image/png")}
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http, ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(http.post, f"/v1/collections/{name}/items", files=image) for name in "ab")
        statistics = "/v2/models/embedding/stats"
        wait_for(lambda: http.get(statistics).json()["model_stats"][0]["inference_stats"]["success"]["count"] == 2)
        assert held.begun.wait(60)
        http.post("/v2/repository/models/backbone/load").raise_for_status()
        held.go.set()
        assert first.result().status_code == second.result().status_code == 201
        found = {one["name"]: one["usable"] for one in http.get("/v1/collections").json()["collections"]}
        assert (found["a"], found["b"]) == (False, False)
        http.post("/v2/repository/models/backbone/load", json={"parameters": {"version": "1"}}).raise_for_status()
        for name in "ab":
            (nearest,) = http.post(f"/v1/collections/{name}/search?k=1", files=image).json()["results"][0]["neighbours"]
            assert nearest["score"] > 0.999


def test_collections_stay_in_memory_for_the_same_weights_and_leave_it_with_others(
    running: Running, models: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of a database, and the graph over it, may have taken minutes, and as much memory as the network."""
    searched: list[Snapshot] = []
    search = Snapshot.search

    def watched(snapshot: Snapshot, *words: Any) -> Any:
        searched.append(snapshot)
        return search(snapshot, *words)

    monkeypatch.setattr(Snapshot, "search", watched)
    image = {"file": ("a.png", png(0), "image/png")}
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        for version in ("1", "1", "2"):
            if version == "2":
                add_version(models, "2", files["2"])
            http.post("/v2/repository/models/backbone/load").raise_for_status()
            http.post("/v1/collections/samples/search?k=1", files=image).raise_for_status()
        assert [one is searched[0] for one in searched] == [True, True, False]
        rows = weakref.ref(searched[0].rows)
        searched.clear()
        wait_for(lambda: gc.collect() >= 0 and rows() is None)


def test_a_load_that_has_begun_is_finished_although_its_caller_left(tmp_path: Path) -> None:
    """On both wires; a deadline of gRPC left the new network, and its threads, to nobody."""
    runtime = GatedRuntime()
    versions = iter("123")
    held = Held(lambda _: Loaded((runtime,), version=next(versions)))
    held.go.set()
    with (
        Running(config_of(tmp_path, tmp_path / "state"), held) as running,
        triton.InferenceServerClient(running.addresses.grpc) as client,
    ):
        at = running.addresses.http
        held.begun.clear(), held.go.clear()
        with pytest.raises(InferenceServerException, match="Deadline"):
            client.load_model("backbone", client_timeout=0.5)
        assert held.begun.wait(60)
        wait_for(lambda: gauge(running, "dinoscope_calls") == 0)
        held.go.set()
        wait_for(lambda: httpx.get(f"{at}/v2/models/embedding").json()["versions"] == ["2"])
        held.begun.clear(), held.go.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{at}/v2/repository/models/backbone/load", timeout=0.5)
        held.go.set()
        wait_for(lambda: httpx.get(f"{at}/v2/models/embedding").json()["versions"] == ["3"])


def test_a_reply_names_the_version_that_made_it(tmp_path: Path) -> None:
    """One that was begun before a load, and is answered after it."""
    runtimes = {"1": GatedRuntime(), "2": GatedRuntime()}
    versions = iter("12")

    def load(config: ServerConfig) -> Loaded:
        version = next(versions)
        return Loaded((runtimes[version],), version=version)

    with Running(config_of(tmp_path, tmp_path / "state"), load) as running, ThreadPoolExecutor(1) as pool:
        client = httpx.Client(base_url=running.addresses.http, timeout=60)
        image = {"content": png(0), "headers": {"inference-header-content-length": "0"}}
        runtimes["1"].batches.clear()
        runtimes["1"].gate.clear()
        asked = pool.submit(client.post, "/v2/models/embedding/infer", **image)
        wait_for(lambda: bool(runtimes["1"].batches))
        runtimes["2"].manifest = replace(runtimes["2"].manifest, weights_sha256="h")
        client.post("/v2/repository/models/backbone/load").raise_for_status()
        assert client.get("/v2/models/embedding").json()["versions"] == ["2"]
        runtimes["1"].gate.set()
        reply = asked.result()
        header = json.loads(reply.content[: int(reply.headers["inference-header-content-length"])])
        assert header["model_version"] == "1"
        client.close()


def test_no_accepted_request_fails_while_networks_change(
    running: Running, models: Path, files: dict[str, Path], embeddings: dict[str, np.ndarray]
) -> None:
    add_version(models, "2", files["2"])
    stop, failures, answers = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
            while not stop.is_set():
                try:
                    answers.append(embed(http))
                except BaseException as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        for number in range(6):
            wanted = {"parameters": {"version": "21"[number % 2]}}
            http.post("/v2/repository/models/backbone/load", json=wanted).raise_for_status()
            time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    apart = [min(float(np.abs(one - wanted).max()) for wanted in embeddings.values()) for one in answers]
    assert len(answers) > 20
    assert max(apart) < 1e-4


def damaged(file: Path, out: Path) -> None:
    """The same file with one weight matrix changed: its manifest still names the old weights."""
    model: Any = onnx.load(str(file))
    weight = max((one for one in model.graph.initializer if len(one.dims) == 2), key=lambda one: np.prod(one.dims))
    weight.CopyFrom(numpy_helper.from_array(np.float32(3) * numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(model, str(out))


def test_what_cannot_be_served_leaves_the_old_network_serving(
    running: Running, models: Path, files: dict[str, Path], embeddings: dict[str, np.ndarray]
) -> None:
    with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        add_version(models, "2", files["2"])
        broken = models / "backbone" / "2" / "model.onnx"
        broken.write_bytes(broken.read_bytes()[:1000])
        assert http.post("/v2/repository/models/backbone/load").status_code == 400
        damaged(files["1"], broken)
        refused = http.post("/v2/repository/models/backbone/load")
        assert refused.status_code == 400
        assert "agree only to a cosine" in refused.json()["error"]
        missing = http.post("/v2/repository/models/backbone/load", json={"parameters": {"version": "9"}})
        assert missing.status_code == 404
        assert "there are 1, 2" in missing.json()["error"]
        config = http.post("/v2/repository/models/backbone/load", json={"parameters": {"config": "{}"}})
        assert config.status_code == 400
        assert http.post("/v2/repository/models/nothing/load").status_code == 404
        np.testing.assert_allclose(embed(http), embeddings["1"], atol=1e-5)


def test_a_model_that_is_not_there_is_not_said_to_be_loaded(
    running: Running, models: Path, files: dict[str, Path]
) -> None:
    """Clients load a model and then count on it; the network, which all models share, stays as it is."""
    add_version(models, "2", files["2"])
    with triton.InferenceServerClient(running.addresses.grpc) as client:
        with pytest.raises(
            InferenceServerException, match="no segmentation head is loaded; add what is missing"
        ) as told:
            client.load_model("segmentation")
        assert told.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert client.get_model_metadata("embedding").versions == ["1"]
        client.load_model("depth")
        assert client.is_model_ready("depth", "2")


def test_an_unloaded_model_answers_nothing_until_it_is_loaded(running: Running) -> None:
    with (
        httpx.Client(base_url=running.addresses.http, timeout=60) as http,
        triton.InferenceServerClient(running.addresses.grpc) as client,
    ):
        client.unload_model("attention")
        client.unload_model("knn")
        assert not client.is_model_ready("attention")
        refused = http.post("/v1/attention", files={"file": ("a.png", png(0), "image/png")})
        assert refused.status_code == 404
        assert "unloaded" in refused.json()["error"]
        states = {one.name: one.state for one in client.get_model_repository_index().models}
        assert (states["attention"], states["embedding"]) == ("UNAVAILABLE", "READY")
        embed(http)
        client.load_model("attention")
        assert client.is_model_ready("attention")
        assert not client.is_model_ready("knn")  # which was unloaded by its own name
        client.load_model("knn")
        assert client.is_model_ready("knn")
        with pytest.raises(InferenceServerException):
            client.unload_model("nothing")


def test_a_version_can_be_asked_for_at_the_start(
    models: Path, files: dict[str, Path], embeddings: dict[str, np.ndarray], tmp_path: Path
) -> None:
    add_version(models, "5", files["2"])
    with (
        Running(config_of(models, tmp_path / "state", version="1")) as server,
        httpx.Client(base_url=server.addresses.http, timeout=60) as http,
    ):
        np.testing.assert_allclose(embed(http), embeddings["1"], atol=1e-5)
