"""Two runtimes side by side, on the same images: `python -m exports.compare A B --data D` prints speed, drift and size.

A and B are whatever `--ckpt` takes elsewhere: checkpoints, exported files, plans, servers. They take turns, so that a busy machine disturbs
both alike; medians are printed. Read in this order: compare, speed, differences.
"""

import json
import os
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.decode import DecodeError
from data.errors import InputError, run_cli
from data.preprocess import center_view, whole_view
from evaluators.classification import summary
from evaluators.results import check_writable
from exports.drift import Drift, evenly, measure_drift, open_parts
from exports.to_onnx import output_difference
from runtimes.connection import REMOTE_SCHEMES
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from runtimes.weight_file import weight_file_of

MAP_IMAGES = 8
"""Whole images on which all common outputs are compared."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians, in milliseconds an image."""

    batch: int
    wall_ms: float
    cpu_ms: float
    """Of this process; what a GPU or a server spends is not in it."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two."""

    name: str
    engine: str
    device: str
    precision: str
    megabytes: float | None
    """Of its files; None for a server."""
    speed: tuple[Speed, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found; drift is that of B from A."""

    a: Side
    b: Side
    drift: Drift
    differences: dict[str, float]
    """Largest difference of each common output over the output's largest value; of classes the share of pixels."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(
    first: str,
    second: str,
    data: str,
    *,
    device: str = "auto",
    threads: int | None = 1,
    rounds: int = 7,
    batches: tuple[int, ...] = (1, 8),
) -> Comparison:
    """Open both and measure them. Raises InputError for what cannot be opened, or two that see images differently."""
    if rounds < 1 or not batches or min(batches) < 1:
        raise InputError(f"--rounds {rounds} --batches {' '.join(map(str, batches))}: wanted at least 1 each")
    with (
        open_runtime(first, device=device, threads=threads) as a,
        open_runtime(second, device=device, threads=threads) as b,
    ):
        seen = [runtime.manifest.preprocess for runtime in (a, b)]
        if seen[0] != seen[1]:
            raise InputError(
                f"{first} and {second} see images in different ways ({seen[0].size_px} and {seen[1].size_px} px views)"
            )
        drift = measure_drift(a, b, data)
        pixels, whole = load_views(a, data)
        times = speed(a, b, pixels, rounds, batches)
        sides = [
            Side(
                name=name,
                engine=runtime.name,
                device=runtime.device,
                precision=runtime.precision,
                megabytes=size_mb(name),
                speed=tuple(found),
            )
            for name, runtime, found in ((first, a, times[0]), (second, b, times[1]))
        ]
        return Comparison(a=sides[0], b=sides[1], drift=drift, differences=differences(a, b, whole))


def load_views(runtime: Runtime, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Some images as centre views, and some as whole ones."""
    images = open_parts(data)[0].val
    decoded = []
    for row in evenly(len(images), MAP_IMAGES):
        with suppress(DecodeError):  # whoever measures drift has told of it
            decoded.append(images.image(row))
    if not decoded:
        raise InputError(f"--data {data}: none of its images that were tried can be decoded")
    preprocess = runtime.manifest.preprocess
    return (
        np.stack([center_view(image, preprocess) for image in decoded]),
        np.stack([whole_view(image, preprocess) for image in decoded]),
    )


def speed(
    a: Runtime, b: Runtime, pixels_NCHW: np.ndarray, rounds: int, batches: tuple[int, ...]
) -> tuple[list[Speed], list[Speed]]:
    """Cost of an embedding on either side, for each size of batch; the first round goes uncounted."""
    found: tuple[list[Speed], list[Speed]] = ([], [])
    for batch in batches:
        given = np.concatenate([pixels_NCHW] * -(-batch // len(pixels_NCHW)))[:batch]
        times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for i in range(rounds + 1):
            for side, runtime in enumerate((a, b)):
                wall, cpu = time.perf_counter(), time.process_time()
                runtime.run(given, ("embedding",))
                if i:
                    times[side].append((time.perf_counter() - wall, time.process_time() - cpu))
        for side in (0, 1):
            wall_ms, cpu_ms = (statistics.median(one[k] for one in times[side]) * 1e3 / batch for k in (0, 1))
            found[side].append(Speed(batch=batch, wall_ms=wall_ms, cpu_ms=cpu_ms))
    return found


def differences(a: Runtime, b: Runtime, pixels_NCHW: np.ndarray) -> dict[str, float]:
    """How far B's outputs are from A's, for those that both have."""
    common = tuple(name for name in a.outputs if name in b.outputs)
    wanted, found = a.run(pixels_NCHW, common), b.run(pixels_NCHW, common)
    return {name: output_difference(found[name], wanted[name]) for name in common}


def size_mb(name: str) -> float | None:
    """Of a file, or of all files of a folder; None for what lies elsewhere."""
    path = Path(name)
    if name.startswith(REMOTE_SCHEMES) or not path.exists():
        return None
    files = [path] if path.is_file() else [Path(root) / file for root, _, names in os.walk(path) for file in names]
    if path.is_file() and weight_file_of(path).is_file():
        files.append(weight_file_of(path))
    return sum(file.stat().st_size for file in files) / 1e6


def table(found: Comparison) -> str:
    """For people."""
    sides = (found.a, found.b)

    def row(title: str, *cells: str) -> str:
        return f"{title:<28}" + "".join(f"{cell:>18}" for cell in cells)

    lines = [f"A  {found.a.name}", f"B  {found.b.name}", row("", "A", "B", "A / B")]
    lines.append(row("engine", *(f"{side.engine}/{side.device}" for side in sides)))
    lines.append(row("precision", *(side.precision for side in sides)))
    lines.append(row("size, MB", *("-" if side.megabytes is None else f"{side.megabytes:.1f}" for side in sides)))
    for one, other in zip(found.a.speed, found.b.speed, strict=True):
        for unit in ("wall_ms", "cpu_ms"):
            pair = getattr(one, unit), getattr(other, unit)
            title = f"{unit[:-3]} ms an image, batch {one.batch}"
            lines.append(row(title, *(f"{value:.2f}" for value in pair), f"{pair[0] / max(pair[1], 1e-9):.2f}"))
    lines += [f"drift: {line}" for line in found.drift.lines()]
    for name, difference in found.differences.items():
        of = "of all pixels" if name == "classes" else "of its largest value"
        lines.append(f"  {name:<10} {difference:.1e} {of}, on whole images")
    return "\n".join(lines)


def main(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    data: str,
    device: str = "auto",
    threads: int | None = 1,
    rounds: int = 7,
    batches: tuple[int, ...] = (1, 8),
    out: Path | None = None,
) -> None:
    """Compare two runtimes.

    Args:
        a: A checkpoint, an exported file, a plan, a catalog name or a server (grpc://host:port, http://host:port).
        b: Another one, of the same preprocessing.
        data: Real images; labelled ones are also judged by k-NN.
        device: auto, cpu, cuda.
        threads: CPU threads of each; None for all.
        rounds: Interleaved calls a case.
        batches: Images a call.
        out: A .json file to write as well.
    """
    if out is not None:
        check_writable(out, "--out", ".json")
    found = compare(a, b, data, device=device, threads=threads, rounds=rounds, batches=batches)
    print(table(found))
    if out is not None:
        out.write_text(json.dumps(found.to_json(), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.compare", description=summary(__doc__)))
