"""The files for Docker, systemd and Kubernetes name settings, ports and folders that there are. No engine of these runs here."""

import configparser
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.config import ServerConfig
from server.run import Running
from server.settings import read_settings
from tests.server.conftest import config_of
from tests.server.gate import GatedRuntime

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_image_copies_every_package_and_nothing_that_is_not_there(repo_root: Path) -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert all((repo_root / name).exists() for name in names)
    packages = {path.parent.name for path in repo_root.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= set(names)


def test_the_images_user_is_the_pods_and_the_one_that_its_token_file_is_given_to(manifests: dict[str, dict]) -> None:
    """A token file that is kept as our own page says, readable by its owner alone, is this user's or the start ends."""
    text = (DEPLOY / "Dockerfile").read_text()
    user = manifests["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"useradd --uid {user} " in text
    assert f"chown {user} tokens" in text


def test_the_settings_of_the_image_are_settings() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    environment = dict(re.findall(r"(DINOSCOPE_\w+)=(\S+)", text))
    config = read_settings([], environment)
    assert config.models == Path("/models")
    config.check()


def health(repo_root: Path, port: int, **environment: str) -> int:
    """The exit status of the image's own check."""
    (words,) = re.findall(r"^HEALTHCHECK .*CMD (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    program, *rest = json.loads(words)
    assert program == "python"
    environment |= {"PATH": os.environ["PATH"], "DINOSCOPE_HTTP_PORT": str(port)}
    return subprocess.run([sys.executable, *rest], env=environment, cwd=repo_root, timeout=30, check=False).returncode


@pytest.mark.parametrize("files", [(), ("tls_cert", "tls_key"), ("tls_cert", "tls_key", "tls_client_ca")])
def test_the_images_check_finds_a_server_that_is_ready_with_and_without_tls(
    files: tuple[str, ...], authority: dict[str, Path], repo_root: Path, tmp_path: Path
) -> None:
    """Whether the environment, which the check sees, asked for TLS, or a flag, which it does not."""
    named = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
    given = {name: authority[named[name]] for name in files}
    with Running(config_of(tmp_path, tmp_path / "state", **given), GatedRuntime().load) as running:
        port = int(running.addresses.http.rpartition(":")[2])
        assert health(repo_root, port) == 0
        assert health(repo_root, port, **{f"DINOSCOPE_{name.upper()}": str(path) for name, path in given.items()}) == 0


def test_the_images_check_fails_for_one_that_is_not_ready_and_where_there_is_none(
    repo_root: Path, tmp_path: Path
) -> None:
    leaves = config_of(tmp_path, tmp_path / "state", drain_delay_s=3)
    with Running(leaves, GatedRuntime().load) as running:
        running.leave()
        assert health(repo_root, int(running.addresses.http.rpartition(":")[2])) == 1
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert health(repo_root, silent.getsockname()[1]) == 1
    assert health(repo_root, 1) == 1


def test_the_images_check_asks_the_port_that_is_the_servers_default() -> None:
    assert f'"{ServerConfig.http_port}"' in (DEPLOY.parent / "health.py").read_text()


def test_the_unit_starts_the_server_and_waits_for_it_to_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "dinoscope.service")
    service = unit["Service"]
    assert service["ExecStart"].endswith("python -m server")
    assert {pair.split("=")[0] for pair in service["Environment"].split()} <= {
        f"DINOSCOPE_{name.upper()}" for name in ServerConfig.__dataclass_fields__
    }
    assert int(service["TimeoutStopSec"]) > ServerConfig.grace_s


def test_the_deployment_probes_what_the_server_answers(manifests: dict[str, dict]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert probes["readiness"] == probes["startup"] == {"path": "/v2/health/ready", "port": "http"}
    assert probes["liveness"] == {"path": "/v2/health/live", "port": "http"}
    given = {one["name"]: one.get("value", "postgresql://u:p@h/d") for one in container["env"]}
    config = read_settings(["--models", "/models"], given)
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s
    mounts = {one["name"] for one in container["volumeMounts"]}
    assert mounts == {one["name"] for one in pod["volumes"]}


def test_the_service_selects_the_deployments_pods(manifests: dict[str, dict]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_pods_are_not_told_of_services_in_variables_that_look_like_settings(manifests: dict[str, dict]) -> None:
    assert manifests["Service"]["metadata"]["name"] == "dinoscope"
    assert manifests["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_image_reads_and_writes_every_form_of_collections() -> None:
    (extras,) = re.findall(r'"\.\[(.+)\]"', (DEPLOY / "Dockerfile").read_text())
    assert {"postgres", "parquet"} <= set(extras.split(","))
