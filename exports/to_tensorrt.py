"""A backbone to a TensorRT plan: `python -m exports.to_tensorrt --ckpt X --out Y.plan`, on the machine with the GPU it is for.

X is an exported .onnx, or anything that `exports.to_onnx` takes, which is then exported first. The plan is written with NAME.plan.json
beside it (its manifest, the versions it is tied to, the sizes it takes), after it has been run against ONNX Runtime on the same graph.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tyro

from backbones.checkpoints import MANIFEST_KEY, Manifest
from data.errors import CheckFailed, InputError, run_cli
from exports.drift import USUAL_TOLERANCE, Tolerance
from exports.graph import Precision
from exports.onnx_file import OnnxSpec
from exports.placing import check_free, scratch_beside
from exports.tensorrt_build import Profile, build_plan, check_operators, load_api
from exports.to_onnx import export_onnx
from runtimes.onnx_runtime import EXPORT_KEY, HEADS_KEY, OnnxRuntime, load_model
from runtimes.runtime import Runtime, step_px
from runtimes.tensorrt_runtime import TensorRTRuntime, sidecar_of

MIN_PARITY_COSINE = 0.999
"""Least cosine between the plan's embeddings and ONNX Runtime's of the same graph; engines with no likeness at all have been seen."""


def export_tensorrt(
    ckpt: str | Path,
    out: str | Path,
    *,
    spec: OnnxSpec | None = None,
    data: str | None = None,
    tolerance: Tolerance = USUAL_TOLERANCE,
    linear_head: str | Path | None = None,
    depth_head: str | Path | None = None,
    segmentation_head: str | Path | None = None,
    batch: int = 8,
    max_batch: int = 32,
    min_px: int | None = None,
    max_px: int | None = None,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Build, check and write a plan, whole or not at all; returns what is told of it. Raises InputError and CheckFailed."""
    out = Path(out)
    if out.suffix != ".plan":
        raise InputError(f"--out {out}: wanted the name of a file that ends in .plan")
    check_free(out)
    check_free(sidecar_of(out))
    trt = load_api()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(ckpt)
        if given.suffix.lower() == ".onnx":
            if spec is not None or linear_head or depth_head or segmentation_head or data:
                raise InputError(
                    f"{ckpt}: is exported already; heads, --precision and --data belong to exports.to_onnx"
                )
            file = given
        else:
            file = Path(folder) / "graph.onnx"
            export_onnx(
                ckpt,
                file,
                depth_head,
                linear_head=linear_head,
                segmentation_head=segmentation_head,
                spec=spec or OnnxSpec(),
                data=data,
                tolerance=tolerance,
            )
        model = load_model(file)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if MANIFEST_KEY not in metadata:
            raise InputError(f"{ckpt}: an .onnx without our manifest; export it with python -m exports.to_onnx")
        check_graph(model)
        profile = make_profile(metadata, batch, max_batch, min_px, max_px)
        known = timing_cache.read_bytes() if timing_cache is not None and timing_cache.is_file() else b""
        plan, cache = build_plan(trt, file, profile, known)
        told = describe_plan(metadata, plan, profile, str(trt.__version__))
        with scratch_beside(out) as scratch:
            write_plan(plan, told, scratch)
            try:
                check_engine(scratch, file, profile)
                os.replace(sidecar_of(scratch), sidecar_of(out))
                os.replace(scratch, out)
            finally:
                sidecar_of(scratch).unlink(missing_ok=True)
    if timing_cache is not None and cache:
        write_bytes(timing_cache, cache)
    return told


def check_graph(model: onnx.ModelProto) -> None:
    """Raise InputError where the graph cannot become a plan."""
    check_operators([node.op_type for node in model.graph.node], [node.domain for node in model.graph.node])
    pixels = model.graph.input[0].type.tensor_type
    if len(model.graph.input) != 1 or pixels.elem_type != onnx.TensorProto.FLOAT:
        raise InputError("a plan takes normalised float32 pixels; export the .onnx without --uint8")


def make_profile(
    metadata: dict[str, str], batch: int, max_batch: int, min_px: int | None, max_px: int | None
) -> Profile:
    """The sizes to build for: what evaluators and servers show the network, unless others are named. Raises InputError."""
    manifest = Manifest.from_json(json.loads(metadata[MANIFEST_KEY]))
    preprocess, step = manifest.preprocess, step_px(manifest)
    fixed = json.loads(metadata.get(EXPORT_KEY, "{}")).get("fixed_px")
    if not 1 <= batch <= max_batch:
        raise InputError(
            f"--batch {batch} --max-batch {max_batch}: wanted at least 1, and the first no larger than the second"
        )
    if fixed:
        if min_px is not None or max_px is not None:
            raise InputError(
                f"--min-px and --max-px: this file takes {fixed[0]}x{fixed[1]} pixels only; leave them out"
            )
        height, width = fixed
        return Profile((1, 3, height, width), (batch, 3, height, width), (max_batch, 3, height, width))
    usual = preprocess.size_px // step * step
    least = min(usual, preprocess.whole_px // step * step) if min_px is None else min_px
    most = max(usual, preprocess.whole_px // step * step) if max_px is None else max_px
    for flag, side in (("--min-px", least), ("--max-px", most)):
        if side < step or side % step:
            raise InputError(f"{flag} {side}: wanted a multiple of the patch, {step}")
    if not least <= most:
        raise InputError(f"--min-px {least} is more than --max-px {most}")
    best = min(max(usual, least), most)
    return Profile((1, 3, least, least), (batch, 3, best, best), (max_batch, 3, most, most))


def describe_plan(metadata: dict[str, str], plan: bytes, profile: Profile, version: str) -> dict[str, Any]:
    """NAME.plan.json."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none here"
    return {
        "manifest": json.loads(metadata[MANIFEST_KEY]),
        "heads": json.loads(metadata.get(HEADS_KEY, "{}")),
        "export": json.loads(metadata.get(EXPORT_KEY, "{}")),
        "tensorrt": version,
        "gpu": gpu,
        "profile": [list(profile.least), list(profile.best), list(profile.most)],
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
    }


def write_plan(plan: bytes, told: dict[str, Any], path: Path) -> None:
    """Both files."""
    write_bytes(path, plan)
    write_bytes(sidecar_of(path), (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to the disk itself, then give the file its name."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def check_engine(plan: Path, file: Path, profile: Profile) -> None:
    """Run the plan and ONNX Runtime on the same noise. Raises CheckFailed where their embeddings are not alike."""
    rng = np.random.default_rng(0)
    with TensorRTRuntime(plan) as found, OnnxRuntime(file, device="cpu") as wanted:
        for shape in (profile.least, profile.best):
            pixels = rng.standard_normal(shape, dtype=np.float32)
            cosine = least_cosine(found, wanted, pixels)
            if not cosine >= MIN_PARITY_COSINE:
                raise CheckFailed(
                    f"the plan's embeddings of {shape[0]} images of {shape[2]}x{shape[3]} have a cosine of {cosine:.4f} to ONNX "
                    f"Runtime's, wanted {MIN_PARITY_COSINE}; nothing was written"
                )


def least_cosine(one: Runtime, other: Runtime, pixels_NCHW: np.ndarray) -> float:
    """The lowest cosine of two runtimes' embeddings over a batch."""
    a, b = (runtime.run(pixels_NCHW)["embedding"].astype(np.float64) for runtime in (one, other))
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def main(
    ckpt: str,
    out: Path,
    precision: Precision | None = None,
    data: str | None = None,
    linear_head: Path | None = None,
    depth_head: Path | None = None,
    segmentation_head: Path | None = None,
    batch: int = 8,
    max_batch: int = 32,
    min_px: int | None = None,
    max_px: int | None = None,
    timing_cache: Path | None = None,
    tolerance: Annotated[Tolerance, tyro.conf.arg(name="")] = USUAL_TOLERANCE,
) -> None:
    """Build a TensorRT plan.

    Args:
        ckpt: An exported .onnx, a checkpoint, published weights, a Hugging Face folder or a catalog name.
        out: The .plan file to write; NAME.plan.json appears beside it.
        precision: Of a checkpoint: fp32, fp16 or int8-static (int8 is for CPUs). Of an .onnx it is what the file has.
        data: Real images to measure drift and calibrate on; needed for every precision of a checkpoint but fp32.
        linear_head: A linear classifier trained on this backbone; adds the output `logits`.
        depth_head: A depth head trained on this backbone; adds the output `depth`.
        segmentation_head: A segmentation head trained on this backbone; adds the output `classes`.
        batch: Images at a time that the plan is tuned to.
        max_batch: Most images at a time that it takes.
        min_px: Smallest side of the images; left out: the smaller of the preprocessing's two.
        max_px: Largest side; left out: the larger of the two.
        timing_cache: File that measurements of earlier builds are read from and kept in.
        tolerance: The most drift that is let through.
    """
    told = export_tensorrt(
        ckpt,
        out,
        spec=None if precision is None else OnnxSpec(precision=precision),
        data=data,
        tolerance=tolerance,
        linear_head=linear_head,
        depth_head=depth_head,
        segmentation_head=segmentation_head,
        batch=batch,
        max_batch=max_batch,
        min_px=min_px,
        max_px=max_px,
        timing_cache=timing_cache,
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, TensorRT {told['tensorrt']}, {told['gpu']}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.to_tensorrt", description=__doc__))
