"""Pages that a newcomer types along with work from top to bottom."""

import json
import re
import urllib.request
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, PYTHON, blocks_of, commands_of
from tests.docs.reading import curl_route
from tests.docs.typing_along import somebody

TYPED_ALONG = ("README.md", "docs/first-run.md", "docs/serve.md")
NOT_EXECUTED: dict[str, str] = {}
"""Pages whose Python is compiled and its imports made, but not run, with the reason."""


def test_the_readme_works_from_top_to_bottom(tmp_path: Path) -> None:
    with somebody(tmp_path) as reader:
        reader.follow("README.md")
        assert "(2, 192)" in reader.said.getvalue(), "two embeddings"
        for model in ("embedding", "attention", "knn", "depth"):
            assert f"{model} [(" in reader.said.getvalue()
        assert (tmp_path / "runs/mine/run.html").is_file()


def test_the_first_run_works_from_top_to_bottom(tmp_path: Path) -> None:
    with somebody(tmp_path) as reader:
        reader.follow("docs/first-run.md")
        assert "0.4375" in reader.said.getvalue(), "the figure that the page promises"
        report = (tmp_path / "report.html").read_text()
        assert "results/first" in report or "latest.safetensors" in report


def test_the_page_on_serving_works_from_top_to_bottom(tmp_path: Path) -> None:
    with somebody(tmp_path) as reader:
        reader.follow("docs/serve.md")
        assert "(1, 192)" in reader.said.getvalue()
        with urllib.request.urlopen(f"http://{reader.addresses['127.0.0.1:8000']}/openapi.json") as reply:
            paths = json.load(reply)["paths"]
    known = {
        (verb.upper(), path): re.sub(r"\\{\w+\\}", "[^/?]+", re.escape(path)) for path in paths for verb in paths[path]
    }
    known |= {("GET", path): path for path in ("/docs", "/metrics", "/openapi.json")}
    for command in [one for page in PAGES for one in commands_of(blocks_of(page)) if one.words[0] == "curl"]:
        method, asked = curl_route(command.words[1:])
        found = [one for (verb, _), one in known.items() if verb == method and re.fullmatch(one, asked.split("?")[0])]
        assert found, f"{command.where}: the server has no {method} {asked}"


def test_every_page_with_a_program_is_run_or_says_why_not() -> None:
    programs = {page for page in PAGES if any(block.language in PYTHON for block in blocks_of(page))}
    assert programs - set(TYPED_ALONG) - set(NOT_EXECUTED) == set()


def test_the_first_client_program_is_short() -> None:
    first = next(block for block in blocks_of("README.md") if block.language in PYTHON)
    assert len(first.text.strip().splitlines()) <= 10


@pytest.mark.parametrize(
    "line",
    [
        ".venv/bin/python -m evaluators.knn --ckpt nowhere.safetensors --data samples/samples.csv",
        "curl -F file=@samples/images/kitten.jpg http://127.0.0.1:9/v1/embeddings",
        "rm -r samples",
    ],
)
def test_a_page_that_does_not_work_is_found(tmp_path: Path, line: str) -> None:
    with somebody(tmp_path) as reader, pytest.raises(AssertionError):
        reader.follow("page.md", f"```sh\n{line}\n```\n")
