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


def test_a_figure_is_light_without_use():
    pio.templates.default = "plotly"
    assert theme.styled(go.Figure(), "a finding").layout.template == pio.templates["kvlab"]


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="light, dark"):
        theme.use("sepia")


def test_bars_have_the_backends_colours():
    figure = reduction_bars(["none", "kvlab-disk"], [2.0, 2.0], [2.0, 1.0], title="")
    assert list(figure.data[1].marker.color) == [theme.color("none"), theme.color("kvlab-disk")]
