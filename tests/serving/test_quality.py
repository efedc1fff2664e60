"""`quality` against a server that answers as vLLM's does, and wrongly; against vLLM's own in test_shutdown."""

import json
import math

import pytest

from kvlab.cli.quality import main as quality_main
from kvlab.errors import ConfigError, StoreError
from kvlab.serving.quality import Compared, divergence, quality, summary
from tests.serving.test_warm import server  # noqa: F401  # a fixture


def answer(tokens, first, hit):
    """Of a completion; `first`: logprobs of the first token's alternatives."""
    told = {"tokens": tokens, "top_logprobs": [first, {}]}
    return {
        "usage": {"prompt_tokens": 9},
        "choices": [{"logprobs": told}],
        "kv_transfer_params": {"kvlab": {"hit_tokens": hit}},
    }


BEFORE = {"token_id:1": math.log(0.5), "token_id:2": math.log(0.3)}
AFTER = {"token_id:1": math.log(0.4), "token_id:2": math.log(0.4)}


def answering(handler, *answers):
    """The server gives these in turn, to whatever is asked next."""
    waiting, noted = list(answers), handler.answer

    def next_one(self):
        if self.path == "/v1/completions":
            self.answers = {**self.answers, self.path: (200, waiting.pop(0))}
        noted(self)

    handler.do_GET = handler.do_POST = next_one


def test_answers_are_compared_with_the_computed_ones(server):  # noqa: F811
    url, handler = server
    computed = answer(["token_id:1", "token_id:7", "token_id:8"], BEFORE, 0)
    loaded = answer(["token_id:1", "token_id:7", "token_id:9"], AFTER, 8)
    answering(handler, computed, computed, loaded, answer(["token_id:2"], AFTER, 0))
    handler.answers = {**handler.answers, "/reset_prefix_cache": (200, b"")}
    found = quality(["text", [1, 2]], url=url, greedy=3, reset=True)
    kl = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert found[0] == Compared(9, 8, pytest.approx(kl), pytest.approx(math.log(0.5 / 0.4)), True, pytest.approx(2 / 3))
    assert (found[1].hit_tokens, found[1].same_first, found[1].agreement) == (0, False, 0.0)
    assert summary(found)["hits"] == 1, "what was computed both times says nothing of a codec"
    assert summary(found)["kl_worst"] == pytest.approx(kl)
    paths = [path for path, *_ in handler.asked]
    assert paths == ["/v1/models", *["/v1/completions"] * 2, "/reset_prefix_cache", *["/v1/completions"] * 2]
    bodies = [body for path, _, body in handler.asked if path == "/v1/completions"]
    assert len({body["cache_salt"] for body in bodies}) == 2, "one for each prompt, both times"
    assert [body["cache_salt"] for body in bodies[:2]] == [body["cache_salt"] for body in bodies[2:]]
    assert {(body["max_tokens"], body["temperature"], body["logprobs"]) for body in bodies} == {(3, 0, 20)}


def test_a_divergence_is_over_what_both_name_and_all_others():
    assert divergence(BEFORE, BEFORE) == 0.0
    other = {"token_id:1": math.log(0.4), "token_id:3": math.log(0.4)}
    assert divergence(BEFORE, other) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)), (
        "the second token is one of the others"
    )


def test_what_cannot_be_compared_is_one_line(server, tmp_path, capsys):  # noqa: F811
    url, handler = server
    same = answer(["token_id:1"], BEFORE, 0)
    answering(handler, same, same)
    with pytest.raises(
        StoreError, match="kvlab loaded none of the prompts the second time: the connector needs report"
    ):
        quality(["text"], url=url)
    answering(handler, {"choices": []}, {"choices": []})
    with pytest.raises(StoreError, match="the server's answer has no logprobs"):
        quality(["text"], url=url)
    for wrong, told in (({"prompts": []}, "no prompts"), ({"prompts": ["x"], "greedy": 0}, "greedy must be from 1")):
        with pytest.raises(ConfigError, match=told):
            quality(**wrong, url=url)
    (tmp_path / "p.txt").write_text("one prompt")
    hit = answer(["token_id:1"], AFTER, 8)
    for flags in ([], ["--json"]):
        answering(handler, same, hit)
        assert quality_main([str(tmp_path / "p.txt"), "--url", url, *flags]) == 0
    lines = capsys.readouterr().out
    assert lines.startswith(
        "1 of 1 prompts decoded, 8 tokens\nfirst token: the same in 100.0%, KL 0.02527 nats on average"
    )
    told = json.loads(lines[lines.index("{") :])
    assert (told["summary"]["hits"], told["prompts"][0]["agreement"]) == (1, 1.0)
