"""What serving costs beside the bare runtime and a real Triton: same file, same cores, one run.

    .venv/bin/python -m benchmarks.serving                     every chapter
    .venv/bin/python -m benchmarks.serving --part tensors      one of tensors, two-blocks, jpeg, identity, overload, departures
    .venv/bin/python -m benchmarks.serving --part peers        identity with other servers beside it; only where they are installed

Servers, clients and the bare runtime are processes of their own on the same cores, so what the clients use is missing to the servers: their
CPU time is printed, and CPU milliseconds of the server an image (from /proc, children included) are the figure to compare; images a
second stand beside them. Cases take turns and medians over the rounds are printed, so that a noisy machine disturbs all alike.
Read in this order: Row, closed_loop, the chapters, main.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from tritonclient.grpc import service_pb2 as pb

from backbones.checkpoints import Manifest, save_backbone
from backbones.vit import ViT, ViTSpec
from benchmarks.serving_overload import departures, overload
from benchmarks.serving_peers import PEERS, Peer, peer
from benchmarks.serving_targets import SIDE_PX, Bare, Target, cpu_s, ours, send, triton
from data.decode import decode_image
from data.errors import run_cli
from data.preprocess import Preprocess, center_view
from exports.to_onnx import export_onnx
from server.cores import usable_cores
from tests.exports.real_triton import VENV

IMAGE_HW = (375, 500)
"""Height and width of the JPEG files, px."""
WARM = 300
"""Requests before a round without compute, in which the first hundreds would count for much."""
Part = Literal["tensors", "two-blocks", "jpeg", "identity", "overload", "departures", "peers"]


@dataclass(frozen=True)
class Row:
    """One round of a case."""

    per_s: float
    cpu_ms: float
    """CPU time of the server, or of the bare runtime, an image."""
    client_cpu_ms: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0


def network(folder: Path, depth: int) -> Path:
    """A ViT-S/16 of so many blocks with random weights, exported. Its speed is that of any other."""
    out = folder / f"vit{depth}.onnx"
    if not out.exists():
        torch.manual_seed(0)
        model = ViT(ViTSpec(patch_px=16, width=384, depth=depth, heads=6, img_px=SIDE_PX))
        preprocess = Preprocess(size_px=SIDE_PX, resize_px=256, whole_px=SIDE_PX)
        ckpt = folder / f"vit{depth}.safetensors"
        save_backbone(ckpt, model, Manifest(architecture={}, preprocess=preprocess, source="random"))
        export_onnx(ckpt, out)
    return out


def tensor() -> bytes:
    """One normalised image [3,224,224] as 602 KB of float32."""
    return np.random.default_rng(0).standard_normal((3, SIDE_PX, SIDE_PX), dtype=np.float32).tobytes()


def tensor_request(folder: Path) -> Path:
    """The tensor, for `backbone`."""
    request = pb.ModelInferRequest(model_name="backbone")
    request.inputs.add(name="pixels", datatype="FP32", shape=[1, 3, SIDE_PX, SIDE_PX])
    request.outputs.add(name="embedding")
    request.raw_input_contents.append(tensor())
    path = folder / "tensor.bin"
    path.write_bytes(request.SerializeToString())
    return path


def jpeg_file() -> bytes:
    """A JPEG of soft noise."""
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, IMAGE_HW[::-1], interpolation=cv2.INTER_CUBIC))[1].tobytes()


def jpeg_request(folder: Path) -> Path:
    """The JPEG file as BYTES, for `embedding`."""
    file = jpeg_file()
    request = pb.ModelInferRequest(model_name="embedding")
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(file).to_bytes(4, "little") + file)
    path = folder / "jpeg.bin"
    path.write_bytes(request.SerializeToString())
    return path


def closed_loop(target: Target, request: Path, images: int, concurrency: int = 16, warm: int = 0) -> Callable[[], Row]:
    """A round of requests, each of which waits for an earlier one's answer; `warm` more go before it, uncounted."""
    flags = ["--count", str(images), "--concurrency", str(concurrency)]
    if target.http is not None:
        flags += ["--http", target.http]

    def run() -> Row:
        if warm:
            send(target.address, request, *flags, "--count", str(warm))
        cpu = cpu_s(target.pid)
        report = send(target.address, request, *flags)
        if report["codes"] != {"OK": images}:
            raise RuntimeError(f"{target.name} answered {report['codes']}")
        ok_s = report["ok_s"]
        used_ms = (cpu_s(target.pid) - cpu) * 1e3
        tail = ok_s[min(len(ok_s) - 1, int(0.99 * len(ok_s)))]
        clients_ms = report["cpu_s"] * 1e3 / images
        return Row(images / report["wall_s"], used_ms / images, clients_ms, statistics.median(ok_s) * 1e3, tail * 1e3)

    return run


def bare_loop(bare: Bare, images: int) -> Callable[[], Row]:
    """A round of the bare runtime."""

    def run() -> Row:
        wall, cpu = bare.run(images)
        return Row(images / wall, cpu * 1e3 / images)

    return run


def take_turns(cases: dict[str, Callable[[], Row]], rounds: int) -> dict[str, Row]:
    """Median of each figure of each case; one round each goes uncounted before."""
    seen: dict[str, list[Row]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in reversed(cases.items()) if number % 2 else cases.items():
            row = run()
            if number:
                seen[name].append(row)
    return {
        name: Row(*(statistics.median(column) for column in zip(*(vars(row).values() for row in rows), strict=True)))
        for name, rows in seen.items()
    }


def show(title: str, found: dict[str, Row], base: str, wanted: str) -> None:
    """The table; ratios are to the row `base`."""
    print(
        f"\n{title}\n{'':<34}{'per s':>8}{'ratio':>7}{'CPU ms':>8}{'ratio':>7}{'client':>8}{'p50 ms':>8}{'p99 ms':>8}"
    )
    for name, row in found.items():
        ratios = row.per_s / found[base].per_s, row.cpu_ms / found[base].cpu_ms
        print(
            f"{name:<34}{row.per_s:>8.1f}{ratios[0]:>7.2f}{row.cpu_ms:>8.2f}{ratios[1]:>7.2f}{row.client_cpu_ms:>8.2f}"
            f"{row.p50_ms:>8.1f}{row.p99_ms:>8.1f}"
        )
    print(wanted)


def beside_bare(folder: Path, depth: int, images: int, rounds: int, wanted: str) -> None:
    """Tensors over gRPC, 16 at a time, beside every set-up of the bare runtime; ratios are to the one with the most images a second."""
    artifact, cores = network(folder, depth), usable_cores()
    setups = {(cores, 1, 1), (cores, 1, 4), (1, cores, 1), (1, cores, 8)}
    cases: dict[str, Callable[[], Row]] = {}
    for setup in sorted(setups, reverse=True):
        one = Bare.open(artifact, *setup)
        cases[one.name] = bare_loop(one, images)
    with ours(artifact, folder) as target:
        cases[target.name] = closed_loop(target, tensor_request(folder), images)
        found = take_turns(cases, rounds)
    best = max((name for name in found if name.startswith("bare")), key=lambda name: found[name].per_s)
    show(
        f"ViT-S/16, {depth} blocks: one image of 602 KB float32 a request, median of {rounds} rounds",
        found,
        best,
        wanted,
    )


def jpeg(folder: Path, rounds: int) -> None:
    """JPEG files over gRPC, beside decoding, preprocessing and the bare runtime in a loop on one thread."""
    artifact, file, images = network(folder, 12), jpeg_file(), 96
    bare = Bare.open(artifact, 1, 1, 1)
    preprocess = bare.runtimes[0].manifest.preprocess

    def loop() -> Row:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(images):
            bare.runtimes[0].run(center_view(decode_image(file), preprocess)[None])
        return Row(images / (time.perf_counter() - wall), (time.process_time() - cpu) * 1e3 / images)

    with ours(artifact, folder) as target:
        cases = {"bare loop, one thread": loop, target.name: closed_loop(target, jpeg_request(folder), images)}
        found = take_turns(cases, rounds)
    title = f"ViT-S/16: a JPEG file of 500x375 a request, median of {rounds} rounds"
    show(title, found, "bare loop, one thread", "wanted: CPU at most 1.10")


def identity(folder: Path, rounds: int, beside: Sequence[Peer] = (), count: int = 2000) -> None:
    """602 KB in, nothing computed: the server's own cost, beside a real Triton's and other servers'; beside Triton alone once more with
    models that read their rows as a network would.

    While the others have their turns, a machine may take pages and caches from a server that waits; every round begins warm. Rounds
    differ by a tenth, with the order in which a dozen threads get two cores: it takes more of them than elsewhere.
    """
    if not VENV.exists():
        print("\n602 KB without compute: no Triton here; `make test-triton` installs it")
        return
    request, body = tensor_request(folder), folder / "pixels.bin"
    body.write_bytes(tensor())
    said = f"602 KB in, 1.5 KB out, nothing computed, median of {rounds} rounds of {count}"
    wanted = "wanted: at least 0.90 of Triton's requests a second"
    for reads in (False,) if beside else (False, True):
        with ExitStack() as stack:
            room = folder / ("read" if reads else "unread")
            room.mkdir()
            targets = {stack.enter_context(ours(None, room, *(["--reads"] if reads else []))): request}
            targets[stack.enter_context(triton(None, room, usable_cores(), reads))] = request
            for one in beside:
                sent = request if one.http is None else body
                targets[stack.enter_context(peer(one, folder, sent))] = sent
            found = take_turns(
                {one.name: closed_loop(one, sent, count, warm=WARM) for one, sent in targets.items()}, rounds
            )
        how = "rows side by side and looked through" if reads else "rows left where they came"
        show(f"{said}; {how}", found, "Triton, Python backend", wanted)


def main(part: Part | None = None, rounds: int = 5) -> None:
    """Run one chapter, or all of them but the peers'.

    Args:
        part: The chapter.
        rounds: Counted rounds of each case.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chapters: dict[Part, Callable[[], None]] = {
            "tensors": lambda: beside_bare(
                folder, 12, 160, rounds, "wanted: CPU at most 1.10, images a second at least 0.95"
            ),
            "two-blocks": lambda: beside_bare(folder, 2, 800, rounds, "wanted: CPU at most 1.15"),
            "jpeg": lambda: jpeg(folder, rounds),
            "identity": lambda: identity(folder, 2 * rounds),
            "overload": lambda: overload(network(folder, 2), tensor_request(folder), folder),
            "departures": lambda: departures(network(folder, 2)),
            "peers": lambda: identity(folder, rounds, PEERS),
        }
        for chapter in [part] if part else [one for one in chapters if one != "peers"]:
            chapters[chapter]()


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
