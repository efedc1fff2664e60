"""A file of KV that proves itself: it names its tokens and model, and says what the model answers behind them.

One safetensors file. Of `naive` KV it is what `KV.save` writes; of other codecs it holds the serde's parts. Its
metadata carries the proof: the model's identity, its rope, and the logprobs of the likeliest tokens at the places that
follow. An engine that serves the KV must say the same (`AttachedCache.load`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvlab.connectors.captured import KV
from kvlab.connectors.tensor_file import opened, write_file
from kvlab.errors import FormatError
from kvlab.geometry import AXES
from kvlab.hashing import token_bytes
from kvlab.serde import get_serde, serde_to_read
from kvlab.serde.base import Encoded

FORMAT = "2"  # 2: the digest of the prompt
FEWEST_TOKENS = 2  # the first is said without a look at the KV of the prompt's last token, which an engine computes


@dataclass(frozen=True)
class Proof:
    """What a file says of its KV.

    `model`: what the KV depends on, by name: weights, config, dtype... `rope`: how positions turn keys; a part of the
    config, given apart for readers that turn keys again. `codec`: the serde of the numbers. `prompt`: `tokens_id` of
    the prompt. `tokens` follow it, and `logprobs` are those of the likeliest tokens at each of their places.
    """

    model: Mapping[str, str]
    rope: Mapping[str, Any]
    codec: str
    prompt: str
    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]


def tokens_id(token_ids: Sequence[int]) -> str:
    """A digest of token ids, in their order."""
    return sha256(token_bytes(token_ids)).hexdigest()


def write_proven(path: str | Path, kv: KV, proof: Proof) -> None:
    """Write `kv`, coded as ``proof.codec`` says, and its proof. ConfigError as of `write_file`."""
    about = {"token_ids": list(kv.token_ids), "num_positions": kv.num_positions, "windows": list(kv.windows)}
    if proof.codec == "naive":
        parts, fields = kv.file_parts()
    else:
        encoded = get_serde(proof.codec).encode(kv.tensor(), AXES)
        parts = {f"parts.{name}": part.contiguous() for name, part in encoded.parts.items()}
        coded = {"serde": encoded.serde, "shape": encoded.shape, "dtype": encoded.dtype, "params": encoded.params}
        fields = {"about": json.dumps({**about, "coded": coded}), "model": kv.model, "axes": ",".join(AXES)}
    write_file(path, parts, {**fields, "kvlab_proof": FORMAT, "proof": json.dumps(asdict(proof))})


def read_proven(path: str | Path) -> tuple[KV, Proof]:
    """The KV of a file and its proof, which is not checked here.

    Raises
    ------
    FormatError
        where the file is something else
    """
    with opened(path) as (file, fields):
        if fields.get("kvlab_proof") != FORMAT:
            raise FormatError(f"{path} carries no proof of format {FORMAT}; KV.load reads files without one")
        told = json.loads(fields["proof"])
        told["logprobs"] = [{int(token): float(value) for token, value in at.items()} for at in told["logprobs"]]
        proof = Proof(**told)
        _check(proof)
        if proof.codec == "naive":
            return KV.load(path), proof
        about = json.loads(fields["about"])
        coded, axes = about["coded"], tuple(fields["axes"].split(","))
        parts = {name.removeprefix("parts."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        encoded = Encoded(coded["serde"], tuple(coded["shape"]), coded["dtype"], axes, parts, coded["params"])
        keys, values = serde_to_read(coded["serde"]).decode(encoded).unbind(dim=3)
        named = (tuple(about["token_ids"]), about["num_positions"], fields.get("model", ""), tuple(about["windows"]))
        return KV(tuple(keys), tuple(values), *named), proof


def _check(proof: Proof) -> None:
    """ValueError where a proof could prove nothing."""
    values = [value for at in proof.logprobs for value in at.values()]
    if len(proof.tokens) < FEWEST_TOKENS or len(proof.tokens) != len(proof.logprobs) or not all(proof.logprobs):
        raise ValueError(f"a proof of {len(proof.tokens)} tokens and {len(proof.logprobs)} places")
    if not all(map(math.isfinite, values)) or not all(type(token) is int and token >= 0 for token in proof.tokens):
        raise ValueError("a proof holds numbers that are none")
    if not all(isinstance(named, Mapping) for named in (proof.model, proof.rope)):
        raise ValueError("a proof names neither model nor rope")
    if not isinstance(proof.codec, str) or not isinstance(proof.prompt, str):
        raise ValueError("a proof names no codec or no prompt")
