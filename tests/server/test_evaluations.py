"""Evaluators on the served network: what can be run, one at a time, to the figures of the command, kept over restarts."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import httpx
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import server.evaluations as evaluations_module
from data.errors import InputError
from evaluators import knn
from evaluators.classification import ClassificationRun
from runtimes.open import open_runtime
from server.artifacts import Loaded, load_artifacts
from server.config import ServerConfig
from server.evaluation_options import spec_of
from server.evaluation_process import Job, without_paths
from server.evaluations import EVALUATORS, INTERRUPTED, Evaluation
from server.run import Running
from tests.evaluators.test_video_actions import action_folder
from tests.server.conftest import config_of
from tests.server.images import png

SETS = Path(__file__).parents[3] / "shared" / "data"
ENDS_S = 1200


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def evaluated(network: Path, colours: Path, state: Path) -> Iterator[Running]:
    """A server that may evaluate good images, and text files with the names of images."""
    broken = state / "broken"
    for part in ("train", "val"):
        for label in ("a", "b"):
            (broken / part / label).mkdir(parents=True)
            for number in range(3):
                (broken / part / label / f"{number}.png").write_text("no image")
    config = config_of(network, state / "server", evaluation_data=(f"colours={colours}", f"broken={broken}"))
    with Running(config) as running:
        yield running


@pytest.fixture
def http(evaluated: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=evaluated.addresses.http, timeout=60) as client:
        yield client


def start(http: httpx.Client, evaluator: str, data: str, **options: object) -> str:
    answer = http.post("/v1/evaluations", json={"evaluator": evaluator, "data": data, "options": options})
    assert answer.status_code == 202, answer.text
    return answer.headers["location"]


def finished(http: httpx.Client, where: str) -> dict:
    """The run once it has ended, and every state that was seen on the way."""
    end = time.monotonic() + ENDS_S
    while (run := http.get(where).json())["state"] == "running":
        assert time.monotonic() < end
        assert run["done"] <= run["total"]
        time.sleep(0.1)
    return run


def test_the_choices_are_listed_with_what_each_measures_and_reads(http: httpx.Client) -> None:
    listing = http.get("/v1/evaluations").json()
    assert listing["data"] == ["broken", "colours"]
    assert {one["name"] for one in listing["evaluators"]} == set(EVALUATORS)
    assert all(one["available"] and one["summary"] and one["data"] for one in listing["evaluators"])


def test_an_evaluation_finds_what_the_command_finds_and_is_kept_with_its_report(
    http: httpx.Client, evaluated: Running, network: Path, colours: Path, state: Path
) -> None:
    where = start(http, "knn", "colours", k=[2, 3], temperature=0.1, preset="dino")
    kept_in = http.post("/v2/repository/models/backbone/unload")
    assert (kept_in.status_code, "evaluation" in kept_in.json()["error"]) == (409, True)
    with triton.InferenceServerClient(evaluated.addresses.grpc) as client:
        for change in (client.unload_model, client.load_model):
            with pytest.raises(
                InferenceServerException, match="an evaluation of the served network is running"
            ) as told:
                change("backbone")
            assert told.value.status() == "StatusCode.FAILED_PRECONDITION"
    busy = http.post("/v1/evaluations", json={"evaluator": "linear", "data": "colours"})
    assert busy.status_code == 409
    assert "one at a time" in busy.json()["error"]
    image = {"file": ("a.png", png(0), "image/png")}
    assert http.post("/v1/embeddings", files=image).status_code == 200, "serving goes on beside it"
    run = finished(http, where)
    assert (run["state"], run["error"]) == ("done", None)
    options = ClassificationRun(
        ckpt=str(network / "backbone.safetensors"), data=str(colours), cache_dir=None, device="cpu", threads=1
    )
    spec = knn.KnnSpec(k=(2, 3), temperature=0.1, preset="dino")
    assert run["result"]["metrics"] == json.loads(json.dumps(knn.run(options, spec)["metrics"]))
    assert run["options"] == {"k": [2, 3], "temperature": 0.1, "preset": "dino"}
    assert (run["result"]["model"]["ckpt"], run["result"]["data"]["source"]) == ("served", "colours")
    page = http.get(run["report"])
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "knn on colours" in page.text
    for text in (json.dumps(run), page.text):
        assert str(colours) not in text
        assert "grpc+unix" not in text
        assert str(state) not in text
    kept = json.loads((state / "server" / "evaluations" / f"{run['id']}.json").read_text())
    assert kept == run
    assert run["id"] in {one["id"] for one in http.get("/v1/evaluations").json()["evaluations"]}


@pytest.mark.parametrize(
    ("evaluator", "options", "told"),
    [
        ("knn", {"neighbours": 3}, "knn has no setting 'neighbours'; it has: preset, k, temperature"),
        ("knn", {"out": "/tmp/x"}, "has no setting 'out'"),
        ("knn", {"k": "3"}, "k is '3'"),
        ("knn", {"k": [0]}, "k 0: wanted whole numbers of at least 1"),
        ("knn", {"temperature": float("nan")}, "temperature"),
        ("knn", {"preset": "mine"}, "'dino' or 'dinov2'"),
        ("depth", {"steps": True}, "steps is True"),
        ("depth", {"held_out": 9}, "held_out 9: wanted 1 to 5"),
        ("segmentation", {"enlarge": [1.0]}, "enlarge"),
        ("retrieval", {"by": None}, "by is None"),
        ("knn", [], "options"),
    ],
)
def test_a_setting_that_the_evaluator_does_not_have_or_refuses_starts_nothing(
    http: httpx.Client, evaluator: str, options: object, told: str
) -> None:
    body = json.dumps({"evaluator": evaluator, "data": "colours", "options": options})
    before = len(http.get("/v1/evaluations").json()["evaluations"])
    answer = http.post("/v1/evaluations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert told in answer.json()["error"]
    assert "--" not in answer.json()["error"]
    assert len(http.get("/v1/evaluations").json()["evaluations"]) == before


def test_a_start_that_is_no_json_is_refused_with_its_place(http: httpx.Client) -> None:
    answer = http.post("/v1/evaluations", content=b'{"evaluator": ,}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, "the request is not JSON: Expecting value: char 14")


def test_a_setting_of_text_cannot_be_taken_for_a_flag(http: httpx.Client) -> None:
    run = finished(http, start(http, "retrieval", "colours", by="--out=/nowhere/x.json"))
    assert run["state"] == "failed"
    assert "has no column" in run["error"]


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_setting_that_a_client_may_give_is_a_path(evaluator: str) -> None:
    """The Spec of every evaluator says how it measures; what names files stays with the operator."""
    for name, kind in get_type_hints(spec_of(evaluator)).items():
        assert "Path" not in str(kind), name


def test_a_cancelled_evaluation_ends_soon_and_makes_room(http: httpx.Client) -> None:
    where = start(http, "linear", "colours")
    assert http.delete(where).status_code == 202
    run = finished(http, where)
    assert (run["state"], run["result"], run["report"]) == ("cancelled", None, None)
    assert http.get(f"{where}/report").status_code == 404
    assert http.delete(where).json()["state"] == "cancelled", "once more changes nothing"


def test_whoever_sees_an_evaluation_end_may_start_the_next_at_once(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows its end when it is kept, and not while a slow disk still writes it."""
    writing, written = threading.Event(), threading.Event()
    save = evaluations_module._save

    def slowly(folder: Path, run: Evaluation) -> None:
        if run.state != "running":
            writing.set()
            assert written.wait(60)
        save(folder, run)

    monkeypatch.setattr(evaluations_module, "_save", slowly)
    where = start(http, "linear", "colours")
    http.delete(where)
    assert writing.wait(60)
    assert http.get(where).json()["state"] == "running"
    written.set()
    while http.get(where).json()["state"] == "running":
        pass
    following = start(http, "linear", "colours")
    http.delete(following)
    assert finished(http, following)["state"] == "cancelled"


def test_data_that_cannot_be_used_fails_with_a_line_that_shows_no_path(http: httpx.Client, state: Path) -> None:
    run = finished(http, start(http, "retrieval", "broken"))
    assert run["state"] == "failed"
    assert "cannot be decoded" in run["error"]
    assert str(state) not in json.dumps(run)


def test_what_a_server_kept_is_there_after_a_restart_and_what_it_cut_short_says_so(
    network: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "evaluations"
    (folder / "1-done").mkdir(parents=True)
    (folder / "1-done" / "report.html").write_text("<p>report</p>")
    (folder / "2-running").mkdir()
    done = {"id": "1-done", "evaluator": "knn", "data": "x", "state": "done", "report": "/v1/evaluations/1-done/report"}
    (folder / "1-done.json").write_text(json.dumps(done))
    (folder / "2-running.json").write_text(json.dumps(done | {"id": "2-running", "state": "running"}))
    (folder / "3-cut.json").write_text('{"id": ')
    (folder / "4-list.json").write_text("[]")
    with Running(config_of(network, tmp_path / "state")) as running:
        at = f"{running.addresses.http}/v1/evaluations"
        states = {one["id"]: (one["state"], one["error"]) for one in httpx.get(at).json()["evaluations"]}
        assert states == {"1-done": ("done", None), "2-running": ("failed", INTERRUPTED)}
        assert httpx.get(f"{at}/1-done/report").text == "<p>report</p>"
        assert httpx.get(f"{at}/2-running/report").status_code == 404
        assert httpx.get(f"{at}/..%2f1-done/report").status_code == 404


def test_what_a_server_that_leaves_cuts_short_was_not_cancelled(network: Path, colours: Path, tmp_path: Path) -> None:
    config = config_of(network, tmp_path / "state", evaluation_data=(f"colours={colours}",))
    with Running(config) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        cancelled = start(http, "linear", "colours")
        http.delete(cancelled)
        finished(http, cancelled)
        cut_short = start(http, "linear", "colours")
    with Running(config) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        found = {where: http.get(where).json() for where in (cancelled, cut_short)}
    assert {where: (run["state"], run["error"]) for where, run in found.items()} == {
        cancelled: ("cancelled", None),
        cut_short: ("failed", INTERRUPTED),
    }


def test_a_network_that_is_brought_up_does_not_replace_one_that_is_evaluated_meanwhile(
    network: Path, colours: Path, tmp_path: Path
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def load(config: ServerConfig) -> Loaded:
        if begun.is_set():
            raise AssertionError("a third time")
        if started.is_set():
            begun.set()
            assert go_on.wait(60)
        return load_artifacts(config)

    started = threading.Event()
    config = config_of(network, tmp_path / "state", evaluation_data=(f"colours={colours}",))
    with Running(config, load) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        started.set()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(http.post, "/v2/repository/models/embedding/load")
            assert begun.wait(60)
            where = start(http, "linear", "colours")
            go_on.set()
            assert loading.result().status_code == 409
        http.delete(where)
        assert finished(http, where)["state"] == "cancelled"


@pytest.mark.slow
def test_an_evaluation_ends_with_a_server_that_is_killed(network: Path, colours: Path, tmp_path: Path) -> None:
    """The operating system tells the process; nothing is left to run on for hours."""
    words = ["--models", network, "--collections", tmp_path, "--samples", "none", "--evaluation-data", f"c={colours}"]
    ports = [word for kind in ("http", "grpc", "metrics") for word in (f"--{kind}-port", "0")]
    server = subprocess.Popen(
        [sys.executable, "-m", "server", *map(str, words), *ports], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    ready = next(json.loads(line) for line in server.stdout if line.startswith(b"{"))
    httpx.post(f"{ready['http']}/v1/evaluations", json={"evaluator": "linear", "data": "c"}).raise_for_status()
    end = time.monotonic() + 60
    while not (children := Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)  # long enough for its main to begin
    server.kill()
    server.wait()
    server.stdout.close()
    while (
        Path(f"/proc/{children[0]}/stat").exists()
        and "Z" not in Path(f"/proc/{children[0]}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < end + 60
        time.sleep(0.05)


def test_an_evaluator_whose_outputs_are_missing_says_which(tmp_path: Path) -> None:
    from tests.server.gate import GatedRuntime

    gated = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", evaluation_data=("x=/nothing",))
    with Running(config, gated.load) as running, httpx.Client(base_url=running.addresses.http) as http:
        attention = next(one for one in http.get("/v1/evaluations").json()["evaluators"] if one["name"] == "attention")
        assert (attention["available"], attention["reason"]) == (False, "the served network has no attention")
        refused = http.post("/v1/evaluations", json={"evaluator": "attention", "data": "x"})
        assert refused.status_code == 409
        assert "has no attention" in refused.json()["error"]


def test_paths_are_hidden_and_words_stay() -> None:
    common = {"evaluator": "knn", "address": "grpc+unix:/tmp/x/s", "folder": "/f/1", "cache": "/f/c", "threads": 1}
    clean = without_paths(Job(data="/srv/sets/photos.csv", data_name="mine", **common))
    assert clean("/srv/sets/photos.csv: bad row; see /srv/sets/photos.zip") == "mine: bad row; see photos.zip"
    assert without_paths(Job(data="voc2012:/a/voc", data_name="v", **common))("voc2012:/a/voc or /a/voc") == "v or v"
    assert without_paths(Job(data="photos", data_name="mine", **common))("many photos") == "many photos"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("evaluator", "data"),
    [
        ("linear", "emoji"),
        ("logistic", "emoji"),
        ("ridge", "emoji"),
        ("retrieval", "objects"),
        ("copies", "neardup"),
        ("attention", "stamps"),
        ("segmentation", "rooms"),
        ("depth", "rooms"),
        ("video_objects", "clips"),
    ],
)
def test_every_evaluator_runs_on_what_a_server_gives(network: Path, tmp_path: Path, evaluator: str, data: str) -> None:
    sheet = SETS / f"{data}.csv"
    if not sheet.is_file():
        pytest.skip(f"needs {sheet}")
    config = config_of(network, tmp_path / "state", evaluation_data=(f"{data}={sheet}",))
    with Running(config) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        run = finished(http, start(http, evaluator, data))
        assert (run["state"], run["error"]) == ("done", None)
        assert run["result"]["metrics"]
        page = http.get(run["report"]).text
    found = re.findall(re.escape(str(sheet.parent)) + r"[^<\s]*", page + json.dumps(run))
    assert not found


def test_names_that_are_no_utf8_are_evaluated_as_by_the_command(network: Path, tmp_path: Path) -> None:
    """And what is told of them is JSON that everyone can read."""
    odd = tmp_path / "odd"
    for number, (part, label) in enumerate(itertools.product((b"train", b"val"), (b"caf\xe9", b"b"))):
        folder = os.path.join(os.fsencode(odd), part, label)
        os.makedirs(folder)
        for image in range(3):
            with open(os.path.join(folder, b"\xe9%d.png" % image), "wb") as file:
                file.write(png(3 * number + image))
    config = config_of(network, tmp_path / "state", evaluation_data=(f"odd={odd}",))
    with Running(config) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        run = finished(http, start(http, "knn", "odd"))
        assert (run["state"], run["error"]) == ("done", None)
        assert "knn on odd" in http.get(run["report"]).text


def test_videos_are_evaluated_with_the_settings_asked_for(network: Path, tmp_path: Path) -> None:
    """Short films of two colours."""
    films = action_folder(tmp_path / "films", n_train=2, n_val=1)
    config = config_of(network, tmp_path / "state", evaluation_data=(f"films={films}",))
    with Running(config) as running, httpx.Client(base_url=running.addresses.http, timeout=60) as http:
        run = finished(http, start(http, "video_actions", "films", frames=2, classifier="knn"))
        assert (run["state"], run["error"]) == ("done", None)
        assert run["result"]["settings"]["frames"] == 2
        assert run["result"]["metrics"][run["result"]["headline"]]["value"] == 1.0
        page = http.get(run["report"]).text
    assert str(films) not in page + json.dumps(run)


def test_an_evaluation_wire_is_an_address_that_runtimes_open() -> None:
    with pytest.raises(InputError, match="no server there"):
        open_runtime("grpc+unix:/nowhere/at/all")
