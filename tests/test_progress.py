"""Progress bars: told what runs and what is left, and never in the way."""

import sys
import types

from kvlab.progress import Progress


class Recorder:
    """In tqdm's place."""

    def __init__(self, total, desc, unit, dynamic_ncols):
        self.total, self.unit, self.calls = total, unit, [desc]

    def set_description(self, text):
        self.calls.append(text)

    def set_postfix_str(self, text, refresh):
        self.calls.append(text)

    def update(self):
        self.calls.append("step")

    def close(self):
        self.calls.append("closed")


def test_a_bar_says_what_runs_and_closes(monkeypatch):
    made = []
    tqdm = types.SimpleNamespace(tqdm=lambda **how: made.append(Recorder(**how)) or made[-1])
    monkeypatch.setitem(sys.modules, "tqdm", tqdm)
    with Progress(2, "sweep", unit="run") as bar:
        bar.doing("lru")
        bar.step("31%")
    assert (made[0].total, made[0].unit) == (2, "run")
    assert made[0].calls == ["sweep", "sweep: lru", "31%", "step", "closed"]


def test_without_tqdm_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress(1, "sweep") as bar:
        bar.doing("lru")
        bar.step()
    assert capsys.readouterr() == ("", "")
