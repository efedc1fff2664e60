"""The command line as a shell starts it: any key, terminal and place for its output, and one line for what is wrong."""

import os
import subprocess
import sys

import pytest

from kvlab.stores import open_store

KEYS = ["kvlab:модель:1:aa", "\udce9 alone", "\ud800\udc00"]


@pytest.fixture
def url(tmp_path):
    with open_store(f"file://{tmp_path}/kv?size=10MiB") as store:
        for key in KEYS:
            assert store.put(key, b"x" * 5000)
    return f"file://{tmp_path}/kv"


def run(*args, stdout=subprocess.PIPE, **env):
    command = [sys.executable, "-m", "kvlab", "store", *args]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **env}, timeout=120)
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8"}], ids=["ascii", "utf-8"])
@pytest.mark.parametrize("command", ["ls", "info", "verify"])
def test_any_key_on_any_terminal(url, command, env):
    code, out, error = run(command, url, **env)
    assert (code, error) == (int(command == "verify"), "")
    assert ("модель" if env["PYTHONIOENCODING"] == "utf-8" else "\\u043c") in out


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_output_that_cannot_be_written_is_one_line(url, command):
    with open("/dev/full", "wb") as full:
        code, _, error = run(command, url, stdout=full)
    assert code == 2
    assert error.splitlines() == ["kvlab: cannot write the output: No space left on device"]


def test_a_closed_output_is_no_traceback(url):
    command = f"{sys.executable} -m kvlab store ls {url} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///a%00b", "NUL"),
        ("unix:///a%00b", "NUL"),
        (f"file:///{'a' * 5000}", "File name too long"),
        (f"file:///{'a/' * 5000}", "File name too long"),
        ("file:///kv?serde=int4", "CacheEngine(..., serde="),
        ("file:///kv?auth=/key", "verify --auth"),
    ],
)
def test_a_wrong_url_is_one_line(url, words, tmp_path):
    code, _, error = run("ls", url.replace("/kv", str(tmp_path)))
    assert code == 2
    assert len(error.splitlines()) == 1
    assert words in error


def test_a_missing_key_file_says_how_to_make_one(url, tmp_path):
    code, _, error = run("verify", url, "--auth", f"{tmp_path}/key")
    assert code == 2
    assert "head -c 32 /dev/urandom >" in error
    assert "chmod 600" in error
