"""The pages: every link leads somewhere, and every file that they name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tfb
import tfb_kernels

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# In a page a file goes by its path from the root, in code or in a link's text.
NAMED = re.compile(r"`((?:tfb|tfb_kernels|benchmarks|tests|docs|tools)/[\w./-]*)`")
HOUSE = ROOT / "docs" / "house.md"
# A name and the file that defines it.
DEFINED = re.compile(r"`(\w+)` (?:in|of) `((?:tfb|tfb_kernels)/[\w./-]*\.py)`")
DOCUMENTED = re.compile(r"^::: (\S+)$", re.MULTILINE)  # by mkdocstrings
# What a changelog says of an older version was true of it.
NAMING = [page for page in PAGES if page.name != "CHANGELOG.md"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings, and the site to names of the API."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return found | set(DOCUMENTED.findall(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):  # another site
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


@pytest.mark.parametrize("page", NAMING, ids=name)
def test_named_files_exist(page: Path) -> None:
    for path in NAMED.findall(prose(page)):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results"), path
    for defined, path in DEFINED.findall(page.read_text()):
        assert re.search(rf"\b{defined}\b", (ROOT / path).read_text()), (defined, path)


def test_the_tree_is_that_of_the_house() -> None:
    """house.md has one line for each module, and no other."""
    listed = set()
    for block in re.findall(r"^```\n(.*?)^```", HOUSE.read_text(), re.MULTILINE | re.DOTALL):
        folders: list[str] = []
        for line in block.splitlines():
            depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
            if entry.endswith("/"):
                folders[depth:] = [entry]
            else:
                listed.add("".join(folders[:depth]) + entry)
    found = (file for package in ("tfb", "tfb_kernels") for file in ROOT.glob(f"{package}/**/*.py"))
    assert listed == {name(file) for file in found if not file.name.startswith("__")}


def test_every_page_is_listed() -> None:
    """Each folder of docs has an index, and each index every page beside it."""
    for index in (ROOT / "docs").rglob("README.md"):
        listed = {(index.parent / link.partition("#")[0]) for link in LINK.findall(prose(index))}
        assert set(index.parent.glob("*.md")) - {index} <= listed


def test_decisions_are_short() -> None:
    """One decision, or a few that belong together, on a page of at most 60 lines."""
    for page in (ROOT / "docs" / "design").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 60, page.name


@pytest.mark.parametrize("package", [tfb, tfb_kernels], ids=lambda p: p.__name__)
def test_every_public_name_is_documented(package: ModuleType) -> None:
    """Once in the reference, from a docstring of its own."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    listed = [name for page in pages for name in DOCUMENTED.findall(page.read_text())]
    own = [name for name in listed if name.partition(".")[0] == package.__name__]
    assert sorted(own) == sorted(f"{package.__name__}.{name}" for name in package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert not callable(value) or value.__doc__, name


def test_the_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_notebook_is_executed_where_it_is_built() -> None:
    """It holds no output that could be of another version."""
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_the_module_of_ones_own_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of docs/own-modules.md, as they stand."""
    text = (ROOT / "docs" / "own-modules.md").read_text()
    names: dict[str, Any] = {}
    for part in text.split("```python\n")[1:]:
        exec(part.split("```")[0], names)
    assert capsys.readouterr().out.startswith("sigma = ")
    assert names["pred"].probs.shape == (64, 4) and names["outputs"].shape == (640, 4)
    assert names["y"].shape == (10, 5, 4)
