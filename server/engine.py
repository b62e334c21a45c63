"""Encoded images -> views -> network outputs: the one way through which every served model reaches the backbone.

The engine owns the instances of the network, their batcher and the decode pool. It knows no wire and no model name.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from backbones.heads import DepthHead, DepthHeadSpec
from data.decode import DecodeLimits, decode_image
from data.errors import InputError
from data.preprocess import Preprocess, center_view, normalise, whole_view
from runtimes.runtime import Runtime, black_image
from server.batcher import PATIENCE_S, Batcher, BatchSpec
from server.errors import TooLarge
from server.statistics import Times

T = TypeVar("T")
Images = Sequence[bytes] | np.ndarray
"""Encoded files, or uint8 RGB [N,H,W,3]."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """How much of the machine the engine takes, and how large an image may be."""

    batching: BatchSpec = field(default_factory=BatchSpec)
    decode_threads: int = 2
    max_size_px: int = 1024
    """Largest side of what the network is given."""
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    working_bytes: int = 1 << 30
    """Memory that the networks may need while they run, all instances together."""


KEPT_SIZES = 256
"""Sizes of images, with outputs, of which it is remembered what they take."""
MAX_CLASSES = 150
"""Logits of a pixel that a segmentation head is reckoned to hold (ADE20K's)."""


class Engine:
    """One backbone behind a batcher. Close it on the loop it was used on."""

    def __init__(self, runtimes: Sequence[Runtime], spec: EngineSpec) -> None:
        self.spec = spec
        self.runtimes = tuple(runtimes)
        self.manifest = runtimes[0].manifest
        self.preprocess: Preprocess = self.manifest.preprocess
        self.step_px = _step_px(self.manifest.architecture)
        self.shapes = self._probe()
        self._row_bytes = lru_cache(KEPT_SIZES)(self._reckon_row)
        self._memory = Budget(spec.working_bytes)
        most_rows = lru_cache(KEPT_SIZES)(self._most_rows)
        self.batcher = Batcher([self._run_with(runtime) for runtime in runtimes], spec.batching, most_rows)
        self._pool = ThreadPoolExecutor(spec.decode_threads, thread_name_prefix="decode")
        self._closed = False

    @property
    def name(self) -> str:
        """The kind of runtime: torch, onnxruntime, ..."""
        return self.runtimes[0].name

    @property
    def width(self) -> int:
        """Size D of an embedding."""
        return self.shapes["embedding"][-1]

    def has(self, output: str) -> bool:
        """Whether the network computes this output."""
        return output in self.shapes

    def _probe(self) -> dict[str, tuple[int, ...]]:
        """Run every instance once at its usual size: it warms up, and says what shapes its outputs have.

        Raises InputError for one that was made for other sizes alone: hardly any model could be served with it.
        """
        image, side = black_image(self.preprocess), self.preprocess.size_px
        try:
            self.runtimes[0].check_sides(side, side)
        except InputError as error:
            raise InputError(
                f"the network cannot be served: {error}, which is the view that its manifest tells evaluators and servers to embed; "
                f"export it for {side}x{side} pixels, or for any size"
            ) from error
        for runtime in dict.fromkeys(self.runtimes):
            shapes = {name: array.shape for name, array in runtime.run(image, runtime.outputs).items()}
        return shapes

    def check_size(self, height_px: int, width_px: int, what: str, outputs: Sequence[str] = ()) -> None:
        """Raise InputError, naming the nearest good sizes, or TooLarge, unless the network has these outputs for this size."""
        step, largest = self.step_px, self.spec.max_size_px
        for side in (height_px, width_px):
            if step <= side <= largest and side % step == 0:
                continue
            low = max(step, min(side, largest) // step * step)
            good = [low] if low + step > largest else [low, low + step]
            raise InputError(
                f"{what} {side} does not fit: sides are multiples of {step} from {step} to {largest} pixels; "
                f"nearest: {' or '.join(map(str, good))}"
            )
        try:
            self.runtimes[0].check_sides(height_px, width_px)
        except InputError as error:  # an export of one size, or a plan of some
            raise InputError(f"{what} {max(height_px, width_px)} does not fit: {error}") from error
        needed = self._row_bytes(height_px, width_px, tuple(outputs))
        if needed > self.spec.working_bytes:
            raise TooLarge(
                f"{what} {max(height_px, width_px)}: one such image needs about {needed >> 20} MB inside the network, and "
                f"{self.spec.working_bytes >> 20} MB are allowed; ask for a smaller size, or start the server with more --queue-mb"
            )

    def _reckon_row(self, height_px: int, width_px: int, outputs: tuple[str, ...]) -> int:
        """What one image takes inside the network at its widest.

        A block holds about 16 times its tokens (measured), and where attention is no single operator its scores, before and after
        softmax. The depth head holds the enlarged logits of its bins three times, a segmentation head those of its classes twice.
        """
        architecture = self.manifest.architecture
        patches = (height_px // self.step_px) * (width_px // self.step_px)
        tokens = 1 + int(architecture.get("registers", 0)) + patches
        width = int(architecture.get("width", 0))
        heads = int(architecture.get("heads", 0)) if self.runtimes[0].holds_scores else 0
        bins = DepthHeadSpec.bins if "depth" in outputs else 0
        logits = MAX_CLASSES * height_px * width_px if "classes" in outputs else 0
        return 4 * (
            16 * width * tokens + 2 * heads * tokens**2 + 3 * bins * DepthHead.ENLARGEMENT**2 * patches + 2 * logits
        )

    def _most_rows(self, key: Hashable) -> int:
        """Rows of one batch that the network computes at a time, and that fit into an instance's share of the memory; at least one."""
        assert isinstance(key, tuple)
        share = self.spec.working_bytes // len(self.runtimes)
        rows = max(1, share // max(1, self._row_bytes(*key)))
        return min(rows, self.runtimes[0].max_batch or rows)

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Do CPU work in the decode pool; work that has not begun is dropped with its caller."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def center_views(self, images: Images, times: Times) -> np.ndarray:
        """Images as the evaluators see them: float32 [N,3,size,size]. Raises InputError naming the bad row."""
        return await self._views(
            images, lambda image: center_view(image, self.preprocess), self.preprocess.size_px, times
        )

    async def whole_views(self, images: Images, size_px: int, times: Times) -> np.ndarray:
        """Whole images, squashed to [N,3,size_px,size_px]. Raises InputError naming the bad row."""
        return await self._views(images, lambda image: whole_view(image, self.preprocess, size_px), size_px, times)

    async def _views(
        self, images: Images, view: Callable[[np.ndarray], np.ndarray], side_px: int, times: Times
    ) -> np.ndarray:
        began = time.perf_counter_ns()
        pixels = np.empty((len(images), 3, side_px, side_px), np.float32)

        def fill(row: int) -> None:
            image = images[row]
            pixels[row] = view(image if isinstance(image, np.ndarray) else decode_image(image, self.spec.limits))

        results = await asyncio.gather(
            *(self.off_loop(fill, row) for row in range(len(images))), return_exceptions=True
        )
        for row, error in enumerate(results):
            if isinstance(error, InputError):
                raise InputError(f"image[{row}]: {error}") from error
            if isinstance(error, BaseException):
                raise error
        times.input_ns += time.perf_counter_ns() - began
        return pixels

    @property
    def shades_only(self) -> bool:
        """Whether the network takes pixels of 8-bit images alone: others would fail the batch of other requests too."""
        return self.runtimes[0].shades_only

    async def check_values(self, pixels: np.ndarray) -> None:
        """Raise InputError for pixels that the network does not take."""
        await self.off_loop(self.runtimes[0].check_values, pixels)

    async def normalised(self, shades_NHWC: np.ndarray, times: Times) -> np.ndarray:
        """uint8 RGB [N,H,W,3] as the network wants it: float32 [N,3,H,W]."""
        began = time.perf_counter_ns()
        made = await self.off_loop(lambda: np.stack([normalise(image, self.preprocess) for image in shades_NHWC]))
        times.input_ns += time.perf_counter_ns() - began
        return made

    async def run(
        self,
        pixels: np.ndarray,
        outputs: Sequence[str],
        times: Times,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
    ) -> dict[str, np.ndarray]:
        """Pixels float32 [N,3,H,W] through the batcher; only the outputs that are named are computed."""
        key = (pixels.shape[2], pixels.shape[3], tuple(sorted(outputs)))
        answer = await self.batcher.submit(key, pixels, deadline_s, patience_s, times.begun)
        times.add(answer)
        return answer.outputs

    async def close(self) -> None:
        """Finish what runs, then free the threads and the runtimes. Once is enough."""
        if self._closed:
            return
        self._closed = True
        await self.batcher.close()
        await asyncio.to_thread(self._pool.shutdown)
        for runtime in self.runtimes:
            runtime.close()

    def _run_with(self, runtime: Runtime) -> Callable[[Hashable, list[np.ndarray]], Mapping[str, np.ndarray]]:
        def run(key: Hashable, parts: list[np.ndarray]) -> Mapping[str, np.ndarray]:
            assert isinstance(key, tuple)
            with self._memory.hold(sum(map(len, parts)) * self._row_bytes(*key)):
                return runtime.run_rows(parts, key[2])

        return run


class Budget:
    """Bytes that instances share: whoever wants more than is left waits, and nobody overtakes."""

    def __init__(self, total: int) -> None:
        self._total, self._left = total, total
        self._turns, self._changed = deque[object](), threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Have these bytes, at most all there are, for the length of the block."""
        turn, nbytes = object(), min(nbytes, self._total)
        with self._changed:
            if self._turns or self._left < nbytes:
                self._turns.append(turn)
                self._changed.wait_for(lambda: self._turns[0] is turn and self._left >= nbytes)
                self._turns.popleft()
                self._changed.notify_all()
            self._left -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._left += nbytes
                if self._turns:
                    self._changed.notify_all()


def _step_px(architecture: Mapping[str, Any]) -> int:
    """What sides must be multiples of: the patch of a ViT, the total stride of a ResNet."""
    return int(architecture.get("patch_px", 32))
