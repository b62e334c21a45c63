"""What the README tells people to type works."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import ServerConfig
from server.run import Running


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "README.md").read_text()


@pytest.fixture(scope="module")
def server(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server as the README starts it, on free ports."""
    config = ServerConfig(
        models=repo_root / "models",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        collections=tmp_path_factory.mktemp("state"),
        log_level="warning",
    )
    with Running(config) as running:
        yield running


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_client_programs_run_as_printed(
    text: str, server: Running, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """gRPC: embeddings of two files, attention, neighbours, depth; HTTP: all four."""
    programs = blocks(text, "python")
    assert len(programs) == 3
    assert len(programs[0].strip().splitlines()) <= 10, "the first one is promised to be short"
    monkeypatch.chdir(repo_root)
    names: dict[str, object] = {}
    for program in programs:
        at = server.addresses
        program = program.replace("127.0.0.1:8001", at.grpc).replace("127.0.0.1:8000", at.http.removeprefix("http://"))
        exec(compile(program, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert said.startswith("(2, "), "two embeddings"
    for model in ("embedding", "attention", "knn", "depth"):
        assert f"{model} [(" in said


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_lines_are_answered(text: str, server: Running, repo_root: Path) -> None:
    lines = [line for block in blocks(text, "sh") for line in block.splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.split(" > ")[0].replace("http://127.0.0.1:8000", server.addresses.http))
        done = subprocess.run([*words, "-sS", "--fail"], cwd=repo_root, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(b"\x89PNG" if "format=png" in line else b"{")


def test_every_command_and_path_exists(text: str, repo_root: Path) -> None:
    for module in set(re.findall(r"python -m ([a-z_.]+)", text)):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=repo_root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{module}: {done.stderr}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (repo_root / link).exists(), link
