"""Named embeddings on disk: what a server's collection is exported to and imported from, and what an exported k-NN model searches.

Two forms of the same table, one row an item: `.npz` (NumPy, read without pickle) and `.parquet` (Apache Parquet, by pyarrow). Columns
`id`, `label`, `metadata` (JSON), `vector` (float32), `thumbnail` (a small JPEG or nothing); beside them the hash of the weights and the
preprocessing that made the vectors, without which they cannot be compared with others.

Axes: n items, D feature size.
"""

import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data.errors import InputError

FORMATS = ("npz", "parquet")
PARQUET = b"PAR1"
"""What a Parquet file begins with."""
MIN_BOUND_BYTES, MAX_GROWTH = 512 << 20, 8
"""A file that unpacks to more than the larger of so many bytes and so many times its own is refused before they are there."""
ROW_BYTES = 512
"""What a row takes besides its cells."""
BATCH_ROWS = 1024
"""Of a Parquet file that are unpacked before they are counted."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_CELLS = ("id", "label", "metadata", "thumbnail")
_NPZ_FIELDS = ("about", *_CELLS, "vector")
_RAGGED = "the vectors of the Parquet file differ in length; wanted as many numbers in each"
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class CollectionFile:
    """A collection as a table."""

    weights_sha256: str
    preprocess: str
    """The preprocessing as JSON with sorted keys."""
    ids: list[str]
    labels: list[str | None]
    metadata: list[str]
    """A JSON object each."""
    vectors_nD: np.ndarray
    """float32, as the network gave them, not normalised."""
    thumbnails: list[bytes | None]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if self.vectors_nD.ndim != 2 or self.vectors_nD.dtype != np.float32:
            raise InputError(
                f"vectors are {self.vectors_nD.dtype} {list(self.vectors_nD.shape)}; wanted float32 [n, D]"
            )
        sizes = {"label": len(self.labels), "metadata": len(self.metadata), "thumbnail": len(self.thumbnails)}
        for name, size in {**sizes, "vector": len(self.vectors_nD)}.items():
            if size != n:
                raise InputError(f"{n} ids and {size} entries of {name!r}; wanted as many")
        _check_column("id", self.ids, str)
        _check_column("label", self.labels, str | None)
        _check_column("metadata", self.metadata, str)
        _check_column("thumbnail", self.thumbnails, bytes | None)
        for row, picture in enumerate(self.thumbnails):
            if picture is not None and not picture.startswith(_JPEG):
                raise InputError(f"row {row}: 'thumbnail' begins with {picture[:4]!r}; wanted a JPEG or nothing")

    @property
    def about(self) -> dict[str, str]:
        """What the vectors depend on."""
        return {"weights_sha256": self.weights_sha256, "preprocess": self.preprocess}


def _check_column(name: str, cells: Sequence[object], wanted: Any) -> None:
    """Raise InputError for a cell of another kind, or text that has no UTF-8."""
    for row, cell in enumerate(cells):
        if not isinstance(cell, wanted):
            raise InputError(
                f"row {row}: {name!r} is {type(cell).__name__}; wanted {getattr(wanted, '__name__', wanted)}"
            )
        if isinstance(cell, str) and _SURROGATE.search(cell):
            raise InputError(
                f"row {row}: {name!r} holds half a character, {cell!r:.80}; wanted text that UTF-8 can hold"
            )


def _check_size(unpacked: int, content: bytes) -> None:
    bound = max(MIN_BOUND_BYTES, MAX_GROWTH * len(content))
    if unpacked > bound:
        raise InputError(f"the file of {len(content):,} bytes unpacks to more than {bound:,}, and no more are read")


def write_collection(collection: CollectionFile, form: str) -> bytes:
    """The bytes of a file in the form `npz` or `parquet`. Raises InputError for another, or without pyarrow."""
    check_form(form)
    return _to_npz(collection) if form == "npz" else _to_parquet(collection)


def read_collection(content: bytes) -> CollectionFile:
    """A collection from the bytes of a file, of either form. Raises InputError for anything else."""
    try:
        if content.startswith(PARQUET):
            check_form("parquet")
            return _from_parquet(content)
        return _from_npz(content)
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile and pyarrow raise many kinds for damaged files
        raise InputError(
            f"the file is no collection ({type(error).__name__}: {error}); wanted .npz or .parquet as exported"
        ) from error


def check_form(form: str) -> None:
    """Raise InputError for a form that is unknown, or that this installation cannot handle."""
    if form not in FORMATS:
        raise InputError(f"format {form!r:.40} is unknown; wanted {' or '.join(FORMATS)}")
    if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            "Parquet needs pyarrow, which is not installed; run: .venv/bin/pip install -c constraints.txt -e '.[parquet]'"
        )


def _to_npz(collection: CollectionFile) -> bytes:
    file = io.BytesIO()
    texts = {
        "id": [text.encode() for text in collection.ids],
        "label": [(text or "").encode() for text in collection.labels],
        "metadata": [text.encode() for text in collection.metadata],
        "thumbnail": [picture or b"" for picture in collection.thumbnails],
    }
    arrays = {name: np.frombuffer(b"".join(cells), np.uint8) for name, cells in texts.items()}
    arrays |= {f"{name}_end": np.cumsum([len(cell) for cell in cells], dtype=np.int64) for name, cells in texts.items()}
    about = np.array(json.dumps(collection.about, sort_keys=True))
    np.savez(file, allow_pickle=False, about=about, vector=collection.vectors_nD, **arrays)
    return file.getvalue()


def _from_npz(content: bytes) -> CollectionFile:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_size(sum(entry.file_size for entry in archive.infolist()), content)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        missing = [name for name in _NPZ_FIELDS if name not in file.files]
        if missing:
            raise InputError(
                f"the .npz has no {missing[0]!r}; wanted a collection as exported: {', '.join(_NPZ_FIELDS)}"
            )
        found = {name: file[name] for name in file.files if name.removesuffix("_end") in _NPZ_FIELDS}
    about = json.loads(str(found["about"]))
    return CollectionFile(
        str(about["weights_sha256"]),
        str(about["preprocess"]),
        _texts(found, "id"),
        [label or None for label in _texts(found, "label")],
        _texts(found, "metadata"),
        found["vector"],
        [picture or None for picture in _cells(found, "thumbnail")],
    )


def _texts(found: Mapping[str, np.ndarray], name: str) -> list[str]:
    """A column of text: UTF-8 bytes behind each other, or NumPy's own text, which pads every cell to the longest."""
    if found[name].dtype.kind == "U" and found[name].ndim == 1:
        return list(found[name].tolist())
    texts = []
    for row, cell in enumerate(_cells(found, name)):
        try:
            texts.append(cell.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"row {row}: {name!r} is {cell!r:.80}; wanted text in UTF-8") from error
    return texts


def _cells(found: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    """A column of bytes behind each other, `NAME_end` telling where each cell ends."""
    joined, ends = found[name], found.get(f"{name}_end", np.zeros((), np.int64))
    if joined.dtype != np.uint8 or joined.ndim != 1 or ends.dtype.kind not in "iu" or ends.ndim != 1:
        raise InputError(
            f"{name!r} is {joined.dtype} {list(joined.shape)}; wanted the bytes of all cells behind each other, uint8, and in "
            f"'{name}_end' where each of them ends, int64"
        )
    borders = [0, *ends.tolist()]
    if borders != sorted(borders) or borders[-1] != len(joined):
        raise InputError(f"'{name}_end' does not rise from 0 to the {len(joined)} bytes of {name!r}")
    whole = joined.tobytes()
    return [whole[start:end] for start, end in pairwise(borders)]


def _to_parquet(collection: CollectionFile) -> bytes:
    import pyarrow as pa  # an optional dependency
    import pyarrow.parquet as pq

    width = collection.vectors_nD.shape[1]
    flat = pa.array(np.ascontiguousarray(collection.vectors_nD).reshape(-1), pa.float32())
    table = pa.table(
        {
            "id": pa.array(collection.ids, pa.string()),
            "label": pa.array(collection.labels, pa.string()),
            "metadata": pa.array(collection.metadata, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, width),
            "thumbnail": pa.array(collection.thumbnails, pa.binary()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(collection.about), sink, compression="zstd")
    return sink.getvalue()


def _from_parquet(content: bytes) -> CollectionFile:
    import pyarrow.parquet as pq

    # Equal cells stay one cell and its index, so that they can be counted before they are unpacked.
    file = pq.ParquetFile(io.BytesIO(content), read_dictionary=list(_CELLS))
    schema, about = file.schema_arrow, file.schema_arrow.metadata or {}
    for name in (*_CELLS, "vector"):
        if name not in schema.names:
            raise InputError(f"the Parquet file has no column {name!r}; it has {', '.join(schema.names)}")
    if b"weights_sha256" not in about or b"preprocess" not in about:
        raise InputError(
            "the Parquet file does not say which weights made its vectors (schema metadata weights_sha256)"
        )
    unpacked = _announced_bytes(file.metadata)
    _check_size(unpacked, content)
    columns: dict[str, list[Any]] = {name: [] for name in _CELLS}
    vectors: list[np.ndarray] = []
    for batch in file.iter_batches(BATCH_ROWS, columns=[*_CELLS, "vector"]):
        unpacked += sum(_cell_bytes(batch.column(name)) for name in _CELLS)
        _check_size(unpacked, content)
        for name in _CELLS:
            columns[name] += batch.column(name).to_pylist()
        vectors.append(_vectors(batch.column("vector")))
    if len({part.shape[1] for part in vectors}) > 1:
        raise InputError(_RAGGED)
    return CollectionFile(
        about[b"weights_sha256"].decode(),
        about[b"preprocess"].decode(),
        columns["id"],
        columns["label"],
        columns["metadata"],
        np.concatenate(vectors) if vectors else np.zeros((0, _width(schema)), np.float32),
        [picture or None for picture in columns["thumbnail"]],
    )


def _announced_bytes(metadata: Any) -> int:
    """What vectors and rows take by themselves, as the file's foot says: numbers may be packed to nearly nothing."""
    numbers = 0
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
        numbers += sum(one.num_values for one in columns if one.path_in_schema.split(".")[0] == "vector")
    return 4 * numbers + ROW_BYTES * int(metadata.num_rows)


def _cell_bytes(column: Any) -> int:
    """What a column's cells take once each is by itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0


def _width(schema: Any) -> int:
    """D of a file without rows, where it says so."""
    return getattr(schema.field("vector").type, "list_size", 0)


def _vectors(column: Any) -> np.ndarray:
    """float32 [n, D] of a batch with at least one row."""
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type) or column.null_count or column.flatten().null_count:
        raise InputError(
            f"the Parquet column 'vector' is {kind}, some of it missing perhaps; wanted lists of float in every row"
        )
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    lengths = set(column.value_lengths().to_pylist())
    if len(lengths) > 1:
        raise InputError(_RAGGED)
    return flat.reshape(len(column), *lengths)
