"""Pages that a newcomer types along with work from top to bottom."""

from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, PYTHON, blocks_of
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
