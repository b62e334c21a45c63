"""Collections: what was acknowledged stays, search is exact, other networks are kept out."""

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data.errors import InputError
from server.collections import Binding, Collections, NewItem
from server.errors import Conflict, NotFound

BINDING = Binding("a" * 64, "{}", 4)


@pytest.fixture
def store(tmp_path):
    store = Collections(tmp_path, BINDING)
    yield store
    store.close()


def item(*vector, **fields):
    return NewItem(vector=np.array(vector, np.float32), **fields)


def test_items_come_back_in_the_order_of_adding_page_by_page(store):
    store.add("birds", [item(1, 0, 0, n, id=f"i{n}", label="even" if n % 2 == 0 else None) for n in range(5)])
    first = store.page("birds", 0, 3, None)
    second = store.page("birds", first[-1].sequence, 3, None)
    assert [one.id for one in first + second] == ["i0", "i1", "i2", "i3", "i4"]
    assert [one.id for one in store.page("birds", 0, 10, "even")] == ["i0", "i2", "i4"]


def test_metadata_labels_and_thumbnails_are_kept(store):
    store.add("birds", [item(1, 0, 0, 0, id="x", label="owl", metadata={"where": ["Ä"]}, thumbnail=b"jpeg")])
    (found,) = store.page("birds", 0, 10, None)
    assert (found.label, found.metadata, found.has_thumbnail) == ("owl", {"where": ["Ä"]}, True)
    assert store.thumbnail("birds", "x") == b"jpeg"


def test_search_is_exact_and_breaks_ties_by_the_order_of_adding(store):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(200, 4)).astype(np.float32)
    vectors[150] = vectors[3]
    store.add("many", [item(*vector, id=str(row)) for row, vector in enumerate(vectors)])
    queries = np.concatenate([vectors[3:4] * 7, generator.normal(size=(5, 4)).astype(np.float32)])
    snapshot = store.snapshot("many")
    found = snapshot.search(queries, 10)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    np.testing.assert_allclose(found.scores, -np.sort(-cosines, axis=1)[:, :10], atol=1e-6)
    assert [snapshot.ids[row] for row in found.rows[0][:2]] == ["3", "150"]


def test_a_search_sees_what_was_added_and_not_what_was_deleted(store):
    store.add("birds", [item(1, 0, 0, 0, id="a"), item(0, 1, 0, 0, id="b")])
    assert store.snapshot("birds").ids == ("a", "b")
    store.add("birds", [item(0, 0, 1, 0, id="c")])
    store.delete_item("birds", "a")
    assert store.snapshot("birds").ids == ("b", "c")
    np.testing.assert_array_equal(store.snapshot("birds").unit_nD, [[0, 1, 0, 0], [0, 0, 1, 0]])


def test_a_snapshot_in_use_does_not_change_under_writes(store):
    store.add("birds", [item(1, 0, 0, 0, id="a")])
    before = store.snapshot("birds")
    store.add("birds", [item(0, 1, 0, 0, id="b")])
    assert before.ids == ("a",)
    assert before.unit_nD.shape == (1, 4)


def test_all_items_of_a_request_are_added_or_none(store):
    store.add("birds", [item(1, 0, 0, 0, id="a")])
    with pytest.raises(Conflict, match="'a' is taken"):
        store.add("birds", [item(1, 0, 0, 0, id="new"), item(1, 0, 0, 0, id="a")])
    with pytest.raises(Conflict, match="'twin' comes twice"):
        store.add("birds", [item(1, 0, 0, 0, id="twin"), item(1, 0, 0, 0, id="twin")])
    with pytest.raises(Conflict, match="'a' is taken"):  # the last of more ids than one statement may name
        store.add("birds", [*(item(1, 0, 0, 0, id=f"n{n}") for n in range(12_000)), item(1, 0, 0, 0, id="a")])
    assert store.snapshot("birds").ids == ("a",)
    assert [one.id for one in store.page("birds", 0, 10, None)] == ["a"]


@pytest.mark.parametrize("vector", [(0, 0, 0, 0), (1, np.nan, 0, 0), (1e30, 1e30, 1e30, 1e30), (1, 2, 3)])
def test_a_vector_without_a_direction_or_of_another_size_is_refused(store, vector):
    with pytest.raises(InputError, match="embedding"):
        store.add("birds", [item(*vector)])


def test_names_and_ids_are_checked(store):
    for name in ("", "Birds", "../etc", "a/b", "x" * 65, "-a"):
        with pytest.raises(InputError, match="collection name"):
            store.add(name, [item(1, 0, 0, 0)])
    with pytest.raises(InputError, match="id 'a/b'"):
        store.add("birds", [item(1, 0, 0, 0, id="a/b")])


def test_the_collection_samples_is_the_servers_own(store):
    with pytest.raises(Conflict, match="built by the server"):
        store.add("samples", [item(1, 0, 0, 0)])
    store.replace("samples", [item(1, 0, 0, 0, id="s")], "v1")
    store.replace("samples", [item(0, 1, 0, 0, id="t")], "v2")
    assert store.snapshot("samples").ids == ("t",)
    assert store.source("samples") == "v2"


def test_what_is_not_there_is_named_with_what_is(store):
    store.add("birds", [item(1, 0, 0, 0, id="a")])
    with pytest.raises(NotFound, match="there are: birds"):
        store.snapshot("fish")
    with pytest.raises(NotFound, match="no item 'b'"):
        store.delete_item("birds", "b")
    with pytest.raises(NotFound, match="no picture"):
        store.thumbnail("birds", "a")


def test_k_is_held_against_the_size(store):
    store.add("birds", [item(1, 0, 0, 0)])
    assert store.snapshot("birds").check_k(None) == 1
    with pytest.raises(InputError, match=re.escape("wanted 1 to 1")):
        store.snapshot("birds").check_k(2)


def test_another_network_is_refused_but_may_delete(tmp_path):
    first = Collections(tmp_path, BINDING)
    first.add("birds", [item(1, 0, 0, 0)])
    first.replace("samples", [item(1, 0, 0, 0)], "v1")
    first.close()
    other = Collections(tmp_path, Binding("b" * 64, "{}", 4))
    for use in (lambda: other.snapshot("birds"), lambda: other.add("birds", [item(1, 0, 0, 0)])):
        with pytest.raises(Conflict, match="made with weights aaaaaaaaaaaa, and the served weights are bbbbbbbbbbbb"):
            use()
    assert [info.usable for info in other.infos()] == [False, False]
    assert other.source("samples") is None
    other.delete("birds")
    assert [info.name for info in other.infos()] == ["samples"]
    other.close()


def test_one_server_at_a_time_has_the_folder(store, tmp_path):
    with pytest.raises(InputError, match="another server has it open"):
        Collections(tmp_path, BINDING)


def test_a_store_that_cannot_be_read_is_bad_input_that_names_the_folder(tmp_path):
    (tmp_path / "collections.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=f"--collections {tmp_path}: .*not a database"):
        Collections(tmp_path, BINDING)
    (tmp_path / "collections.sqlite").unlink()
    Collections(tmp_path, BINDING).close()  # the folder was let go of


def test_searches_run_beside_writes(store):
    store.add("busy", [item(1, 0, 0, 0, id="first")])
    stop, errors = threading.Event(), []

    def search():
        while not stop.is_set():
            snapshot = store.snapshot("busy")
            found = snapshot.search(np.ones((1, 4), np.float32), snapshot.check_k(None))
            if len(snapshot.ids) != len(snapshot.unit_nD) or found.rows.max() >= len(snapshot.ids):
                errors.append(snapshot)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        store.add("busy", [item(0, 1, number, 0, id=str(number))])
        if number % 3 == 0:
            store.delete_item("busy", str(number))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.snapshot("busy").ids) == 41


WRITER = """
import json, sys
from pathlib import Path
import numpy as np
from server.collections import Binding, Collections, NewItem
store = Collections(Path(sys.argv[1]), Binding("a" * 64, "{}", 4))
print("open", flush=True)
for number in range(100_000):
    batch = [NewItem(vector=np.array([1, number, part, 0], np.float32), thumbnail=bytes(3000)) for part in range(3)]
    print(json.dumps(store.add("kept", batch)), flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_every_acknowledged_item_survives_kill_9_and_no_request_is_half_there(tmp_path, repo_root, seed):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repo_root)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.05, 0.5))
    writer.send_signal(signal.SIGKILL)
    lines = writer.stdout.read().splitlines(keepends=True)
    writer.wait()
    acknowledged = [one for line in lines if line.endswith("\n") for one in json.loads(line)]
    assert acknowledged
    store = Collections(tmp_path, BINDING)
    there = store.snapshot("kept").ids
    store.close()
    assert set(acknowledged) <= set(there)
    assert len(there) % 3 == 0
    assert len(there) - len(acknowledged) <= 3
