"""A network in, the same network seen otherwise out: several of its blocks side by side, or images in a mirror.

Dense heads read these as they read any runtime, so extraction and its cache need not know.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.errors import InputError
from runtimes.runtime import Runtime, step_px
from runtimes.torch_runtime import TorchRuntime

LAST = 4
"""Blocks that the published heads on several layers read."""


class LayersRuntime(Runtime):
    """`patches` [N, h*w, L D] and `embedding` (CLS) [N, L D] of several blocks, one after another."""

    def __init__(self, runtime: TorchRuntime, layers: tuple[int, ...], norm: bool) -> None:
        self._runtime, self._layers, self._norm = runtime, layers, norm
        seen = {"layers": list(layers), "layers_normed": norm}
        self.manifest = replace(runtime.manifest, architecture=runtime.manifest.architecture | seen)
        self.name, self.device, self.precision = runtime.name, runtime.device, runtime.precision
        self.outputs = ("embedding", "patches")

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """As `Runtime.run`."""
        self.check_call(pixels_NCHW, outputs)
        patches, cls = self._runtime.run_layers(pixels_NCHW, self._layers, self._norm)
        made = {"embedding": cls, "patches": patches}
        return {name: made[name] for name in outputs}


class MirroredRuntime(Runtime):
    """`patches` of the image in a mirror, put back where they belong."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.manifest = replace(runtime.manifest, architecture=runtime.manifest.architecture | {"mirrored": True})
        self.name, self.device, self.precision = runtime.name, runtime.device, runtime.precision
        self.outputs = runtime.outputs

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        """As `Runtime.run`."""
        made = self._runtime.run(np.ascontiguousarray(pixels_NCHW[:, :, :, ::-1]), outputs)
        if "patches" in made:
            n, _, height, width = pixels_NCHW.shape
            grid = (n, height // step_px(self.manifest), width // step_px(self.manifest), -1)
            mirrored = made["patches"].reshape(grid)[:, :, ::-1]
            made["patches"] = np.ascontiguousarray(mirrored.reshape(made["patches"].shape))
        return made


def with_layers(runtime: Runtime, layers: tuple[int, ...], norm: bool) -> Runtime:
    """The runtime that gives these blocks; without any, the runtime itself. Raises InputError where it cannot."""
    if not layers:
        return runtime
    if not isinstance(runtime, TorchRuntime):
        raise InputError(
            f"a head on blocks {list(layers)} needs them all, and {runtime.name} gives the last one alone (exported files "
            "and servers do); evaluate the checkpoint itself, or choose a head on the last layer"
        )
    return LayersRuntime(runtime, layers, norm)


def spread_layers(runtime: Runtime) -> tuple[int, ...]:
    """The four blocks that DINOv2's depth heads read: the last of each quarter (of 12: 2 5 8 11; of 24: 4 11 17 23)."""
    depth = depth_of(runtime)
    published = {24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
    return published.get(depth, tuple(depth * (k + 1) // LAST - 1 for k in range(LAST)))


def last_layers(runtime: Runtime) -> tuple[int, ...]:
    """The last four blocks, which DINOv2's multi-scale segmentation head reads."""
    return tuple(range(depth_of(runtime) - LAST, depth_of(runtime)))


def depth_of(runtime: Runtime) -> int:
    """Blocks of a ViT. Raises InputError where there are fewer than four."""
    depth = int(runtime.manifest.architecture.get("depth", 0))
    if depth < LAST or runtime.manifest.architecture.get("family") == "resnet":
        raise InputError(
            f"a head on {LAST} layers needs a ViT of {LAST} blocks or more; choose a head on the last layer"
        )
    return depth
