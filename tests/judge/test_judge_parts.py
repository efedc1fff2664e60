"""The judge without an engine: subjects, comparisons, damage, reports, and the command line."""

import json

import pytest

from kvlab.__main__ import main
from kvlab.errors import ConfigError
from kvlab.judge import Report, Subject, Verdict
from kvlab.judge.answers import Answer, Ask, Book, difference
from kvlab.judge.child import line_of
from kvlab.judge.damage import cut_short, flip_bits, make_empty, objects, remove, swap_content
from kvlab.judge.run import _last_line, _shared
from kvlab.judge.stage import Stage
from kvlab.judge.traps import GROUPS, TRAPS

ASK = Ask((1, 2, 3), salt="s")
WANTED = Answer([7, 8, 9], [-0.5, -1.0, -2.0], [1.0, 1.0, 1.0], [])


@pytest.mark.parametrize("text", ["", "a:", "a:b:c", "a-b:C", "a..b:C", "a:C D", "a/b.py:C"])
def test_a_connector_is_named_by_module_and_class(text):
    with pytest.raises(ConfigError, match="MODULE:CLASS, or a name that vLLM knows, got"):
        Subject.parse(text)


def test_vllm_is_told_of_the_subject_with_a_folder_in_its_place():
    subject = Subject.parse("a.b:C", '{"url": "file://{storage}?size=1", "n": [1, {"x": "{storage}"}], "y": null}')
    assert subject.has_storage
    assert subject.transfer("/f") == {
        "kv_connector": "C",
        "kv_connector_module_path": "a.b",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "file:///f?size=1", "n": [1, {"x": "/f"}], "y": None},
    }
    assert not Subject.parse("Known").has_storage
    assert "kv_connector_module_path" not in Subject.parse("Known").transfer("")


@pytest.mark.parametrize("extra", ["{", "[]", "3"])
def test_extra_must_be_an_object(extra):
    with pytest.raises(ConfigError, match="extra must be"):
        Subject.parse("a:B", extra)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "words"),
    [
        ([7, 8, 9], [-0.5, -1.0, -2.0], None),
        ([7, 8, 9], [-0.5, -1.0001, -2.0], None),
        ([7, 5, 9], [-0.5, -1.0, -2.0], "token 1: 5 in the place of 8 (3 tokens, salt s, 2 tokens loaded)"),
        ([7, 8, 9], [-0.5, -1.0, -2.1], "logprob of token 2: -2.1 in the place of -2.0 (3 tokens, salt s, 2 tokens"),
        ([7, 8], [-0.5, -1.0], "the answer ends at token 2: None in the place of 9"),
    ],
)
def test_the_first_difference_is_told(tokens, logprobs, words):
    found = difference(Ask((1, 2, 3), salt="s", max_tokens=3), Answer(tokens, logprobs, [1.0] * 3, loaded=2), WANTED)
    assert (found is None) == (words is None)
    assert words is None or words in found.shown


def test_what_follows_a_near_tie_is_not_compared():
    tied = Answer([7, 8, 9], [-0.5, -1.0, -2.0], [1.0, 1e-4, 1.0])
    assert difference(ASK, Answer([7, 6, 1], [-0.5, -1.0, -3.0], [1.0] * 3), tied) is None


def test_logprobs_of_the_prompt_that_are_missing_are_told():
    ask = Ask((1, 2, 3), prompt_logprobs=True)
    wanted = Answer([7], [-0.5], [1.0], [-1.0, -2.0])
    assert difference(ask, Answer([7], [-0.5], [1.0], [-1.0, -2.0]), wanted) is None
    assert "missing from token 1" in difference(ask, Answer([7], [-0.5], [1.0], [-1.0]), wanted).shown
    assert "logprob of prompt token 2" in difference(ask, Answer([7], [-0.5], [1.0], [-1.0, -3.0]), wanted).shown


def test_a_book_is_read_as_it_was_written(tmp_path):
    book = Book({"k": WANTED}, {"k": {0: [-0.5], 32: [-0.25]}})
    book.write(tmp_path / "book")
    assert Book.read(tmp_path / "book") == book


def test_neither_salt_nor_priority_changes_the_answer_that_is_wanted():
    assert Ask((1, 2), salt="a", priority=3, n=2).key == Ask((1, 2)).key
    assert len({Ask((1, 2)).key, Ask((1, 3)).key, Ask((1, 2), adapter=1).key}) == 3


def test_damage_is_done_to_objects_alone(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, byte in (("a", b"a"), ("deep/b", b"b"), ("deep/c", b"c")):
        (tmp_path / name).write_bytes(byte * 80_000)
    (tmp_path / "index").write_bytes(b"small")
    found = objects(tmp_path)
    assert [path.name for path in found] == ["a", "b", "c"]
    before = [path.read_bytes() for path in found]
    for kind in (swap_content, flip_bits, cut_short, make_empty):
        for path in found:
            kind(path, found)
        assert all(path.read_bytes() != data for path, data in zip(found, before, strict=True)), kind
    for path in found:
        remove(path, found)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["index"]


def test_an_object_that_leaves_while_others_are_damaged_is_no_crash(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(80_000))
    stage = Stage.__new__(Stage)
    stage.storage = tmp_path

    def and_the_next(path, others):
        cut_short(path, others)
        others[(others.index(path) + 1) % 3].unlink(missing_ok=True)

    assert stage.damage(and_the_next) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_every_trap_is_described_and_has_a_group():
    for name, trap in TRAPS.items():
        assert trap.name == name
        assert trap.about
        assert trap.group in GROUPS
        assert not trap.before or trap.fresh, "another process stands before it"


def report():
    rows = [("edges", "held", ""), ("forks", "failed", "token 1 <b>"), ("lora", "refused", "no"), ("bits", "hung", "")]
    return Report("m:C", '{"x": 1}', [Verdict(a, "about", b, c, 3, 4000) for a, b, c in rows], {"versions": "vllm 1"})


def test_a_report_is_counted_shown_and_written():
    assert report().counts == {"held": 1, "failed": 1, "refused": 1, "hung": 1}
    assert report().has_failed
    assert report().rows()[2] == ["forks", "failed", "3", "4,000", "token 1 <b>"]
    kept = json.loads(json.dumps(report().to_dict()))
    assert kept["verdicts"][1]["why"] == "token 1 <b>"
    page = report().to_html()
    assert "token 1 &lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page, "it needs no other file"
    assert not Report("m:C", "{}", [Verdict("edges", "", "refused"), Verdict("bits", "", "no hits")]).has_failed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a connector, like kvlab judge"),
        (["nosuchpackage.x:C"], "no module 'nosuchpackage' for the connector nosuchpackage.x:C"),
        (["json:C", "--traps", "edges,nosuch"], "unknown trap 'nosuch'; there are edges, "),
        (["json:C", "--extra", "x"], "extra must be JSON"),
        (["json:C", "--deadline-s", "0"], "--deadline-s must be above 0"),
    ],
)
def test_a_mistake_is_one_line(args, words, capsys):
    assert main(["judge", *args]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_the_traps_are_listed(capsys):
    assert main(["judge", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(TRAPS) + 1


def test_the_command_writes_what_was_found(monkeypatch, tmp_path, capsys):
    def found(subject, *, told, **options):
        assert (subject.shown, options["traps"], options["seed"]) == ("m:C", ["edges"], 7)
        for verdict in report().verdicts:
            told(verdict)
        return report()

    monkeypatch.setattr("kvlab.judge.run.judge", found)
    files = ["--json", str(tmp_path / "j"), "--html", str(tmp_path / "h")]
    assert main(["judge", "m:C", "--traps", "edges", "--seed", "7", *files]) == 1
    assert "1 held, 1 failed, 1 refused, 1 hung" in capsys.readouterr().out
    assert json.loads((tmp_path / "j").read_text())["connector"] == "m:C"
    assert (tmp_path / "h").read_text().startswith("<!doctype html>")
    assert main(["judge", "m:C", "--traps", "edges", "--seed", "7", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["counts"]["failed"] == 1
    assert main(["judge", "m:C", "--traps", "edges", "--seed", "7", "--html", str(tmp_path)]) == 2


def test_an_error_without_a_text_says_where_it_was_raised():
    with pytest.raises(AssertionError) as raised:
        raise_without_a_text()
    line = line_of(raised.value)
    assert line.startswith(f"AssertionError: {__file__}:")
    assert line.endswith("raise AssertionError")
    log = '[rank0]: Traceback\n[rank0]:   File "/a/engine.py", line 7, in start\n[rank0]: [rank0]: AssertionError\n'
    assert _last_line(log) == 'AssertionError (File "/a/engine.py", line 7, in start)'
    assert _last_line("Error: too small\n\n") == "Error: too small"


def test_the_first_thing_that_pydantic_says_is_told():
    said = "1 validation error for VllmConfig\n  Value error, Unsupported connector type: Exemple [type=value_error]"
    assert "Unsupported connector type: Exemple" in line_of(ValueError(said))


def test_a_connector_with_which_no_engine_starts_has_failed():
    def report(*verdicts):
        return Report("C", "{}", [Verdict("edges", "about", verdict) for verdict in verdicts], {})

    assert report("refused", "not run").has_failed
    assert not report("held", "refused", "not run").has_failed


def raise_without_a_text():
    raise AssertionError


def test_the_engine_without_a_connector_computes_as_those_that_are_judged():
    graphs = {"enforce_eager": False}
    assert _shared([{**graphs, "enable_prefix_caching": True}]) == graphs
    assert _shared([{**graphs, "seed": 1}, {**graphs, "seed": 2}, graphs]) == graphs
    assert _shared([graphs, {}]) == {}
