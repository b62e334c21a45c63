"""A real Triton, from the wheel `nvidia-pytriton` in a virtual environment of its own (`make test-triton` makes it)."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

VENV = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope" / "venvs" / "triton"
START_TIMEOUT_S = 180


def site_packages() -> Path:
    """Of the environment; skips the test where there is none."""
    found = sorted(VENV.glob("lib/python3*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if not found:
        pytest.skip(f"no Triton in {VENV}; `make test-triton` installs it")
    return found[0].parents[3]


class RealTriton:
    """The server on one repository, on ports of this machine's choosing; a context manager."""

    def __init__(self, repository: Path, scratch: Path) -> None:
        self.repository, self.scratch = repository, scratch
        self.http, self.grpc, self.metrics = free_ports(3)
        self.log = scratch / "triton.log"

    def __enter__(self) -> "RealTriton":
        site = site_packages()
        bundled = site / "pytriton" / "tritonserver"
        server = self.scratch / "server"
        for part in ("backends", "bin", "caches"):
            shutil.copytree(bundled / part, server / part)
        version = next(path.name.removeprefix("python") for path in (VENV / "lib").glob("python3*"))
        stub = server / "backends" / "python" / "triton_python_backend_stub"
        shutil.copy(bundled / "python_backend_stubs" / version / stub.name, stub)
        for program in (stub, server / "bin" / "tritonserver"):
            program.chmod(0o755)
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={server / 'backends'}",
            f"--cache-directory={server / 'caches'}",
            *(f"--{wire}-address=127.0.0.1" for wire in ("http", "grpc", "metrics")),
            *(f"--{wire}-port={getattr(self, wire)}" for wire in ("http", "grpc", "metrics")),
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10",
        ]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
            "PYTHONPATH": str(site),
            "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"Triton did not become ready:\n{self.log.read_text()[-6000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
