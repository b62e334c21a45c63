"""Parquet files that would take the server with them are read, and refused, beside it."""

import json
import signal
import sys

import numpy as np
import pytest

from data.errors import InputError
from evaluators.collection_file import CollectionFile, write_collection
from server import file_process
from server.file_process import read_apart

OPTIONAL, REQUIRED = b"\x25\x02\x18\x07element", b"\x25\x00\x18\x07element"
"""What a Parquet schema says of a vector's numbers: its footer counts levels for the first only."""


def parquet() -> bytes:
    vectors = np.ones((2, 5), np.float32)
    about = json.dumps({"size_px": 32})
    table = CollectionFile("ab" * 32, about, ["a", "ü"], ["owl", None], ["{}", "{}"], vectors, [None, b"\xff\xd8\xff"])
    return write_collection(table, "parquet")


def lethal() -> bytes:
    whole = parquet()
    assert whole.count(OPTIONAL) == 1
    return whole.replace(OPTIONAL, REQUIRED)


def test_a_good_file_is_read_as_ever() -> None:
    found = read_apart(parquet())
    assert (found.ids, found.labels, found.thumbnails) == (["a", "ü"], ["owl", None], [None, b"\xff\xd8\xff"])
    assert np.array_equal(found.vectors_nD, np.ones((2, 5)))


def test_what_a_reader_says_of_a_file_is_said_to_the_client() -> None:
    with pytest.raises(InputError, match=r"^the file is no collection \(.*\); wanted .npz or .parquet as exported$"):
        read_apart(parquet()[:-20])


def test_a_file_that_ends_its_reader_is_refused_and_the_server_goes_on(http, goes_on_serving) -> None:
    answer = http.post("/v1/collections/lethal/import", content=lethal())
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the file is no collection")
    assert http.get("/v1/collections/lethal/items").status_code == 404


def test_a_reader_that_dies_is_named_by_its_signal(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    reader = tmp_path / "reader"
    reader.write_text(f"#!{sys.executable}\nimport os\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n")
    reader.chmod(0o755)
    monkeypatch.setattr(file_process.sys, "executable", str(reader))
    with pytest.raises(InputError, match="its reader ended by SIGKILL"):
        read_apart(parquet())


def test_a_reader_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Imports and exports take turns: all would wait for it, for as long as the server lives."""
    reader = tmp_path / "reader"
    reader.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    reader.chmod(0o755)
    monkeypatch.setattr(file_process.sys, "executable", str(reader))
    monkeypatch.setattr(file_process, "READ_S", 1.0)
    with pytest.raises(InputError, match="the file was not read within 1 s"):
        read_apart(parquet())
