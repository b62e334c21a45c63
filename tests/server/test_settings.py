"""Settings from a file, the environment and flags."""

import json
import re
from pathlib import Path

import pytest

from data.errors import InputError
from server.config import ServerConfig
from server.settings import read_settings, resolved
from tests.server.gate import GatedRuntime


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(
        'models = "from-file"\nhttp_port = 1111\ngrpc_port = 2222\npublic = true\nevaluation_data = ["a=/a", "b=/b"]\n'
    )
    return path


def test_flags_go_before_the_environment_and_that_before_the_file(file: Path) -> None:
    environment = {"DINOSCOPE_GRPC_PORT": "3333", "DINOSCOPE_METRICS_PORT": "4444", "OTHER": "x"}
    found = read_settings(["--config", str(file), "--metrics-port", "5555"], environment)
    assert (found.http_port, found.grpc_port, found.metrics_port) == (1111, 3333, 5555)
    assert found.models == Path("from-file")
    assert found.public
    assert found.evaluation_data == ("a=/a", "b=/b")


def test_a_file_may_be_named_by_the_environment_and_a_switch_be_taken_back(file: Path) -> None:
    found = read_settings(["--no-public"], {"DINOSCOPE_CONFIG": str(file), "DINOSCOPE_EVALUATION_DATA": "c=/c"})
    assert not found.public
    assert found.evaluation_data == ("c=/c",)


def test_flags_alone_are_enough() -> None:
    assert read_settings(["--models", "m", "--http_port=7"], {}).http_port == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_prot = 1", "'http_prot' is no setting"),
        ("http_port = [1]", "wanted one value"),
        ('evaluation_data = "a=/a"', "wanted a list"),
        ("public = 3", "wanted true or false"),
        ("= 1", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_settings(["--models", "m", "--config", str(tmp_path / "s.toml")], {})


def test_what_kubernetes_tells_of_services_is_no_setting() -> None:
    links = {
        "DINOSCOPE_SERVICE_HOST": "10.0.0.1",
        "DINOSCOPE_SERVICE_PORT": "8000",
        "DINOSCOPE_SERVICE_PORT_HTTP": "8000",
        "DINOSCOPE_PORT": "tcp://10.0.0.1:8000",
        "DINOSCOPE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "DINOSCOPE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "DINOSCOPE_CANARY_SERVICE_HOST": "10.0.0.2",
        "DINOSCOPE_CANARY_PORT": "tcp://10.0.0.2:8000",
    }
    assert read_settings(["--models", "m"], links) == ServerConfig(models=Path("m"))
    with pytest.raises(InputError, match="DINOSCOPE_GPRC_PORT: there is no such setting"):
        read_settings(["--models", "m"], {"DINOSCOPE_GPRC_PORT": "9000"})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(InputError, match="DINOSCOPE_PROT: there is no such setting"):
        read_settings(["--models", "m"], {"DINOSCOPE_PROT": "1"})


def test_variables_for_clients_are_no_settings() -> None:
    assert read_settings(["--models", "m"], {"DINOSCOPE_TOKEN": "t", "DINOSCOPE_CA": "ca.pem"}).token_file is None


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("http_port", "many", "'many'; wanted a whole number"),
        ("instances", "1.5", "'1.5'; wanted a whole number"),
        ("grace_s", "soon", "'soon'; wanted a number"),
        ("public", "maybe", "'maybe'; wanted true or false"),
        ("log_level", "loud", "'loud'; wanted debug, info, warning or error"),
    ],
)
def test_a_value_of_another_kind_is_refused_where_it_stands(name: str, text: str, wanted: str, tmp_path: Path) -> None:
    variable, file = f"DINOSCOPE_{name.upper()}", tmp_path / "s.toml"
    with pytest.raises(InputError, match=f"^{variable} is {wanted}$"):
        read_settings(["--models", "m"], {variable: text})
    file.write_text(f'{name} = "{text}"\n')
    with pytest.raises(InputError, match=f"^--config {file}: {name} is {wanted}$"):
        read_settings(["--models", "m", "--config", str(file)], {})


@pytest.mark.parametrize("name", ["collections", "samples", "host", "http_port"])
def test_an_empty_value_is_refused_where_it_stands(name: str, tmp_path: Path) -> None:
    """It would be the working directory as a folder of collections, or all of its images as samples."""
    variable, file = f"DINOSCOPE_{name.upper()}", tmp_path / "s.toml"
    with pytest.raises(InputError, match=f"^{variable} is empty; give it a value, or leave it out$"):
        read_settings(["--models", "m"], {variable: ""})
    file.write_text(f'{name} = ""\n')
    with pytest.raises(InputError, match=f"^--config {file}: {name} is empty"):
        read_settings(["--models", "m", "--config", str(file)], {})


def test_no_data_to_evaluate_is_an_empty_list_and_no_empty_variable(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("evaluation_data = []\n")
    assert read_settings(["--models", "m", "--config", str(tmp_path / "s.toml")], {}).evaluation_data == ()
    with pytest.raises(InputError, match=r"^DINOSCOPE_EVALUATION_DATA is empty"):
        read_settings(["--models", "m"], {"DINOSCOPE_EVALUATION_DATA": ""})


def test_a_value_that_makes_no_sense_is_refused_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("queue_rows = 0\n")
    wanted = "DINOSCOPE_HTTP_PORT: --http-port 70000: wanted 0 to 65535"
    with pytest.raises(InputError, match=f"^{wanted}$"):
        read_settings(["--models", "m"], {"DINOSCOPE_HTTP_PORT": "70000"})
    with pytest.raises(InputError, match=f"^--config {file}: queue_rows: --queue-rows 0: wanted at least 1$"):
        read_settings(["--models", "m", "--config", str(file)], {})
    with pytest.raises(InputError, match=r"^--http-port -1: wanted 0 to 65535$"):
        read_settings(["--models", "m", "--http-port", "-1"], {"DINOSCOPE_HTTP_PORT": "80"})


def test_what_was_set_elsewhere_can_be_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("instances = 3\n")
    assert read_settings(["--models", "m", "--config", str(file)], {"DINOSCOPE_INSTANCES": "None"}).instances is None


def test_what_is_printed_is_everything_but_the_password() -> None:
    runtime = GatedRuntime()
    runtime.threads = 3
    shown = resolved(ServerConfig(models=Path("m"), database="postgresql://me:secret@host/d"), [runtime, runtime])
    assert "secret" not in json.dumps(shown)
    assert (shown["instances"], shown["threads"], shown["device"], shown["spinning"]) == (2, 3, "cpu", False)
    assert shown["database"] == "postgresql://me:***@host/d"
    assert shown["http_port"] == 8000
