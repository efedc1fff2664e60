"""GPU memory of a transfer lies in no pool of the thread that opens it."""

import threading
from contextlib import nullcontext

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.paged.pools import outside_pools


def test_what_a_gpu_needs_is_made_in_another_thread(monkeypatch):
    waited, on = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(threading.current_thread()))
    monkeypatch.setattr(torch.cuda, "device", lambda device: on.append(device) or nullcontext())
    device, here = torch.device("cuda", 1), threading.current_thread()
    there = outside_pools(device, threading.current_thread)
    assert there is not here
    assert (waited, on) == ([here, there], [device]), "neither thread's stream runs ahead of the other's"
    assert outside_pools(torch.device("cpu"), threading.current_thread) is here

    def fail():
        raise ConfigError("too small")

    with pytest.raises(ConfigError, match="too small"):
        outside_pools(device, fail)
