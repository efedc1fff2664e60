"""Messages over a socket: whole or not at all, whatever the peer sends."""

import os
import random
import socket
import struct

import pytest

from kvlab.tierworker.link import MAX_BYTES, MAX_JSON, Link, LinkError


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    links = Link(ours), Link(theirs)
    yield links
    for link in links:
        link.close()


def received(link, count):
    found = []
    while len(found) < count:
        assert link.wait(20)
        found += link.receive()
    return found


def test_messages_come_as_they_were_sent(pair):
    ours, theirs = pair
    sent = [({"op": "fill", "id": number}, bytes([number]) * number * 1000) for number in range(50)]
    for message, data in sent:
        ours.send(message, data)
    found = []
    while len(found) < len(sent):
        ours.flush()
        found += received(theirs, 1)
    assert found == sent


def test_a_peer_that_reads_nothing_holds_nothing_up(pair):
    ours, theirs = pair
    for number in range(100):
        ours.send({"id": number}, bytes(100_000))
    assert ours.queued_bytes > 0
    found = []
    while len(found) < 100:
        ours.flush()
        found += received(theirs, 1)
    assert [message["id"] for message, _ in found] == list(range(100))
    assert ours.flush()
    assert ours.queued_bytes == 0


def test_a_descriptor_comes_with_its_message(pair):
    ours, theirs = pair
    fd = os.memfd_create("test")
    os.write(fd, b"shared")
    ours.send({"op": "memory"}, fd=fd)
    received(theirs, 1)
    other = theirs.take_fd()
    assert os.pread(other, 6, 0) == b"shared"
    assert not os.get_inheritable(other)
    os.close(other)
    os.close(fd)
    with pytest.raises(LinkError, match="without its file descriptor"):
        theirs.take_fd()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<II", MAX_JSON + 1, 0),
        struct.pack("<II", 0, MAX_BYTES + 1),
        struct.pack("<II", 1 << 31, 1 << 31),
        struct.pack("<II", 4, 0) + b"{]}{",
        struct.pack("<II", 2, 0) + b"[]",
        struct.pack("<II", 2, 0) + b"\xff\xff",
        struct.pack("<II", 100_000, 0) + b"[" * 100_000,
    ],
    ids=["long JSON", "many bytes", "lengths of 2^31", "no JSON", "no object", "no text", "deep"],
)
def test_what_is_no_message_ends_the_link(pair, frame):
    ours, theirs = pair
    ours.socket.setblocking(True)
    ours.socket.sendall(frame)
    with pytest.raises(LinkError):
        received(theirs, 1)


def test_half_a_message_waits_for_the_rest(pair):
    ours, theirs = pair
    frame = struct.pack("<II", 8, 3) + b'{"op":1}' + b"abc"
    for at in range(len(frame) - 1):
        ours.socket.send(frame[at : at + 1])
        assert theirs.wait(20)
        assert theirs.receive() == []
    ours.socket.send(frame[-1:])
    assert received(theirs, 1) == [({"op": 1}, b"abc")]


def receive_all(link):
    while link.wait(20):
        link.receive()


def test_descriptors_without_end_end_the_link(pair):
    ours, theirs = pair
    for _ in range(20):
        socket.send_fds(ours.socket, [struct.pack("<II", 2, 0) + b"{}"], [0])
    with pytest.raises(LinkError, match="without end"):
        receive_all(theirs)


def test_random_bytes_are_messages_or_end_the_link():
    for seed in range(300):
        rng = random.Random(seed)
        ours, theirs = socket.socketpair()
        link = Link(theirs)
        ours.sendall(rng.randbytes(rng.randrange(1, 4000)))
        ours.close()
        with pytest.raises(LinkError):
            receive_all(link)
        link.close()


def test_a_peer_that_is_gone_is_an_error(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(LinkError, match="gone"):
        ours.send({}, bytes(100_000))
    with pytest.raises(LinkError, match="gone"):
        ours.receive()
