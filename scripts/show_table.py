"""Print the result table of an executed notebook: the last plain-text table in its outputs, and where it lies.

python scripts/show_table.py notebooks/executed/00_quickstart.ipynb
"""

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    tables = [
        "".join(output["data"]["text/plain"])
        for cell in json.loads(path.read_text())["cells"]
        if "result-table" in cell["metadata"].get("tags", [])
        for output in cell.get("outputs", [])
        if "text/plain" in output.get("data", {})
    ]
    if not tables:
        sys.exit(f"{path} holds no result table; was it executed?")
    print(f"\n{tables[-1]}\n\nExecuted notebook: {path}")


if __name__ == "__main__":
    main()
