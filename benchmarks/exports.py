"""How good exported files are: speed beside the engine's own matrix product, what each part costs, and what an export needs.

    .venv/bin/python -m benchmarks.exports

Everything that is compared takes turns in one process on one thread, in calls of like length, and what counts is CPU time. Ratios are taken
within each round, which a busy machine disturbs as one, and their medians are printed. Weights are random: speed does not depend on them.
`--data` adds what int8 costs the bundled backbone on real images, `--large` what it takes to export networks of those sizes.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
import tyro
from onnx import helper, numpy_helper

from backbones.checkpoints import Manifest, load_backbone, save_backbone
from backbones.network import Heads
from backbones.vit import ViT, ViTSpec
from data.errors import run_cli
from exports.drift import Tolerance
from exports.graph import OPSET
from exports.onnx_file import OnnxSpec, make_model
from exports.to_huggingface import export_huggingface
from exports.to_onnx import export_onnx
from runtimes.onnx_graph import cut_graph, fuse_attention
from runtimes.onnx_runtime import session_options

SPECS = {
    "ViT-S/16": ViTSpec(patch_px=16, width=384, depth=12, heads=6),
    "ViT-S/14": ViTSpec(patch_px=14, width=384, depth=12, heads=6, img_px=224, layer_scale=1.0, mask_token=True),
}
LARGE = {
    "ViT-L/14": ViTSpec(patch_px=14, width=1024, depth=24, heads=16, img_px=518, layer_scale=1.0, mask_token=True),
    "ViT-g/14": ViTSpec(
        patch_px=14, width=1536, depth=40, heads=24, img_px=518, ffn="swiglu", layer_scale=1.0, mask_token=True
    ),
}
SIDE_PX = 224
BUNDLED = Path("models/dinoscope_tiny.safetensors")


@dataclass(frozen=True)
class Case:
    """Something that runs, and the work that one call does, in GFLOP."""

    run: Callable[[], object]
    gflop: float


def multiply_adds(spec: ViTSpec) -> float:
    """GFLOP of one image of SIDE_PX: patch embedding, four linear layers and two products of attention a block."""
    n = (SIDE_PX // spec.patch_px) ** 2
    tokens, width = 1 + spec.registers + n, spec.width
    block = tokens * width * 12 * width + 2 * tokens * tokens * width
    return 2e-9 * (n * 3 * spec.patch_px**2 * width + spec.depth * block)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """On one thread."""
    return ort.InferenceSession(model.SerializeToString(), session_options(1), ["CPUExecutionProvider"])


def product_case() -> Case:
    """The engine's bare matrix product, as large as a linear layer of eight images, often enough to last as long as a network."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((384, 1536), dtype=np.float32), "weight")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [value("x", 1, ["M", 384])],
        [value("y", 1, ["M", 1536])],
        [weight],
    )
    made = session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))
    x = rng.standard_normal((1576, 384), dtype=np.float32)
    repeats = 6

    def run() -> None:
        for _ in range(repeats):
            made.run(None, {"x": x})

    return Case(run, repeats * 2e-9 * 1576 * 384 * 1536)


def network_case(model: onnx.ModelProto, gflop: float, batch: int) -> Case:
    """A network on noise."""
    made = session(model)
    (name,) = (given.name for given in made.get_inputs())
    pixels = np.random.default_rng(0).standard_normal((batch, 3, SIDE_PX, SIDE_PX), dtype=np.float32)
    return Case(lambda: made.run(None, {name: pixels}), gflop * batch)


def rates(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """GFLOP a second of CPU time of each in each of the interleaved rounds; the first round goes uncounted."""
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, case in cases.items():
            began = time.process_time()
            case.run()
            if i:
                seen[name].append(case.gflop / (time.process_time() - began))
    return seen


def ratio(found: dict[str, list[float]], case: str, other: str) -> float:
    """How much faster a case is than another, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(found[case], found[other], strict=True))


def save_random(spec: ViTSpec, path: Path) -> Path:
    """A checkpoint with the weights that training begins from."""
    torch.manual_seed(0)
    save_backbone(path, ViT(spec), Manifest(architecture={}, source="random"))
    return path


def plain_export(ckpt: Path, folder: Path) -> onnx.ModelProto | None:
    """What torch.onnx.export makes of the model in transformers with the same weights; None without transformers."""
    try:
        from transformers import AutoModel
    except ImportError:
        return None
    export_huggingface(ckpt, folder)
    model = AutoModel.from_pretrained(folder).eval()
    pixels = torch.zeros(2, 3, SIDE_PX, SIDE_PX)
    program = torch.onnx.export(
        model, (pixels,), dynamo=True, input_names=["pixel_values"], dynamic_shapes=({0: "N"},), verbose=False
    )
    assert program is not None
    return program.model_proto


def cost_of_export(ckpt: Path, out: Path) -> tuple[float, float]:
    """Seconds of CPU, and the largest memory in GB, of the command."""
    code = (
        "import sys, resource; from exports.to_onnx import export_onnx; export_onnx(sys.argv[1], sys.argv[2]);"
        "used = resource.getrusage(resource.RUSAGE_SELF); "
        # the kernel's other figure counts the memory of whoever started this process
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(used.ru_utime + used.ru_stime, peak)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(ckpt), str(out)], check=True, capture_output=True, text=True
    )
    seconds, kilobytes = map(float, ended.stdout.split()[-2:])
    return seconds, kilobytes * 1024 / 1e9


def compare_network(name: str, spec: ViTSpec, folder: Path, rounds: int) -> None:
    """Print the lines of one network."""
    ckpt = save_random(spec, folder / "x.safetensors")
    seconds, gigabytes = cost_of_export(ckpt, folder / "x.onnx")
    print(f"{name}: export {seconds:.1f} s of CPU, {gigabytes:.2f} GB at most")
    gflop = multiply_adds(spec)
    whole = onnx.load(folder / "x.onnx")
    fused, bare = onnx.load(folder / "x.onnx"), cut_graph(whole, ["pixels"], ["embedding", "patches"])
    fuse_attention(fused)
    int8 = make_model(load_backbone(ckpt), Heads(), OnnxSpec(precision="int8"))
    plain = plain_export(ckpt, folder / "hf")
    cases = {"product": product_case()}
    cases |= {f"file, batch {batch}": network_case(whole, gflop, batch) for batch in (4, 2, 1)}
    cases |= {"no attention": network_case(bare, gflop, 1), "runtime, batch 1": network_case(fused, gflop, 1)}
    cases |= {"plain": network_case(plain, gflop, 1)} if plain else {}
    cases |= {"int8": network_case(int8, gflop, 1)}
    found = rates(cases, rounds)
    beside = {case: ratio(found, case, "product") for case in cases}
    for case, rate in found.items():
        print(f"  {case:<18}{statistics.median(rate):7.1f} GFLOP a CPU-second{beside[case]:7.2f} of the bare product")
    best = max(rate for case, rate in beside.items() if case.startswith(("file", "runtime")))
    print(f"  best batch beside the bare product      {best:.2f}  (wanted 0.90)")
    if plain:
        print(f"  beside plain torch.onnx.export, batch 1 {ratio(found, 'file, batch 1', 'plain'):.2f}  (wanted 1.00)")
    attention = ratio(found, "no attention", "file, batch 1")
    print(f"  time with the attention output          {attention:.3f}  (wanted 1.02)")
    print(
        f"  int8 beside fp32, batch 1               {ratio(found, 'int8', 'file, batch 1'):.2f}  (wanted 1.30)",
        flush=True,
    )


Small = Literal["ViT-S/16", "ViT-S/14"]
Large = Literal["ViT-L/14", "ViT-g/14"]


def main(
    rounds: int = 15,
    networks: tuple[Small, ...] = ("ViT-S/16", "ViT-S/14"),
    data: tuple[str, ...] = (),
    large: tuple[Large, ...] = (),
) -> None:
    """Measure exported files.

    Args:
        rounds: Interleaved calls of each case.
        networks: Those that are timed.
        data: Labelled images on which the bundled backbone in int8 is held against itself.
        large: Export these as well, and tell the time and the memory (minutes; the giant needs 10 GB of both memory and disk).
    """
    for name in networks:
        with tempfile.TemporaryDirectory() as folder:
            compare_network(name, SPECS[name], Path(folder), rounds)
    for images in data:
        with tempfile.TemporaryDirectory() as scratch:
            any_drift = Tolerance(min_cosine=0.0, max_knn_loss=1.0)
            out, spec8 = Path(scratch) / "int8.onnx", OnnxSpec(precision="int8")
            drift = export_onnx(BUNDLED, out, spec=spec8, data=images, tolerance=any_drift).drift
            assert drift is not None
            print(f"int8 of {BUNDLED.name} on {images}:", *drift.lines(), sep="\n  ", flush=True)
    for giant in large:
        with tempfile.TemporaryDirectory() as folder:
            ckpt = save_random(LARGE[giant], Path(folder) / "x.safetensors")
            seconds, gigabytes = cost_of_export(ckpt, Path(folder) / "x.onnx")
            files = {file.name: file.stat().st_size / 1e9 for file in Path(folder).glob("x.onnx*")}
            sizes = ", ".join(f"{file} {size:.2f} GB" for file, size in sorted(files.items()))
            print(f"{giant}: export {seconds:.0f} s of CPU, {gigabytes:.1f} GB at most; {sizes}", flush=True)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.exports", description=__doc__))
