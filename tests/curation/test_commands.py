"""The commands as a user meets them: their help, and one run from argv to the list."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

import curation.balance
import curation.calibrate
import curation.deduplicate
import curation.images
import curation.retrieve
from data.datasets import open_dataset
from tests.curation.images import PixelRuntime, make_heap

MAINS = {name: getattr(curation, name).main for name in ("balance", "calibrate", "deduplicate", "retrieve")}


@pytest.mark.parametrize("main", MAINS.values(), ids=MAINS)
def test_the_help_names_every_flag_with_words(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tyro.cli(main, args=["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--ckpt" in text
    assert "--data" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("balance", ["--keep", "9"]),
        ("deduplicate", ["--whiten", "0", "--threshold", "0.9"]),
        ("retrieve", ["--queries", "samples/samples.csv", "--k", "1"]),
    ],
)
def test_each_command_runs_from_argv_to_a_list(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.images, "open_runtime", lambda *_, **__: PixelRuntime())
    heap, out = make_heap(tmp_path / "heap"), tmp_path / "out"
    tyro.cli(MAINS[name], args=["--ckpt", "pixels", "--data", str(heap), "--out", str(out), *words])
    assert 0 < len(open_dataset(out / "kept.csv")) < 34
    assert {path.name for path in out.iterdir()} == {
        "decisions.csv",
        "kept.csv",
        "report.html",
        "stages",
        "summary.json",
    }
