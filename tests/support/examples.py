"""Examples of README.md and the guide, as programs see them."""

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
GUIDE = sorted([*(DOCS / "guide").glob("*.md"), *(DOCS / "design").glob("*.md"), DOCS / "index.md"])
SHOWN = [ROOT / "README.md", *GUIDE]
FENCE = re.compile(r"([ ]*<!-- not run: (?P<why>.+?) -->\n)?[ ]*```(?P<kind>\w+)\n(?P<text>.*?)\n[ ]*```", re.DOTALL)
VARIABLE = re.compile(r"[A-Z_]+=")
SECRET_FILES = {"kvlab_key": b"k" * 32, "key": b"k" * 32, "redis_password": b"secret\n", "ca.pem": b""}


def blocks(page: Path, kind: str) -> list[tuple[str | None, str]]:
    """(why it is not run, text) of every fenced block of a kind."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(match["why"], textwrap.dedent(match["text"])) for match in found if match["kind"] == kind]


def commands(page: Path) -> list[list[str]]:
    """Words of every command of the page's ``bash`` blocks, without the variables that it sets."""
    return [words for _, words in commands_with_variables(page)]


def commands_with_variables(page: Path) -> list[tuple[dict[str, str], list[str]]]:
    """(variables, words) of every command; a line that ends with a backslash goes on."""
    text = "\n".join(text.replace("\\\n", " ") for why, text in blocks(page, "bash") if why is None)
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        count = next((at for at, word in enumerate(words) if not VARIABLE.match(word)), len(words))
        if words[count:]:
            found.append((dict(word.split("=", 1) for word in words[:count]), words[count:]))
    return found


def serve_lines() -> list[tuple[Path, list[str]]]:
    """(page, arguments) of every ``vllm serve``."""
    return [(page, words[2:]) for page in SHOWN for words in commands(page) if words[:2] == ["vllm", "serve"]]


def with_files(text: str, folder: Path) -> str:
    """`text` with its secrets in `folder`, where they are made: kvlab reads a key when it checks settings."""
    for name, content in SECRET_FILES.items():
        path = folder / name
        path.write_bytes(content)
        path.chmod(0o600)
    return re.sub(r"/(?:etc/kvlab|run/secrets)/(?=[\w.]+)", f"{folder}/", text)
