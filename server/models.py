"""The served models: for each, what goes in and out, and how a checked request becomes arrays.

Names, types and shapes are those of an exported Triton repository. Read in this order: ServedModel, then one class a
model, then `make_models`. Axes: N rows, D feature size, H and W pixels, h and w patches, k neighbours.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from data.errors import InputError
from evaluators.attention_maps import top_mass
from server.collections import Collections
from server.engine import Engine
from server.errors import TooLarge
from server.formats import TOP
from server.options import AttentionOptions, EmbeddingOptions, KnnOptions, MapOptions, NoOptions, read_options
from server.statistics import Times
from server.tensors import TensorSpec, object_array

IMAGE = TensorSpec("image", "BYTES", (-1,), shades=True)
"""Encoded JPEG, PNG, WebP, BMP or TIFF, one image a row."""
FLOAT_MAP = ("fp16", "uint8", "png")
NEIGHBOUR_BYTES = 1000
"""What a neighbour takes until it is in a reply: its place and cosine, its id and label as bytes, for people what is told of its item."""


class ServedModel(ABC):
    """One name of the protocol. Inputs arrive checked against `inputs`; outputs are those of `outputs` asked for."""

    name: ClassVar[str]
    options_kind: ClassVar[type] = NoOptions
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @cached_property
    def input_specs(self) -> dict[str, TensorSpec]:
        """The inputs by name."""
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def output_specs(self) -> dict[str, TensorSpec]:
        """The outputs by name."""
        return {spec.name: spec for spec in self.outputs}

    def options(self, parameters: Mapping[str, Any]) -> Any:
        """The request parameters as this model's typed options. Raises InputError."""
        return read_options(self.options_kind, parameters, self.name)

    @abstractmethod
    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        """Pixels that one row of this request puts into the network: what admission reckons memory with.

        Raises InputError when the size does not fit.
        """

    @abstractmethod
    async def infer(
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        options: Any,
        times: Times,
        deadline_s: float | None,
    ) -> dict[str, np.ndarray]:
        """Answer one request. Raises InputError and the errors of `server.errors`."""

    def _center_pixels(self) -> int:
        return self.engine.preprocess.size_px**2

    def _side(self, options: MapOptions) -> int:
        """The side that the whole image is squashed to, checked."""
        side = self.engine.preprocess.whole_px if options.size is None else options.size
        self.engine.check_size(side, side, "parameter 'size'", [spec.name for spec in self.outputs])
        return side


class BackboneModel(ServedModel):
    """The network itself: normalised pixels in, its raw outputs out."""

    name = "backbone"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        fixed = engine.runtimes[0].fixed_px
        sides = fixed or (-1, -1)
        rows, columns = (side // engine.step_px if fixed else -1 for side in sides)
        self.inputs = (TensorSpec("pixels", "FP32", (-1, 3, *sides), shades=True),)
        shapes = {"embedding": (-1, engine.width), "patches": (-1, rows * columns if fixed else -1, engine.width)}
        if engine.has("attention"):
            shapes["attention"] = (-1, engine.shapes["attention"][1], rows, columns)
        forms = {"attention": FLOAT_MAP}
        self.outputs = tuple(
            TensorSpec(name, "FP32", shape, formats=forms.get(name, ("fp16",))) for name, shape in shapes.items()
        )

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        pixels = inputs["pixels"]
        height, width = pixels.shape[1:3] if pixels.dtype == np.uint8 else pixels.shape[2:]
        self.engine.check_size(height, width, "input 'pixels': side")
        return height * width

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = inputs["pixels"]
        if pixels.dtype == np.uint8:
            pixels = await self.engine.normalised(pixels, times)
        elif self.engine.shades_only:
            await self.engine.check_values(pixels)
        answers = await self.engine.run(pixels, outputs, times, deadline_s)
        for name, array in answers.items():
            if np.count_nonzero(np.isfinite(array)) == array.size:
                continue
            bad = next((row for row, image in enumerate(pixels) if not np.isfinite(image).all()), None)
            if bad is None:
                raise InputError(
                    f"output {name!r} is not finite: the pixels are too large; normalise them as the manifest says"
                )
            if not random_bits(pixels):
                raise InputError(f"input 'pixels': row {bad} holds values that are not finite")
        return answers


def random_bits(pixels: np.ndarray) -> bool:
    """Whether these are no pixels but random bits read as numbers, tiny and huge ones side by side.

    perf_analyzer sends them unless told otherwise, and means to measure, not to be told that they are no image: the network's answer is
    sent as it comes.
    """
    size = np.abs(pixels)
    return bool((size > 1e10).mean() > 0.1 and ((size > 0) & (size < 1e-10)).mean() > 0.1)


class EmbeddingModel(ServedModel):
    """Images in, one vector each, seen as the evaluators see them."""

    name = "embedding"
    options_kind = EmbeddingOptions

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.inputs = (IMAGE,)
        self.outputs = (TensorSpec("embedding", "FP32", (-1, engine.width), formats=("fp16",)),)

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._center_pixels()

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.center_views(inputs["image"], times)
        embedding_ND = (await self.engine.run(pixels, ["embedding"], times, deadline_s))["embedding"]
        return {"embedding": unit_rows(embedding_ND) if options.normalize else embedding_ND}


class ClassificationModel(ServedModel):
    """Images in, a linear head's logits out, seen as the evaluators see them; the classes' names are in its configuration."""

    name = "classification"

    def __init__(self, engine: Engine, labels: Sequence[str]) -> None:
        super().__init__(engine)
        self.inputs = (IMAGE,)
        shape, forms = (-1, engine.shapes["logits"][1]), ("fp16", TOP)
        self.outputs = (TensorSpec("logits", "FP32", shape, formats=forms, classes=tuple(labels)),)

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._center_pixels()

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.center_views(inputs["image"], times)
        return await self.engine.run(pixels, ["logits"], times, deadline_s)


class AttentionModel(ServedModel):
    """Images in, the last block's CLS attention out, over the whole image, and the patches that hold most of it."""

    name = "attention"
    options_kind = AttentionOptions

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        heads = engine.shapes["attention"][1]
        self.inputs = (IMAGE,)
        self.outputs = (
            TensorSpec("attention", "FP32", (-1, heads, -1, -1), formats=FLOAT_MAP),
            TensorSpec("mask", "UINT8", (-1, heads, -1, -1), formats=("png",)),
        )

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._side(options) ** 2

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.whole_views(inputs["image"], self._side(options), times)
        attention = (await self.engine.run(pixels, ["attention"], times, deadline_s))["attention"]
        began = time.perf_counter_ns()
        answers = {"attention": attention}
        if "mask" in outputs:
            answers["mask"] = top_mass(attention, options.mass)
        times.output_ns += time.perf_counter_ns() - began
        return {name: answers[name] for name in outputs}


class KnnModel(ServedModel):
    """Images or embeddings in, the nearest items of a collection out."""

    name = "knn"
    options_kind = KnnOptions

    def __init__(self, engine: Engine, collections: Collections) -> None:
        super().__init__(engine)
        self.collections = collections
        self.inputs = (
            replace(IMAGE, optional=True),
            TensorSpec("embedding", "FP32", (-1, engine.width), optional=True),
        )
        self.outputs = (
            TensorSpec("ids", "BYTES", (-1, -1)),
            TensorSpec("labels", "BYTES", (-1, -1)),
            TensorSpec("scores", "FP32", (-1, -1)),
        )

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        if len(inputs) != 1:
            raise InputError(f"model 'knn' wants either 'image' or 'embedding'; {len(inputs)} inputs came")
        return self._center_pixels() if "image" in inputs else 0

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        snapshot = await self.collections.read(lambda: self.collections.snapshot(options.collection))
        label = options.label or None
        k = snapshot.check_k(options.k, label)
        self._check_memory(len(next(iter(inputs.values()))), k)
        queries_ND = inputs.get("embedding")
        if queries_ND is None:
            pixels = await self.engine.center_views(inputs["image"], times)
            queries_ND = (await self.engine.run(pixels, ["embedding"], times, deadline_s))["embedding"]
        began = time.perf_counter_ns()
        found = await self.engine.off_loop(snapshot.search, queries_ND, k, label)
        times.output_ns += time.perf_counter_ns() - began
        shape = (len(queries_ND), k)
        answers = {
            "ids": object_array([one.encode() for row in found.ids for one in row], shape),
            "labels": object_array([(one or "").encode() for row in found.labels for one in row], shape),
            "scores": found.scores,
        }
        return {name: answers[name] for name in outputs}

    def _check_memory(self, rows: int, k: int) -> None:
        """Raise TooLarge for more neighbours than there is memory for: a collection may have hundreds of thousands of items."""
        needed, most = rows * k * NEIGHBOUR_BYTES, self.engine.spec.working_bytes
        if needed > most:
            raise TooLarge(
                f"{k} neighbours of each of {rows} rows take about {needed >> 20} MB, and {most >> 20} MB are allowed; "
                "ask for fewer, or start the server with more --queue-mb"
            )


class DepthModel(ServedModel):
    """Images in, one depth map each out, at the size the network saw; the unit is in the model's configuration."""

    name = "depth"
    options_kind = MapOptions

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.inputs = (IMAGE,)
        self.outputs = (TensorSpec("depth", "FP32", (-1, -1, -1), formats=FLOAT_MAP),)

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._side(options) ** 2

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.whole_views(inputs["image"], self._side(options), times)
        return await self.engine.run(pixels, ["depth"], times, deadline_s)


class SegmentationModel(ServedModel):
    """Images in, the class of each pixel out, at the size the network saw; the classes' names are in its configuration."""

    name = "segmentation"
    options_kind = MapOptions

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.inputs = (IMAGE,)
        self.outputs = (TensorSpec("classes", "INT32", (-1, -1, -1), formats=("uint8", "png")),)

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._side(options) ** 2

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.whole_views(inputs["image"], self._side(options), times)
        return await self.engine.run(pixels, ["classes"], times, deadline_s)


class OverviewModel(ServedModel):
    """Images in, everything about them out by one forward pass: whatever of the other models' outputs is asked for, of the whole image."""

    name = "overview"
    options_kind = AttentionOptions

    def __init__(self, engine: Engine, parts: Sequence[ServedModel]) -> None:
        super().__init__(engine)
        self.inputs = (IMAGE,)
        self.outputs = tuple(spec for part in parts for spec in part.outputs)

    def pixel_count(self, inputs: Mapping[str, np.ndarray], options: Any) -> int:
        return self._side(options) ** 2

    async def infer(self, inputs, outputs, options, times, deadline_s):  # type: ignore[no-untyped-def]
        pixels = await self.engine.whole_views(inputs["image"], self._side(options), times)
        computed = dict.fromkeys("attention" if name == "mask" else name for name in outputs)
        answers = await self.engine.run(pixels, list(computed), times, deadline_s)
        began = time.perf_counter_ns()
        if "mask" in outputs:
            answers["mask"] = top_mass(answers["attention"], options.mass)
        times.output_ns += time.perf_counter_ns() - began
        return {name: answers[name] for name in outputs}


def make_models(
    engine: Engine, collections: Collections, labels: Sequence[str] = ()
) -> tuple[dict[str, ServedModel], dict[str, str]]:
    """Every model that this backbone and its heads allow, and for each of the others why it is absent.

    `labels` are the names of the classes that the linear head tells apart.
    """
    models: list[ServedModel] = [BackboneModel(engine), EmbeddingModel(engine), KnnModel(engine, collections)]
    absent = {}
    if engine.has("attention"):
        models.append(AttentionModel(engine))
    else:
        absent["attention"] = "this backbone has no attention"
    if engine.has("depth"):
        models.append(DepthModel(engine))
    else:
        absent["depth"] = "no depth head is loaded"
    if engine.has("classes"):
        models.append(SegmentationModel(engine))
    else:
        absent["segmentation"] = "no segmentation head is loaded"
    models.append(OverviewModel(engine, [one for one in models if one.name not in ("backbone", "knn")]))
    if engine.has("logits"):
        models.append(ClassificationModel(engine, labels))
    else:
        absent["classification"] = "no linear head is loaded"
    return {model.name: model for model in models}, absent


def unit_rows(rows_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays as it is."""
    length = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return (rows_ND / np.maximum(length, 1e-12)).astype(np.float32)
