"""A list of evaluators from one extraction: each once, again only where something changed, the rest in spite of a failure."""

import importlib
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import InputError
from evaluators import suite
from evaluators.results import load_result
from evaluators.suite import Entry, SuiteRun, available, data_mark, evaluate, plan, run, versions_of
from tests.evaluators.fakes import colour_folder, small_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    root = tmp_path_factory.mktemp("suite")
    ckpt = small_checkpoint(root / "small.safetensors", seed=7)
    data = colour_folder(root / "data", n_train=6, n_val=4, contrast=10)
    return SuiteRun(
        ckpt=str(ckpt), data=str(data), evaluators=("knn", "retrieval"), out=root / "out", cache_dir=root / "cache",
        threads=1, device="cpu",
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the evaluators that really run."""
    names: list[str] = []
    whole = suite.evaluate

    def counted(entry: Entry, out: Path, options: SuiteRun) -> dict[str, object]:
        names.append(entry.name)
        return whole(entry, out, options)

    monkeypatch.setattr(suite, "evaluate", counted)
    return names


def test_results_are_made_once_and_again_where_their_inputs_changed(base: SuiteRun, ran: list[str]) -> None:
    run(base)
    assert ran == ["knn", "retrieval"]
    results = {name: load_result(base.out / f"{name}.json") for name in ran}
    assert results["knn"]["timing"]["features_from_cache"] is False
    assert results["retrieval"]["timing"]["features_from_cache"] is True, "one extraction"
    run(base)
    assert ran == ["knn", "retrieval"], "nothing changed"
    (base.out / "knn.json").unlink()
    run(base)
    assert ran == ["knn", "retrieval", "knn"], "one result was lost"
    (base.out / "retrieval.json").write_text("{")
    run(replace(base, evaluators=("knn", "retrieval", "ridge")))
    assert ran[3:] == ["retrieval", "ridge"], "one damaged, one new"
    image = next(Path(base.data).rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    run(base)
    assert ran[5:] == ["knn", "retrieval"], "the data changed"
    small_checkpoint(Path(base.ckpt), seed=8)
    run(base)
    assert ran[7:] == ["knn", "retrieval"], "the network changed"
    knn, retrieval = (base.out / f"{name}.json" for name in ("knn", "retrieval"))
    knn.write_bytes(retrieval.read_bytes())
    run(base)
    assert ran[9:] == ["knn"], "another result was put in its place"
    entries = json.loads((base.out / "suite.json").read_text())["entries"]
    assert set(entries) == {"knn.json", "retrieval.json"}, "ridge was of another network"
    assert all(entry["status"] == "done" for entry in entries.values())


def test_one_failure_costs_one_evaluator(base: SuiteRun, tmp_path: Path, ran: list[str]) -> None:
    options = replace(base, evaluators=("depth", "knn"), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"1 of 2 evaluators failed, first depth .* not every image has a depth map"):
        run(options)
    assert (tmp_path / "out" / "knn.json").is_file()
    with pytest.raises(InputError, match="1 of 2"):
        run(options)
    assert ran == ["depth", "knn", "depth"], "only what failed is tried again"


def test_an_interrupted_suite_goes_on_where_it_stopped(
    base: SuiteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, whole, ran = replace(base, out=tmp_path / "out"), suite.evaluate, []

    def stopped(entry: Entry, out: Path, given: SuiteRun) -> dict[str, object]:
        if entry.name == "retrieval":
            raise KeyboardInterrupt
        return whole(entry, out, given)

    monkeypatch.setattr(suite, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    monkeypatch.setattr(suite, "evaluate", lambda *args: ran.append(args[0].name) or whole(*args))
    run(options)
    assert ran == ["retrieval"]


def test_evaluators_may_read_data_of_their_own() -> None:
    options = SuiteRun(
        ckpt="x", data="photos", evaluators=("knn", "knn=a/rooms", "knn=b/rooms.csv", "attention=stamps")
    )
    assert [(one.name, one.data, one.file) for one in plan(options)] == [
        ("knn", "photos", "knn.photos.json"),
        ("knn", "a/rooms", "knn.rooms.json"),
        ("knn", "b/rooms.csv", "knn.rooms.2.json"),
        ("attention", "stamps", "attention.json"),
    ]


def test_a_result_keeps_its_name_when_the_list_grows(base: SuiteRun, tmp_path: Path, ran: list[str]) -> None:
    other = colour_folder(tmp_path / "other", n_train=6, n_val=4)
    options = replace(base, out=tmp_path / "out", evaluators=("knn",))
    run(options)
    entries = run(replace(options, evaluators=("knn", f"knn={other}")))["entries"]
    assert ran == ["knn", "knn"], "the first was made before"
    assert {file: entry["data"] for file, entry in entries.items()} == {
        "knn.json": base.data,
        "knn.other.json": str(other),
    }
    run(replace(options, data=str(other)))
    assert ran == ["knn", "knn"], "so was the second, under its name"


@pytest.mark.parametrize(
    ("evaluators", "data", "said"),
    [
        (("knnn",), "photos", "want one of knn, linear"),
        ((), "photos", "name at least one"),
        (("knn",), "", "is given no data"),
        (("knn", "knn"), "photos", "twice"),
    ],
)
def test_lists_that_cannot_be_run_are_refused(evaluators: tuple[str, ...], data: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(SuiteRun(ckpt="x", data=data, evaluators=evaluators))


@pytest.mark.parametrize("name", available())
def test_every_evaluator_takes_the_options_that_the_suite_passes(name: str, base: SuiteRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        evaluate(Entry(name, str(tmp_path / "absent"), "x.json"), tmp_path / "x.json", base)


@pytest.mark.parametrize("name", available())
def test_every_evaluator_has_a_version_that_results_follow_from(name: str) -> None:
    assert versions_of(name)


def test_the_mark_of_data_follows_its_files(tmp_path: Path) -> None:
    data = colour_folder(tmp_path / "data", n_train=1, n_val=1)
    before = data_mark(str(data))
    assert data_mark(str(data)) == before == data_mark(f"voc2012:{data}")
    (data / "new.png").write_bytes(b"x")
    assert data_mark(str(data)) != before
    packed = tmp_path / "set.csv"
    packed.write_text("name\n")
    (tmp_path / "set.zip").write_bytes(b"1")
    first = data_mark(str(tmp_path / "set"))
    (tmp_path / "set.zip").write_bytes(b"12")
    assert data_mark(str(tmp_path / "set")) != first
    assert data_mark(str(tmp_path / "absent")) == data_mark(str(tmp_path / "absent"))
    comma = f"imagenet:{colour_folder(tmp_path / 'here, there', n_train=1, n_val=1)}"
    before = data_mark(comma)
    (tmp_path / "here, there" / "new.png").write_bytes(b"x")
    assert data_mark(comma) != before


def test_the_mark_of_data_follows_links_and_ends_at_loops(tmp_path: Path) -> None:
    data = colour_folder(tmp_path / "data", n_train=1, n_val=1)
    whole, part = tmp_path / "whole", tmp_path / "parts"
    whole.symlink_to(data)
    part.mkdir()
    (part / "train").symlink_to(data / "train")
    (data / "train" / "loop").symlink_to(data)
    before = [data_mark(str(one)) for one in (whole, part)]
    (data / "train" / "red" / "0.png").rename(data / "train" / "blue" / "1.png")
    after = [data_mark(str(one)) for one in (whole, part)]
    assert not set(before) & set(after)


@pytest.mark.parametrize("kind", ["image", "sem", "depth_mm"])
def test_the_mark_of_a_list_follows_every_file_that_it_names(kind: str, tmp_path: Path) -> None:
    files = {name: tmp_path / "files" / f"{name}.png" for name in ("image", "sem", "depth_mm")}
    (tmp_path / "files").mkdir()
    for file in files.values():
        file.write_bytes(b"1")
    rows = tmp_path / "rows"
    rows.mkdir()
    listed = rows / "list.csv"
    listed.write_text("path,sem,depth_mm\n" + ",".join(str(file) for file in files.values()) + "\n")
    before = data_mark(str(listed))
    assert data_mark(str(listed)) == before
    files[kind].write_bytes(b"12")
    assert data_mark(str(listed)) != before


@pytest.mark.parametrize("name", available())
def test_processes_reach_every_evaluator_that_takes_them(
    name: str, base: SuiteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(suite, "evaluator_cli", lambda _, words: given.append(words))
    monkeypatch.setattr(suite, "load_result", lambda _: {})
    evaluate(Entry(name, "x", "x.json"), tmp_path / "x.json", replace(base, processes=2))
    assert ("--processes" in given[0]) == (
        not hasattr(importlib.import_module(f"evaluators.{name}"), "refuse_processes")
    )


def test_the_command_tells_what_it_did(
    base: SuiteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--ckpt", base.ckpt, "--data", base.data, "--evaluators", "knn", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["suite", *words, "--cache-dir", str(base.cache_dir), "--threads", "1"])
    monkeypatch.delitem(sys.modules, "evaluators.suite")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("evaluators.suite", run_name="__main__")
    assert not ended.value.code
    said = capsys.readouterr()
    assert "[1/1] knn on" in said.err
    assert "knn.json  top1" in said.out
    assert "evaluators.report" in said.out
