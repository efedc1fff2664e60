"""Writes the golden files of the serdes. Run once per kind and format version, by hand, never by a test:

    python -m tests.golden.serde.make KIND...

A golden file is an object as a store holds it (key ``golden``) and, beside it, the tensor that came out of it.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from kvlab.container import pack
from kvlab.geometry import AXES
from kvlab.serde.tables import save_tables
from kvlab.serde.wire import to_parts
from tests.serde.kinds import sample, serde_of, tables

HERE = Path(__file__).parent


def make(kind: str) -> None:
    folder = HERE / kind
    folder.mkdir(exist_ok=True)
    serde, kv = serde_of(kind), sample()
    encoded = serde.encode(kv, AXES)
    with open(folder / "v2.safetensors", "xb") as out:  # x: a golden file is never written over
        out.writelines(bytes(memoryview(piece)) for piece in pack("golden", *to_parts(encoded)))
    save_file({"kv": kv, "decoded": serde.decode(encoded)}, str(folder / "v2.expected.safetensors"))
    if kind == "cachegen":
        save_tables(folder / "v2.tables.safetensors", [tables()])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
