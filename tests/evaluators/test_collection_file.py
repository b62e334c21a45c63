"""A collection to a file and back, in either form."""

import json

import numpy as np
import pytest

from data.errors import InputError
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
