"""Collections: what was acknowledged stays, search is exact, other networks are kept out."""

import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest

import server.databases
import server.neighbours
from data.errors import InputError
from evaluators.collection_file import read_collection, write_collection
from server.collection_items import Binding
from server.collections import Collections
from server.databases import open_postgres, open_sqlite
from server.errors import Conflict, NotFound
from tests.server.items import BINDING, item


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    database = (
        open_sqlite(tmp_path) if request.param == "sqlite" else open_postgres(request.getfixturevalue("database_url"))
    )
    store = Collections(database, BINDING)
    yield store
    store.close()


@pytest.mark.parametrize("name", ["nothing", "../x", "a\0b", "\n"])
def test_a_collection_of_whatever_name_is_not_found(store, name):
    for ask in (
        lambda: store.page(name, 0, 1, None),
        lambda: store.snapshot(name),
        lambda: store.thumbnail(name, "i"),
        lambda: store.exported(name),
    ):
        with pytest.raises(NotFound, match="there is no collection"):
            ask()


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


def test_control_characters_are_refused_in_labels_and_name_no_item(store):
    """PostgreSQL keeps no NUL, SQLite does: a client is told the same by both."""
    store.add("birds", [item(1, 0, 0, 0, id="x")])
    with pytest.raises(InputError, match="no control characters"):
        store.add("birds", [item(1, 0, 0, 0, label="a\0b")])
    with pytest.raises(InputError, match="no control characters"):
        store.page("birds", 0, 10, "\0")
    for call in (store.thumbnail, store.delete_item):
        with pytest.raises(NotFound, match="has no item"):
            call("birds", "x\0")


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
    assert found.ids[0][:2] == ["3", "150"]


def test_a_search_sees_what_was_added_and_not_what_was_deleted(store):
    store.add("birds", [item(1, 0, 0, 0, id="a"), item(0, 1, 0, 0, id="b")])
    assert store.snapshot("birds").ids == ("a", "b")
    store.add("birds", [item(0, 0, 1, 0, id="c")])
    store.delete_item("birds", "a")
    assert store.snapshot("birds").ids == ("b", "c")
    found = store.snapshot("birds").search(np.array([[0, 1, 0.1, 0], [1, 0, 0, 0]], np.float32), 2)
    assert found.ids[0] == ["b", "c"]
    assert found.scores[1].tolist() == [0, 0]


def test_what_is_deleted_is_not_kept_in_memory(store):
    store.add("birds", [item(1, 0, 0, 0, id="a")])
    kept = weakref.ref(store.snapshot("birds"))
    store.delete("birds")
    assert kept() is None
    store.add("birds", [item(0, 1, 0, 0, id="b")])
    assert store.snapshot("birds").ids == ("b",)


@pytest.mark.parametrize(
    "metadata", ['{"a": NaN}', '{"a": 1e999}', r'{"a": "\ud800"}', '{"a": ' + "[" * 900 + "]" * 900 + "}", "[]", "x"]
)
def test_metadata_of_a_file_that_could_not_be_written_again_is_refused(store, metadata):
    store.add("birds", [item(1, 0, 0, 0, id="a")])
    table = replace(store.exported("birds"), ids=["b"], metadata=[metadata])
    with pytest.raises(InputError, match="metadata"):
        store.imported("birds", table)
    assert store.snapshot("birds").ids == ("a",)


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
    first = Collections(open_sqlite(tmp_path), BINDING)
    first.add("birds", [item(1, 0, 0, 0)])
    first.replace("samples", [item(1, 0, 0, 0)], "v1")
    first.close()
    other = Collections(open_sqlite(tmp_path), Binding("b" * 64, "{}", 4))
    for use in (lambda: other.snapshot("birds"), lambda: other.add("birds", [item(1, 0, 0, 0)])):
        with pytest.raises(Conflict, match="made with weights aaaaaaaaaaaa, and the served weights are bbbbbbbbbbbb"):
            use()
    assert [info.usable for info in other.infos()] == [False, False]
    assert other.source("samples") is None
    other.delete("birds")
    assert [info.name for info in other.infos()] == ["samples"]
    other.close()


def test_searches_run_beside_writes(store):
    store.add("busy", [item(1, 0, 0, 0, id="first")])
    stop, errors = threading.Event(), []

    def search():
        while not stop.is_set():
            snapshot = store.snapshot("busy")
            found = snapshot.search(np.ones((1, 4), np.float32), snapshot.check_k(None))
            if not set(found.ids[0]) <= set(snapshot.ids) or len(snapshot) != len(snapshot.ids):
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


def test_only_items_of_a_label_are_searched_where_one_is_named(store):
    store.add("birds", [item(1, n / 10, 0, 0, id=f"i{n}", label="even" if n % 2 == 0 else "odd") for n in range(6)])
    snapshot = store.snapshot("birds")
    query = np.array([[1, 0, 0, 0]], np.float32)
    assert snapshot.search(query, 3, "odd").ids == [["i1", "i3", "i5"]]
    assert snapshot.check_k(None, "even") == 3
    with pytest.raises(InputError, match="holds 3 items labelled 'odd'"):
        snapshot.check_k(4, "odd")
    with pytest.raises(InputError, match="holds no items labelled 'none'"):
        snapshot.check_k(None, "none")


def test_a_write_copies_nothing_that_is_there(store):
    store.add("many", [item(1, n, 0, 0, id=str(n)) for n in range(500)])
    before = store.snapshot("many")
    store.add("many", [item(0, 1, 0, 0, id="new")])
    store.delete_item("many", "3")
    after = store.snapshot("many")
    assert np.shares_memory(before.unit_nD, after.unit_nD)
    assert "3" in before.ids
    assert "3" not in after.ids


def test_what_was_removed_is_cleared_away_in_the_end(store):
    store.add("many", [item(1, n, 0, 0, id=str(n), label=str(n % 3)) for n in range(40)])
    store.snapshot("many")
    for n in range(20):
        store.delete_item("many", str(n))
        assert store.snapshot("many").ids == tuple(str(one) for one in range(n + 1, 40))
    store.add("many", [item(1, 0, 0, 1, id="5")])
    snapshot = store.snapshot("many")
    assert snapshot.n < 40
    assert snapshot.ids[-1] == "5"
    assert snapshot.search(np.array([[1, 0, 0, 1]], np.float32), 1).ids == [["5"]]


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (12, 3)])
def test_a_graph_is_built_on_a_quarter_of_the_cores_and_nothing_else_is_slowed(monkeypatch, cores, threads):
    monkeypatch.setattr(server.neighbours, "usable_cores", lambda: cores)
    before = faiss.omp_get_max_threads()

    def build():
        server.neighbours.build_graph(server.neighbours.Snapshot.empty("small", 3))
        return faiss.omp_get_max_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build).result() == threads
    assert faiss.omp_get_max_threads() == before


def test_a_large_collection_is_searched_through_a_graph_that_follows_writes(store, monkeypatch):
    monkeypatch.setattr(server.neighbours, "EXACT_ROWS", 1000)
    monkeypatch.setattr(server.neighbours, "FEW", 50)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 4)).astype(np.float32)
    store.add("large", [item(*vector, id=str(n), label=str(n % 10)) for n, vector in enumerate(vectors)])
    exact = store.snapshot("large")
    deadline = time.monotonic() + 60
    while store.snapshot("large").graph is None and time.monotonic() < deadline:
        time.sleep(0.05)
    store.add("large", [item(*vectors[7], id="twin", label="3")])
    store.delete_item("large", "8")
    snapshot = store.snapshot("large")
    assert snapshot.graph is not None
    queries = vectors[:200]
    found = snapshot.search(queries, 10)
    wanted = exact.search(queries, 10)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.ids, wanted.ids, strict=True))
    assert hits > 0.95 * 2000
    assert found.ids[7][:2] == ["7", "twin"]
    assert all("8" not in row for row in found.ids)
    assert {label for row in snapshot.search(queries, 5, "3").labels for label in row} == {"3"}


def test_writes_by_the_network_before_and_after_a_reload_are_numbered_one_by_one(store):
    """Two writes of one number, and a search that follows by number would miss the second."""
    stores = (store, store.bound_to(store.binding))
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda one: [one.add("birds", [item(1, 0, 0, 0)]) for _ in range(30)], stores):
            assert len(done) == 30
    assert store.snapshot("birds").version == 60


def test_a_collection_goes_to_a_file_and_comes_back(store):
    store.add(
        "birds",
        [item(1, n, 0, 0, id=f"i{n}", label="a", metadata={"n": n}, thumbnail=b"\xff\xd8\xff") for n in range(4)],
    )
    for form in ("npz", "parquet"):
        table = read_collection(write_collection(store.exported("birds"), form))
        assert store.imported(f"copy-{form}", table) == ["i0", "i1", "i2", "i3"]
        (first, *_) = store.page(f"copy-{form}", 0, 10, None)
        assert (first.id, first.label, first.metadata) == ("i0", "a", {"n": 0})
        assert store.thumbnail(f"copy-{form}", "i0") == b"\xff\xd8\xff"
    with pytest.raises(Conflict, match="cannot be compared"):
        store.imported("copy", replace(table, weights_sha256="f" * 64))
    with pytest.raises(InputError, match=r"item 1: metadata .* is no JSON"):
        store.imported("copy", replace(table, metadata=["{}", "[", "{}", "{}"]))
    with pytest.raises(InputError, match=r"item 2: id 'a/b': wanted 1 to 256 characters"):
        store.imported("copy", replace(table, ids=["a", "b", "a/b", "d"]))
    assert "copy" not in [info.name for info in store.infos()]
