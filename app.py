"""The demo page: what a backbone attends to, what it finds alike, how far it sees. `python app.py [--server grpc://host:port]`

Everything on the page comes from a server over the wire, see `demo/`. Without --server the bundled backbone is exported once into a cache
and served from within this process.
"""

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import gradio as gr
import tyro

from backbones.checkpoints import load_backbone, load_tensors, weights_sha256
from data.errors import InputError, run_cli
from demo.client import Served
from demo.page import CSS, make_page
from demo.visits import MAX_UPLOAD_MB, private_folder
from exports.to_onnx import export_onnx
from runtimes.connection import REMOTE_SCHEMES
from server.config import ServerConfig
from server.run import Running

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "models" / "dinoscope_tiny.safetensors"
DEPTH_HEAD = ROOT / "models" / "depth.safetensors"
SAMPLES = ROOT / "samples" / "samples.csv"
MAX_WAITING = 64
"""Requests of all visitors that may wait."""


def exported_models() -> Path:
    """The bundled backbone with its depth head as one .onnx in the cache; exported where weights or code are new."""
    for path in (CHECKPOINT, DEPTH_HEAD):
        if not path.is_file():
            raise InputError(f"{path}: is missing; restore it from the repository, or name a server with --server")
    key = hashlib.sha256(load_backbone(CHECKPOINT).manifest.weights_sha256.encode())
    key.update(weights_sha256(load_tensors(DEPTH_HEAD)[0]).encode())
    for source in sorted([*(ROOT / "backbones").glob("*.py"), *(ROOT / "exports").glob("*.py")]):
        key.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope" / "exports"
    exported = cache / f"{CHECKPOINT.stem}-{key.hexdigest()[:16]}.onnx"
    if not exported.is_file():
        print(f"exporting {CHECKPOINT.name} to {exported} (once)", flush=True)
        export_onnx(CHECKPOINT, exported, DEPTH_HEAD)
    return exported


@contextlib.contextmanager
def embedded_server(models: Path, ports: tuple[int, int, int], evaluation_data: tuple[str, ...]) -> Iterator[Served]:
    """A server in this process, with collections that stay; yields the wire to it."""
    state = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dinoscope" / "demo"
    config = ServerConfig(
        models=models,
        http_port=ports[0],
        grpc_port=ports[1],
        metrics_port=ports[2],
        collections=state,
        evaluation_data=evaluation_data,
        log_level="warning",
    )
    with Running(config) as running:
        at = running.addresses
        print(f"server: gRPC {at.grpc}, HTTP and its API page {at.http}/docs, metrics {at.metrics}", flush=True)
        yield Served(f"grpc://{at.grpc}", at.http, "bundled")


@contextlib.contextmanager
def second_server(named: str, uploads: Path) -> Iterator[Served]:
    """What to show beside: the server of an address, or a server in this process for an artifact."""
    if named.startswith(REMOTE_SCHEMES):
        yield Served(named, name=named)
        return
    path = Path(named)
    if not path.exists():
        raise InputError(
            f"--beside {named}: wanted grpc://host:port or http://host:port (with TLS grpcs:// or https://), or a file or folder to serve"
        )
    state = uploads / "beside"
    config = ServerConfig(
        models=path, http_port=0, grpc_port=0, metrics_port=0, collections=state, samples="none", log_level="warning"
    )
    with Running(config) as running:
        yield Served(f"grpc://{running.addresses.grpc}", running.addresses.http, path.stem)


def main(
    server: str | None = None,
    port: int = 7860,
    host: str = "127.0.0.1",
    server_ports: tuple[int, int, int] = (8000, 8001, 8002),
    beside: str | None = None,
    runs: Path = ROOT / "runs",
    evaluation_data: tuple[str, ...] = (),
) -> None:
    """Show the demo page until Ctrl-C.

    Args:
        server: Take everything from this server instead of starting one: grpc://host:port or http://host:port, with TLS grpcs:// or
            https://. Its token comes from the environment, as do files of TLS: DINOSCOPE_TOKEN, DINOSCOPE_CA, DINOSCOPE_CLIENT_CERT,
            DINOSCOPE_CLIENT_KEY.
        port: Port of the page.
        host: Address of the page.
        server_ports: HTTP, gRPC and metrics port of the server that is started; 0 takes a free one.
        beside: Compare attention with this: the address of a second server, or a checkpoint or exported file to serve.
        runs: The page may watch the run folders below this one.
        evaluation_data: Data that the page may evaluate the started server on, each as NAME=PATH, beside the samples.
    """
    signal.signal(signal.SIGTERM, _leave)
    with contextlib.ExitStack() as stack:
        uploads = stack.enter_context(private_folder())
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        served = Served(server, name="first") if server else _own_server(stack, server_ports, evaluation_data)
        second = stack.enter_context(second_server(beside, uploads)) if beside else None
        try:
            blocks = make_page(served, second, SAMPLES, runs, bundled=server is None)
        except gr.Error as error:
            raise InputError(f"--server {served.address}: {error.message}") from error
        blocks.queue(default_concurrency_limit=2, max_size=MAX_WAITING)
        try:
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=True,
                _frontend=False,  # no asking itself over HTTP for 3 s, which a busy machine or a proxy fails
                css=CSS,
                max_file_size=f"{MAX_UPLOAD_MB}mb",
                allowed_paths=[str(SAMPLES.parent)],
            )
        except OSError as error:
            raise InputError(f"--port {port}: cannot listen on {host} ({error}); name another port") from error
        print(f"demo: {url}", flush=True)
        blocks.block_thread()


def _leave(*_: object) -> NoReturn:
    raise KeyboardInterrupt  # everything on the stack, uploads too, is put away


def _own_server(stack: contextlib.ExitStack, ports: tuple[int, int, int], evaluation_data: tuple[str, ...]) -> Served:
    """The bundled backbone, which may be evaluated on the samples."""
    data = (f"samples={SAMPLES}", *evaluation_data)
    return stack.enter_context(embedded_server(exported_models(), ports, data))


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    run_cli(lambda: tyro.cli(main, prog="python app.py", description=__doc__))
