"""schemathesis on the server's OpenAPI page: requests made from what the page says, and from what it rules out.

Every answer must be what the page says: no failure of the server, a status, a media type and JSON of a form that stand there.
"""

import os
import re
import subprocess
from pathlib import Path

from data.errors import CheckFailed, InputError

PROGRAM = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "dinoscope" / "venvs" / "schemathesis" / "bin" / "schemathesis"
)  # fmt: skip
HOOKS = Path(__file__).parent / "peers" / "schemathesis_hooks.py"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
MADE = re.compile(r"(\d+) generated")


def ask_by_the_page(http: str, folder: Path, examples: int, seed: int) -> int:
    """Run it on the server at `http`, up to `examples` random requests a route beside its fixed ones; how many there were.

    Raises InputError where schemathesis is not installed, CheckFailed where an answer is not what the page says.
    """
    if not PROGRAM.is_file():
        raise InputError(f"{PROGRAM}: is not there; `make reliability` installs it")
    command = [str(PROGRAM), "run", f"{http}/openapi.json", "--checks", ",".join(CHECKS), "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", str(seed)]
    command += ["--generation-database", "none", "--continue-on-failure", "--warnings", "off"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)}, capture_output=True, text=True
    )
    said = MADE.search(done.stdout)
    if done.returncode or said is None:
        raise CheckFailed(
            f"schemathesis ended with status {done.returncode}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )
    return int(said.group(1))
