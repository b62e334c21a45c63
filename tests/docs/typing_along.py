"""Does what a page says, from top to bottom, in an empty folder with the sample images: commands, clients, curl."""

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from server.run import Running
from server.settings import read_settings
from tests.docs.blocks import PYTHON, ROOT, Command, blocks_of, commands_of
from tests.docs.reading import run_command

STANDS_FOR = {
    "path/to/images": "samples/images",
    "path/to/labelled": "samples/samples.csv",
    "dino_small_cpu": "smoke",
    "dino_tiny_small_data": "smoke",
}
"""What a reader would put in, and the recipe that takes seconds where a page names one that takes hours."""
INSTEAD = {("make", "demo"): "-m server --models models/", ("make", "test"): None}
"""What is done instead: the demo's own tests install and open it, and this is one of the tests of `make test`."""
IN_THIS_PROCESS = {"training": ("--workers", "0")}
"""Added, because a process with threads of a server in it should not be forked."""


class Reader:
    """Somebody who types along. Servers that a page starts get free ports, and what it then asks goes to them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.addresses: dict[str, str] = {}
        self.names: dict[str, object] = {}
        self.said = io.StringIO()
        self.done: list[str] = []
        for name in ("models", "samples", "app.py"):
            (folder / name).symlink_to(ROOT / name)
        self.folder = folder

    def follow(self, page: str, text: str | None = None) -> None:
        """Everything in the page's blocks, in order."""
        for block in blocks_of(page, text):
            if block.language in PYTHON:
                with contextlib.redirect_stdout(self.said):
                    exec(compile(self._here(block.text), f"{page}:{block.line}", "exec"), self.names)
            for command in commands_of([block]):
                self.type(command)

    def type(self, command: Command) -> None:
        """Run one command; AssertionError if it fails."""
        words = tuple(STANDS_FOR.get(word, word) for word in command.words)
        if words in INSTEAD:
            instead = INSTEAD[words]
            if instead is None:
                return
            words = (".venv/bin/python", *instead.split())
        if words[0] == "curl":
            self._curl(command.where, words)
        elif words[:3] == (".venv/bin/python", "-m", "server"):
            self._serve(words[3:])
        elif words[:2] == (".venv/bin/python", "-m"):
            module = words[2]
            with contextlib.redirect_stdout(self.said), contextlib.redirect_stderr(self.said):
                words = tuple(self._here(word) for word in (*words[3:], *IN_THIS_PROCESS.get(module, ())))
                status = run_command(module, words)
            assert status == 0, f"{command.where}: status {status}\n{self.said.getvalue()[-2000:]}"
        else:
            raise AssertionError(f"{command.where}: {' '.join(words)} is not something a reader of this kind can do")
        self.done.append(command.where)

    def _here(self, text: str) -> str:
        return re.sub(r"127\.0\.0\.1:\d+", lambda at: self.addresses.get(at[0], at[0]), text)

    def _serve(self, words: tuple[str, ...]) -> None:
        config = read_settings(words, {})
        free = replace(
            config,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            collections=Path(f"state-{len(self.addresses)}"),
            log_level="warning",
        )
        running = self.stack.enter_context(Running(free))
        at = running.addresses
        self.addresses |= {
            f"127.0.0.1:{config.http_port}": at.http.removeprefix("http://"),
            f"127.0.0.1:{config.grpc_port}": at.grpc,
        }

    def _curl(self, where: str, words: tuple[str, ...]) -> None:
        if not shutil.which("curl"):
            return
        done = subprocess.run([*map(self._here, words), "-sS", "--fail"], capture_output=True, check=False)
        assert done.returncode == 0, f"{where}: {done.stderr.decode()}"
        assert done.stdout.startswith(b"\x89PNG" if "format=png" in " ".join(words) else b"{"), where


@contextlib.contextmanager
def somebody(folder: Path) -> Iterator[Reader]:
    """A reader in this folder; servers end with them."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.ExitStack() as stack:
            yield Reader(folder, stack)
    finally:
        os.chdir(before)
