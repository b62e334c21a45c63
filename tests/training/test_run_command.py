"""`python -m training` as a program: signals, kill -9, bad input, and how it takes its memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backbones.checkpoints import load_backbone
from training.run_folder import RunFolder
from training.run_log import read_steps


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "training", *words]


def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ("--recipe", "smoke", "--data", str(folder), "--out", str(tmp_path / "run"), "--workers", "0")
    long = command(*words, "--epochs", "400", "--threads", "1")
    env = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen(long, cwd=repo_root, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
    while not (log.is_file() and len(read_steps(log)) > 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    done = len(read_steps(log))
    saved = RunFolder(tmp_path / "run").load_state()
    assert saved["step"] == done


def test_a_run_keeps_others_out_and_saves_first_when_its_whole_group_is_signalled(
    folder: Path, tmp_path: Path, repo_root: Path
) -> None:
    """As a terminal's Ctrl-C, `timeout`, systemd and SLURM send it."""
    words = ("--recipe", "smoke", "--data", str(folder), "--out", str(tmp_path / "run"), "--workers", "2")
    long = command(*words, "--epochs", "400", "--threads", "1")
    process = subprocess.Popen(long, cwd=repo_root, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
    while not (log.is_file() and len(read_steps(log)) > 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = subprocess.run(long, cwd=repo_root, capture_output=True, text=True)
    assert second.returncode == 2, "two trainers would overwrite each other"
    assert second.stderr.strip().splitlines()[-1].endswith("wait until it ends, or choose another --out")
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert RunFolder(tmp_path / "run").load_state()["step"] == len(read_steps(log))


def test_kill_9_leaves_a_state_that_loads(folder: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ("--recipe", "smoke", "--data", str(folder), "--out", str(tmp_path / "run"), "--workers", "0")
    env = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen(command(*words, "--epochs", "400"), cwd=repo_root, env=env, stderr=subprocess.DEVNULL)
    run, checkpoint = RunFolder(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "latest.safetensors"
    deadline = time.monotonic() + 90
    while not (run.has_state and checkpoint.is_file()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = run.load_state()
    assert saved["step"] % 2 == 0
    load_backbone(checkpoint)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--recipe", "dino_vits61", "--data", "{folder}"), "dino_vits61"),
        (("--recipe", "smoke", "--data", "{folder}/absent"), "nothing there"),
        (("--recipe", "smoke", "--data", "{folder}", "--device", "tpu"), "tpu"),
        (("--recipe", "smoke", "--data", "{folder}", "--epochs", "0"), "0 epochs"),
        (("--recipe", "smoke", "--data", "{folder}", "--seed", "99999999999999999999"), "--seed"),
        (("--recipe", "smoke_dinov2", "--data", "{folder}", "--batch-size", "1"), "KoLeo needs at least 2 images"),
        (
            ("--recipe", "smoke", "--data", "{folder}", "--init", "{repo}/models/dinoscope_tiny.safetensors"),
            "its architecture",
        ),
        (("--recipe", "smoke,smoke_dinov2", "--data", "{folder}"), "name it with --teacher"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, repo_root: Path, words: tuple[str, ...], said: str
) -> None:
    given = [word.format(folder=folder, repo=repo_root) for word in words]
    done = subprocess.run(
        command(*given, "--out", str(tmp_path / "run")),
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt is Linux's")
def test_freed_memory_is_kept_and_not_zeroed_by_the_system_anew() -> None:
    """Page faults of making and dropping the same array; in processes of their own, since the setting cannot be taken back."""
    program = (
        "import resource, torch; from training.memory import keep_freed_memory\n"
        "{keep}\n"
        "torch.ones(10_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(100): torch.ones(10_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", program.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in ("assert keep_freed_memory()", "")
    ]
    assert faults[0] < 0.3 * faults[1]
