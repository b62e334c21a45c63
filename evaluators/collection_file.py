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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import InputError

FORMATS = ("npz", "parquet")
MAX_UNPACKED_BYTES = 8 << 30
"""A file that would take more memory than this is refused before it is read."""
BATCH_ROWS = 1024
"""Of a Parquet file that are unpacked before they are counted."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_NPZ_FIELDS = ("about", "id", "label", "metadata", "vector", "thumbnail", "thumbnail_end")


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


def write_collection(collection: CollectionFile, form: str) -> bytes:
    """The bytes of a file in the form `npz` or `parquet`. Raises InputError for another, or without pyarrow."""
    check_form(form)
    return _to_npz(collection) if form == "npz" else _to_parquet(collection)


def read_collection(content: bytes) -> CollectionFile:
    """A collection from the bytes of a file, of either form. Raises InputError for anything else."""
    try:
        if content[:4] == b"PAR1":
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
    pictures = [picture or b"" for picture in collection.thumbnails]
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        about=np.array(json.dumps(collection.about, sort_keys=True)),
        id=_text(collection.ids),
        label=_text([label or "" for label in collection.labels]),
        metadata=_text(collection.metadata),
        vector=collection.vectors_nD,
        thumbnail=np.frombuffer(b"".join(pictures), np.uint8),
        thumbnail_end=np.cumsum([len(picture) for picture in pictures], dtype=np.int64),
    )
    return file.getvalue()


def _text(values: Sequence[str]) -> np.ndarray:
    # NumPy drops zero characters at the end of a text; ids, labels and JSON hold none there.
    return np.array(list(values), dtype=str) if values else np.zeros(0, "<U1")


def _from_npz(content: bytes) -> CollectionFile:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES:
        raise InputError(f"the file unpacks to {unpacked:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        missing = [name for name in _NPZ_FIELDS if name not in file.files]
        if missing:
            raise InputError(
                f"the .npz has no {missing[0]!r}; wanted a collection as exported: {', '.join(_NPZ_FIELDS)}"
            )
        found = {name: file[name] for name in _NPZ_FIELDS}
    about = json.loads(str(found["about"]))
    joined, ends = found["thumbnail"].tobytes(), found["thumbnail_end"].tolist()
    pictures = [joined[start:end] or None for start, end in zip([0, *ends][: len(ends)], ends, strict=True)]
    labels = [label or None for label in found["label"].tolist()]
    return CollectionFile(
        str(about["weights_sha256"]),
        str(about["preprocess"]),
        found["id"].tolist(),
        labels,
        found["metadata"].tolist(),
        found["vector"],
        pictures,
    )


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(content))
    batches, unpacked = [], 0
    for batch in file.iter_batches(BATCH_ROWS):  # a file tells its size with equal cells counted once
        unpacked += batch.nbytes
        if unpacked > MAX_UNPACKED_BYTES:
            raise InputError(f"the file unpacks to more than {MAX_UNPACKED_BYTES:,} bytes, and no more are read")
        batches.append(batch)
    table = pa.Table.from_batches(batches, file.schema_arrow)
    about = table.schema.metadata or {}
    for name in ("id", "label", "metadata", "vector", "thumbnail"):
        if name not in table.column_names:
            raise InputError(f"the Parquet file has no column {name!r}; it has {', '.join(table.column_names)}")
    if b"weights_sha256" not in about or b"preprocess" not in about:
        raise InputError(
            "the Parquet file does not say which weights made its vectors (schema metadata weights_sha256)"
        )
    vectors = table["vector"].combine_chunks()
    width = vectors.type.list_size if pa.types.is_fixed_size_list(vectors.type) else 0
    flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return CollectionFile(
        about[b"weights_sha256"].decode(),
        about[b"preprocess"].decode(),
        table["id"].to_pylist(),
        table["label"].to_pylist(),
        table["metadata"].to_pylist(),
        flat.reshape(len(table), width or -1) if len(table) else np.zeros((0, width), np.float32),
        table["thumbnail"].to_pylist(),
    )
