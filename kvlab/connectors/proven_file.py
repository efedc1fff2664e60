"""A file of KV that proves itself: it names its tokens and model, and says what the model answers behind them.

One safetensors file. Of `naive` KV it is what `KV.save` writes; of other codecs it holds the serde's parts. Its
metadata carries the proof: a digest of all that the file holds, the model's identity, its rope, and the logprobs of the
likeliest tokens at the places that follow. An engine that serves the KV must say the same (`AttachedCache.load`). The
digest tells what no logprob can: attention does not see the order of its keys.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.tensor_file import opened, write_file
from kvlab.errors import FormatError
from kvlab.geometry import AXES
from kvlab.serde import get_serde, serde_to_read
from kvlab.serde.base import Encoded

FORMAT = "3"  # 2: a digest of the prompt; 3: of all that the file holds
FEWEST_TOKENS = 2  # the first is said without a look at the KV of the prompt's last token, which an engine computes


@dataclass(frozen=True)
class Proof:
    """What a file says of its KV.

    `model`: what the KV depends on, by name: weights, config, dtype... `rope`: how positions turn keys; a part of the
    config, given apart for readers that turn keys again. `codec`: the serde of the numbers. `tokens` follow the prompt,
    and `logprobs` are those of the likeliest tokens at each of their places. `content`: a digest, by `write_proven`.
    """

    model: Mapping[str, str]
    rope: Mapping[str, Any]
    codec: str
    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]
    content: str = ""


def content_id(parts: Mapping[str, torch.Tensor], fields: Mapping[str, str]) -> str:
    """A digest of a file's tensors and of what its metadata says, but for the digest itself."""
    proof = {name: value for name, value in json.loads(fields["proof"]).items() if name != "content"}
    digest = sha256(json.dumps({**fields, "proof": proof}, sort_keys=True).encode())
    for name, part in sorted(parts.items()):
        digest.update(json.dumps([name, str(part.dtype), list(part.shape)]).encode())
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    fields = {**fields, "kvlab_proof": FORMAT, "proof": json.dumps(asdict(proof))}
    proof = replace(proof, content=content_id(parts, fields))
    write_file(path, parts, {**fields, "proof": json.dumps(asdict(proof))})


def read_proven(path: str | Path, *, check: bool = False) -> tuple[KV, Proof]:
    """The KV of a file and its proof. `check`: whether the file holds what was saved; no more of the proof is checked
    here.

    Raises
    ------
    FormatError
        where the file is something else, or its content is not what was saved (reason ``unproven``)
    """
    with opened(path) as (file, fields):
        if fields.get("kvlab_proof") != FORMAT:
            raise FormatError(f"{path} carries no proof of format {FORMAT}; KV.load reads files without one")
        told = json.loads(fields["proof"])
        told["logprobs"] = [{int(token): float(value) for token, value in at.items()} for at in told["logprobs"]]
        proof = Proof(**told)
        _check(proof)
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if check and proof.content != content_id(parts, fields):
            raise FormatError(
                f"{path} does not hold what was saved; check=False loads it all the same", reason="unproven"
            )
        if proof.codec == "naive":
            return KV.load(path), proof
        about = json.loads(fields["about"])
        coded, axes = about["coded"], tuple(fields["axes"].split(","))
        named_parts = {name.removeprefix("parts."): part for name, part in parts.items()}
        encoded = Encoded(coded["serde"], tuple(coded["shape"]), coded["dtype"], axes, named_parts, coded["params"])
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
    if not isinstance(proof.codec, str) or not isinstance(proof.content, str):
        raise ValueError("a proof names no codec or no content")
