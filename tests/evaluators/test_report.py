"""The page of results: everything on it is in the files, nothing is fetched, and names stay text."""

import json
import pickle
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from evaluators import copies, retrieval
from evaluators.report import make_page
from evaluators.report_groups import Found, group_results, load_results, name_networks
from evaluators.report_pictures import Thumbnails
from evaluators.report_tables import grid_lines
from evaluators.suite import SuiteRun, run
from tests.evaluators.fakes import colour_folder, small_checkpoint
from tests.evaluators.test_compare import make_result
from tests.evaluators.test_copies import copydays
from tests.evaluators.test_retrieval import oxford_folder
from tests.evaluators.test_video_actions import action_folder


class Seen(HTMLParser):
    """What a page would fetch, its tags, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("img", "meta", "br", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag


def read(page: str) -> Seen:
    seen = Seen()
    seen.feed(page)
    assert seen.open == []
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in seen.links)
    assert "url(" not in page
    assert "script" not in seen.tags
    return seen


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, measured by three evaluators on the same images."""
    root = tmp_path_factory.mktemp("report")
    data = colour_folder(root / "data", n_train=6, n_val=6, contrast=2)
    for seed in (7, 8):
        ckpt = small_checkpoint(root / f"net{seed}.safetensors", seed=seed)
        options = SuiteRun(
            ckpt=str(ckpt), data=str(data), evaluators=("knn", "retrieval", "ridge"), out=root / "out" / f"net{seed}",
            cache_dir=None, threads=1,
        )  # fmt: skip
        run(options)
    return root / "out"


def test_networks_measured_on_the_same_images_share_a_table(results: Path) -> None:
    groups = group_results(load_results([results]))
    assert [(group.evaluator, len(group.found)) for group in groups] == [("knn", 2), ("retrieval", 2), ("ridge", 2)]
    for group in groups:
        values = [one.result["metrics"][one.result["headline"]]["value"] for one in group.found]
        assert values == sorted(values, reverse=True)
    page = make_page(load_results([results]), "Nets & nets")
    seen = read(page)
    assert "Nets &amp; nets" in page
    assert seen.tags.count("section") == 3
    for shown in (
        "net7.safetensors",
        "net8.safetensors",
        "top1 over neighbours k",
        "what queries find",
        "how this was measured",
    ):
        assert shown in page
    assert sum(link.startswith("data:") for link in seen.links) > 20, "thumbnails"
    assert re.search(r"p [0-9.e-]+", page), "paired comparison"


def test_names_from_files_stay_text_and_missing_pictures_are_left_out(tmp_path: Path) -> None:
    scores = np.array([1, 0, 1, 0], np.float32)
    grid = [{"features": "<script>", "lr_per_256": rate, "top1": rate, "diverged": False} for rate in (0.1, 0.2, 0.5)]
    path = make_result(
        tmp_path / "<img src=x>.json", scores, model={"ckpt": "<b>&", "runtime": "torch"}, grid=grid,
        chosen={"features": "<script>", "lr_per_256": 0.2}, picture_file="../../etc/passwd",
        baselines={"<i>": {"metrics": {}, "difference": {"value": 0.1, "ci95": None, "n": 4}}},
    )  # fmt: skip
    page = make_page(load_results([path]), "<title>")
    seen = read(page)
    assert not {"b>&", "i", "title>"} & set(seen.tags)
    assert "&lt;script&gt;" in page
    assert 'class="chosen"' in page


def test_what_results_say_of_themselves_stands_below_their_figures(tmp_path: Path) -> None:
    """Not in a folded block alone: an interval that is too narrow is read with the figure."""
    said = {"a": ["all <say> this", "only a"], "b": ["all <say> this"]}
    paths = [
        make_result(tmp_path / f"{name}.json", np.ones(4, np.float32), notes=notes) for name, notes in said.items()
    ]
    page = make_page(load_results(paths), "title")
    read(page)
    assert '<ul class="soft"><li>all &lt;say&gt; this</li><li>a: only a</li></ul>' in page
    plain = make_result(tmp_path / "plain.json", np.ones(4, np.float32))
    assert "<ul" not in make_page(load_results([plain]), "title")


def test_a_result_that_the_suite_could_not_measure_again_is_told_to_be_of_an_earlier_run(tmp_path: Path) -> None:
    data, ckpt = colour_folder(tmp_path / "data", n_train=6, n_val=2), small_checkpoint(tmp_path / "a.safetensors")
    options = SuiteRun(
        ckpt=str(ckpt), data=str(data), evaluators=("knn",), out=tmp_path / "out", cache_dir=None, threads=1
    )
    run(options)
    assert "of an earlier run" not in make_page(load_results([tmp_path / "out"]), "title")
    shutil.rmtree(data / "val")
    with pytest.raises(InputError, match="1 of 1 evaluators failed"):
        run(options)
    for places in ([tmp_path / "out"], [tmp_path / "out" / "knn.json"]):
        page = make_page(load_results(places), "title")
        assert "<li>of an earlier run: when the suite last ran, this evaluator failed (" in page


def test_lower_is_better_puts_the_smallest_error_first(tmp_path: Path) -> None:
    for name, error in (("a", 0.5), ("b", 0.25)):
        metrics = {"rmse": {"value": error, "ci95": [0.1, 0.9], "n": 4, "lower_is_better": True, "unit": "metre"}}
        make_result(tmp_path / f"{name}.json", np.full(4, error), metrics=metrics, headline="rmse")
    (group,) = group_results(load_results([tmp_path]))
    assert [one.path.stem for one in group.found] == ["b", "a"]
    page = make_page(load_results([tmp_path]), "t")
    assert "rmse\u00a0↓" in page
    assert "0.250 metre" in page


def test_other_data_is_another_table(tmp_path: Path) -> None:
    for name in "ab":
        make_result(tmp_path / f"{name}.json", np.ones(4, np.float32), fingerprint={"val": name})
    make_result(tmp_path / "c.json", np.ones(4, np.float32), fingerprint={"val": "b"}, truth_fingerprint={"val": "c"})
    assert len(group_results(load_results([tmp_path]))) == 3


def test_what_is_no_result_is_refused_or_passed_over(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps({"schema": "dinoscope.suite/1"}))
    (tmp_path / "notes.json").write_text("no json")
    with pytest.raises(
        InputError, match=r"no result files; what is there is none: .*wanted schema 'dinoscope\.result/1'"
    ):
        load_results([tmp_path])
    with pytest.raises(InputError, match="nothing there"):
        load_results([tmp_path / "absent"])
    with pytest.raises(InputError, match="no readable result file"):
        load_results([tmp_path / "notes.json"])
    (tmp_path / "old.json").write_text(json.dumps({"schema": "dinoscope.result/0"}))
    with pytest.raises(InputError, match=r"schema 'dinoscope.result/0', wanted"):
        load_results([tmp_path])


def test_a_result_without_predictions_is_still_listed(tmp_path: Path) -> None:
    path = make_result(tmp_path / "a.json", np.ones(4, np.float32))
    (tmp_path / "a.predictions.npz").unlink()
    assert "a.json" not in make_page(load_results([path]), "t")
    assert load_results([path])[0].scored is None


def test_tries_are_averaged_along_a_curve() -> None:
    grid = [{"k": k, "n_per_class": n, "top1": 0.1 * k + t} for k in (1, 2) for n in (1, 5) for t in (0.0, 0.2)]
    lines = grid_lines(grid, "k", "top1")
    assert lines == {f", n_per_class {n}": [(1, pytest.approx(0.2)), (2, pytest.approx(0.3))] for n in (1, 5)}
    assert grid_lines([{"k": "x", "top1": None}], "k", "top1") == {}


def test_results_of_another_schema_are_named_with_what_was_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, words), "--out", str(tmp_path / "page.html")])
        monkeypatch.delitem(sys.modules, "evaluators.report", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("evaluators.report", run_name="__main__")
        return int(ended.value.code or 0)

    folder = tmp_path / "alien"
    folder.mkdir()
    (folder / "a.json").write_text('{"schema": "other.result/1", "metrics": {}}')
    (folder / "b.json").write_text("{")
    assert status(folder) == 2
    said = capsys.readouterr().err
    assert f"{folder / 'a.json'} (schema 'other.result/1'), {folder / 'b.json'} (no readable JSON)" in said
    assert "wanted schema 'dinoscope.result/1': run evaluators with --out" in said
    assert status(folder / "a.json") == 2
    assert f"{folder / 'a.json'}: schema 'other.result/1', wanted 'dinoscope.result/1'" in capsys.readouterr().err
    (folder / "newer.json").write_text('{"schema": "dinoscope.result/2"}')
    assert status(folder) == 2
    assert "newer.json: schema 'dinoscope.result/2', wanted 'dinoscope.result/1'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    make_result(folder / "newer.json", np.ones(4, np.float32))
    (folder / "suite.json").write_text('{"schema": "dinoscope.suite/1"}')
    assert status(folder) == 0
    said = capsys.readouterr().err
    assert f"note: {folder / 'a.json'} is no result of ours and was passed over" in said
    assert "suite.json" not in said


def two_results(root: Path, *changes: dict[str, dict[str, object]]) -> list[Found]:
    """Results on the same images, each with parts of it changed."""
    for number, change in enumerate(changes):
        path = make_result(root / f"{number}.json", np.arange(20) % (number + 2) == 0)
        result = json.loads(path.read_text())
        for part, values in change.items():
            result[part] |= values
        path.write_text(json.dumps(result))
    return load_results([root])


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([("run1/teacher.safetensors", "a"), ("run2/teacher.safetensors", "b")], ["run1/teacher.safetensors", "run2/teacher.safetensors"]),
        ([("x/net.safetensors", "a"), ("/far/x/net.safetensors", "a")], ["net.safetensors", "net.safetensors"]),
        ([("net.safetensors", "aaaaaaaaaa"), ("net.safetensors", "bbbbbbbbbb")], ["net.safetensors aaaaaaaa", "net.safetensors bbbbbbbb"]),
        ([("grpc://h:1", "a"), ("a/b.safetensors", "b")], ["grpc://h:1", "b.safetensors"]),
    ],
)  # fmt: skip
def test_networks_are_named_by_as_much_of_their_path_as_tells_them_apart(
    models: list[tuple[str, str]], names: list[str]
) -> None:
    assert name_networks([{"ckpt": ckpt, "weights_sha256": weights} for ckpt, weights in models]) == names


def test_two_networks_of_one_file_name_both_stand_in_the_overview(tmp_path: Path) -> None:
    found = two_results(
        tmp_path,
        {"model": {"ckpt": "run1/last.safetensors", "weights_sha256": "a" * 64}},
        {"model": {"ckpt": "run2/last.safetensors", "weights_sha256": "b" * 64}},
    )
    overview_table = make_page(found, "t").split("</table>")[0]
    assert ("run1/last.safetensors" in overview_table, "run2/last.safetensors" in overview_table) == (True, True)


def test_results_of_one_network_are_told_apart_by_what_was_set(tmp_path: Path) -> None:
    found = two_results(
        tmp_path,
        *(
            {"settings": {"preset": preset, "size_px": size_px, "group": "g"}, "model": {"ckpt": "net.safetensors"}}
            for preset, size_px in (("dino", 320), (None, 128), (None, 128))
        ),
    )
    (group,) = group_results(found)
    assert {one.path.name: one.apart for one in group.found} == {
        "0.json": "preset dino",
        "1.json": "no preset, 1.json",
        "2.json": "no preset, 2.json",
    }
    assert "<small>preset dino</small>" in make_page(found, "t")


def strips(page: str) -> list[tuple[str, str, bool]]:
    """Of every thumbnail the class of its frame, its image's name, and whether it shows the image."""
    found = re.findall(r'<figure class="(query|hit|miss)" title="([^"]*)">(<img)?', page)
    return [(kind, name, bool(image)) for kind, name, image in found]


def test_strips_of_copydays_show_queries_and_what_they_find(tmp_path: Path) -> None:
    root, ckpt = copydays(tmp_path / "copydays"), small_checkpoint(tmp_path / "a.safetensors")
    copies.run(
        copies.CopiesRun(
            ckpt=str(ckpt), data=f"copydays:{root}", cache_dir=None, threads=1, out=tmp_path / "r" / "c.json"
        )
    )
    seen = strips(make_page(load_results([tmp_path / "r"]), "t"))
    assert len(seen) == 6 * (1 + 5), "six altered images, which search five originals"
    assert all(shown for _, _, shown in seen)
    for start in range(0, len(seen), 6):
        (_, query, _), *found = seen[start : start + 6]
        assert [name for kind, name, _ in found if kind == "hit"] == [f"{query[:4]}00.jpg"]


def test_strips_of_landmarks_pass_over_junk_and_mark_what_is_relevant(tmp_path: Path) -> None:
    oxford = oxford_folder(tmp_path)
    path = oxford / "roxford5k" / "gnd_roxford5k.pkl"
    truth = pickle.loads(path.read_bytes())
    truth["gnd"][0] |= {"easy": [0], "hard": [2], "junk": [4]}
    path.write_bytes(pickle.dumps(truth))
    options = retrieval.RetrievalRun(
        ckpt=str(small_checkpoint(tmp_path / "a.safetensors")), data=f"roxford5k:{oxford}", cache_dir=None, threads=1,
        out=tmp_path / "r" / "o.json",
    )  # fmt: skip
    retrieval.run(options, retrieval.RetrievalSpec(size_px=64, scales=(1.0,)))
    seen = strips(make_page(load_results([tmp_path / "r"]), "t"))
    assert all(shown for _, _, shown in seen)
    first = seen.index(("query", "qa", True))
    own = [kind for kind, *_ in seen[first + 1 :]]
    of_qa = seen[first + 1 : first + 1 + (own.index("query") if "query" in own else len(own))]
    assert {name for kind, name, _ in of_qa if kind == "hit"} == {"a0", "a1"}
    assert {name for _, name, _ in of_qa} == {"a0", "b0", "a1", "b1", "b2"}, "a2 is junk"


def test_a_video_is_shown_by_its_middle_frame(tmp_path: Path) -> None:
    source = str(action_folder(tmp_path / "data", n_train=1, n_val=1))
    thumbnails = Thumbnails({"evaluator": "video_actions", "data": {"source": source}})
    for name in ("val/Run/as_frames", "val/Swim/clip0.avi"):
        assert "<img" in thumbnails.figure(name, "miss")
    assert "<img" not in thumbnails.figure("val/Run/gone.avi", "miss")
