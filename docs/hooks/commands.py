"""Every command of this repository, and what its `--help` says.

A command is a module with an `if __name__ == "__main__"` block. They are run in this process, so that dozens of helps cost one
import of torch.
"""

import contextlib
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("training", "evaluators", "curation", "exports", "server", "benchmarks")
WIDTH = 96
"""Columns of a help page; wider ones need scrolling on most screens."""


def find_commands(root: Path = ROOT) -> dict[str, list[str]]:
    """Modules that can be run, by room; `app.py` counts as a room of its own."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        paths = sorted((root / room).glob("*.py"))
        runnable = [path for path in paths if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]
        found[room] = [room if path.stem == "__main__" else f"{room}.{path.stem}" for path in runnable]
    return {**found, "app": ["app"]}


def typed(module: str) -> str:
    """What a person types to run it."""
    return "python app.py" if module == "app" else f"python -m {module}"


def run_command(module: str, words: Sequence[str]) -> int:
    """Run a command here, as from the repository's root; its exit status. Output and exceptions are the command's own."""
    with _argv([module, *words]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0) if not isinstance(end.code, str) else 1
    return 0


def help_text(module: str) -> str:
    """What `--help` prints, without the boxes that tyro draws. Raises RuntimeError if it cannot be had."""
    said = io.StringIO()
    with _environ(COLUMNS=str(WIDTH), TERM="dumb", NO_COLOR="1"), contextlib.redirect_stdout(said):
        status = run_command(module, ["--help"])
    if status or not said.getvalue().strip():
        raise RuntimeError(f"{typed(module)} --help ended with status {status}")
    return unboxed(said.getvalue())


def unboxed(text: str) -> str:
    """`╭─ options ─────╮` becomes `options`, and the sides and the bottom of the box go."""
    lines = []
    for line in text.splitlines():
        if line.startswith("╰"):
            continue
        title = re.match(r"╭─ (.+?) ─*╮$", line)
        inside = re.match(r"│ (.*?)\s*│$", line)
        lines.append(title[1] if title else f"  {inside[1]}".rstrip() if inside else line.rstrip())
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before, path = sys.argv, list(sys.path)
    sys.argv = words
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path


@contextlib.contextmanager
def _environ(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
