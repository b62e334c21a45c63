"""Revisited Oxford and Paris as distributed, in; database, queries and their ground truth, out.

    ROOT/roxford5k/gnd_roxford5k.pkl    {imlist, qimlist, gnd: [{bbx, easy, hard, junk}, ...]}
    ROOT/roxford5k/jpg/NAME.jpg

The ground truth is a pickle, which may name any function to be called while it is read. `load_plain_pickle` calls
none: it knows containers, numbers, text, and numpy arrays of numbers, which it reads from their bytes itself.
Read in this order: landmarks_at, open_landmarks, load_plain_pickle.
"""

import hashlib
import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.datasets import Dataset
from data.decode import DEFAULT_LIMITS, DecodeLimits
from data.errors import InputError
from data.listings import IMAGE, Item, Record
from data.members import Member

BENCHMARKS = ("roxford5k", "rparis6k")
KINDS = ("easy", "hard", "junk")
MAX_PICKLE_BYTES = 64 * 2**20
"""The published files have a few hundred kilobytes."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies."""

    name: str
    folder: Path
    """Holds gnd_NAME.pkl and jpg/."""


@dataclass(frozen=True)
class Landmarks:
    """The ground truth of a benchmark."""

    benchmark: str
    names: tuple[str, ...]
    """Database images, in the order that `truth` counts by."""
    truth: tuple[Mapping[str, tuple[int, ...]], ...]
    """For each query, the database images that are `easy`, `hard` and `junk`."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """For each query, the box of its object: left, upper, right, lower, in pixels."""


class CroppedDataset(Dataset):
    """Images cut to a box each."""

    def __init__(self, records: Sequence[Record], boxes: Sequence[tuple[float, ...]], name: str) -> None:
        super().__init__(records, name=name)
        self._boxes = list(boxes)

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """The image of item i within its box, uint8 [H,W,3]."""
        image_HWC = super().image(i, limits)
        height, width = image_HWC.shape[:2]
        left, top, right, bottom = (round(edge) for edge in self._boxes[i])
        left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
        return image_HWC[top : max(bottom, top + 1), left : max(right, left + 1)]

    def subset(self, indices: Iterable[int]) -> "CroppedDataset":
        """As `Dataset.subset`; each image keeps its box, also where several processes share the images."""
        rows = [int(i) for i in indices]
        return CroppedDataset([self._records[i] for i in rows], [self._boxes[i] for i in rows], self.name)

    def fingerprint(self) -> str:
        """Of the whole images and the boxes."""
        return hashlib.sha256(f"{super().fingerprint()} {self._boxes}".encode()).hexdigest()


def landmarks_at(data: str) -> Benchmark | None:
    """The benchmark that `data` names (`roxford5k:ROOT`, or a folder with its ground truth), or None for other data.

    Raises InputError where a benchmark is named that does not lie there.
    """
    name, colon, root = data.partition(":")
    if colon and name in BENCHMARKS:
        for folder in (Path(root) / name, Path(root)):
            if (folder / f"gnd_{name}.pkl").is_file():
                return Benchmark(name, folder)
        raise InputError(f"{data}: no gnd_{name}.pkl in {root} or {Path(root) / name}; wanted it beside jpg/")
    for name in BENCHMARKS:
        if (Path(data) / f"gnd_{name}.pkl").is_file():
            return Benchmark(name, Path(data))
    return None


def open_landmarks(benchmark: Benchmark, crop_queries: bool) -> tuple[Landmarks, Dataset, Dataset]:
    """Ground truth, database and queries. Raises InputError for a ground truth that is not plain, or images missing."""
    path = benchmark.folder / f"gnd_{benchmark.name}.pkl"
    plain = load_plain_pickle(path)
    try:
        names, queries = ([_text(name) for name in plain[key]] for key in ("imlist", "qimlist"))
        marks = tuple({kind: _rows(one[kind], len(names)) for kind in KINDS} for one in plain["gnd"])
        boxes = tuple(_box(one["bbx"]) for one in plain["gnd"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: {type(error).__name__} {error}; wanted imlist, qimlist and gnd with bbx, easy, hard and junk"
        ) from error
    if len(marks) != len(queries):
        raise InputError(f"{path}: {len(queries)} queries but ground truth for {len(marks)}; download it again")
    truth = Landmarks(benchmark.name, tuple(names), marks, boxes)
    database = [_record(benchmark.folder, name) for name in names]
    asked = [_record(benchmark.folder, name) for name in queries]
    shown = CroppedDataset(asked, boxes, "queries") if crop_queries else Dataset(asked, name="queries")
    return truth, Dataset(database, name="database"), shown


def _record(folder: Path, name: str) -> Record:
    if "/" in name or "\\" in name or name.startswith("."):
        raise InputError(f"{folder}: the ground truth names the image {name!r:.80}, which is no plain file name")
    path = folder / "jpg" / f"{name}.jpg"
    if not path.is_file():
        raise InputError(f"{path}: missing, though the ground truth lists it; unpack all images into {folder / 'jpg'}")
    return Record(Item(name), {IMAGE: Member(str(path))})


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise TypeError(f"a file name is a {type(value).__name__}")
    return value


def _rows(values: Any, n: int) -> tuple[int, ...]:
    rows = tuple(int(value) for value in np.asarray(values, dtype=np.int64).ravel()) if len(values) else ()
    if rows and not 0 <= min(rows) <= max(rows) < n:
        raise ValueError(f"image {max(rows)} of {n}")
    return rows


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in values)
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"a box is {left:g} {top:g} {right:g} {bottom:g}")
    return left, top, right, bottom


class _Array:
    """Stands in for numpy's array while a pickle is read; turns into one of numbers at the end."""

    def __init__(self, *_: object) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        flat = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.value)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy's dtype; numbers and truth values only."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or code[:1] not in "biuf" or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"an array of type {code!r:.20}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.value)[0].item()


def _encode(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {codec!r:.20}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes an empty array's bytes for Python 2."""
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
"""What stands in for the names that a pickled array uses."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def load_plain_pickle(path: Path) -> Any:
    """A pickle of containers, numbers, text and numeric arrays; nothing it names is imported or called.

    Raises InputError for any other, and for one that is damaged or larger than MAX_PICKLE_BYTES.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes; a ground truth has at most {MAX_PICKLE_BYTES:,}")
        return _as_plain(_PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(
            f"{path}: not a ground truth of plain values ({str(error)[:120]}); nothing in it was run; download it again"
        ) from error


def _as_plain(value: Any, depth: int = 0) -> Any:
    """The same with arrays in place of their stand-ins."""
    if depth > 20:
        raise pickle.UnpicklingError("it is nested too deeply")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _as_plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(one, depth + 1) for one in value]
    return value
