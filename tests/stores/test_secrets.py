"""A password is planted in every way a URL can hold one; no error, repr, log, output or cause of an error shows it."""

import dataclasses
import os
import pickle
import socket
import time
import traceback
from contextlib import suppress

import pytest
from liars import Liar
from planted import MARK, found
from servers import Server, running

from kvlab.cli.store import main
from kvlab.connectors.config import ConnectorConfig, vllm_config
from kvlab.errors import ConfigError, StoreError
from kvlab.machine.provenance import provenance
from kvlab.serving.provenance import serving_provenance
from kvlab.stores import StoreURL, open_store, open_stores
from kvlab.stores.redis.resp import RespConnection, ok
from kvlab.stores.redis.url import PASSWORD, SENTINEL_PASSWORD, RedisTarget
from kvlab.stores.url import Secret, hide_logins, shown_url

LOGINS = [
    *(f"user:{MARK}", f":{MARK}", MARK, f"user:{MARK}:tail", f"{MARK}:pw", f":{MARK}%40x"),
    *(f":{MARK}]b[", f"[{MARK}"),
]
SPLIT = [f"user:{MARK}{char}x" for char in "/?#@&%[] \t\n"] + [f":a{char}{MARK}" for char in "/?#@&=[]"]
PLACES = [
    *(
        "127.0.0.1:1/0",
        "h:99999999/0",
        "h:1/zz",
        "h:1/0?ttl=1",
        "h:1/0?ttl_ms=x",
        "h:1/0?limit=x",
        "[::1/0",
        "h:1,h2:zz",
    ),
    *("h:1/0?ttl_ms=1&ttl_ms=2", "h:1/0?tls=true&ca=/nonexistent", "h:1/0?password_file=/nonexistent"),
]
SCHEMES = ["redis", "rediss", "redis-sentinel", "redis-cluster", "unix", "redi", "file", "memory", "REDIS"]
OPTIONS = ["password", "pass", "Password", "passwd", "password_file", "key_password_file"]
URLS = sorted(
    {
        *(f"{scheme}://{login}@127.0.0.1:1/0" for scheme in SCHEMES for login in LOGINS),
        *(f"{scheme}://{login}@127.0.0.1:1/0" for scheme in ("redis", "unix", "file") for login in SPLIT),
        *(f"redis:/{login}@127.0.0.1:1/0" for login in LOGINS + SPLIT),
        *(f"{login}@127.0.0.1:1" for login in LOGINS + SPLIT),
        *(f"redis://user:{MARK}@{place}" for place in PLACES),
        *(f"redis://h:1/0?{option}={MARK}" for option in OPTIONS),
        *(f"redis://user:{MARK}", f"user:{MARK}", f"redis:user:{MARK}", f"redis://h:1,user:{MARK}/0"),
        *(f"redis://h:1/0?{MARK}", f"redis://h:1/0?{MARK}=x", f"redis://:{MARK}@h:1/0?password_file=/etc/hostname"),
        *(f"redis-sentinel://h:1/m?sentinel_password={MARK}&zz=1", f"redis-sentinel://h:1/m?sentinel_pasword={MARK}"),
        *(f"redis://h:1/0&password={MARK}", f"redis://h:1/password={MARK}", f"redis-sentinel://h:1/m;password={MARK}"),
        *(f"redis://h:1/0?timeout_ms={MARK}", f"redis://:{MARK[:5]} {MARK[5:]}@h:1/0"),
        *(f"redis-sentinel://127.0.0.1:1/m?sentinel_password={MARK}", f"redis-sentinel://h:1?sentinel_password={MARK}"),
    }
)


@pytest.mark.parametrize("url", URLS)
def test_no_error_shows_a_password(url, attempt):
    def use():
        with open_store(url) as store:
            store.get("kvlab:x")

    attempt(use)
    attempt(lambda: open_stores(["memory://?size=1MiB", url]).close())
    attempt(lambda: main(["ls", url]))
    attempt(lambda: print(repr(ConnectorConfig.from_extra({"tiers": [url]}))))
    two_serdes = ["memory://", f"{url}&serde=naive", "file:///x?serde=lossless"]
    for tiers in ([url], url, [url, "memory://"], [url, 3], two_serdes):
        attempt(lambda tiers=tiers: print(vllm_config(tiers)) if MARK not in str(vllm_config(tiers)) else None)
    assert not found(shown_url(url))


def test_nothing_that_holds_a_password_shows_it():
    url = StoreURL.parse(f"redis-sentinel://user:{MARK}@h:1/m?sentinel_password={MARK}")
    place = RedisTarget.from_url(url)
    store = open_store(f"redis://user:{MARK}@127.0.0.1:1")
    things = [url, place, place.login, place.sentinel_login, dataclasses.asdict(url), vars(url), vars(place.login)]
    for thing in (*things, store):
        assert not found(f"{thing!r} {thing!s}")
    assert not found(repr([vars(store._topology), vars(store._topology.known()[0]), store.stats(), store.rows()]))
    assert place.login.password.reveal() == MARK == place.sentinel_login.password.reveal()
    assert (url.user, url.netloc, url.path) == ("user", "h:1", "/m")
    assert pickle.loads(pickle.dumps(place.login.password)).reveal() == MARK


def test_a_connector_takes_no_password_in_a_url():
    """vLLM logs its arguments, and a command line is seen by all."""
    for url in (f"redis://:{MARK}@h:1", f"redis-sentinel://h:1/m?sentinel_password={MARK}"):
        with pytest.raises(ConfigError, match=r"no password.*password_file.*KVLAB_REDIS_PASSWORD"):
            vllm_config([url])
    config = vllm_config(["redis://user@h:1?password_file=/run/secrets/redis"])
    assert config["kv_connector_extra_config"]["tiers"] == ["redis://user@h:1?password_file=/run/secrets/redis"]
    assert (
        ConnectorConfig.from_extra(config["kv_connector_extra_config"])
        .secondary_tiers[0]
        .endswith("%2Frun%2Fsecrets%2Fredis")
    )


def test_command_lines_are_recorded_without_logins(monkeypatch):
    urls = f"redis://u:{MARK}@h,redis://:{MARK}@g"
    argv = ["stores.py", "--redis-url", f"redis://:{MARK}@h:1/0", f"--backends={urls}", f"x?password={MARK}"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("kvlab.serving.provenance.client_version", lambda: "0")  # which imports vLLM
    assert not found(provenance()["command"])
    serving_provenance.cache_clear()
    assert not found(serving_provenance()["command"])
    serving_provenance.cache_clear()
    assert hide_logins("--folder /data/a --seed 1") == "--folder /data/a --seed 1"


ODD = "p:a/s?s#w@o]r[d %41é"


def test_passwords_from_files_and_the_environment(tmp_path, monkeypatch):
    users = (f"user kv on >{MARK} ~* +@all", "requirepass other")
    file = tmp_path / "password"
    file.write_text(MARK + "\n")
    with running(Server(tmp_path / "s", *users)) as (server,):
        at = f"kv@127.0.0.1:{server.port}"

        def works(url):
            with open_store(url) as store:
                return store.put("k", b"v") and bytes(store.get("k")) == b"v"

        assert works(f"redis://{at}?password_file={file}")
        assert works(f"unix://kv@{server.socket_path}?password_file={file}")
        with pytest.raises(ConfigError, match="a user needs a password"):
            open_store(f"redis://{at}")
        monkeypatch.setenv(PASSWORD, MARK)
        assert works(f"redis://{at}")
        monkeypatch.setenv(PASSWORD, "wrong")
        assert works(f"redis://{at}?password_file={file}"), "a file goes before the environment"
        assert works(f"redis://kv:{MARK}@127.0.0.1:{server.port}"), "and so does the URL"
        with server.client(password="other") as client:
            client.execute_command("ACL", "SETUSER", "odd", "on", ">" + ODD, "~*", "+@all")
        file.write_bytes(ODD.encode() + b"\r\n")
        assert works(f"redis://odd@127.0.0.1:{server.port}?password_file={file}")
        with open_store(f"redis://odd:wrong@127.0.0.1:{server.port}") as store, pytest.raises(StoreError) as caught:
            store.get("k")
        assert caught.value.reason == "auth"


def test_a_password_file_must_hold_a_password(tmp_path):
    for content in (b"", b"\n", b"\xff\xfe", b"x" * 5000):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ConfigError, match="must hold one password"):
            open_store(f"redis://h?password_file={tmp_path}/file")
    with pytest.raises(ConfigError, match="No such file"):
        open_store(f"redis://h?password_file={tmp_path}/none")
    with pytest.raises(ConfigError, match="absolute path"):
        open_store("redis://h?password_file=relative")


def test_sentinels_have_a_password_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv(PASSWORD, "of-the-server")
    monkeypatch.setenv(SENTINEL_PASSWORD, MARK)
    place = RedisTarget.from_url(StoreURL.parse("redis-sentinel://h/m"))
    assert (place.login.password.reveal(), place.sentinel_login.password.reveal()) == ("of-the-server", MARK)
    (tmp_path / "file").write_text("from-file")
    place = RedisTarget.from_url(StoreURL.parse(f"redis-sentinel://h/m?sentinel_password_file={tmp_path}/file"))
    assert place.sentinel_login.password.reveal() == "from-file"


def test_a_server_that_repeats_what_it_was_told_is_not_quoted(attempt):
    """Old servers answer an unknown AUTH, or any other refused command, with its arguments."""

    def repeat(liar, sock, args):
        return b"-ERR unknown command, with args beginning with: " + b" ".join(args) + f" {MARK}".encode() + b"\r\n"

    for commands in ((b"AUTH",), (b"GET",), (b"SELECT",), (b"SET", b"CONFIG")):
        with Liar({command: repeat for command in commands}) as liar:

            def use(url=f"redis://:{MARK}@127.0.0.1:{liar.port}/3?retry_ms=1"):
                with open_store(url) as store:
                    try:
                        store.get("kvlab:a")
                    finally:
                        store.put("kvlab:a", b"v")

            assert isinstance(attempt(use), StoreError)
            attempt(lambda: main(["ls", f"redis://:{MARK}@127.0.0.1:{liar.port}/3"]))


def test_a_secret_is_starred_out_of_error_replies_but_redirections_stay_readable():
    connection = RespConnection.__new__(RespConnection)
    connection._hidden = [b"1"]
    error = connection._error(b"MOVED 3999 127.0.0.1:6381")
    assert error.target.reveal() == "127.0.0.1:6381"
    assert "1" not in f"{error} {vars(error)}"


def test_an_encrypted_key_asks_nobody(tmp_path):
    """OpenSSL would wait at the terminal for the passphrase."""
    import trustme
    from cryptography.hazmat.primitives import serialization

    issued = trustme.CA().issue_cert("localhost")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    encryption = serialization.BestAvailableEncryption(MARK.encode())
    form = serialization.PrivateFormat.PKCS8
    (tmp_path / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    (tmp_path / "cert").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "password").write_text(MARK)
    url = f"rediss://localhost:1?cert={tmp_path}/cert&key={tmp_path}/key"
    with pytest.raises(ConfigError, match="an encrypted key needs key_password_file"):
        open_store(url)
    open_store(f"{url}&key_password_file={tmp_path}/password").close()


def test_a_secret_is_no_string():
    assert f"{Secret(MARK)} {Secret(MARK)!r} {[Secret(MARK)]}" == "*** *** [***]"


@pytest.mark.parametrize(
    "argv",
    [
        [f"redis://:{MARK}@h/0"],
        ["store", f"redis://:{MARK}@h/0", "ls"],
        ["store", "ls", "file:///none", f"redis://:{MARK}@h/0"],
        ["store", "evict", "file:///none", f"--to=redis://:{MARK}@h"],
        ["bench", f"redis://:{MARK}@h/0"],
        ["simulate", "rounds", f"--redis://:{MARK}@h/0"],
        ["size", "none", f"redis://:{MARK}@h/0"],
    ],
)
def test_a_url_in_the_wrong_place_of_a_command_is_not_repeated(argv, capsys):
    from kvlab.__main__ import main

    with suppress(SystemExit):
        assert main(argv) != 0
    out = "".join(capsys.readouterr())
    assert out
    assert MARK not in out


@pytest.mark.parametrize("reply", [b"+%s\r\n", b"$14\r\n%s\r\n", b"*1\r\n+%s\r\n", b"-ERR no %s\r\n"])
def test_a_server_that_repeats_the_password_is_not_quoted(reply):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply % MARK.encode())
        with pytest.raises(StoreError) as raised:
            ok(RespConnection(ours, [MARK]).call([b"AUTH", MARK.encode()], time.monotonic() + 10))
        assert MARK not in "".join(traceback.format_exception(raised.value))


NAMING = {  # replies that name the password as a host, by what is asked
    "moved": (b"GET", f"-MOVED 5 {MARK}:6379\r\n"),
    "moved to no address": (b"GET", f"-MOVED 5 {MARK}/x:6379\r\n"),
    "slots": (b"CLUSTER", f"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n${len(MARK)}\r\n{MARK}\r\n:6379\r\n"),
    "master": (b"SENTINEL", f"*2\r\n${len(MARK)}\r\n{MARK}\r\n$4\r\n6379\r\n"),
    "master of no address": (b"SENTINEL", f"*2\r\n${len(MARK) + 2}\r\n{MARK}/x\r\n$4\r\n6379\r\n"),
}


@pytest.mark.parametrize(
    ("scheme", "secret", "how"),
    [
        *(("redis-cluster", "password", how) for how in ("moved", "moved to no address", "slots")),
        *(("redis-sentinel", "password", how) for how in ("master", "master of no address")),
        *(("redis-sentinel", "sentinel_password", how) for how in ("master", "master of no address")),
    ],
)
def test_a_server_that_names_the_password_as_a_host_is_not_quoted(scheme, secret, how, attempt, monkeypatch):
    def no_such_host(host, port, **_):
        if host == "127.0.0.1":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        raise socket.gaierror(f"no host {host}")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    command, reply = NAMING[how]
    place = "/main" if scheme == "redis-sentinel" else ""
    with Liar({command: reply.encode()}) as liar:

        def use(url=f"{scheme}://127.0.0.1:{liar.port}{place}?retry_ms=1&longest_retry_ms=1&{secret}={MARK}"):
            with open_store(url) as store, open_stores([url, "memory://"]) as stack:
                stack.get("kvlab:a")
                print(stack.rows(), store.stats())
                for _ in range(3):
                    with suppress(StoreError):
                        store.contains_many(["kvlab:a"])
                    time.sleep(0.002)
                store.get("kvlab:a")

        attempt(use)
        assert command in [args[0] for args in liar.asked]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://h?password=@{MARK}",
        f"redis://h:6379/0?password=p@{MARK}",
        f"redis-sentinel://h:26379/m?sentinel_password=p@{MARK}&db=1",
        f"rediss://h/0?key_password=a@{MARK}",
        f"redis://h?password_file=/x@{MARK}",
        f"redis://u:a#b@{MARK}",
    ],
)
def test_an_at_in_an_option_is_no_end_of_a_login(url):
    with pytest.raises(ConfigError) as raised:
        open_store(url)
    assert not found(str(raised.value))
    with pytest.raises(ConfigError) as raised:
        vllm_config([url])
    assert not found(str(raised.value))
    assert not found(hide_logins(f"--redis-url {url} --seed 1"))


@pytest.mark.parametrize("query", ["password=a&{}", "passwd={}", "pass={}", "sentinel_password={}&x=1", "a={}@", "{}"])
def test_recorded_options_of_a_url_are_no_secrets(query):
    shown = hide_logins(f"--redis-url redis://h/0?{query.format(MARK)} --seed 1")
    assert not found(shown)
    assert shown.endswith("--seed 1")
    assert hide_logins("--tiers file:///kv?size=1GiB&fsync=true") == "--tiers file:///kv?size=1GiB&fsync=true"


def test_a_password_files_place_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="must hold one password"):
        open_store(f"redis://h?password_file={tmp_path}/pipe")


def test_half_of_a_password_is_no_options_name():
    with pytest.raises(ConfigError, match="write & in a password as %26") as raised:
        open_store("redis://h/0?password=correct&horsebattery")
    assert "horse" not in str(raised.value)
