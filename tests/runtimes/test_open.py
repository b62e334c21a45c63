"""What `--ckpt`, `--device` and `--threads` may name, and what is said of the rest."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import runtimes.onnx_build
import runtimes.onnx_runtime
import runtimes.remote
from backbones.checkpoints import MANIFEST_KEY
from data.errors import InputError
from runtimes.onnx_build import check_one_build
from runtimes.onnx_runtime import OnnxRuntime, pick_providers
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from runtimes.torch_runtime import TorchRuntime, pick_device
from server.artifacts import load_artifacts
from server.config import ServerConfig
from tests.exports.artifacts import Artifact
from tests.runtimes.fake_servers import SERVERS, Served


def refusal(*args: Any, **options: Any) -> str:
    """The one line with which opening is refused."""
    with pytest.raises(InputError) as caught:
        open_runtime(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- checkpoints and files --------------------------------------------------------------------------------------------


def test_a_checkpoint_runs_on_torch_with_depth_where_a_head_is_named(checkpoint: tuple[Path, Path]) -> None:
    with open_runtime(checkpoint[0], device="cpu") as plain, open_runtime(str(checkpoint[0]), device="cpu") as again:
        assert isinstance(plain, TorchRuntime)
        assert plain.device == "cpu"
        assert plain.outputs == again.outputs == ("embedding", "patches", "attention")
    with open_runtime(checkpoint[0], device="cpu", depth_head=checkpoint[1]) as deep:
        assert deep.outputs == ("embedding", "patches", "attention", "depth")


@pytest.mark.parametrize("threads", [0, -2])
def test_fewer_threads_than_one_are_refused(checkpoint: tuple[Path, Path], threads: int) -> None:
    assert refusal(checkpoint[0], threads=threads) == f"--threads {threads}: wanted at least 1"


def test_threads_bound_torch(checkpoint: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    try:
        with open_runtime(checkpoint[0], device="cpu", threads=2) as made:
            made.run(np.zeros((1, 3, 8, 8), np.float32))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.onnx", "folder.onnx"):
        (tmp_path / "folder.onnx").mkdir(exist_ok=True)
        assert str(tmp_path / name) in refusal(tmp_path / name)
    assert "no such file" in refusal(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"hello, this is text\n", b"", b"\0" * 100], ids=["text", "empty", "zeros"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ONNX"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_an_onnx_file_cut_short_is_refused(exported: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(exported.onnx.read_bytes()[:50_000])
    assert "not a readable .onnx file" in refusal(path)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "an .onnx without our manifest; its preprocessing is unknown. Export it with python -m exports.to_onnx"),
        ("{", "its manifest is not JSON"),
        ("[]", "x.onnx: its manifest is no object"),
        ("[" * 100_000, "x.onnx: its manifest is not JSON"),
        ('{"kind": "backbone"}', "x.onnx: this is not a backbone's manifest"),
        ('{"architecture": {}}', "this is not a backbone's manifest"),
        ('{"architecture": {}, "preprocess": {}}', "preprocess lacks"),
    ],
    ids=["none", "no JSON", "list", "nested", "kind alone", "part", "empty"],
)
def test_an_onnx_file_without_a_usable_manifest_is_refused(tmp_path: Path, manifest: str | None, words: str) -> None:
    value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])
    out = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["pixels"], ["embedding"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    if manifest is not None:
        onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest})
    onnx.save(model, tmp_path / "x.onnx")
    assert words in refusal(tmp_path / "x.onnx")


def test_a_depth_head_belongs_to_a_checkpoint_and_to_its_own(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    head = checkpoint[1]
    assert "cannot be added to an exported file" in refusal("x.onnx", depth_head=head)
    assert "cannot be added to a server" in refusal("grpc://127.0.0.1:1", depth_head=head)
    assert "not a head" in refusal(checkpoint[0], depth_head=checkpoint[0])


def test_closing_twice_is_fine_and_a_closed_file_says_so(exported: Artifact) -> None:
    made = OnnxRuntime(exported.onnx, device="cpu")
    made.close()
    made.close()
    with pytest.raises(InputError, match="this runtime was closed"):
        made.run(np.zeros((1, 3, 8, 8), np.float32))


# --- devices and builds -----------------------------------------------------------------------------------------------


def test_an_unknown_device_is_refused(checkpoint: tuple[Path, Path], exported: Artifact) -> None:
    for ckpt in (checkpoint[0], exported.onnx):
        assert refusal(ckpt, device="gpu") == "--device 'gpu' is unknown; want auto, cpu or cuda"


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="torch sees no GPU here"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == "cuda"
    assert pick_device("cpu") == "cpu"


def test_a_gpu_that_this_onnxruntime_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = runtimes.onnx_runtime.ort
    monkeypatch.setattr(engine, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert pick_providers("auto") == pick_providers("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(InputError, match="this onnxruntime has no CUDA"):
        pick_providers("cuda")
    monkeypatch.setattr(engine, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert pick_providers("auto") == pick_providers("cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert pick_providers("cpu") == ["CPUExecutionProvider"]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_does_not_start_is_no_silent_cpu(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = runtimes.onnx_runtime.ort
    if "CUDAExecutionProvider" in engine.get_available_providers():
        pytest.skip("this build has CUDA")
    monkeypatch.setattr(engine, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert "could not start CUDA here" in refusal(exported.onnx, device="cuda")
    with OnnxRuntime(exported.onnx, device="auto") as made:
        assert made.device == "cpu"


def versions(name: str, installed: tuple[str, ...]) -> str:
    if name not in installed:
        raise PackageNotFoundError(name)
    return "1.2.3"


@pytest.mark.parametrize("names", [("onnxruntime", "onnxruntime-gpu")])
def test_both_builds_of_onnxruntime_at_once_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """Said before any file is looked at, whichever engine it is for."""
    monkeypatch.setattr(runtimes.onnx_build, "version", lambda name: versions(name, names))
    for path in (tmp_path / "none.onnx", tmp_path / "none.safetensors"):
        assert "onnxruntime and onnxruntime-gpu are both installed" in refusal(path)
    with pytest.raises(InputError, match="both installed"):
        load_artifacts(ServerConfig(models=tmp_path / "none"))


@pytest.mark.parametrize("names", [("onnxruntime",), ("onnxruntime-gpu", "onnx"), ()])
def test_one_build_of_onnxruntime_is_fine(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    monkeypatch.setattr(runtimes.onnx_build, "version", lambda name: versions(name, names))
    check_one_build()


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where somebody listens and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def chatty_port() -> Iterator[int]:
    """A port where somebody speaks another protocol."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"220 mail.example.org ESMTP\r\n")

        threading.Thread(target=greet, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_where_nobody_listens_there_is_no_server(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refusal(f"{scheme}://127.0.0.1:{port}").startswith(
        f"{scheme}://127.0.0.1:{port}: no server there that serves"
    )


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_never_answers_is_given_up(
    scheme: str, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtimes.remote.OPENING_TIMEOUT_S <= 10
    monkeypatch.setattr(runtimes.remote, "OPENING_TIMEOUT_S", 0.5)
    assert "no server there" in refusal(f"{scheme}://127.0.0.1:{silent_port}")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_of_something_else_is_refused(scheme: str, chatty_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.remote, "OPENING_TIMEOUT_S", 2.0)
    assert "no server there" in refusal(f"{scheme}://127.0.0.1:{chatty_port}")


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize(
    "where",
    [
        "",
        "/",
        "host",
        ":80",
        "host:1/path",
        "host:port",
        "host:99999",
        "host:0",
        "host:-1",
        "a..b:80",
        "[:80",
        "a b:80",
    ],
)
def test_an_address_is_a_host_and_a_port(scheme: str, where: str) -> None:
    address = f"{scheme}://{where}"
    assert refusal(address) == f"{address}: wanted grpc://host:port or http://host:port; with TLS grpcs:// or https://"


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("", "has no manifest in its parameters"),
        ("{", "is not JSON"),
        (json.dumps({"a": 1}), "not a backbone's manifest"),
    ],
    ids=["none", "no JSON", "other"],
)
def test_a_server_without_a_usable_manifest_is_refused(
    torch_runtime: Runtime, scheme: str, manifest: str, words: str
) -> None:
    served = Served(torch_runtime)
    served.manifest = manifest
    with SERVERS[scheme](served) as address:
        assert words in refusal(address)


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize(("limit", "batches"), [(0, [5]), (2, [2, 2, 1]), (5, [5])])
def test_a_batch_is_sent_in_parts_that_the_server_takes(
    torch_runtime: Runtime, scheme: str, limit: int, batches: list[int]
) -> None:
    served = Served(torch_runtime, max_batch_size=limit)
    with SERVERS[scheme](served) as address, open_runtime(address) as made:
        made.run(np.zeros((5, 3, 8, 8), np.float32))
    assert served.batches == batches


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_message_is_bounded_in_bytes_by_request_and_by_reply(
    torch_runtime: Runtime, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes.remote, "MAX_MESSAGE_BYTES", 2 * 4 * 3 * 24 * 24)
    served = Served(torch_runtime)
    with SERVERS[scheme](served) as address, open_runtime(address) as made:
        made.run(np.zeros((5, 3, 24, 24), np.float32))
    assert served.batches == [2, 2, 1]


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        (lambda served: setattr(served, "refusal", "the queue is full"), "gave no result (.*the queue is full"),
        (lambda served: setattr(served, "rows_lost", 1), "reply lacks rows of embedding"),
    ],
    ids=["full", "short"],
)
def test_a_reply_that_is_none_is_an_error(
    torch_runtime: Runtime, scheme: str, misbehave: Callable[[Served], None], words: str
) -> None:
    served = Served(torch_runtime)
    with SERVERS[scheme](served) as address, open_runtime(address) as made:
        misbehave(served)
        with pytest.raises(InputError, match=words.replace("(", r"\(")):
            made.run(np.zeros((2, 3, 8, 8), np.float32))


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_server_that_goes_away_is_an_error(torch_runtime: Runtime, scheme: str) -> None:
    with SERVERS[scheme](Served(torch_runtime)) as address:
        made = open_runtime(address)
    with made, pytest.raises(InputError, match="the server gave no result"):
        made.run(np.zeros((1, 3, 8, 8), np.float32))
