"""Reads a command of the documentation as its program would, without running it. Each function returns what is wrong, or None."""

import argparse
import contextlib
import functools
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import tyro
from torch.distributed.run import get_args_parser

from data.errors import InputError
from evaluators.suite import available
from tests.docs.blocks import ROOT, Block, Command, commands_of
from training.recipes import check_name

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
from commands import find_commands, help_text, run_command  # type: ignore[import-not-found]

RUNNABLE = {module for modules in find_commands().values() for module in modules}
OTHERS = {
    "srun": "wants SLURM; what it starts is read",
    "tritonserver": "the vendor's container",
    "kubectl": "a cluster",
    "perf_analyzer": "the vendor's load generator; `make test-perf-analyzer` runs it",
    "docker": "a container engine",
    "systemctl": "systemd",
    "sudo": "an administrator",
    "psql": "a database server",
    "openssl": "makes keys; nothing of ours",
    "git": "fetches the repository",
}
"""Programs that are not ours and are not run, with the reason."""
SHELL_OWN = {
    "cd",
    "mkdir",
    "cp",
    "mv",
    "rm",
    "ls",
    "cat",
    "printf",
    "echo",
    "chmod",
    "export",
    "unzip",
    "wait",
    "kill",
    "xdg-open",
}


class Read(BaseException):
    """The program has read its command line, and would begin."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


@functools.cache
def help_flags() -> frozenset[str]:
    """All flags of all commands, and torchrun's."""
    texts = [help_text(module) for module in sorted(RUNNABLE)]
    ours = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)}
    return frozenset(ours.union(*(action.option_strings for action in get_args_parser()._actions)))


@contextlib.contextmanager
def reading_only() -> Iterator[None]:
    """Within, a command that calls `tyro.cli` raises Read where it would begin."""
    cli = tyro.cli

    def read(target: Callable[..., object], **options: Any) -> None:
        if isinstance(target, type):
            raise Read({"options": cli(target, **options)})

        @functools.wraps(target)
        def stop(*_: Any, **values: Any) -> None:
            raise Read(values)

        cli(stop, **options)

    with mock.patch.object(tyro, "cli", read):
        yield


def wrong_with(command: Command) -> str | None:
    """What the program would say against it."""
    program, *words = command.words
    name = program.rsplit("/", 1)[-1]
    if name in ("python", "python3"):
        return _python(words)
    readers: dict[str, Callable[[Sequence[str]], str | None]] = {
        "torchrun": _torchrun,
        "pip": _pip,
        "make": _make,
        "bash": _bash,
        "curl": lambda _: None,  # see `curl_route`
    }
    if name in readers:
        return readers[name](words)
    if name == "srun":
        return wrong_with(Command(command.where, tuple(words)))
    if name in OTHERS or name in SHELL_OWN:
        return None
    return f"nobody checks {name!r}: read it in tests/docs/reading.py, or list it there with the reason why not"


def _python(words: Sequence[str]) -> str | None:
    if list(words[:2]) == ["-m", "pip"]:
        return _pip(words[2:])
    if list(words[:2]) == ["-m", "venv"]:
        return None
    if list(words[:2]) == ["-m", "pytest"]:
        missing = [
            word for word in words[2:] if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()
        ]
        return f"{', '.join(missing)} is not there" if missing else None
    if words[:1] == ["-m"] and len(words) > 1:
        module, words = words[1], words[2:]
    elif words[:1] == ["app.py"]:
        module, words = "app", words[1:]
    else:
        return f"python {' '.join(words)}: neither -m MODULE nor app.py"
    if module not in RUNNABLE:
        return f"there is no command {module}"
    return _ours(module, words)


def _ours(module: str, words: Sequence[str]) -> str | None:
    said = io.StringIO()
    try:
        with reading_only(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = run_command(module, words)
    except Read as read:
        return _values(module, read.values)
    return None if status == 0 else " ".join(said.getvalue().split())


def _values(module: str, values: dict[str, Any]) -> str | None:
    """What only the program's own code would refuse: names of recipes and evaluators. Words in capitals stand for the reader's own."""
    if module == "training" and not values["recipe"].isupper():
        try:
            for name in values["recipe"].split(","):
                check_name(name)
        except InputError as error:
            return str(error)
    named = [word.split("=")[0] for word in getattr(values.get("options"), "evaluators", ())]
    unknown = set(named) - set(available())
    return f"there is no evaluator {', '.join(sorted(unknown))}" if unknown else None


def _torchrun(words: Sequence[str]) -> str | None:
    words = ["1" if word.startswith("SLURM") else word for word in words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read = get_args_parser().parse_args(words)
    except SystemExit:
        return said.getvalue().rsplit("error:", 1)[-1].strip()
    started = ["-m"] * read.module + [read.training_script, *read.training_script_args]
    return _python(started)


def _pip(words: Sequence[str]) -> str | None:
    """Extras that are asked of this package must be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {name for word in words for found in re.findall(r"^\.\[([\w,]+)\]$", word) for name in found.split(",")}
    unknown = asked - set(extras)
    return f"there is no extra {', '.join(sorted(unknown))}" if unknown else None


def _make(words: Sequence[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()  # type: ignore[index]
    for word in words:
        known = re.search(rf"\$\(?\(?{word.split('=')[0]}\b", makefile) if "=" in word else word in targets
        if not known:
            return f"the Makefile knows no {word}"
    return None


def _bash(words: Sequence[str]) -> str | None:
    """The script of `bash -c SCRIPT`."""
    if list(words[:1]) != ["-c"]:
        return f"bash {shlex.join(words)}: only -c SCRIPT is read"
    for command in commands_of([Block("bash -c", 1, "sh", words[1])]):
        if (wrong := wrong_with(command)) is not None:
            return wrong
    return None


def curl_route(words: Sequence[str]) -> tuple[str, str]:
    """Method and path, with the query, that a curl line asks for. Raises SystemExit for flags that are not known here."""
    parser = argparse.ArgumentParser(prog="curl", exit_on_error=False)
    for flags in (
        ("-s", "--silent"),
        ("-S", "--show-error"),
        ("-sS",),
        ("-f", "--fail"),
        ("-i",),
        ("-L",),
        ("-N",),
        ("-k",),
    ):
        parser.add_argument(*flags, action="store_true")
    for flags in (("-F", "--form"), ("-H", "--header"), ("-d", "--data"), ("--data-binary",), ("--json",)):
        parser.add_argument(*flags, action="append", default=[])
    for flags in (("-X", "--request"), ("-o", "--output"), ("--cacert",)):
        parser.add_argument(*flags)
    parser.add_argument("url")
    read = parser.parse_args(list(words))
    method = read.request or ("POST" if read.form or read.data or read.data_binary or read.json else "GET")
    return method, re.sub(r"^(https?://)?[^/]+", "", read.url)
