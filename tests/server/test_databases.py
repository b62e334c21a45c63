"""Where collections are kept: several servers on one database, `kill -9`, a full disk, a store that cannot be used."""

import gc
import json
import random
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import server.databases
import server.neighbours
from data.errors import InputError
from server.collection_items import Binding
from server.collections import Collections
from server.databases import open_database, open_postgres, open_sqlite
from server.errors import Conflict, NotFound, StorageFailed
from tests.server.items import BINDING, item


def test_one_server_at_a_time_has_the_folder(tmp_path):
    store = Collections(open_sqlite(tmp_path), BINDING)
    with pytest.raises(InputError, match="another server has it open"):
        Collections(open_sqlite(tmp_path), BINDING)
    store.close()


def test_a_store_that_cannot_be_read_is_bad_input_that_names_the_folder(tmp_path):
    (tmp_path / "collections.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=f"--collections {tmp_path}: .*not a database"):
        Collections(open_sqlite(tmp_path), BINDING)
    (tmp_path / "collections.sqlite").unlink()
    Collections(open_sqlite(tmp_path), BINDING).close()  # the folder was let go of


def test_a_write_does_not_wait_forever_for_another_servers(database_url, monkeypatch):
    import psycopg

    monkeypatch.setattr(server.databases, "LOCK_S", 1)
    database = open_postgres(database_url)
    store = Collections(database, BINDING)
    store.add("birds", [item(1, 0, 0, 0, id="first")])
    with psycopg.connect(database_url) as other:
        other.execute("SELECT * FROM collections FOR UPDATE")
        with pytest.raises(StorageFailed, match=r"cannot be read or written: .*lock timeout"):
            store.add("birds", [item(0, 1, 0, 0)])
    store.add("birds", [item(0, 1, 0, 0, id="second")])
    assert [one.id for one in store.page("birds", 0, 10, None)] == ["first", "second"]
    store.close()


def test_a_collection_that_several_servers_make_at_once_is_one_with_all_their_items(database_url):
    stores = [Collections(open_postgres(database_url), BINDING) for _ in range(4)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for n in range(10):
            added = pool.map(lambda store, n=n: store.add(f"new-{n}", [item(1, 0, 0, 0)]), stores)
            assert len({one for ids in added for one in ids}) == len(stores)
            assert len(stores[0].page(f"new-{n}", 0, 10, None)) == len(stores)
    for store in stores:
        store.close()


def test_servers_that_start_at_once_build_the_same_samples(database_url):
    stores = [Collections(open_postgres(database_url), BINDING) for _ in range(4)]
    new = [item(1, n, 0, 0, id=str(n)) for n in range(50)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for _ in range(5):
            assert list(pool.map(lambda store: store.replace("samples", new, "of these"), stores)) == [None] * 4
            assert stores[0].snapshot("samples").ids == tuple(map(str, range(50)))
    for store in stores:
        store.close()


def test_servers_of_two_networks_search_their_own_samples_and_list_those_made_last(database_url):
    first, second = (Collections(open_postgres(database_url), one) for one in (BINDING, Binding("b" * 64, "{}", 4)))
    for store, name in ((first, "old"), (second, "new")):
        store.replace("samples", [item(1, 0, 0, 0, id=name)], "of these")
        store.snapshot("samples")
    assert (first.snapshot("samples").ids, second.snapshot("samples").ids) == (("old",), ("new",))
    assert [[one.id for one in store.page("samples", 0, 10, None)] for store in (first, second)] == [["new"]] * 2
    assert (first.source("samples"), second.source("samples")) == (None, "of these"), "who starts next makes them anew"
    for store in (first, second):
        store.close()


def test_a_collection_that_another_server_deleted_is_not_kept_in_memory(database_url):
    first, second = (Collections(open_postgres(database_url), BINDING) for _ in range(2))
    first.add("gone", [item(1, 0, 0, 0, id="a")])
    kept = weakref.ref(second.snapshot("gone"))
    first.delete("gone")
    with pytest.raises(NotFound):
        second.snapshot("gone")
    gc.collect()
    assert kept() is None


def test_servers_of_one_database_see_each_others_writes_at_once(database_url):
    first, second = (Collections(open_postgres(database_url), BINDING) for _ in range(2))
    first.add("shared", [item(1, 0, 0, 0, id="a")])
    assert second.snapshot("shared").ids == ("a",)
    second.add("shared", [item(0, 1, 0, 0, id="b")])
    first.delete_item("shared", "a")
    assert first.snapshot("shared").ids == second.snapshot("shared").ids == ("b",)
    first.add("shared", [item(0, 0, 1, 0, id="a")])
    assert second.snapshot("shared").ids == ("b", "a")
    first.delete("shared")
    first.add("shared", [item(0, 0, 0, 1, id="z")])
    assert second.snapshot("shared").ids == ("z",)
    with pytest.raises(Conflict, match="'z' is taken"):
        second.add("shared", [item(1, 0, 0, 0, id="z")])
    first.close()
    second.close()


def test_writers_of_several_servers_lose_nothing(database_url):
    stores = [Collections(open_postgres(database_url), BINDING) for _ in range(3)]
    stores[0].add("busy", [item(1, 0, 0, 0, id="first")])

    def write(number):
        for n in range(15):
            stores[number].add("busy", [item(1, number, n, 0, id=f"{number}-{n}")])
            if n % 5 == 4:
                stores[number].delete_item("busy", f"{number}-{n}")
            stores[(number + 1) % 3].snapshot("busy")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    wanted = {"first"} | {f"{number}-{n}" for number in range(3) for n in range(15) if n % 5 != 4}
    for store in stores:
        assert set(store.snapshot("busy").ids) == wanted
        assert len(store.snapshot("busy")) == len(wanted)
        store.close()


def test_a_database_that_cannot_be_used_is_told_without_its_password(tmp_path):
    for url in ("mysql://u:secret@h/d", "postgresql://u:secret@127.0.0.1:1/d", "nonsense", "postgresql://u:secret@h"):
        with pytest.raises(InputError, match="--database") as told:
            open_postgres(url)
        assert "secret" not in str(told.value)


WRITER = """
import json, sys
from pathlib import Path
import numpy as np
from server.collection_items import Binding, NewItem
from server.collections import Collections
from server.databases import open_database
store = Collections(open_database(Path(sys.argv[1]), *sys.argv[2:] or [None]), Binding("a" * 64, "{}", 4))
print("open", flush=True)
for number in range(100_000):
    batch = [NewItem(vector=np.array([1, number, part, 0], np.float32), thumbnail=bytes(3000)) for part in range(3)]
    print(json.dumps(store.add("kept", batch)), flush=True)
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 100))])
def test_every_acknowledged_item_survives_kill_9_and_no_request_is_half_there(kind, seed, tmp_path, repo_root, request):
    url = [] if kind == "sqlite" else [request.getfixturevalue("database_url")]
    command = [sys.executable, "-c", WRITER, str(tmp_path), *url]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repo_root)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.05, 0.5))
    writer.send_signal(signal.SIGKILL)
    lines = writer.stdout.read().splitlines(keepends=True)
    writer.wait()
    acknowledged = [one for line in lines if line.endswith("\n") for one in json.loads(line)]
    store = Collections(open_database(tmp_path, *url or [None]), BINDING)
    there = store.snapshot("kept").ids if store.infos() else ()
    store.close()
    assert set(acknowledged) <= set(there)
    assert len(there) % 3 == 0
    assert len(there) - len(acknowledged) <= 3


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from server.collection_items import Binding, NewItem
from server.collections import Collections
from server.databases import open_sqlite
from server.errors import StorageFailed
store = Collections(open_sqlite(Path(sys.argv[1])), Binding("a" * 64, "{}", 4))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
kept = []
try:
    for number in range(1000):
        item = NewItem(vector=np.array([1, number, 0, 0], np.float32), thumbnail=bytes(3000))
        kept += store.add("kept", [item])
except StorageFailed as error:
    there = store.snapshot("kept")
    print(json.dumps([str(error), kept, there.ids, there.search(np.ones((1, 4), np.float32), 1).ids]))
"""


def test_a_full_disk_is_told_and_reads_go_on(tmp_path, repo_root):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=repo_root, check=True
    )
    told, kept, there, found = json.loads(done.stdout)
    assert "cannot be read or written" in told
    assert len(kept) > 5
    assert there == kept
    assert len(found[0]) == 1
