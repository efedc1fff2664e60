"""Write docs/measured/ from data/measured/: one page a question.

    python scripts/report.py           # write the pages
    python scripts/report.py --check   # exit with 1 where a page is not what the rows give

Standard library only. The pages stand in `scripts/measured/`; tests/test_docs.py compares them with the committed ones.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import codecs, connector, equal, judged, parts, serving
from measured.pages import Page, rendered

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "measured"
PAGES = (*connector.PAGES, *codecs.PAGES, *serving.PAGES, *parts.PAGES, *equal.PAGES, *judged.PAGES)


def pages() -> dict[str, str]:
    """File name -> text of every page, the index among them."""
    made = [page() for page in PAGES]
    return {"index.md": _index(made), **{f"{page.name}.md": rendered(page) for page in made}}


def _index(made: list[Page]) -> str:
    lines = [
        "# Measured",
        "",
        "One page a question, made by `python scripts/report.py` from the rows of `data/measured/`. Each table names "
        "its machine, versions, date, commit and command; `data/README.md` describes the files, and "
        "`data/measured/archive/` holds rows that later ones replace.",
        "",
        "| question | answer | goals |",
        "|---|---|---|",
    ]
    for page in made:
        met = sum(goal.met for goal in page.goals)
        goals = f"{met} of {len(page.goals)} met" if page.goals else ""
        lines.append(f"| [{page.question}]({page.name}.md) | {page.answer} | {goals} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    texts = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    wrong = sorted(name for name in {*texts, *there} if texts.get(name) != there.get(name))
    if check:
        if wrong:
            print(f"docs/measured is not what the rows give: {', '.join(wrong)}; run python scripts/report.py")
        return bool(wrong)
    FOLDER.mkdir(exist_ok=True)
    for name in wrong:
        if name in texts:
            (FOLDER / name).write_text(texts[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    print(f"{len(texts)} pages, {len(wrong)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
