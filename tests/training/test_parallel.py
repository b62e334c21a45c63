"""Two processes learn what one learns: the same losses, the same weights, whatever the losses take over the batch."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.checkpoints import load_backbone
from data.datasets import open_dataset
from training import parallel
from training.loop import train
from training.recipe import Recipe
from training.recipes import RECIPES
from training.run_log import read_steps

WORDS = {"source": "test", "revision": "none"}


def steady(name: str, **step: object) -> Recipe:
    """A recipe whose steps are continuous in the gradient (SGD), so that sums in another order end in nearly the same weights."""
    recipe = RECIPES[name]
    return replace(
        recipe,
        backbone=replace(recipe.backbone, drop_path=0.0),
        step=replace(recipe.step, **step),
        optim=replace(recipe.optim, optimizer="sgd", lr=0.5, lr_batch=8),
    )


CASES = {
    "dino": steady("smoke"),
    "sinkhorn": steady("smoke_dinov2", targets="sinkhorn"),
    "centering": steady("smoke_dinov2", targets="centering"),
}
WORKER = """
import sys
from pathlib import Path
import torch
from data.datasets import open_dataset
from tests.training.test_parallel import CASES, WORDS
from training import parallel
from training.loop import train

torch.set_num_threads(1)
with parallel.joined(torch.device("cpu")) as device:
    train(CASES[sys.argv[1]], open_dataset(sys.argv[2]), Path(sys.argv[3]), recipe_name=sys.argv[1], workers=0, device=device, **WORDS)
"""


def start_two(repo_root: Path, *command: str) -> list[subprocess.Popen[str]]:
    """Two processes of a command, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    base = {
        **os.environ,
        "PYTHONPATH": str(repo_root),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=repo_root, env={**base, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, images: Path, tmp_path: Path, repo_root: Path) -> None:
    torch.set_num_threads(1)
    alone = train(CASES[name], open_dataset(str(images)), tmp_path / "one", recipe_name=name, workers=0, **WORDS)
    for process in start_two(repo_root, "-c", WORKER, name, str(images), str(tmp_path / "two")):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    logs = [read_steps(tmp_path / folder / "log.jsonl") for folder in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*logs, strict=True):
        for key in {
            "loss",
            "dino_local",
            "dino_global",
            "koleo",
            "ibot",
            "grad_norm",
            "grad_norm_backbone",
            "center_norm",
        } & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    weights = [
        load_backbone(tmp_path / folder / "checkpoints" / "latest.safetensors").model.state_dict()
        for folder in ("one", "two")
    ]
    for key, wanted in weights[0].items():
        torch.testing.assert_close(
            weights[1][key], wanted, atol=1e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    moved = load_backbone(alone).model.state_dict()["blocks.0.mlp.fc1.weight"]
    assert not np.allclose(moved.numpy(), 0)


def test_a_signal_to_one_process_stops_both_at_the_same_step(images: Path, tmp_path: Path, repo_root: Path) -> None:
    """As a scheduler does that ends a job: all save once, and the same command goes on."""
    words = (
        "--recipe",
        "smoke",
        "--data",
        str(images),
        "--out",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--threads",
        "1",
        "--epochs",
        "4000",
    )
    processes = start_two(repo_root, "-m", "training", *words)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
    while not (log.is_file() and len(read_steps(log)) > 3):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=60)
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert saved["step"] == len(read_steps(log))


def test_a_batch_that_cannot_be_shared_is_refused(images: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ("--recipe", "smoke", "--data", str(images), "--out", str(tmp_path / "run"), "--batch-size", "7")
    for process in start_two(repo_root, "-m", "training", *words):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "a batch of 7 images does not divide among 2 processes" in said


def test_one_process_alone_talks_to_nobody() -> None:
    rows = torch.randn(5, 3)
    assert parallel.total(rows) is rows
    assert parallel.all_rows(rows) is rows
    assert parallel.gathered("x") == ["x"]
    assert parallel.largest(3, torch.device("cpu")) == 3
    torch.testing.assert_close(parallel.column_log_sum(rows), rows.exp().sum(dim=0, keepdim=True).log())
