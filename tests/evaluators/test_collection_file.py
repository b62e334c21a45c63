"""A collection to a file and back, in either form."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from evaluators import collection_file
from evaluators.collection_file import CollectionFile, read_collection, write_collection

JPEG = b"\xff\xd8\xff"


def collection(n: int = 3) -> CollectionFile:
    rng = np.random.default_rng(0)
    return CollectionFile(
        "ab" * 32,
        json.dumps({"size_px": 32}),
        [f"id {i} ü" for i in range(n)],
        ["owl" if i % 2 else None for i in range(n)],
        [json.dumps({"n": i, "ß": "✓"}) for i in range(n)],
        rng.normal(size=(n, 5)).astype(np.float32),
        [JPEG + bytes([0, i, 255, 0]) if i else None for i in range(n)],
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
    fields = {name: np.zeros(1) for name in ("label", "metadata", "vector", "thumbnail", "about")}
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


def changed_npz(**columns: np.ndarray) -> bytes:
    """A collection of three items with other columns."""
    with np.load(io.BytesIO(write_collection(collection(), "npz"))) as file:
        changed = dict(file) | columns
    made = io.BytesIO()
    np.savez(made, **changed)
    return made.getvalue()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": np.arange(3)}, r"'id' is int64 \[3\]; wanted the bytes of all cells behind each other"),
        ({"label": np.zeros(3, np.int8)}, r"'label' is int8 \[3\]; wanted the bytes"),
        ({"label": np.array([["a"], ["b"], ["c"]])}, r"'label' is <U1 \[3, 1\]; wanted"),
        ({"id": np.array(["a", "b", "c\ud800"])}, "row 2: 'id' holds half a character"),
        ({"id": np.frombuffer(b"a\xffc", np.uint8), "id_end": np.array([1, 2, 3])}, r"row 1: 'id' is b'\\xff'; wanted text in UTF-8"),
        ({"id_end": np.array([8, 4, 12])}, "'id_end' does not rise from 0"),
        ({"thumbnail_end": np.array([0, 7, 13])}, "'thumbnail_end' does not rise from 0 to the 14 bytes"),
        ({"thumbnail_end": np.array([-1, 7, 14])}, "'thumbnail_end' does not rise from 0"),
        ({"thumbnail_end": np.array([0.0, 7.0, 14.0])}, "'thumbnail' is uint8"),
        (
            {"thumbnail": np.frombuffer(b"<script>alert", np.uint8), "thumbnail_end": np.array([0, 0, 13])},
            "row 2: 'thumbnail' begins with b'<scr'; wanted a JPEG",
        ),
    ],
)  # fmt: skip
def test_cells_of_another_kind_are_refused_with_their_row(columns: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_collection(changed_npz(**columns))


def test_a_file_that_somebody_wrote_with_numpys_own_text_is_read() -> None:
    found = read_collection(changed_npz(id=np.array(["a", "b", "cü"]), label=np.array(["", "x", ""])))
    assert (found.ids, found.labels) == (["a", "b", "cü"], [None, "x", None])


def test_one_long_text_does_not_pad_the_others() -> None:
    one = collection(100)
    content = write_collection(replace(one, metadata=[*one.metadata[:-1], json.dumps("x" * 100_000)]), "npz")
    assert len(content) < 120_000


def changed_parquet(**columns: Any) -> bytes:
    """A collection of three items with other columns."""
    table = pq.read_table(io.BytesIO(write_collection(collection(), "parquet")))
    for name, cells in columns.items():
        table = table.set_column(table.column_names.index(name), name, [cells])
    made = io.BytesIO()
    pq.write_table(table, made)
    return made.getvalue()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"thumbnail": ["x", "y", "z"]}, "row 0: 'thumbnail' is str; wanted bytes"),
        ({"thumbnail": [b"", None, b"PNG"]}, "row 2: 'thumbnail' begins with b'PNG'; wanted a JPEG or nothing"),
        ({"id": [1, 2, 3]}, "row 0: 'id' is int; wanted str"),
        ({"id": ["a", None, "c"]}, "row 1: 'id' is NoneType; wanted str"),
        ({"vector": [[1.0], [2.0, 3.0], [4.0]]}, "differ in length; wanted as many numbers in each"),
        ({"vector": [[1.0], None, [4.0]]}, "wanted lists of float in every row"),
        ({"vector": [[1.0], [None], [4.0]]}, "wanted lists of float in every row"),
        ({"vector": [1.0, 2.0, 3.0]}, "'vector' is double"),
        ({"vector": [["a"], ["b"], ["c"]]}, "'vector' is list<element: string>"),
    ],
)
def test_parquet_cells_of_another_kind_are_refused(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_collection(changed_parquet(**columns))


def test_vectors_of_doubles_in_lists_are_read_as_others_write_them() -> None:
    found = read_collection(changed_parquet(vector=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.5]]))
    assert found.vectors_nD.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.5]]
    assert found.vectors_nD.dtype == np.float32


def test_vectors_may_differ_neither_within_nor_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_file, "BATCH_ROWS", 1)
    with pytest.raises(InputError, match="differ in length"):
        read_collection(changed_parquet(vector=[[1.0], [2.0], [3.0, 4.0]]))


@pytest.mark.parametrize("column", ["id", "metadata", "thumbnail"])
def test_equal_cells_of_parquet_are_counted_as_often_as_they_are_there_before_they_are_unpacked(
    column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[Any] = [JPEG + bytes(10_000)] * 3 if column == "thumbnail" else ["x" * 10_000] * 3
    content = changed_parquet(**{column: cells})
    assert len(content) < 10_000
    monkeypatch.setattr(collection_file, "MIN_BOUND_BYTES", 20_000)
    monkeypatch.setattr(collection_file, "MAX_GROWTH", 1)
    with pytest.raises(InputError, match="unpacks to more than 20,000, and no more are read"):
        read_collection(content)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_equal_vectors_and_empty_rows_are_counted_before_they_are_unpacked(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = np.ones((500, 64), np.float32)
    same = CollectionFile("a", "{}", ["a"] * 500, [None] * 500, ["{}"] * 500, ones, [None] * 500)
    content = write_collection(same, form)
    monkeypatch.setattr(collection_file, "MIN_BOUND_BYTES", 500 * 64 * 4)
    monkeypatch.setattr(collection_file, "MAX_GROWTH", 0)
    with pytest.raises(InputError, match="unpacks to more than 128,000"):
        read_collection(content)


def test_a_large_file_may_unpack_to_a_multiple_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_file, "MIN_BOUND_BYTES", 0)
    noise = np.random.default_rng(0)
    whole = replace(collection(40), thumbnails=[JPEG + noise.bytes(10_000) for _ in range(40)])
    for form in ("npz", "parquet"):
        assert len(read_collection(write_collection(whole, form)).ids) == 40
