"""The command line as a shell uses it: readers that leave, files that are not there, mistakes in one line."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kvlab.__main__ import main
from kvlab.cli.commands import COMMANDS
from kvlab.cli.profile import main as profile_main
from kvlab.errors import ConfigError
from kvlab.serving.warm import Warmed
from kvlab.stores import open_store
from tests.serving.test_interrupts import heed_interrupts

KVLAB = [sys.executable, "-m", "kvlab"]


@pytest.mark.parametrize(
    "args", [["size", "Qwen2.5-7B"], ["size", "Qwen2.5-7B", "--json"], ["--help"], ["size", "--help"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_costs_no_traceback(args: list[str], unbuffered: str) -> None:
    """As `kvlab size | head -1`, but the reader is gone before the first byte."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([*KVLAB, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    passed_over = unbuffered and args == ["size", "--help"]  # by argparse itself, which then sees the error
    assert process.wait(timeout=60) == (0 if passed_over else 141)
    assert told == b""


def test_another_pipe_that_broke_is_not_taken_for_stdout() -> None:
    code = (
        "import sys, types; m = types.ModuleType('m')\n"
        "def f(args): raise BrokenPipeError('a socket')\n"
        "m.main = f; m.parser = None; sys.modules['m'] = m\n"
        "import kvlab.__main__ as cli; cli.COMMANDS['size'] = type(cli.COMMANDS['size'])('m', '', '')\n"
        "try: cli.main(['size'])\nexcept BrokenPipeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "a socket\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "text").write_text("some words")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        ("absent", "text", "must be a checkpoint folder with a config.json"),
        ("text", "text", "must be a checkpoint folder with a config.json"),
        ("model", "absent", "cannot read .*absent.*: No such file"),
        ("model", "model", "cannot read .*: Is a directory"),
        ("model", "binary", "is not UTF-8 text"),
        ("model", "empty", "is empty"),
        ("model", "text", "cannot load a model from .*model"),
    ],
)
def test_profile_says_what_is_wrong_in_one_line(folder: Path, model: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        profile_main([str(folder / model), str(folder / text)])
    assert "\n" not in str(caught.value)


def one_line(capsys: pytest.CaptureFixture[str], status: int, *args: str) -> str:
    assert main(list(args)) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "?, ?" not in line]  # bars at 0%
    assert len(lines) == 1, lines
    return lines[0] + "\n"


def test_help_shows_every_command_with_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert command.example in text
        words = shlex.split(command.example)
        assert words[:2] == ["kvlab", name]
        import_module(command.module).parser().parse_args(words[2:])
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  kvlab {name}" in text or name == "completion"
    for line in [*re.findall("^  (kvlab .*)", text, re.MULTILINE), COMMANDS[name].example]:
        unquoted = re.sub(r"""'[^']*'|"[^"]*\"""", "", line)
        assert not re.search("[?&*]", unquoted), line  # zsh would take it for a pattern, and & ends a command
    if name in ("store", "serve"):
        return  # the commands of one have it, see below; the other prints a log
    assert "--json" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sizee"], "do you mean 'size'?"),
        (["size"], "give a model, like kvlab size Qwen2.5-7B"),
        (["size", "nosuch"], "or --hub"),
        (["size", "Qwen2.5-7B", "--foo"], "unrecognized arguments: --foo; see kvlab size --help"),
        (["size", "."], "cannot read config.json"),
        (["size", "--list", "no such"], "no model's name holds"),
        (["size", "Qwen2.5-7B", "--sessions-in", "lots"], "size must be a number of bytes"),
        (["simulate", "chat", "--tiers", "10GiB"], "needs --model, or give it in blocks"),
        (["simulate", "chat", "--serde", "2"], "give --model too"),
        (["simulate", "/"], "no trace at '/'"),
        (["simulate", "/absent.jsonl"], "no trace at '/absent.jsonl'"),
        (["simulate", "chat", "--policy", "best"], "unknown eviction policy 'best'; known: arc, belady"),
        (["simulate", "chat", "--tiers", "file:///kv?size=9GiB&serde=int4"], "give it as --serde"),
        (["bench", "--runs", "x"], "see kvlab bench --help"),
        (["bench", "--foo"], "unknown argument '--foo'; flags for the server go after --"),
        (["bench", "--request-rate", "0"], "--request-rate must be positive"),
        (["bench", "--num-prompts", "1,2"], "--num-prompts must be one number or one for each"),
        (["bench", "--model", "/absent"], "no model folder '/absent'"),
        (["bench", "--backends", "lmcache-cpu"], "backend 'lmcache-cpu' needs a GPU: "),
        (["bench", "--restart", "--dataset", "rounds,documents"], "a restart is measured with one dataset"),
        (["bench", "--backends", "redis://127.0.0.1:9"], "Redis at 127.0.0.1:9"),
        (["bench", "--backends", "memcached://127.0.0.1:9"], "memcached at 127.0.0.1:9"),
        (["bench", "--backends", "lm://127.0.0.1:9"], "LMCache server at 127.0.0.1:9"),
        (["bench", "--cache-size", "900TiB", "--backends", "kvlab-memory"], "give a smaller --cache-size"),
        (["bench", "--out", "/absent/rows.jsonl"], "rows cannot be written to '/absent/rows.jsonl': No such file"),
        (["bench", "--report", "/absent"], "cannot read rows from '/absent'"),
        (["profile", "/absent", "x"], "must be a checkpoint folder"),
        (["store", "ls", "file:///absent"], "no folder '/absent'"),
        (["store", "ls", "redis://127.0.0.1:9"], "kvlab store: Redis at 127.0.0.1:9"),
        (["store", "ls", "lm://127.0.0.1:9"], "kvlab store: LMCache server at 127.0.0.1:9"),
        (["store", "ls", "file:///"], "a disk store needs a folder"),
        (["store", "lss", "file:///x"], "invalid choice: 'lss'"),
        (["config", "memory://?sze=1GiB"], "unknown option 'sze' in 'memory://'"),
        (["config", "8GiB", "chunk=3"], "unknown connector setting 'chunk'"),
        (["config", "chunk_tokens=512"], "give a tier"),
        (["config", "from-lmcache"], "takes a YAML file, or --env"),
        (["config", "from-lmcache", "/"], "cannot read '/': Is a directory"),
        (["size", "Qwen2.5-7B", "--context", "32k"], "--context goes with --sessions-in"),
        (["warm", "/absent"], "cannot read '/absent'"),
        (["warm", __file__, "--ttl-s", "10"], "--ttl-s is how long a pin lasts: give --pin as well"),
        (["warm", __file__, "--url", "http://127.0.0.1:9", "--model", "m"], "http://127.0.0.1:9"),
        (["completion", "csh"], "invalid choice: 'csh'"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = one_line(capsys, 2, *args)
    assert words in told
    assert "hub=True" not in told
    assert "=..." not in told


def test_a_look_at_a_plain_folder_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note").write_text("mine")
    assert "holds no store" in one_line(capsys, 2, "store", "ls", f"file://{tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_messages_hold_what_was_typed_and_no_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(f"file://{tmp_path}?size=1MiB").close()
    told = one_line(capsys, 2, "store", "ls", f"file://{tmp_path}?sze=1GiB")
    assert "unknown option 'sze'" in told
    assert "9223372036854775807" not in told


def test_the_quarantine_can_be_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/kv"
    with open_store(f"{url}?size=1MiB") as store:
        assert store.put("broken", b"x" * 5000)
        assert store.put("other", b"y" * 5000)
    assert main(["store", "verify", url, "--quarantine", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == 2
    assert main(["store", "clear", url]) == 0
    assert "0 objects and 2 files in quarantine would be removed" in capsys.readouterr().out
    assert main(["store", "clear", url, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"done": True, "objects": 0, "in_quarantine": 2}
    with open_store(f"{url}?size=1MiB") as store:
        assert store.used_bytes == 0


def test_every_store_command_has_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/kv"
    with open_store(f"{url}?size=1MiB") as store:
        store.put("k", b"x" * 10)
    for command, more in (("ls", []), ("info", []), ("evict", ["--to", "1MiB"]), ("clear", [])):
        assert main(["store", command, url, "--json", *more]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_sizes_of_sessions_and_of_several_models(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*args: str) -> list[dict[str, object]]:
        assert main(["size", *args, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    (row,) = answer("Qwen2.5-7B", "--sessions-in", "80GiB", "--context", "32k")
    assert (row["session_bytes"], row["sessions"], row["sessions_in_vllm_pool"]) == (57344 * 32768, 45, 45)
    (row,) = answer("Qwen2.5-7B", "--sessions-in", "file:///kv?size=1TiB", "--context", "32k")
    assert row["sessions"] == 585
    assert "sessions_in_vllm_pool" not in row
    rows = answer("Qwen2.5-7B", "--sessions-in", "80GiB+file:///kv?size=1TiB", "--context", "32k")
    assert [(row["tier"], row["sessions"]) for row in rows] == [("memory://", 45), ("file:///kv", 585)]
    rows = answer("Qwen2.5-7B", "DeepSeek-V3", "--tokens", "1k")
    assert [row["bytes_at_1024"] for row in rows] == [58720256, 70272 * 1024]
    assert "Qwen/Qwen2.5-7B-Instruct" in answer("--list", "qwen2.5-7b")
    for args in (["Qwen2.5-7B", "DeepSeek-V3"], ["Qwen2.5-7B", "--sessions-in", "1GiB"], ["--list"]):
        assert main(["size", *args]) == 0
        assert "Qwen2.5-7B" in capsys.readouterr().out


def test_rows_of_a_simulation_hold_urls_that_configure_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = "64MiB+file:///kv?size=1TiB&gb_per_s=3&policy=fifo"
    assert main(["simulate", "chat", "--limit", "20", "--model", "Qwen2.5-7B", "--tiers", tiers, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["urls"] == "memory://?size=64MiB+file:///kv?size=1TiB&policy=fifo"
    assert main(["config", row["urls"]]) == 0
    made = json.loads(capsys.readouterr().out)["kv_connector_extra_config"]
    assert made["tiers"] == ["memory://?size=64MiB", "file:///kv?size=1TiB&policy=fifo"]


def test_an_interrupt_is_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    command = [*KVLAB, "simulate", "agent", "--limit", "4000", "--tiers", "1000 blocks,2000 blocks,3000 blocks"]
    command += ["--policy", "lru,fifo,arc,s3fifo,lfu", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, process_group=0, preexec_fn=heed_interrupts, **pipes)
    while len(workers_of(process.pid)) < 2:  # it starts none any more
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "kvlab simulate: interrupted\n"
    assert workers_of(process.pid) == []


def workers_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def test_a_terminal_gets_colours_and_a_pipe_none(tmp_path: Path) -> None:
    assert (
        "\033"
        not in subprocess.run(
            [*KVLAB, "size", "Qwen2.5-7B"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    )
    for no_colour, styled in (("", True), ("1", False)):
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "NO_COLOR": no_colour}
        process = subprocess.Popen([*KVLAB, "size", "Qwen2.5-7B"], stdout=theirs, env=env)
        assert process.wait(timeout=60) == 0
        os.close(theirs)
        shown = os.read(ours, 65536)
        os.close(ours)
        assert (b"\033[1m" in shown) == styled


def test_completion_offers_commands_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "kvlab.bash"
    script.write_text(capsys.readouterr().out)
    probe = f"source {script}; COMP_WORDS=(kvlab {{}}); COMP_CWORD={{}}; _kvlab; printf '%s\\n' ${{{{COMPREPLY[@]}}}}"
    for words, position, wanted in (("si", 1, "size"), ("size --sess", 2, "--sessions-in"), ("store cl", 2, "clear")):
        done = subprocess.run(
            ["bash", "-c", probe.format(words, position)], capture_output=True, text=True, check=True, timeout=60
        )
        assert wanted in done.stdout.split()
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "sessions-in" in capsys.readouterr().out


def test_warm_sends_prompts_with_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def sent(prompts: list[object], **how: object) -> list[Warmed]:
        asked.update(how, prompts=prompts)
        return [Warmed(601, 0, 3), Warmed(9, None, None), Warmed(2, None, None)][: len(prompts)]

    monkeypatch.setattr("kvlab.cli.warm.warm", sent)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (tmp_path / "a.txt").write_text("one prompt")
    (tmp_path / "b.jsonl").write_text('"two"\n[1, 2]\n')
    assert main(["warm", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--pin", "--ttl-s", "5"]) == 0
    assert asked["prompts"] == ["one prompt", "two", [1, 2]]
    assert (asked["pin"], asked["ttl_s"], asked["api_key"]) == (True, 5.0, "secret")
    assert capsys.readouterr().out == "3 prompts, 612 tokens, 0 of them loaded by kvlab, 3 objects pinned\n"
    assert main(["warm", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in rows] == ["a.txt", "b.jsonl", "b.jsonl"]
    assert rows[0]["pinned_objects"] == 3
