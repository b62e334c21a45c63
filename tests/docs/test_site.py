"""Pages and what they point at: code that is named exists, links are well-formed, nothing is fetched from elsewhere."""

import ast
import re
from functools import cache
from urllib.parse import urlsplit

import pytest

from tests.docs.blocks import PAGES, ROOT

FILES = (
    r"(?:data|backbones|runtimes|training|evaluators|curation|exports|server|benchmarks|tests|models|samples)/[\w./-]+"
)


@cache
def names_in(path: str) -> frozenset[str]:
    """Functions, classes, methods, fields and constants of a source file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    named = {name.rstrip("/.") for name in re.findall(rf"`({FILES})`", text)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_how_dino_works_names_code_that_is_there() -> None:
    """A word in backticks belongs to the last file that its paragraph names."""
    text = (ROOT / "docs/how-dino-works.md").read_text(encoding="utf-8")
    checked = 0
    for paragraph in re.split(r"\n\s*\n|\n- |\n#", text):
        path = None
        for code in re.findall(r"`([^`]+)`", paragraph):
            if code.endswith(".py"):
                path = code
                assert (ROOT / path).is_file(), path
            elif re.fullmatch(r"[A-Za-z_]\w*", code):
                assert path is not None, f"{code}: in which file?"
                assert code in names_in(path), f"{path} has no {code}"
                checked += 1
    assert checked > 25


@pytest.mark.parametrize("page", PAGES)
def test_links_to_other_sites_are_well_formed(page: str) -> None:
    """Whether they answer is not asked: tests run without a network."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\((\w+:[^)\s]+)\)|<(https?://[^>\s]+)>", text):
        parts = urlsplit(link[0] or link[1])
        assert parts.scheme == "https", link
        assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), link


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    """Those between pages of docs/ are checked by `make docs`, anchors too."""
    for link, anchor in re.findall(r"\]\(([^)#:\s]+)(#[^)\s]+)?\)", (ROOT / page).read_text(encoding="utf-8")):
        target = ROOT / link
        assert target.exists(), link
        if anchor:
            slugs = [
                re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
                for title in headings(target.read_text())
            ]
            assert anchor[1:] in slugs, f"{link}{anchor}"


def headings(text: str) -> list[str]:
    """Titles of a page, without those that are comments in blocks."""
    return re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
