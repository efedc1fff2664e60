"""What a request may ask of the cache: ``kv_transfer_params={"kvlab": {"pin": true, "ttl_s": 600}}``."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

logger = logging.getLogger("vllm.kvlab")
_LOGGED: set[str] = set()


@dataclass(frozen=True)
class Hints:
    """`load`, `save`: whether the cache may serve the prompt, and keep it. `exact`: objects of a lossy kind do not
    serve it. `pin`: what the memory tier holds of the prompt when the request ends stays there, for `ttl_s` seconds if
    given. `release`: it is pinned no longer. `wrong` says what is no hint; such a request goes without the cache, as it
    may have meant to."""

    load: bool = True
    save: bool = True
    exact: bool = False
    pin: bool = False
    release: bool = False
    ttl_s: float | None = None
    wrong: str = ""

    @classmethod
    def of(cls, request: Any) -> "Hints":
        params = getattr(request, "kv_transfer_params", None)
        given = params.get("kvlab") if params is not None and isinstance(params, Mapping) else None
        if given is None:
            return _NONE
        wrong = _fault(given)
        if wrong and wrong not in _LOGGED:  # the texts are those below
            _LOGGED.add(wrong)
            logger.warning("kvlab: a request's hints are wrong, such requests go without the cache: %s", wrong)
        return cls(load=False, save=False, wrong=wrong) if wrong else cls(**given)

    def refusal(self, *, lossy: bool) -> str:
        """Why the request goes without some of what the tiers hold; empty if it does not."""
        return "not_wanted" if not self.load else "not_exact" if self.exact and lossy else ""


_NONE = Hints()  # as most requests have


def _fault(given: object) -> str:
    """What is wrong with hints from a client; empty if nothing is."""
    if not isinstance(given, Mapping):
        return "hints must be an object"
    known = [field.name for field in fields(Hints) if field.name != "wrong"]
    for name, value in given.items():
        if name not in known:
            return f"unknown hint; known: {', '.join(known)}"
        if name == "ttl_s":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                return "ttl_s must be a number of seconds above 0"
        elif not isinstance(value, bool):
            return f"{name} must be true or false"
    if "ttl_s" in given and not given.get("pin"):
        return "ttl_s is how long a pin lasts; give pin as well"
    if given.get("pin") and given.get("release"):
        return "pin and release exclude each other"
    return ""
