"""What holds for the repository as a whole: the set-up files agree with each other, and nothing private slipped in."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pyproject(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())


def requirement_name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    assert match, line
    return match.group().lower().replace("_", "-").replace(".", "-")


def tracked_files(repo_root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repo_root, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is not a git checkout, so there is no list of tracked files to look through")
    return [repo_root / name for name in listed.stdout.decode().split("\0") if name]


def test_every_direct_dependency_is_pinned_in_the_constraints(pyproject: dict, repo_root: Path) -> None:
    pins = {
        requirement_name(line)
        for line in (repo_root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = list(pyproject["project"]["dependencies"])
    for extra in pyproject["project"]["optional-dependencies"].values():
        wanted += extra
    assert {requirement_name(line) for line in wanted} - pins == set()


def test_the_two_onnxruntime_wheels_are_never_in_one_extra_or_in_the_base(pyproject: dict) -> None:
    base = {requirement_name(line) for line in pyproject["project"]["dependencies"]}
    assert not base & {"onnxruntime", "onnxruntime-gpu"}
    for lines in pyproject["project"]["optional-dependencies"].values():
        assert len({requirement_name(line) for line in lines} & {"onnxruntime", "onnxruntime-gpu"}) <= 1


def test_each_room_is_packaged_and_stands_in_the_import_contract(pyproject: dict, repo_root: Path) -> None:
    rooms = {path.parent.name for path in repo_root.glob("*/__init__.py")} - {"tests", "benchmarks"}
    packaged = set(pyproject["tool"]["setuptools"]["packages"])
    layers = {
        name.strip()
        for layer in pyproject["tool"]["importlinter"]["contracts"][0]["layers"]
        for name in layer.split("|")
    }
    assert packaged == rooms == layers


def test_make_help_lists_every_target(repo_root: Path) -> None:
    makefile = (repo_root / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=repo_root, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in help_text.splitlines()} == phony


def test_no_tracked_text_names_a_private_path_or_a_package_registry(repo_root: Path) -> None:
    # Written in pieces so that this file does not find itself.
    forbidden = re.compile(
        "|".join(
            [
                "/wo" + "rk/",
                "/tmp/b" + "ash",
                "pypi" + r"\.org",
                "pythonhosted" + r"\.org",
                "npmjs" + r"\.(org|com)",
                "deb" + r"\.debian\.org",
            ]
        )
    )
    found = []
    for path in tracked_files(repo_root):
        if path.suffix in {".safetensors", ".pth", ".jpg", ".png", ".npz"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(repo_root)}: {hit.group()}" for hit in forbidden.finditer(text)]
    assert found == []


def test_no_tracked_file_is_larger_than_the_bundled_checkpoint_may_be(repo_root: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in tracked_files(repo_root) if path.is_file()}
    assert {name: size for name, size in sizes.items() if size > 25_000_000} == {}
