"""A collection to a file and back, in either form."""

import io
import json

import numpy as np
import pytest

from data.errors import InputError
from evaluators import collection_file
from evaluators.collection_file import CollectionFile, read_collection, write_collection


def collection(n: int = 3) -> CollectionFile:
    rng = np.random.default_rng(0)
    return CollectionFile(
        "ab" * 32,
        json.dumps({"size_px": 32}),
        [f"id {i} ü" for i in range(n)],
        ["owl" if i % 2 else None for i in range(n)],
        [json.dumps({"n": i, "ß": "✓"}) for i in range(n)],
        rng.normal(size=(n, 5)).astype(np.float32),
        [bytes([0, i, 255, 0]) if i else None for i in range(n)],
    )


@pytest.mark.parametrize("form", ["npz", "parquet"])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_what_is_written_is_read_back(form: str, n: int) -> None:
    written = collection(n)
    found = read_collection(write_collection(written, form))
    assert (found.about, found.ids, found.labels) == (written.about, written.ids, written.labels)
    assert (found.metadata, found.thumbnails) == (written.metadata, written.thumbnails)
    assert np.array_equal(found.vectors_nD, written.vectors_nD)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PAR1 nonsense", b"PK\3\4 nonsense"])
def test_other_files_are_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(InputError, match="no collection"):
        read_collection(content)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_file_cut_anywhere_is_refused(form: str) -> None:
    whole = write_collection(collection(20), form)
    for share in (0.2, 0.6, 0.98):
        with pytest.raises(InputError):
            read_collection(whole[: int(share * len(whole))])


def test_nothing_is_unpickled(tmp_path) -> None:  # type: ignore[no-untyped-def]
    fields = {name: np.zeros(1) for name in ("label", "metadata", "vector", "thumbnail", "thumbnail_end", "about")}
    np.savez(tmp_path / "evil.npz", id=np.array([{}]), **fields)
    with pytest.raises(InputError, match="no collection"):
        read_collection((tmp_path / "evil.npz").read_bytes())


def test_an_npz_of_something_else_names_what_is_missing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.savez(tmp_path / "a.npz", vector=np.zeros(3))
    with pytest.raises(InputError, match="has no 'about'"):
        read_collection((tmp_path / "a.npz").read_bytes())


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(InputError, match="2 ids and 1 entries of 'label'"):
        CollectionFile("a", "{}", ["x", "y"], [None], ["{}", "{}"], np.zeros((2, 3), np.float32), [None, None])


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InputError, match="wanted npz or parquet"):
        write_collection(collection(), "csv")


@pytest.mark.parametrize(
    ("column", "cells", "said"),
    [
        ("id", np.arange(3), "row 0: 'id' is int; wanted str"),
        ("label", np.arange(3) + 0.5, "row 0: 'label' is float"),
        ("id", np.array(["a", "b", "c\ud800"]), "row 2: 'id' holds half a character"),
    ],
)
def test_cells_of_another_kind_are_refused_with_their_row(column: str, cells: np.ndarray, said: str) -> None:
    with np.load(io.BytesIO(write_collection(collection(), "npz"))) as file:
        changed = dict(file) | {column: cells}
    made = io.BytesIO()
    np.savez(made, **changed)
    with pytest.raises(InputError, match=said):
        read_collection(made.getvalue())


def test_a_parquet_thumbnail_of_text_is_refused_with_its_row() -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(write_collection(collection(), "parquet")))
    at = table.column_names.index("thumbnail")
    made = io.BytesIO()
    pq.write_table(table.set_column(at, "thumbnail", [["x", "y", "z"]]), made)
    with pytest.raises(InputError, match="row 0: 'thumbnail' is str; wanted bytes"):
        read_collection(made.getvalue())


def test_equal_cells_of_parquet_count_as_often_as_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    one = collection(40)
    same = CollectionFile(
        one.weights_sha256, one.preprocess, one.ids, one.labels, one.metadata, one.vectors_nD, [bytes(10_000)] * 40
    )
    content = write_collection(same, "parquet")
    assert len(content) < 20_000
    monkeypatch.setattr(collection_file, "MAX_UNPACKED_BYTES", 200_000)
    with pytest.raises(InputError, match="unpacks to more than 200,000 bytes"):
        read_collection(content)
