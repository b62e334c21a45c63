"""Parquet files from clients, read in a process of their own: pyarrow ends the process that it runs in over some broken ones.

Read in this order: `read_apart`, which the server calls; `main`, which its process runs, and people never do: the file on stdin becomes the
same collection as `.npz` on stdout, or one line on stderr.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from data.errors import InputError, run_cli
from evaluators.collection_file import PARQUET, CollectionFile, check_form, read_collection, write_collection

ROOT = str(Path(__file__).resolve().parents[1])
READ_S = 300.0
"""How long a file may be read: the largest that is taken needs seconds, and whatever else is imported or exported waits for it."""
_BAD_INPUT = 2
"""Status of a command that was given something it cannot use; see `data.errors`."""


def read_apart(content: bytes) -> CollectionFile:
    """As `read_collection`, whatever the file does to its reader. Raises InputError."""
    if not content.startswith(PARQUET):
        return read_collection(content)
    check_form("parquet")
    command = [sys.executable, "-P", "-m", "server.file_process"]
    environment = os.environ | {"PYTHONPATH": ROOT}
    try:
        done = subprocess.run(
            command,
            input=content,
            capture_output=True,
            env=environment,
            start_new_session=True,
            check=False,
            timeout=READ_S,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"the file was not read within {READ_S:g} s; send it in parts, or as .npz") from error
    if done.returncode == 0:
        return read_collection(done.stdout)
    told = done.stderr.decode(errors="replace").strip()
    if done.returncode == _BAD_INPUT:
        raise InputError(told.removeprefix("error: "))
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        raise InputError(
            f"the file is no collection (its reader ended by {ended}); wanted .npz or .parquet as exported"
        )
    raise RuntimeError(f"the reader of Parquet files ended with status {done.returncode}: {told[-4000:]}")


def main() -> None:
    """stdin to stdout."""
    run_cli(lambda: sys.stdout.buffer.write(write_collection(read_collection(sys.stdin.buffer.read()), "npz")))


if __name__ == "__main__":
    main()
