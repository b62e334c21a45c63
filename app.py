"""The demo page: what a backbone attends to, what it finds alike, how far it sees. `python app.py [--server grpc://host:port]`

Everything on the page comes from a server over the wire. Without --server the bundled backbone is exported once into a cache and served
from within this process. Read in this order: Served (the wire), the drawings, the page, main.
"""

import contextlib
import hashlib
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import gradio as gr
import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tyro
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException

from backbones.checkpoints import Manifest, load_backbone, load_tensors, weights_sha256
from data.datasets import open_dataset
from data.decode import decode_image
from data.errors import InputError, run_cli
from exports.to_onnx import export_onnx
from runtimes.connection import split_address
from runtimes.open import open_runtime
from runtimes.remote import config_parameters
from runtimes.runtime import step_px
from server.config import ServerConfig
from server.run import Running

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "models" / "dinoscope_tiny.safetensors"
DEPTH_HEAD = ROOT / "models" / "depth.safetensors"
SAMPLES = ROOT / "samples" / "samples.csv"
CSS = ".fixed-height { min-height: 0 !important; max-height: none !important }"
"""Galleries as tall as what they hold."""
FILE_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
NEIGHBOURS = 8
PICTURE_PX = 480
"""Long side of a picture on the page."""
DIM = 0.25
"""Brightness of the patches that hold the rest of the attention."""
TIMEOUT_S = 60.0


class Served:
    """A server's models as this page asks for them; a client is made for each call, so that a restarted server is found again."""

    def __init__(self, address: str, pictures: str | None = None) -> None:
        scheme, self.where = split_address(address)
        if scheme not in ("grpc", "http"):
            raise InputError(f"--server {address}: the page talks to grpc:// and http:// only")
        self.address = address
        self.pictures = pictures or (address.rstrip("/") if scheme == "http" else None)
        """Where REST gives the thumbnails of collections; None if only gRPC is known."""
        self._wire: Any = grpc_client if scheme == "grpc" else http_client

    def models(self) -> set[str]:
        """Names of the models of this page that the server has. Raises gr.Error."""
        with self._client() as client:
            return {name for name in ("attention", "knn", "depth") if client.is_model_ready(name)}

    def manifest(self) -> Manifest:
        """The backbone's, with the preprocessing. Raises InputError."""
        with open_runtime(self.address) as runtime:
            return runtime.manifest

    def unit(self) -> str:
        """The unit of `depth`."""
        with self._client() as client:
            return config_parameters(client.get_model_config("depth")).get("unit", "")

    def ask(self, model: str, image: bytes, parameters: dict[str, Any]) -> Callable[[str], np.ndarray]:
        """Run a model on one image; the answer gives each output's first row. Raises gr.Error with the server's own words."""
        tensor = self._wire.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([image], dtype=object))
        with self._client() as client:
            answer = client.infer(model, [tensor], parameters=parameters)
        return lambda name: answer.as_numpy(name)[0]

    def thumbnail(self, item: str) -> np.ndarray | None:
        """An item of the collection of samples as a picture; from the server, or from this repository's own samples."""
        if self.pictures is None:
            return _bundled(item)
        url = f"{self.pictures}/v1/collections/samples/items/{quote(item, safe='')}/thumbnail"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
                return decode_image(reply.read())
        except (OSError, InputError):
            return _bundled(item)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        timeouts = {} if self._wire is grpc_client else {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S}
        with contextlib.ExitStack() as stack:
            try:
                client = self._wire.InferenceServerClient(self.where, **timeouts)
                stack.callback(client.close)
                yield client
            except (InferenceServerException, OSError, HTTPParseError, ValueError) as error:
                raise gr.Error(_words(error, self.address), print_exception=False) from error


def _words(error: Exception, address: str) -> str:
    """What a visitor is told: the server's reason, or that it cannot be reached."""
    if isinstance(error, HTTPParseError):
        return f"The server at {address} does not answer in HTTP. Is this its gRPC port?"
    if isinstance(error, ValueError):
        return f"The address {address} cannot be used ({error})."
    message = error.message() if isinstance(error, InferenceServerException) else str(error)
    if isinstance(error, OSError) or "UNAVAILABLE" in str(error):
        return f"The server at {address} does not answer. Start it, then try again."
    return re.sub(r"^image\[0\]: ", "", str(message))


def _bundled(item: str) -> np.ndarray | None:
    """The sample image behind an item's id (its file name without the ending, ':' for '/')."""
    for suffix in FILE_KINDS:
        path = SAMPLES.parent / f"{item.replace(':', '/')}{suffix}"
        if path.is_file() and path.resolve().is_relative_to(SAMPLES.parent):
            return decode_image(path.read_bytes())
    return None


def fitted(image_HWC: np.ndarray) -> np.ndarray:
    """An image shrunk or enlarged to PICTURE_PX on its long side."""
    height, width = image_HWC.shape[:2]
    scale = PICTURE_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def heat(picture_HWC: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """A map laid over a picture, from its smallest value (dark) to its largest (bright)."""
    height, width = picture_HWC.shape[:2]
    span = float(map_hw.max() - map_hw.min())
    scaled = ((map_hw - map_hw.min()) / max(span, 1e-12)).astype(np.float32)
    smooth = np.clip(cv2.resize(scaled, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = cv2.cvtColor(cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(picture_HWC, 0.4, colours, 0.6, 0)


def cut_out(picture_HWC: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """A picture with all patches dimmed but those of a mask."""
    inside = cv2.resize(mask_hw, picture_HWC.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    return np.where(inside[:, :, None], picture_HWC, (picture_HWC * DIM).astype(np.uint8))


def depth_colours(depth_HW: np.ndarray, like_HWC: np.ndarray) -> np.ndarray:
    """A depth map in the proportions of an image, near bright and far dark, beside the scale of colours."""
    height, width = like_HWC.shape[:2]
    low, high = float(depth_HW.min()), float(depth_HW.max())
    near = 1 - (cv2.resize(depth_HW, (width, height), interpolation=cv2.INTER_LINEAR) - low) / max(high - low, 1e-12)
    bar = np.repeat(np.linspace(1, 0, height, dtype=np.float32)[:, None], max(8, width // 25), axis=1)
    gap = np.ones((height, 6), np.float32)
    levels = (np.concatenate([near.astype(np.float32), gap, bar], axis=1) * 255).clip(0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    picture[:, width : width + 6] = 255
    return picture


def read_upload(path: str | None) -> tuple[bytes, np.ndarray]:
    """The bytes of the chosen file as they came, and a picture of them for the page. Raises gr.Error."""
    if path is None:
        raise gr.Error("Choose a sample or upload an image first.", print_exception=False)
    data = Path(path).read_bytes()
    try:
        return data, fitted(decode_image(data))
    except InputError as error:
        raise gr.Error(f"This file cannot be used: {error}", print_exception=False) from error


@dataclass(frozen=True)
class Page:
    """What the page's events do."""

    served: Served

    def attention(self, path: str | None, mass: float, size: float) -> tuple[list[tuple[np.ndarray, str]], ...]:
        """For each head, and for their mean: the map over the image, and the patches that hold `mass` of it."""
        data, picture = read_upload(path)
        answer = self.served.ask("attention", data, {"mass": float(mass), "size": int(size)})
        maps_nhw, masks_nhw = answer("attention"), answer("mask")
        names = [f"head {i + 1}" for i in range(len(maps_nhw))]
        heats = [(heat(picture, one), name) for one, name in zip(maps_nhw, names, strict=True)]
        cuts = [(cut_out(picture, one), name) for one, name in zip(masks_nhw, names, strict=True)]
        return [(picture, "image"), (heat(picture, maps_nhw.mean(axis=0)), "mean of all heads"), *heats], cuts

    def neighbours(self, path: str | None) -> tuple[list[tuple[np.ndarray, str]], str]:
        """The sample images that are nearest, with labels and cosines."""
        data, _ = read_upload(path)
        answer = self.served.ask("knn", data, {"collection": "samples", "k": NEIGHBOURS})
        found, missing = [], 0
        for item, label, score in zip(answer("ids"), answer("labels"), answer("scores"), strict=True):
            picture = self.served.thumbnail(item.decode())
            missing += picture is None
            tile = np.full((128, 128, 3), 230, np.uint8) if picture is None else picture
            found.append((tile, f"{label.decode() or item.decode()} {score:.2f}"))
        return (
            found,
            f"{missing} of these have no picture here: the server is known by its gRPC port only." if missing else "",
        )

    def depth(self, path: str | None) -> tuple[np.ndarray, str]:
        """The depth map, and its range in words."""
        data, picture = read_upload(path)
        depth_HW = self.served.ask("depth", data, {})("depth")
        unit = self.served.unit()
        return (
            depth_colours(depth_HW, picture),
            f"From {depth_HW.min():.1f} {unit} (bright) to {depth_HW.max():.1f} {unit} (dark). "
            "A linear probe on frozen features, learned from rendered rooms: expect little of it outdoors.",
        )


def sample_images() -> list[tuple[str, str]]:
    """Path and label of every sample image."""
    if not SAMPLES.is_file():
        return []
    dataset = open_dataset(str(SAMPLES))
    return [(str(SAMPLES.parent / item.name), item.label or "") for item in dataset.items]


def uploaded_path(payload: Any) -> str | None:
    """Path of an upload, or None where there is none."""
    return None if payload is None else payload.path


def make_page(served: Served) -> gr.Blocks:
    """The page for a server that is up."""
    page, models = Page(served), served.models()
    manifest = served.manifest()
    step, whole = step_px(manifest), manifest.preprocess.whole_px
    sizes = sorted({max(1, round(whole * factor / step)) * step for factor in (1, 1.5, 2)})
    samples = sample_images()
    with gr.Blocks(title="Dinoscope") as blocks:
        gr.Markdown(
            "# Dinoscope\nWhat a self-supervised backbone sees. It was trained on images alone, without labels: "
            "upload one of yours, or click a sample."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="image",
                )
                # The file goes on as it came: the server's decoder judges it, not Gradio's, whose refusals are long and its own.
                image.preprocess = uploaded_path  # type: ignore[method-assign]
                gallery = gr.Gallery(
                    [path for path, _ in samples],
                    label="Samples",
                    columns=3,
                    height=420,
                    object_fit="cover",
                    allow_preview=False,
                    elem_id="samples",
                )
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                if "attention" in models:
                    attention_tab(page, image, sizes)
                if "knn" in models:
                    neighbours_tab(page, image)
                if "depth" in models:
                    depth_tab(page, image)
        gr.Markdown(
            "Images are sent to the server, answered, and not kept. Origins of the samples: `samples/ATTRIBUTION.md`."
        )

        def choose(event: gr.SelectData) -> str:
            return samples[event.index][0]

        gallery.select(choose, None, image, show_progress="hidden")
    return blocks


def attention_tab(page: Page, image: gr.Image, sizes: list[int]) -> None:
    """Maps of all heads, and the patches above the threshold."""
    with gr.Tab("Attention"):
        with gr.Row():
            mass = gr.Slider(
                0.1, 0.95, 0.6, step=0.05, label="Threshold: share of the attention that is shown below", elem_id="mass"
            )
            size = gr.Radio(sizes, value=sizes[0], label="Resolution (pixels)", elem_id="size")
        maps = gr.Gallery(
            label="Attention of the last block, from the CLS token", columns=3, object_fit="contain", elem_id="maps"
        )
        cuts = gr.Gallery(label="The patches that hold that share", columns=3, object_fit="contain", elem_id="masks")
        gr.on(
            [image.change, mass.release, size.change], skip_empty(page.attention, 2), [image, mass, size], [maps, cuts]
        )


def neighbours_tab(page: Page, image: gr.Image) -> None:
    """The nearest samples."""
    with gr.Tab("Nearest neighbours"):
        found = gr.Gallery(
            label="Most alike among the samples, by cosine", columns=4, object_fit="contain", elem_id="neighbours"
        )
        note = gr.Markdown()
        image.change(skip_empty(page.neighbours, 2), image, [found, note])


def depth_tab(page: Page, image: gr.Image) -> None:
    """The depth map."""
    with gr.Tab("Depth"):
        picture = gr.Image(label="Depth", interactive=False, elem_id="depth")
        words = gr.Markdown(elem_id="depth-words")
        image.change(skip_empty(page.depth, 2), image, [picture, words])


def skip_empty(work: Callable[..., Any], n_outputs: int) -> Callable[..., Any]:
    """The event's work, or empty outputs where the image was taken away."""

    def event(path: str | None, *rest: Any) -> Any:
        return (None,) * n_outputs if path is None else work(path, *rest)

    return event


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
def embedded_server(ports: tuple[int, int, int]) -> Iterator[Served]:
    """A server in this process; yields the wire to it."""
    state = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dinoscope" / "demo"
    config = ServerConfig(
        models=exported_models(),
        http_port=ports[0],
        grpc_port=ports[1],
        metrics_port=ports[2],
        collections=state,
        log_level="warning",
    )
    with Running(config) as running:
        at = running.addresses
        print(f"server: gRPC {at.grpc}, HTTP and its API page {at.http}/docs, metrics {at.metrics}", flush=True)
        yield Served(f"grpc://{at.grpc}", at.http)


def main(
    server: str | None = None,
    port: int = 7860,
    host: str = "127.0.0.1",
    server_ports: tuple[int, int, int] = (8000, 8001, 8002),
) -> None:
    """Show the demo page until Ctrl-C.

    Args:
        server: Take everything from this server (grpc://host:port or http://host:port) instead of starting one.
        port: Port of the page.
        host: Address of the page.
        server_ports: HTTP, gRPC and metrics port of the server that is started; 0 takes a free one.
    """
    with contextlib.ExitStack() as stack:
        served = Served(server) if server else stack.enter_context(embedded_server(server_ports))
        try:
            blocks = make_page(served)
        except gr.Error as error:
            raise InputError(f"--server {server}: {error.message}") from error
        blocks.queue(default_concurrency_limit=2, max_size=64)
        try:
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                css=CSS,
                max_file_size="32mb",
                allowed_paths=[str(SAMPLES.parent)],
            )
        except OSError as error:
            raise InputError(f"--port {port}: cannot listen on {host} ({error}); name another port") from error
        print(f"demo: {url}", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    run_cli(lambda: tyro.cli(main, prog="python app.py", description=__doc__))
