"""Draw the pictures of README.md into docs/images/.

    python scripts/readme_pictures.py              # the figure, from data/measured/
    python scripts/readme_pictures.py --thumbnails # and one picture of each notebook, from its own figures

Needs plotly, kaleido, pillow and Chrome or Chromium. tests/test_readme.py holds the figure to its rows.
"""

import argparse
import base64
import io
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
NOTEBOOKS = ROOT / "notebooks"
DATASET, RUN = "documents", 2
# place of the KV -> backends, in the file of the servers that ran side by side
PLACES = {
    "no cache": ("memory", ["none"]),
    "Redis": ("redis", ["lmcache-redis", "kvlab-redis"]),
    "disk": ("disk", ["lmcache-disk", "kvlab-disk"]),
    "memory, then disk": ("disk", ["kvlab-tiered"]),
    "host memory": ("memory", ["vllm-offload", "lmcache-cpu", "kvlab-memory"]),
    "GPU memory": ("memory", ["vllm-prefix"]),
}
NAMES = {
    "none": "computed", "vllm-offload": "vLLM OffloadingConnector", "vllm-prefix": "vLLM prefix cache",
    "lmcache": "LMCache 0.5.2", "kvlab": "kvlab",
}  # fmt: skip
THUMBNAIL = (420, 236)  # pixels
FIGURE_OF = {
    "00": 0,
    "01": 1,
    "02": 2,
    "03": 0,
    "04": 0,
    "05": 1,
    "06": 1,
    "07": 0,
    "08": 0,
    "09": 1,
    "10": 0,
}  # the one that shows most


def measured() -> list[tuple[str, str, float]]:
    """(place, backend, mean TTFT in ms) of each bar, slowest place first."""
    found = []
    for place, (file, backends) in PLACES.items():
        path = ROOT / "data" / "measured" / f"serving_{file}_h200_piecewise.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for backend in backends:
            (row,) = [r for r in rows if (r["backend"], r["dataset"], r["run"]) == (backend, DATASET, RUN)]
            found.append((place, backend, row["mean_ttft_ms"]))
    return found


def label(ms: float) -> str:
    return f"{ms:,.0f} ms"


def title(bars: list[tuple[str, str, float]]) -> str:
    ms = {backend: value for _, backend, value in bars}
    return (
        f"The same documents again: {label(ms['kvlab-memory'])} to the first token, {label(ms['none'])} computed"
        "<br><sup>mean TTFT of second runs under load, Qwen2.5-7B's shapes on an H200; "
        "what would load slower than the GPU computes, kvlab computes</sup>"
    )


def draw(mode: str) -> None:
    import plotly.graph_objects as go

    from kvlab.plotting import theme

    theme.use(mode)
    bars = measured()
    kinds = [backend if backend in NAMES else backend.partition("-")[0] for _, backend, _ in bars]
    figure = go.Figure(
        go.Bar(
            y=[[place for place, _, _ in bars], [NAMES[kind] for kind in kinds]],
            x=[ms for _, _, ms in bars],
            orientation="h",
            marker_color=[theme.color(kind) for kind in kinds],
            text=[label(ms) for _, _, ms in bars],
            textposition="outside",
            cliponaxis=False,
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(type="log", range=[1, 4.5], title="mean TTFT, ms (logarithmic)")
    theme.styled(figure, title(bars), height=460)
    figure.update_layout(margin={"t": 80, "r": 40})
    figure.write_image(IMAGES / f"ttft-{mode}.svg")


def thumbnail(path: Path) -> None:
    from PIL import Image

    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    raw = base64.b64decode("".join(pictures[min(FIGURE_OF[path.name[:2]], len(pictures) - 1)]))
    picture = Image.open(io.BytesIO(raw)).convert("RGBA")
    picture.thumbnail(THUMBNAIL)
    picture.quantize(64).save(IMAGES / f"{path.stem}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", action="store_true", help="also draw the notebooks' pictures")
    if parser.parse_args().thumbnails:
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            thumbnail(path)
    for mode in ("light", "dark"):
        draw(mode)


if __name__ == "__main__":
    main()
