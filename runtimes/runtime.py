"""The one call that evaluators and servers know: normalised pixels in, named arrays out, whatever computes them."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from backbones.checkpoints import Manifest
from data.errors import InputError
from data.preprocess import Preprocess, normalise

BACKBONE_OUTPUTS = ("embedding", "patches", "attention")
"""What a backbone computes without a head."""


class Runtime(ABC):
    """A network that can be run. Close it, or use it as a context manager."""

    manifest: Manifest
    """What is known of the backbone; its `preprocess` says how images become pixels."""
    name: str
    """The engine: torch, onnxruntime, tensorrt, remote."""
    device: str
    """Where it computes: cpu, cuda."""
    outputs: tuple[str, ...]
    """Names that `run` can give: `embedding`, `patches`, and where the network has them `attention`, `logits`, `depth`, `classes`."""
    precision: str = "fp32"
    """What the linear layers are computed in; features of different precisions differ."""
    threads: int | None = None
    """CPU threads of one call, where they were bounded."""
    max_batch: int | None = None
    """Images computed at a time; larger batches are run in parts, which gains nothing."""
    holds_scores: bool = False
    """Whether all attention scores of a block are in memory at once."""
    fixed_px: tuple[int, int] | None = None
    """Height and width of the images that it takes, where it takes one size alone."""
    shades_only: bool = False
    """Whether it takes pixels of 8-bit images alone; see `check_values`."""

    @abstractmethod
    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """The named outputs, float32, of normalised pixels float32 [N, 3, H, W]; safe to call from several threads.

        `embedding` [N, D], `patches` [N, h*w, D], `attention` [N, heads, h, w], `logits` [N, C], `depth` [N, H, W], `classes`
        [N, H, W] (int32). H and W are multiples of the patch.
        Raises InputError for an unknown output, or pixels of another shape or type.
        """

    def run_rows(self, parts: Sequence[np.ndarray], outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """`run` on the images of several arrays [n, 3, H, W] of one size, as a server receives them: at any byte of a message, unchecked.

        Images with values that are not finite have outputs of NaN; the others of the batch are as they would be alone.
        """
        pixels_NCHW = joined(parts)
        made = self.run(pixels_NCHW, outputs)
        spoil(pixels_NCHW, made)
        return made

    def warm_up(self) -> None:
        """Run once at the usual size, so that the first request does not pay for what is done only once."""
        self.run(black_image(self.manifest.preprocess), self.outputs)

    def close(self) -> None:  # noqa: B027 (nothing to free unless a runtime says so)
        """Free what the runtime holds."""

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_call(self, pixels_NCHW: np.ndarray, outputs: Sequence[str]) -> None:
        """Raise InputError unless `run` can answer this."""
        unknown = [name for name in outputs if name not in self.outputs]
        if unknown or not outputs:
            wanted = f"output {unknown[0]!r}" if unknown else "no output"
            raise InputError(f"{wanted} was asked for; this network has {', '.join(self.outputs)}")
        shape = pixels_NCHW.shape
        if pixels_NCHW.dtype != np.float32 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise InputError(
                f"pixels are {pixels_NCHW.dtype} {list(shape)}; wanted float32 [N, 3, H, W] with at least one image"
            )
        self.check_sides(shape[2], shape[3])

    def check_sides(self, height_px: int, width_px: int) -> None:
        """Raise InputError for images of a size that `run` does not take."""
        step = step_px(self.manifest)
        if height_px % step or width_px % step:
            raise InputError(f"images are {height_px}x{width_px} pixels; wanted sides that are multiples of {step}")

    def check_values(self, pixels_NCHW: np.ndarray) -> None:  # noqa: B027 (most networks take any)
        """Raise InputError for pixels of a good shape that `run` does not take."""


def black_image(preprocess: Preprocess) -> np.ndarray:
    """One image [1, 3, S, S] of the usual size that every network takes, those of 8-bit images too."""
    side = preprocess.size_px
    return normalise(np.zeros((side, side, 3), np.uint8), preprocess)[None]


def step_px(manifest: Manifest) -> int:
    """What the sides of an image must be multiples of: the patch of a ViT, the total stride of a ResNet."""
    return int(manifest.architecture.get("patch_px", 32))


def run_in_parts(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], pixels_NCHW: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """What `run` makes of at most `rows` images at a time, put together again."""
    parts = [run(pixels_NCHW[start : start + rows]) for start in range(0, len(pixels_NCHW), rows)]
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts' rows in one array that is aligned.

    Python's own join lets go of the interpreter's lock once for all parts. NumPy does for each, and to get the lock back from a busy event
    loop takes longer than to copy an image.
    """
    first = parts[0]
    if len(parts) == 1:
        return first if first.flags.aligned else np.array(first)
    if not all(part.flags.c_contiguous and part.dtype == first.dtype for part in parts) or first.dtype.hasobject:
        return np.require(np.concatenate(parts), requirements="A")
    rows = bytearray().join([part.view(np.uint8).data for part in parts])
    return np.frombuffer(rows, first.dtype).reshape(-1, *first.shape[1:])


def spoil(pixels_NCHW: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
    """Make outputs NaN for images with values that are not finite: not every layer lets those through to its own output.

    A sum is finite only if all its parts are, and costs a third of looking at each of them; one sum serves for all images that are well.
    """
    if math.isfinite(np.einsum("i->", pixels_NCHW.reshape(-1))):  # three times as fast as NumPy's exacter sum
        return
    with np.errstate(all="ignore"):
        bad = [
            row
            for row, image in enumerate(pixels_NCHW)
            if not np.isfinite(image.sum()) and not np.isfinite(image).all()
        ]
    for array in outputs.values() if bad else ():
        if array.dtype.kind == "f":
            array[bad] = np.nan


def gpu_number(device: str) -> int | None:
    """N of `cuda:N`, None for auto, cpu and cuda. Raises InputError for any other word."""
    found = re.fullmatch("cuda:([0-9]{1,3})", device)
    if device not in ("auto", "cpu", "cuda") and not found:
        raise InputError(f"--device {device!r} is unknown; want auto, cpu or cuda")
    return int(found[1]) if found else None
