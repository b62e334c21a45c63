"""Two processes learn what one learns: the same losses, the same weights, whatever the losses take over the batch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from backbones.checkpoints import load_backbone
from data.datasets import open_dataset
from training import parallel
from training.dinov2 import Dinov2Spec, koleo_of_views
from training.loop import train
from training.recipe import Recipe
from training.recipes import RECIPES
from training.run_folder import RunFolder
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


# At the start all CLS tokens are nearly equal, and KoLeo's gradient, one over their distances, magnifies what float32 rounds off them.
# A smaller weight keeps that below the bounds; its value is compared all the same, and its gradient below, on tokens that are apart.
CASES = {
    "dino": steady("smoke"),
    "batch_norm": replace(steady("smoke"), head=replace(RECIPES["smoke"].head, batch_norm=True)),
    "sinkhorn": steady("smoke_dinov2", targets="sinkhorn", koleo_weight=0.02),
    "centering": steady("smoke_dinov2", targets="centering", koleo_weight=0.02),
}
WORKER = """
import sys
from pathlib import Path
import torch
from data.datasets import open_dataset
from tests.training.test_parallel import CASES, WORDS
from training import parallel
from training.loop import train
from training.scale import Scale

torch.set_num_threads(1)
name, data, out, sharding, accumulate, stop = sys.argv[1:]
with parallel.joined(torch.device("cpu")) as device:
    train(
        CASES[name], open_dataset(data), Path(out), recipe_name=name, workers=0, device=device,
        scale=Scale(sharding=sharding, accumulate=int(accumulate)), stop_at_step=int(stop) or None, **WORDS
    )
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


def train_with_two(
    repo_root: Path, name: str, images: Path, out: Path, sharding: str = "none", accumulate: int = 1, stop: int = 0
) -> Path:
    """Train a case in two processes; returns the run's folder."""
    for process in start_two(
        repo_root, "-c", WORKER, name, str(images), str(out), sharding, str(accumulate), str(stop)
    ):
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    return out


SAME = (
    "loss",
    "dino_local",
    "dino_global",
    "koleo",
    "ibot",
    "grad_norm",
    "grad_norm_backbone",
    "grad_norm_dino_head",
    "center_norm",
)


def assert_same_runs(one: Path, other: Path, n_steps: int = 2, looser: float = 1.0) -> None:
    """The same losses and gradient norms at every step, and the same weights, centres and optimiser at the end."""
    close = {"atol": 5e-6 * looser, "rtol": 2e-4 * looser}
    logs = [read_steps(run / "log.jsonl") for run in (one, other)]
    assert len(logs[0]) == len(logs[1]) == n_steps
    for record, its in zip(*logs, strict=True):
        for key in set(SAME) & record.keys():
            assert its[key] == pytest.approx(record[key], rel=close["rtol"], abs=close["atol"]), key
    states = [RunFolder(run).load_state() for run in (one, other)]
    for kind in ("student", "teacher", "centers", "optimizer"):
        assert states[0][kind].keys() == states[1][kind].keys()
        for key, wanted in states[0][kind].items():
            torch.testing.assert_close(
                states[1][kind][key], wanted, **close, msg=lambda text, key=key: f"{key}: {text}"
            )
    exported = [load_backbone(run / "checkpoints" / "latest.safetensors").model.state_dict() for run in (one, other)]
    for key, wanted in exported[0].items():
        torch.testing.assert_close(wanted, states[0]["teacher"][f"backbone.{key}"])
        torch.testing.assert_close(exported[1][key], states[1]["teacher"][f"backbone.{key}"])


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case trained by one process, once."""
    root = tmp_path_factory.mktemp("alone")

    def run(name: str) -> Path:
        if not (root / name).exists():
            torch.set_num_threads(1)
            train(CASES[name], open_dataset(str(images)), root / name, recipe_name=name, workers=0, **WORDS)
        return root / name

    return run


PAIRS = [
    pytest.param(name, sharding, marks=[pytest.mark.slow] * ((place + n) % 2))
    for place, name in enumerate(CASES)
    for n, sharding in enumerate(("none", "fsdp"))
]
"""Each case sharded or not, and the other way round among the long checks."""


@pytest.mark.parametrize(("name", "sharding"), PAIRS)
def test_two_processes_equal_one(
    name: str, sharding: str, alone: Callable[[str], Path], images: Path, tmp_path: Path, repo_root: Path
) -> None:
    """With whole weights in each, and with shares of them."""
    # Batch norm over eight rows magnifies rounding; the test below holds it to double precision.
    looser = 10.0 if name == "batch_norm" else 1.0
    assert_same_runs(alone(name), train_with_two(repo_root, name, images, tmp_path / "two", sharding), looser=looser)
    moved = load_backbone(tmp_path / "two" / "checkpoints" / "latest.safetensors").model.state_dict()
    assert not np.allclose(moved["blocks.0.mlp.fc1.weight"].numpy(), 0)


NORM = """
import sys
import torch
from tests.training.test_parallel import batch_norm_pass
from training import parallel
from training.sync_norm import synchronise_

with parallel.joined(torch.device("cpu")):
    torch.save(batch_norm_pass(int(sys.argv[1]), parallel.rank(), 2, synchronise_), sys.argv[2] + str(parallel.rank()))
"""


def batch_norm_pass(
    n_axes: int, rank: int, world_size: int, prepare: Callable[[nn.Module], None]
) -> list[torch.Tensor]:
    """Output, gradient of the input and of the weights, and running values of batch norm on a process's part of six images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(3) if n_axes == 2 else nn.BatchNorm2d(3)).double()
    nn.init.normal_(network[0].weight)
    shape = (6, 3, 4, 5)[:n_axes]
    x, upstream = (torch.randn(shape, dtype=torch.float64).chunk(world_size)[rank] for _ in range(2))
    x = (3 + 2 * x).requires_grad_()
    prepare(network)
    out = network(x)
    (out * upstream).sum().backward()
    norm = network[0]
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("n_axes", [2, 4])
def test_batch_norm_of_two_processes_equals_that_of_one(n_axes: int, tmp_path: Path, repo_root: Path) -> None:
    for process in start_two(repo_root, "-c", NORM, str(n_axes), str(tmp_path / "rank")):
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    out, x_grad, weight_grad, bias_grad, *running = batch_norm_pass(n_axes, 0, 1, lambda _: None)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x_grad)
    torch.testing.assert_close([first[2] + second[2], first[3] + second[3]], [weight_grad, bias_grad])
    torch.testing.assert_close(first[4:], running)
    torch.testing.assert_close(second[4:], running)


KOLEO = """
import sys
import torch
from tests.training.test_parallel import koleo_pass
from training import parallel

with parallel.joined(torch.device("cpu")):
    torch.save(koleo_pass(parallel.rank(), 2), sys.argv[1] + str(parallel.rank()))
"""


def koleo_pass(rank: int, world_size: int) -> list[torch.Tensor]:
    """KoLeo of a process's part of two views of six images, and its gradient at weights that all processes share."""
    torch.manual_seed(0)
    weights = torch.randn(5, 4, requires_grad=True)
    views = [torch.randn(6, 5).chunk(world_size)[rank] for _ in range(2)]
    value = koleo_of_views(torch.cat(views) @ weights, Dinov2Spec())
    value.backward()
    assert weights.grad is not None
    return [value.detach(), weights.grad]


def test_koleo_sees_the_images_of_both_processes_and_their_mean_gradient_is_that_of_one(
    tmp_path: Path, repo_root: Path
) -> None:
    for process in start_two(repo_root, "-c", KOLEO, str(tmp_path / "rank")):
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    (value, gradient), (other_value, other_gradient) = (
        torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)
    )
    expected_value, expected_gradient = koleo_pass(0, 1)
    torch.testing.assert_close([value, other_value], [expected_value, expected_value])
    torch.testing.assert_close((gradient + other_gradient) / 2, expected_gradient, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_may_have_other_processes_shards_and_parts(
    alone: Callable[[str], Path], images: Path, tmp_path: Path, repo_root: Path
) -> None:
    """Shares of two processes go on whole in one, and the other way round."""
    name, data = "sinkhorn", open_dataset(str(images))
    train_with_two(repo_root, name, images, tmp_path / "first", "fsdp", accumulate=2, stop=1)
    train(CASES[name], data, tmp_path / "first", recipe_name=name, workers=0, **WORDS)
    assert_same_runs(alone(name), tmp_path / "first")
    train(CASES[name], data, tmp_path / "second", recipe_name=name, workers=0, stop_at_step=1, **WORDS)
    train_with_two(repo_root, name, images, tmp_path / "second", "fsdp")
    assert_same_runs(alone(name), tmp_path / "second")


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
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 300
    while not (log.is_file() and len(read_steps(log)) > 3):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=300)
    saved = RunFolder(tmp_path / "run").load_state()
    assert saved["step"] == len(read_steps(log))


def test_a_batch_that_cannot_be_shared_is_refused(images: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ("--recipe", "smoke", "--data", str(images), "--out", str(tmp_path / "run"), "--batch-size", "7")
    for process in start_two(repo_root, "-m", "training", *words):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "a batch of 7 images does not divide among 2 processes" in said


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("of another recipe", "holds a run with another "),
        ("busy", "another process is training into it"),
        ("of other things", "is not empty and holds no run"),
    ],
)
def test_a_folder_that_only_the_first_process_opens_is_refused_by_both_and_told_once(
    kind: str, said: str, images: Path, tmp_path: Path, repo_root: Path
) -> None:
    out = tmp_path / "run"
    folder = RunFolder(out)
    if kind == "of another recipe":
        (out / "state" / "step-00000001").mkdir(parents=True)
        (out / "state" / "step-00000001" / "state.json").write_text("{}")
        (out / "recipe.json").write_text("{}")
    elif kind == "busy":
        folder.open({})  # held by this process until the test is over
    else:
        out.mkdir()
        (out / "letter.txt").write_text("mine")
    words = ("--recipe", "smoke", "--data", str(images), "--out", str(out), "--workers", "0", "--threads", "1")
    processes = start_two(repo_root, "-m", "training", *words)
    told, silent = (process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], told + silent
    assert len(told.strip().splitlines()) == 1, told
    assert said in told
    assert silent == ""


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_processes_wait_while_the_first_one_measures_for_hours(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-NN on a million images takes process 0 longer than the half an hour, or ten minutes, after which torch gives up by itself."""
    asked: list[tuple[str, timedelta]] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append((backend, timeout)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with parallel.joined(torch.device(kind)):
        pass
    assert asked == [(backend, parallel.PATIENCE)]
    assert timedelta(hours=6) <= parallel.PATIENCE


def test_one_process_alone_talks_to_nobody() -> None:
    rows = torch.randn(5, 3)
    assert parallel.total(rows) is rows
    assert parallel.all_rows(rows) is rows
    assert parallel.gathered("x") == ["x"]
    assert parallel.of_the_first(lambda: "x") == "x"
    assert parallel.largest(3, torch.device("cpu")) == 3
    torch.testing.assert_close(parallel.column_log_sum(rows), rows.exp().sum(dim=0, keepdim=True).log())
