"""Every command of this repository, and what its `--help` says.

A command is a module that ends in `if __name__ == "__main__": run_cli(...)`; a process that another program starts has no such end. They
are run in this process, so that dozens of helps cost one import of torch.
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
_MAIN = '\nif __name__ == "__main__":\n'
WIDTH = 160
"""Columns that help is asked for in: so many that few of its lines are broken."""


def find_commands(root: Path = ROOT) -> dict[str, list[str]]:
    """Modules that can be run, by room; `app.py` counts as a room of its own."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        paths = sorted((root / room).glob("*.py"))
        runnable = [path for path in paths if "run_cli(" in path.read_text(encoding="utf-8").partition(_MAIN)[2]]
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
    """Titles lose the line around or below them, and options the box's sides."""
    lines = []
    for line in text.splitlines():
        title = re.match(r"╭─ (.+?) ─*╮$", line)
        inside = re.match(r"│ (.*?)\s*│$", line)
        if not re.fullmatch(r"╰─*╯|\s*-{20,}\s*", line):
            lines.append(title[1] if title else f"  {inside[1]}".rstrip() if inside else line.rstrip())
    return "\n".join(lines).strip()


def help_page(module: str) -> str:
    """The help as Markdown: what it says before the options, then each option with its text, which a narrow screen can wrap."""
    usage, *rest = re.split(r"\n\s*\n", help_text(module))
    parts = [f"```text\n{usage}\n```"]
    for paragraph in rest:
        lines = paragraph.splitlines()
        if any(_OPTION.match(line) for line in lines):
            parts += _definitions(lines)
        else:
            parts.append(_plain(" ".join(line.strip() for line in lines)))
    return "\n\n".join(parts)


_OPTION = re.compile(r" {2,4}(?P<name>(?:-{1,2}\w|\[*[A-Z{])\S*.*?)(?: {2,}(?P<text>\S.*))?$")


def _definitions(lines: list[str]) -> list[str]:
    """Option by option; lines that are not indented are titles, lines that are indented far go on with the text."""
    found: list[str] = []
    for line in lines:
        option = _OPTION.match(line)
        if option:
            found.append(f"`{option['name']}`\n:   {_plain(option['text'] or '')}")
        elif line.startswith(" " * 5) and found:
            found[-1] += f" {_plain(line.strip())}"
        else:
            found.append(f"**{line.strip()}**")
    return found


def _plain(text: str) -> str:
    """Text of a help that Markdown would take for its own."""
    return re.sub(r"([*_<>\[\]])(?=(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", text)


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
