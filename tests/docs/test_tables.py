"""Numbers in README.md and docs/ are those of docs/results; links lead somewhere; the front page is short."""

import re
from pathlib import Path

import pytest

from tools import tables

ROOT = Path(__file__).parents[2]
PAGES = [*tables.pages(), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def local_links(page):
    """``(link, file)`` of every link to a file of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if not re.match(r"https?://|mailto:|#", link):
            yield link, (page.parent / link.partition("#")[0]).resolve()


def test_every_table_and_number_is_that_of_its_results_file():
    stale = [str(page.relative_to(ROOT)) for page in tables.out_of_date()]
    assert not stale, f"run python tools/tables.py: {stale} differ from docs/results"


@pytest.mark.parametrize(("right", "wrong"), [("0.987 ± 0.002", "0.988 ± 0.002"), ("129 s", "128 s")])
def test_a_changed_number_is_noticed(right, wrong):
    text = (ROOT / "README.md").read_text()
    assert right in text
    assert tables.render(text.replace(right, wrong), "README.md") == text


def test_unknown_and_open_markers_are_refused():
    with pytest.raises(ValueError, match=r"page.md: given table 'nothing'; allowed: "):
        tables.render("<!-- table: nothing -->\n<!-- end -->", "page.md")
    with pytest.raises(ValueError, match=r"page.md: a marker is not closed"):
        tables.render("<!-- end -->", "page.md")


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 6144


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    missing = [link for link, file in local_links(page) if not file.exists()]
    assert not missing


def test_every_results_file_and_picture_is_shown():
    shown = {file for page in PAGES for _, file in local_links(page)}
    kept = [*(ROOT / "docs/results").glob("*.json"), *(ROOT / "docs/images").iterdir()]
    assert not [file.name for file in kept if file not in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_line_begins_with_the_marker_of_a_value(page):
    """Markdown would end the paragraph there."""
    assert not re.search(r"^<!-- value", page.read_text(), re.MULTILINE)
