"""Write the tables and numbers of README.md and docs/ from docs/results/*.json.

    python tools/tables.py            # rewrite what stands between the markers
    python tools/tables.py --check    # change nothing; list what is out of date, with exit code 1

A page holds `<!-- table: NAME -->` ... `<!-- end -->` around a table and `<!-- value: NAME -->` ... `<!-- end -->`
around a number in a sentence. NAME is a key of TABLES or VALUES in tools/results.py, where each is computed from a
results file. A marker with an unknown name is an error, and so is a table or value that no page shows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.results import TABLES, VALUES

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- (?P<kind>table|value): (?P<name>[\w-]+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)


def pages(root: Path = ROOT) -> Iterator[Path]:
    """Every Markdown page that may show results."""
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def render(text: str, page: str) -> str:
    """``text`` with everything between markers computed anew. ValueError for an unknown name."""

    def replace(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        known = TABLES if kind == "table" else VALUES
        if name not in known:
            raise ValueError(f"{page}: given {kind} {name!r}; allowed: {', '.join(sorted(known))}")
        content = f"\n\n{known[name]()}\n\n" if kind == "table" else known[name]()
        return f"<!-- {kind}: {name} -->{content}<!-- end -->"

    if text.count("<!-- end -->") != len(MARKER.findall(text)):
        raise ValueError(f"{page}: a marker is not closed by <!-- end -->, or an end has no beginning")
    return MARKER.sub(replace, text)


def out_of_date(root: Path = ROOT) -> dict[Path, str]:
    """The pages whose numbers differ from their files, and what they should contain."""
    texts = {page: page.read_text() for page in pages(root)}
    shown = {(m["kind"], m["name"]) for text in texts.values() for m in MARKER.finditer(text)}
    wanted = {("table", name) for name in TABLES} | {("value", name) for name in VALUES}
    if unused := sorted(wanted - shown):
        raise ValueError(f"no page shows {', '.join(f'{kind} {name}' for kind, name in unused)}")
    rendered = {page: render(text, str(page.relative_to(root))) for page, text in texts.items()}
    return {page: new for page, new in rendered.items() if new != texts[page]}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    changed = out_of_date()
    for page, text in changed.items():
        print(f"{page.relative_to(ROOT)}: {'differs from its results' if args.check else 'rewritten'}")
        if not args.check:
            page.write_text(text)
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
