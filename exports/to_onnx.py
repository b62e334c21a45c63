"""A checkpoint to one .onnx file that stands for it everywhere: `python -m exports.to_onnx --ckpt X --out Y.onnx`.

The graph takes `pixels` float32 [N, 3, H, W] of any N and any H, W that are multiples of the patch, and has every output that the
backbone and its heads have; the manifest travels in the metadata. What was written is run and compared with torch before it gets its name.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import tyro

from backbones.checkpoints import MANIFEST_KEY, Backbone, load_backbone
from backbones.heads import AnyDepthHead, HeadManifest, load_depth_head
from backbones.network import Network
from data.errors import CheckFailed, InputError, run_cli
from runtimes.onnx_runtime import HEADS_KEY, OnnxRuntime
from runtimes.runtime import step_px
from runtimes.torch_runtime import TorchRuntime

OPSET = 20
MAX_WEIGHT_BYTES = 2**31 - 2**24
"""A protobuf message, which an .onnx file is, holds 2 GB; the graph takes a little of them."""
TOLERANCE = 2e-4
"""Largest difference from torch that is let through, relative to the largest value of the output."""
AXES = {
    "embedding": {0: "N"},
    "patches": {0: "N", 1: "patches"},
    "attention": {0: "N", 2: "h", 3: "w"},
    "depth": {0: "N", 1: "H", 2: "W"},
}


@dataclass(frozen=True)
class Parity:
    """The largest differences found, relative to the largest value of each output."""

    differences: dict[str, float]
    cases: tuple[tuple[int, int, int], ...]
    """Batches compared: images, height, width."""


def export_onnx(ckpt: str | Path, out: str | Path, depth_head: str | Path | None = None) -> Parity:
    """Export a checkpoint, and its depth head if one is named; the file appears whole and checked, or not at all.

    Raises InputError for what cannot be read, CheckFailed where ONNX Runtime and torch differ by more than `TOLERANCE`.
    """
    out = Path(out)
    if out.suffix != ".onnx" or out.is_dir():
        raise InputError(f"--out {out}: wanted the name of a file that ends in .onnx")
    backbone = load_backbone(ckpt)
    check_size(backbone)
    head: AnyDepthHead | None = None
    heads: dict[str, HeadManifest] = {}
    if depth_head is not None:
        head, heads["depth"] = load_depth_head(depth_head, backbone.manifest.weights_sha256)
    with scratch_beside(out) as scratch:
        write_graph(backbone, head, heads, scratch)
        parity = check_parity(backbone, head, scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, out)
    return parity


def check_size(backbone: Backbone) -> None:
    """Raise InputError where the weights do not fit into one file."""
    size = sum(weight.numel() * weight.element_size() for weight in backbone.model.state_dict().values())
    if size > MAX_WEIGHT_BYTES:
        raise InputError(
            f"this backbone has {size / 1e9:.1f} GB of weights, one .onnx file holds at most "
            f"{MAX_WEIGHT_BYTES / 1e9:.1f}; use the checkpoint itself, which runs on torch"
        )


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden file to write into, in the folder of `out`, gone afterwards. Raises InputError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}.", suffix=".onnx")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); choose another place") from error


def write_graph(backbone: Backbone, head: AnyDepthHead | None, heads: Mapping[str, HeadManifest], path: Path) -> None:
    """Trace with symbolic sizes and write the file with its manifests."""
    step = step_px(backbone.manifest)
    network = Network(backbone.model, head).eval()  # type: ignore[arg-type]
    example = torch.zeros(2, 3, 3 * step, 2 * step)
    h, w = torch.export.Dim("h", min=1, max=1024), torch.export.Dim("w", min=1, max=1024)
    shapes = {0: torch.export.Dim("N", min=1, max=65_536), 2: step * h, 3: step * w}
    names = list(network.output_names)
    with quiet():
        program = torch.onnx.export(
            Listed(network),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=names,
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    name_axes(model)
    strip_traces(model)
    metadata = {MANIFEST_KEY: json.dumps(backbone.manifest.to_json(), sort_keys=True)}
    if heads:
        metadata[HEADS_KEY] = json.dumps({kind: manifest.to_json() for kind, manifest in heads.items()}, sort_keys=True)
    onnx.helper.set_model_props(model, metadata)
    with open(path, "wb") as file:
        onnx.save(model, file)
        file.flush()
        os.fsync(file.fileno())


class Listed(torch.nn.Module):
    """The network with its outputs as a tuple, which an exported graph wants."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.network(pixels)
        return tuple(made[name] for name in self.network.output_names)


def name_axes(model: onnx.ModelProto) -> None:
    """Give the dynamic axes of inputs and outputs the names that people look for."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in {"pixels": {0: "N", 2: "H", 3: "W"}, **AXES}[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


def strip_traces(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with the paths of this machine, as large as the weights of a small network."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        noted.ClearField("metadata_props")


def parity_cases(backbone: Backbone) -> tuple[tuple[int, int, int], ...]:
    """Batches that cover what may differ: one and several images, the usual sizes, wide, tall, one patch."""
    step, preprocess = step_px(backbone.manifest), backbone.manifest.preprocess
    usual = max(step, preprocess.size_px // step * step)
    whole = max(step, preprocess.whole_px // step * step)
    return (
        (1, usual, usual),
        (3, usual, usual),
        (2, whole, whole),
        (1, usual, 2 * usual),
        (2, 3 * step, step),
        (1, step, step),
    )


def check_parity(backbone: Backbone, head: AnyDepthHead | None, path: Path) -> Parity:
    """Compare the file with torch on random pixels. Raises CheckFailed, naming output and size, where they differ."""
    generator = np.random.default_rng(0)
    differences: dict[str, float] = {}
    cases = parity_cases(backbone)
    with TorchRuntime(backbone, head, device="cpu") as wanted, OnnxRuntime(path, device="cpu") as found:
        if wanted.outputs != found.outputs:
            raise CheckFailed(f"the exported graph has outputs {found.outputs}, wanted {wanted.outputs}")
        for n, height, width in cases:
            pixels = generator.standard_normal((n, 3, height, width), dtype=np.float32)
            expected, got = wanted.run(pixels, wanted.outputs), found.run(pixels, wanted.outputs)
            for name in wanted.outputs:
                difference = relative_difference(got[name], expected[name])
                if not difference <= TOLERANCE:
                    raise CheckFailed(
                        f"exported {name} differs from torch by {difference:.2e} of its largest value "
                        f"on {n} images of {height}x{width} (allowed {TOLERANCE:.0e}); nothing was written"
                    )
                differences[name] = max(difference, differences.get(name, 0.0))
    return Parity(differences, cases)


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value; infinite where shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12))


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter narrates its passes; none of it helps whoever exports a backbone."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main(ckpt: str, out: Path, depth_head: Path | None = None) -> None:
    """Export a backbone to ONNX and check it against torch.

    Args:
        ckpt: A checkpoint, published weights, a Hugging Face folder or a catalog name.
        out: The .onnx file to write.
        depth_head: A depth head trained on this backbone; adds the output `depth`.
    """
    parity = export_onnx(ckpt, out, depth_head)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, largest difference from torch over {len(parity.cases)} batches:")
    for name, difference in parity.differences.items():
        print(f"  {name:<10} {difference:.1e} of its largest value")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.to_onnx", description=__doc__))
