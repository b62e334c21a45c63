"""A PostgreSQL server of the tests' own, where Debian's is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSING = "PostgreSQL is not installed (Debian: postgresql), so the shared store is not tested"


def find_programs() -> Path | None:
    """The folder of initdb and postgres, newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: -int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[0].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def running_postgres(programs: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The URL of an empty server, and its process; it is stopped and its files are removed at the end."""
    as_user = [] if os.getuid() else ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder, socket.socket() as free:
        if as_user:  # PostgreSQL refuses to run as root
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        data = f"{folder}/data"
        make = [*as_user, str(programs / "initdb"), "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder)
        start = [str(programs / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        server = subprocess.Popen([*as_user, *start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        try:
            ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            for _ in range(300):
                if subprocess.run(ready, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError("PostgreSQL did not come up within 30 s")
            yield f"postgresql://tests@127.0.0.1:{port}/postgres", server
        finally:
            server.terminate()
            server.wait(timeout=30)
