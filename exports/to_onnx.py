"""A checkpoint to one .onnx file that stands for it everywhere: `python -m exports.to_onnx --ckpt X --out Y.onnx`.

The graph takes `pixels` float32 [N, 3, H, W] of any N and any H, W that are multiples of the patch, and has every output that the
backbone and its heads have; the manifest travels in the metadata. What was written is run and compared with torch before it gets its
name; a file of lower precision is also run on real images, carries its measured drift, and is refused where that is too much.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from onnx import helper

from backbones.checkpoints import Backbone, load_backbone
from backbones.network import Heads, load_heads, make_network
from data.errors import CheckFailed, InputError, run_cli
from exports.calibration import calibrate
from exports.drift import USUAL_TOLERANCE, Drift, Tolerance, check_drift, measure_drift, open_parts
from exports.graph import Precision
from exports.onnx_file import PLAIN, OnnxSpec, check_spec, fixed_preprocess, make_model, too_large
from exports.placing import check_free, new_folder, write_file
from exports.weight_writer import WeightWriter
from runtimes.onnx_runtime import EXPORT_KEY, OnnxRuntime, load_model, read_export
from runtimes.runtime import step_px
from runtimes.torch_runtime import TorchRuntime
from runtimes.weight_file import weight_file_of

TOLERANCE = 2e-4
"""Largest difference from torch that is let through in float32, relative to the largest value of the output."""
CLASS_TOLERANCE = 2e-3
"""Largest share of pixels whose class differs; two logits that are nearly equal may change places."""


@dataclass(frozen=True)
class Parity:
    """The largest differences found, relative to the largest value of each output."""

    differences: dict[str, float]
    cases: tuple[tuple[int, int, int], ...]
    """Batches compared: images, height, width."""


@dataclass(frozen=True)
class Exported:
    """What was found out about a file before it got its name."""

    parity: Parity
    drift: Drift | None = None


def export_onnx(
    ckpt: str | Path,
    out: str | Path,
    depth_head: str | Path | None = None,
    *,
    linear_head: str | Path | None = None,
    segmentation_head: str | Path | None = None,
    spec: OnnxSpec = PLAIN,
    data: str | None = None,
    tolerance: Tolerance = USUAL_TOLERANCE,
) -> Exported:
    """Export a checkpoint and the heads that are named; the file appears whole and checked, or not at all.

    Raises InputError for what cannot be read, does not fit or is in the way, CheckFailed where ONNX Runtime and torch differ by more
    than `TOLERANCE`, or a lower precision drifts by more than `tolerance`.
    """
    out = Path(out)
    check_out(out)
    if spec.precision != "fp32" and data is None:
        raise InputError(f"--precision {spec.precision}: name real images with --data, on which its drift is measured")
    backbone = load_backbone(ckpt)
    check_spec(backbone, spec)
    heads = load_heads(backbone, linear_head, depth_head, segmentation_head)
    ranges = None
    if spec.precision == "int8-static":
        ranges = calibrate(backbone, open_parts(str(data))[0].train, spec.fixed_px)
    large = too_large(backbone, heads, spec)
    if large:
        check_free(weight_file_of(out))
    with new_folder(out) as scratch:
        file = scratch / out.name
        write_file(
            make_model(backbone, heads, spec, ranges, WeightWriter(weight_file_of(file)) if large else None), file
        )
        parity = check_parity(backbone, heads, spec, file)
        drift = None if data is None else add_drift(backbone, spec, file, data, tolerance)
        place(file, out, large)
    return Exported(parity, drift)


def check_out(out: Path) -> None:
    """Raise InputError unless `out` can be the name of a new file."""
    if out.suffix != ".onnx" or out.is_dir():
        raise InputError(f"--out {out}: wanted the name of a file that ends in .onnx")
    check_free(out)


def place(file: Path, out: Path, large: bool) -> None:
    """Give a finished file its name, after its weights have theirs; both or none."""
    if large:
        os.replace(weight_file_of(file), weight_file_of(out))
    try:
        os.replace(file, out)
    except BaseException:
        if large:
            weight_file_of(out).unlink()
        raise


def parity_cases(backbone: Backbone, fixed_px: tuple[int, int] | None) -> tuple[tuple[int, int, int], ...]:
    """Batches that cover what may differ: one and several images, the usual sizes, wide, tall, one patch."""
    if fixed_px is not None:
        return (1, *fixed_px), (3, *fixed_px)
    step, preprocess = step_px(backbone.manifest), backbone.manifest.preprocess
    usual = max(step, preprocess.size_px // step * step)
    whole = max(step, preprocess.whole_px // step * step)
    return (
        (1, usual, usual),
        (3, usual, usual),
        *([(2, whole, whole)] if whole != usual else []),
        (1, usual, 2 * usual),
        (2, 3 * step, step),
        (1, step, step),
    )


def random_pixels(rng: np.random.Generator, shape: tuple[int, int, int], backbone: Backbone) -> np.ndarray:
    """Normalised noise of 8 bits, float32 [N, 3, H, W], as images of every kind are."""
    n, height, width = shape
    preprocess = backbone.manifest.preprocess
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    shades = rng.integers(0, 256, (n, 3, height, width)).astype(np.float32)
    return (shades / np.float32(255) - mean) / std


def check_parity(backbone: Backbone, heads: Heads, spec: OnnxSpec, path: Path) -> Parity:
    """Compare the file with torch on noise. Raises CheckFailed, naming output and size, where they differ.

    Of a lower precision only names and shapes are held against torch, and that all is finite: how much it may depart is for real
    images to say.
    """
    rng = np.random.default_rng(0)
    differences: dict[str, float] = {}
    cases = parity_cases(backbone, spec.fixed_px)
    network = make_network(backbone, heads)
    with TorchRuntime(backbone, network=network, device="cpu") as wanted, OnnxRuntime(path, device="cpu") as found:
        if wanted.outputs != found.outputs:
            raise CheckFailed(f"the exported graph has outputs {found.outputs}, wanted {wanted.outputs}")
        for shape in cases:
            pixels = random_pixels(rng, shape, backbone)
            expected, got = wanted.run(pixels, wanted.outputs), found.run(pixels, wanted.outputs)
            for name in wanted.outputs:
                difference = output_difference(got[name], expected[name])
                allowed = CLASS_TOLERANCE if name == "classes" else TOLERANCE
                if not difference <= (allowed if spec.precision == "fp32" else np.finfo(np.float32).max):
                    n, height, width = shape
                    raise CheckFailed(
                        f"exported {name} differs from torch by {difference:.2e} of its largest value "
                        f"on {n} images of {height}x{width} (allowed {allowed:.0e}); nothing was written"
                    )
                differences[name] = max(difference, differences.get(name, 0.0))
    return Parity(differences, cases)


def output_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Of whole numbers the share that differs, else `relative_difference`."""
    if np.issubdtype(expected.dtype, np.integer) and got.shape == expected.shape:
        return float((got != expected).mean())
    return relative_difference(got, expected)


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value; infinite where shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12))


def add_drift(backbone: Backbone, spec: OnnxSpec, path: Path, data: str, tolerance: Tolerance) -> Drift:
    """Measure a file's drift and write it into the file. Raises CheckFailed where it is more than `tolerance`."""
    preprocess = fixed_preprocess(backbone.manifest.preprocess, spec.fixed_px)
    same_views = Backbone(backbone.model, replace(backbone.manifest, preprocess=preprocess))
    with TorchRuntime(same_views, device="cpu") as before, OnnxRuntime(path, device="cpu") as after:
        drift = measure_drift(before, after, data)
    check_drift(drift, tolerance)
    model = load_model(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    metadata[EXPORT_KEY] = json.dumps({**read_export(metadata, path), "drift": drift.to_json()}, sort_keys=True)
    helper.set_model_props(model, metadata)
    write_file(model, path)
    return drift


def main(
    ckpt: str,
    out: Path,
    depth_head: Path | None = None,
    segmentation_head: Path | None = None,
    linear_head: Path | None = None,
    precision: Precision = "fp32",
    fixed_px: tuple[int, int] | None = None,
    uint8: bool = False,
    data: str | None = None,
    tolerance: Annotated[Tolerance, tyro.conf.arg(name="")] = USUAL_TOLERANCE,
) -> None:
    """Export a backbone to ONNX and check it against torch.

    Args:
        ckpt: A checkpoint, published weights, a Hugging Face folder or a catalog name.
        out: The .onnx file to write; it must not be there yet. Weights of more than 2 GB go into NAME.onnx.data beside it.
        depth_head: A depth head trained on this backbone; adds the output `depth`.
        segmentation_head: A segmentation head trained on this backbone; adds the output `classes`.
        linear_head: A linear classifier trained on this backbone; adds the output `logits`.
        precision: fp32; fp16 (float32 in and out); int8 (for CPUs, scales found while it runs); int8-static (Q/DQ pairs calibrated on
            the training part of --data, in the form that TensorRT takes).
        fixed_px: Height and width to bake in, multiples of the patch; left out: any.
        uint8: Take decoded images, uint8 [N,H,W,3], and normalise them inside.
        data: Real images to measure drift on, labelled ones also by k-NN; needed for every precision but fp32.
        tolerance: The most drift that is let through.
    """
    spec = OnnxSpec(precision=precision, fixed_px=fixed_px, uint8=uint8)
    done = export_onnx(
        ckpt,
        out,
        depth_head,
        linear_head=linear_head,
        segmentation_head=segmentation_head,
        spec=spec,
        data=data,
        tolerance=tolerance,
    )
    beside = weight_file_of(out)
    size_mb = sum(file.stat().st_size for file in (out, beside) if file.exists()) / 1e6
    print(
        f"{out}: {size_mb:.1f} MB, {precision}, largest difference from torch over {len(done.parity.cases)} batches of noise:"
    )
    for name, difference in done.parity.differences.items():
        of = "of all pixels" if name == "classes" else "of its largest value"
        print(f"  {name:<10} {difference:.1e} {of}")
    for line in done.drift.lines() if done.drift else ():
        print(f"  {line}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.to_onnx", description=__doc__))
