"""One style for all figures: a thing has one colour, whatever figure it is in."""

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from kvlab.errors import ConfigError
from kvlab.plotting import theme
from kvlab.plotting.serving import reduction_bars
from kvlab.serde import SERDES
from kvlab.serving.backends import NAMES
from kvlab.stores.eviction import POLICIES


@pytest.fixture(autouse=True)
def default_template():
    before = pio.templates.default
    yield
    pio.templates.default = before


def test_every_backend_policy_and_serde_has_a_colour():
    assert [name for name in (*NAMES, *POLICIES, *SERDES) if theme.color(name) is None] == []


def test_options_and_urls_do_not_change_a_colour():
    assert theme.color("int4:group=32") == theme.color("int4")
    assert theme.color("redis://host:6379") == theme.color("redis")
    assert theme.color("anything else") is None


@pytest.mark.parametrize(("mode", "template"), theme.TEMPLATES.items())
def test_figures_made_after_use_have_its_template(mode, template):
    theme.use(mode)
    figure = theme.styled(go.Figure(), "a finding", width=theme.NARROW)
    assert figure.layout.template == pio.templates[template]
    assert (figure.layout.title.text, figure.layout.width) == ("a finding", theme.NARROW)


def test_logarithmic_axes_have_round_ticks_without_powers():
    figure = go.Figure(go.Scatter(x=[700, 2e12], y=[8, 400]))
    figure.update_xaxes(type="log").update_yaxes(type="log")
    theme.styled(figure, "")
    assert figure.layout.xaxis.ticktext[-1] == "1T"
    assert 4 <= len(figure.layout.xaxis.tickvals) <= 8
    assert list(figure.layout.yaxis.ticktext) == ["3", "10", "30", "100", "300", "1k"]


def test_ticks_that_are_given_stay():
    figure = go.Figure(go.Scatter(x=[1, 100], y=[1, 2]))
    figure.update_xaxes(type="log", tickvals=[1, 7])
    assert list(theme.styled(figure, "").layout.xaxis.tickvals) == [1, 7]


def test_ticks_come_from_the_axis_own_numbers():
    figure = go.Figure([go.Scatter(x=[1, 10], y=[1, 2]), go.Scatter(x=[1e6, 1e8], y=[1, 2], xaxis="x2")])
    figure.update_layout(xaxis2={"type": "log"}, xaxis={"type": "log"})
    theme.styled(figure, "")
    assert (figure.layout.xaxis.tickvals[-1], figure.layout.xaxis2.tickvals[0]) == (10, 1e6)


@pytest.mark.parametrize("back", ["#ffffff", "#111111", "#0d1117"])
def test_text_of_the_template_for_any_background_stands_out(back):
    theme.use()
    text = pio.templates["kvlab-any"].layout.font.color
    light, dark = sorted((luminance(text), luminance(back)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3.8


def luminance(color: str) -> float:
    """Relative luminance, as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_figure_is_light_without_use():
    pio.templates.default = "plotly"
    assert theme.styled(go.Figure(), "a finding").layout.template == pio.templates["kvlab"]


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="light, dark"):
        theme.use("sepia")


def test_bars_have_the_backends_colours():
    figure = reduction_bars(["none", "kvlab-disk"], [2.0, 2.0], [2.0, 1.0], title="")
    assert list(figure.data[1].marker.color) == [theme.color("none"), theme.color("kvlab-disk")]


def test_a_bar_whose_hits_were_not_loaded_is_hatched_and_says_so():
    figure = reduction_bars(["none", "lmcache-cpu"], [2.0, 2.0], [2.0, 1.0], title="", not_loaded=[0.0, 0.93])
    assert list(figure.data[1].marker.pattern.shape) == ["", "/"]
    assert list(figure.data[1].text) == ["+0%", "93% of hits<br>not loaded"]
