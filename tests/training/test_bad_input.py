"""Bad input to `python -m training`: one clear line, status 2 or 3, and nothing that was saved is harmed."""

import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from data.datasets import open_dataset
from tests.training.conftest import write_images
from training.loop import train
from training.recipes import RECIPES
from training.run_log import read_steps


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """The command as `python -m training` runs it, in this process: its status and the lines it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training", *words, "--workers", "0", "--threads", "1"])
        patch.setattr("training.command.keep_freed_memory", lambda: None)  # it would last
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("training", run_name="__main__")
    status = ended.value.code
    assert isinstance(status, int)
    return status, capsys.readouterr().err.strip().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_folder(root: Path, kind: str) -> Path:
    folder = root / kind
    folder.mkdir()
    if kind == "all corrupt":
        for i in range(12):
            (folder / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    else:
        write_images(folder, {"empty": 0, "one image": 1, "seven images": 7}[kind])
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "no images in this folder"),
        ("one image", "1 image; self-distillation needs"),
        ("seven images", "7 images are fewer than one batch of 8; add images or make the batch smaller"),
        ("all corrupt", "12 images in a row cannot be read, first"),
    ],
)
def test_data_that_cannot_be_trained_on(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_folder(tmp_path, kind), tmp_path / "run"
    status, lines = run(capsys, "--recipe", "smoke", "--data", str(data), "--out", str(out))
    assert status == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert not out.exists() or not any(path.suffix in (".pt", ".safetensors") for path in out.rglob("*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--recipe", "smoke_dinov2", "--batch-size", "1"), "KoLeo needs at least 2 images in a batch, got 1"),
        (("--recipe", "smoke_dinov2", "--batch-size", "0"), "batches of 0"),
        (("--recipe", "smoke", "--eval-data", "{images}"), "has no label"),
        (("--recipe", "smoke", "--eval-data", "{one}"), "wanted at least two classes"),
        (("--recipe", "smoke", "--eval-data", "{images}/absent"), "nothing there"),
        (("--recipe", "smoke", "--eval-data", "{labelled}", "--eval-every-steps", "0"), "want at least 1"),
    ],
)
def test_options_that_cannot_work(
    words: tuple[str, ...], said: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told at once, not after an epoch."""
    labelled, one = tmp_path / "labelled", tmp_path / "one"
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (labelled / part).mkdir(parents=True)
        write_images(labelled / part, 2)
    for part in ("train/a", "val/a"):
        (one / part).mkdir(parents=True)
        write_images(one / part, 2)
    given = [word.format(images=images, labelled=labelled, one=one) for word in words]
    status, lines = run(capsys, *given, "--data", str(images), "--out", str(tmp_path / "run"))
    assert status == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_images_smaller_than_a_crop_are_enlarged_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "small"
    data.mkdir()
    write_images(data, 8, 9, 5)
    words = ("--recipe", "smoke", "--data", str(data), "--out", str(tmp_path / "run"), "--epochs", "1")
    status, lines = run(capsys, *words)
    assert status == 0
    assert "8 of 8 images looked at are smaller than a global crop of 32 px and are enlarged" in lines[0]


def test_a_folder_of_another_run_is_left_as_it_is(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ("--data", str(images), "--out", str(out), "--epochs", "1")
    assert run(capsys, "--recipe", "smoke", *words)[0] == 0
    before = contents(out)
    for other in (
        ("--recipe", "smoke_dinov2"),
        ("--recipe", "smoke", "--batch-size", "4"),
        ("--recipe", "smoke", "--seed", "1"),
    ):
        status, lines = run(capsys, *other, *words)
        assert status == 2
        assert len(lines) == 1
        assert "holds a run with another" in lines[0]
        assert "choose another --out" in lines[0]
    assert contents(out) == before


def test_a_file_where_the_run_folder_should_be_and_a_folder_of_other_things(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for name in ("file", "full", "file/below"):
        status, lines = run(capsys, "--recipe", "smoke", "--data", str(images), "--out", str(tmp_path / name))
        assert (status, len(lines)) == (2, 1)
        assert name in lines[0]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["", "run", "some/where/run"])
def test_a_run_folder_among_the_images_is_refused(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pictures would be images of the data, which would be another from then on: the run could never go on."""
    data = tmp_path / "images"
    data.mkdir()
    write_images(data, 8)
    before = contents(tmp_path)
    for named in (str(data), f"{data},{data}"):
        status, lines = run(capsys, "--recipe", "smoke", "--data", named, "--out", str(data / where))
        assert (status, len(lines)) == (2, 1)
        assert "lies in the folder of --data" in lines[0]
    assert contents(tmp_path) == before
    status, _ = run(capsys, "--recipe", "smoke", "--data", str(data), "--out", str(data / ".runs" / "mine"))
    assert status == 0, "hidden folders are not looked into"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of file sizes are set as Linux does")
def test_a_full_disk_ends_the_run_in_one_line_and_the_same_command_goes_on(
    images: Path, tmp_path: Path, repo_root: Path
) -> None:
    """No file may grow beyond 20 kB: the log has room, the next state has not."""
    out, data = tmp_path / "run", open_dataset(str(images))
    words = {"recipe_name": "smoke", "source": str(images), "revision": "", "workers": 0}
    train(RECIPES["smoke"], data, out, stop_at_step=1, **words)  # type: ignore[arg-type]
    saved = {name: content for name, content in contents(out).items() if name.startswith(("state/", "checkpoints/"))}
    command = (
        "-m",
        "training",
        "--recipe",
        "smoke",
        "--data",
        str(images),
        "--out",
        str(out),
        "--workers",
        "0",
        "--threads",
        "1",
    )
    done = subprocess.run(
        [sys.executable, *command], cwd=repo_root, env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("step ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "cannot be written (File too large); make room, and the same command goes on" in lines[0].replace(
        "Make", "make"
    )
    assert saved.items() <= contents(out).items(), "what was saved before is as it was"
    train(RECIPES["smoke"], data, out, **words)  # type: ignore[arg-type]
    assert [record["step"] for record in read_steps(out / "log.jsonl")] == [0, 1]
