"""One style for all figures: three templates, two widths, and one colour for each thing that is compared.

    from kvlab.plotting import theme

    theme.use()                                        # or theme.use("dark"); figures made later look so
    theme.styled(figure, "LRU gets 13% of the blocks") # title, template and size of one figure

A backend, tier, policy or serde has the same colour in every figure: `color("kvlab-memory")`, `color("lru")`.
"""

from typing import TYPE_CHECKING

from kvlab.errors import ConfigError
from kvlab.installed import needed
from kvlab.plotting.ticks import tidy_log_axes

if TYPE_CHECKING:
    import plotly.graph_objects as go

NARROW, WIDE = 640, 900  # pixels: one series, or several with a legend
HEIGHT = 420
TEMPLATES = {"light": "kvlab", "dark": "kvlab-dark", "any": "kvlab-any"}
PNG_SCALE = 2  # pictures are read on screens of two dots a pixel

FIRST = "#c3cad3"  # a first run
NONE = "#7b8794"  # no cache, and bounds: there only to compare with
BLUE, TEAL, AMBER, RUST, VIOLET, GREEN, PINK, BROWN = (
    "#2f6db5", "#2a9d8f", "#e09f3e", "#c8553d", "#7a5fb5", "#5a9e4b", "#c9588f", "#8d6e4a"
)  # fmt: skip
CYCLE = (BLUE, RUST, TEAL, AMBER, VIOLET, GREEN, PINK, BROWN)
BACKENDS = {
    "none": NONE, "computed": NONE,
    "vllm-prefix": TEAL, "vllm-offload": AMBER, "vllm-fs": "#b87d28", "vllm-simple": "#efc27e",
    "kvlab": BLUE, "kvlab-memory": BLUE, "kvlab-disk": "#6f9fd8", "kvlab-redis": "#16457f", "kvlab-tiered": VIOLET,
    "kvlab-serve": "#8fc1ee", "loaded": BLUE,
    "lmcache": RUST, "lmcache-cpu": RUST, "lmcache-disk": "#df8a76", "lmcache-redis": "#8e2f1b",
    "lmcache-mp": "#d98e7f",
}  # fmt: skip
TIERS = {"memory": BLUE, "disk": BROWN, "file": BROWN, "redis": "#c0392b"}
POLICIES = {
    "lru": BLUE, "fifo": AMBER, "lfu": PINK, "mru": BROWN, "s3fifo": TEAL, "arc": VIOLET, "belady": NONE
}  # fmt: skip
SERDES = {
    "naive": NONE, "lossless": GREEN, "fp8": TEAL, "int8": BLUE, "int4": VIOLET, "centered": AMBER, "rotated4": PINK,
    "cachegen": RUST, "cachegen-lmcache": "#df8a76",
}  # fmt: skip
COLORS = {**BACKENDS, **TIERS, **POLICIES, **SERDES}


def color(name: str) -> str | None:
    """The colour of a backend, tier (its URL too), policy or serde (with options too); None of anything else, which
    lets plotly take the next colour of the template.

    >>> color("int8:k=channel,v=token") == color("int8")
    True
    """
    return COLORS.get(name) or COLORS.get(name.partition(":")[0])


def use(mode: str = "any") -> None:
    """Make the style the default of every figure made from now on.

    ``light`` and ``dark`` paint their background. ``any`` paints none, and its text is legible on white and on black:
    so a notebook looks right in Lab's light and dark theme and on a page that follows the reader's.
    """
    pio = needed("plotly.io", "a figure")

    if mode not in TEMPLATES:
        raise ConfigError(f"mode must be one of {', '.join(TEMPLATES)}, got {mode!r}")
    _register()
    pio.templates.default = TEMPLATES[mode]
    pio.renderers["png"].scale = PNG_SCALE


def styled(figure: "go.Figure", title: str, *, width: int = WIDE, height: int = HEIGHT) -> "go.Figure":
    """Give `figure` the style, a title that states what it shows, round ticks where an axis is logarithmic, and one of
    the two widths. Returns it."""
    pio = needed("plotly.io", "a figure")

    _register()
    if pio.templates.default not in TEMPLATES.values():
        figure.update_layout(template=TEMPLATES["light"])
    tidy_log_axes(figure)
    return figure.update_layout(title=title, width=width, height=height)


def _register() -> None:
    pio = needed("plotly.io", "a figure")

    if TEMPLATES["light"] not in pio.templates:
        pio.templates[TEMPLATES["light"]] = _template(text="#1f2933", back="#ffffff", grid="#e4e7eb")
        pio.templates[TEMPLATES["dark"]] = _template(text="#e4e7eb", back="#161b22", grid="#30363d")
        pio.templates[TEMPLATES["any"]] = _template(text="#727d8a", back="rgba(0,0,0,0)", grid="rgba(128,128,128,0.3)")


def _template(*, text: str, back: str, grid: str) -> "go.layout.Template":
    go = needed("plotly.graph_objects", "a figure")

    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "title": {"standoff": 10}, "automargin": True}
    title = {"x": 0.02, "xanchor": "left", "font": {"size": 16}}
    return go.layout.Template(
        layout={
            "font": {"color": text, "size": 13, "family": "Inter, Helvetica, Arial, sans-serif"},
            "paper_bgcolor": back,
            "plot_bgcolor": back,
            "colorway": CYCLE,
            "title": title,
            "margin": {"l": 60, "r": 20, "t": 70, "b": 55},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "hovermode": "closest",
            "shapedefaults": {"line": {"color": text}},
            "annotationdefaults": {"font": {"color": text}},
        }
    )
