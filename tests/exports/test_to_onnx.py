"""The command: a whole, checked file or none; what is refused; the exit status."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import CheckFailed, InputError, run_cli
from exports import to_onnx
from exports.to_onnx import TOLERANCE, export_onnx, main, relative_difference
from tests.exports.artifacts import Artifact, artifact, save_network


@pytest.fixture
def quick(v1: Artifact, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the file that was traced before in place of tracing again, then does what a test wants done."""

    def arrange(then: Callable[[Any, Path], None] = lambda backbone, path: None, file: Path = v1.onnx) -> None:
        def write(backbone: Any, head: Any, heads: Any, path: Path) -> None:
            shutil.copy(file, path)
            then(backbone, path)

        monkeypatch.setattr(to_onnx, "write_graph", write)

    return arrange


def test_the_file_appears_whole_with_the_folders_it_needs(v1: Artifact, tmp_path: Path, quick: Callable) -> None:
    quick()
    out = tmp_path / "deep" / "down" / "x.onnx"
    parity = export_onnx(v1.ckpt, out, v1.depth_head)
    assert parity == v1.parity, "the check draws the same pixels each time"
    assert out.read_bytes() == v1.onnx.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in out.parent.iterdir()] == ["x.onnx"]


def _tamper(backbone: Any, path: Path) -> None:
    with torch.no_grad():
        backbone.model.blocks[1].mlp.fc2.weight[3, 5] += 0.5


def test_a_single_altered_weight_fails_the_check_and_leaves_nothing(
    v1: Artifact, tmp_path: Path, quick: Callable
) -> None:
    quick(_tamper)
    with pytest.raises(CheckFailed, match=r"differs from torch by .* \(allowed 2e-04\); nothing was written"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_with_other_outputs_fails_the_check(v1: Artifact, tmp_path: Path, quick: Callable) -> None:
    quick(file=artifact("v2").onnx)
    with pytest.raises(CheckFailed, match=r"the exported graph has outputs .*, wanted .*depth"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert list(tmp_path.iterdir()) == []


def _interrupt(backbone: Any, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    raise KeyboardInterrupt


def _break(backbone: Any, path: Path) -> None:
    raise RuntimeError("the exporter failed")


def _disk_full(backbone: Any, path: Path) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("accident", "error"),
    [(_tamper, CheckFailed), (_interrupt, KeyboardInterrupt), (_break, RuntimeError), (_disk_full, InputError)],
)
def test_an_accident_leaves_the_file_that_was_there_and_no_scratch(
    v1: Artifact, tmp_path: Path, quick: Callable, accident: Callable, error: type[BaseException]
) -> None:
    out = tmp_path / "x.onnx"
    out.write_bytes(b"the old one")
    quick(accident)
    with pytest.raises(error):
        export_onnx(v1.ckpt, out, v1.depth_head)
    assert out.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_what_is_not_a_number_or_of_another_shape_is_no_match() -> None:
    ones = np.ones((2, 3), np.float32)
    broken = ones.copy()
    broken[0, 0] = np.nan
    assert not relative_difference(broken, ones) <= TOLERANCE
    assert not relative_difference(ones, broken) <= TOLERANCE
    assert relative_difference(ones, ones[:1]) == float("inf")
    assert relative_difference(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_difference(0 * ones, 0 * ones) == 0


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.pt", "wanted the name of a file that ends in .onnx"),
        ("x", "wanted the name of a file that ends in .onnx"),
        ("folder.onnx", "wanted the name of a file that ends in .onnx"),
        ("file/x.onnx", "cannot be written"),
        ("file/deep/x.onnx", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(
    v1: Artifact, tmp_path: Path, quick: Callable, out: str, words: str
) -> None:
    quick()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match=words):
        export_onnx(v1.ckpt, tmp_path / out, v1.depth_head)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.onnx"]


def test_weights_that_one_file_cannot_hold_are_refused_before_anything_is_traced(
    v1: Artifact, tmp_path: Path, quick: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(_break)
    monkeypatch.setattr(to_onnx, "MAX_WEIGHT_BYTES", 100_000)
    with pytest.raises(InputError, match=r"one \.onnx file holds at most"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_another_backbone_is_refused(v1: Artifact, tmp_path: Path) -> None:
    _, head = save_network("v1", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="this head fits the backbone"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", head)
    assert not (tmp_path / "x.onnx").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def status_of(command: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_cli(command)
    return int(ended.value.code or 0)


def test_status_0_with_the_size_and_the_differences(
    v1: Artifact, tmp_path: Path, quick: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    quick()
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx", v1.depth_head)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0.1 MB" in lines[0] or "0.2 MB" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(v1.outputs)


def test_status_3_and_one_line_when_the_check_fails(
    v1: Artifact, tmp_path: Path, quick: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(_tamper)
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx")) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_status_130_when_stopped(v1: Artifact, tmp_path: Path, quick: Callable) -> None:
    quick(_interrupt)
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx")) == 130
    assert list(tmp_path.iterdir()) == []


def test_status_2_and_one_line_for_bad_input(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "exports.to_onnx", "--ckpt", str(tmp_path / "none.safetensors")]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "x.onnx")], cwd=repo_root, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "no such file" in ended.stderr
    assert list(tmp_path.iterdir()) == []
