"""``kvlab profile MODEL TEXT``: make the tables that the cachegen serde needs, and lay them beside the model.

It warns of keys with a large constant, which most lossy kinds cannot code.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from kvlab.cli.parser import Parser
from kvlab.cli.show import print_json
from kvlab.errors import ConfigError, missing_package

# A layer's constant in units of what differs between tokens, from which on the plain kinds lose more than twice as much
# as without. SmolLM2's layers have 1 to 4; with a bias of norm 605 as in Qwen 2.5's first layer, 57.
LARGE_CONSTANT = 8.0
ENOUGH_TOKENS = 64  # of a chunk, for what differs between its tokens to show


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab profile``."""
    about = "Make the tables that the cachegen serde needs, and lay them beside the model."
    p = Parser("kvlab profile", about, examples=("kvlab profile path/to/model chats.txt code.txt",))
    p.add_argument("model", type=Path, help="checkpoint folder")
    p.add_argument("text", type=Path, nargs="+", help="plain text files like what will be served; 4,000 tokens do")
    p.add_argument("--out", type=Path, help="where to write (default: beside the model)")
    p.add_argument("--max-tokens", type=int, default=2048, help="of each text (default: %(default)s)")
    p.add_argument("--chunk", type=int, default=256, help="tokens of a chunk (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the file is written."""
    args = parser().parse_args(argv)
    if args.max_tokens < 1 or args.chunk < 1:
        raise ConfigError(f"--max-tokens and --chunk must be at least 1, got {args.max_tokens} and {args.chunk}")
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"model must be a checkpoint folder with a config.json, got {str(args.model)!r}")
    texts = [_read(path) for path in args.text]
    try:  # heavy; argparse answers --help without it
        import_module("transformers")  # first: its extra brings PyTorch too
        from kvlab.connectors.transformers import capture, load_model
    except ImportError as error:
        raise missing_package(error, "it") from error
    from kvlab.geometry import AXES
    from kvlab.serde.centered import constants, rope_frequencies, rope_of
    from kvlab.serde.tables import FILE, LEVELS, profile, save_tables

    try:
        model = load_model(args.model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot load a model from {str(args.model)!r}: {reason}") from error
    chunks = []
    for text in texts:
        kv = capture(model, text, max_tokens=args.max_tokens).tensor()
        chunks += [kv[:, start : start + args.chunk] for start in range(0, kv.shape[1], args.chunk)]
    tables = [profile(chunks, AXES, level) for level in LEVELS]
    out = args.out or args.model / FILE
    try:
        save_tables(out, tables)
    except OSError as error:
        raise ConfigError(f"cannot write {str(out)!r}: {error.strerror or error}; give another --out") from error
    num_tokens = sum(chunk.shape[1] for chunk in chunks)
    theta, rotary = rope_of(model.config, chunks[0].shape[-1])
    seen = [chunk for chunk in chunks if chunk.shape[1] >= ENOUGH_TOKENS]
    found = [constants(chunk, AXES, rope_frequencies(rotary, theta)) for chunk in seen]
    largest = [max(of_layer) for of_layer in zip(*found, strict=True)]
    large = {layer: round(size, 1) for layer, size in enumerate(largest) if size > LARGE_CONSTANT}
    if large:
        print(_warning(large, theta, rotary if rotary != chunks[0].shape[-1] else 0), file=sys.stderr)
    if args.json:
        digests = {str(one.level): one.digest for one in tables}
        print_json({"file": str(out), "bytes": out.stat().st_size, "tokens": num_tokens, "tables": digests,
                    "large_constants": large})  # fmt: skip
        return 0
    print(f"{out}: {len(tables)} levels from {num_tokens} tokens, {out.stat().st_size:,} bytes")
    for one in tables:
        print(f"  level {one.level:<7} table {one.digest}")
    return 0


def _warning(large: dict[int, float], theta: float, rotary: int) -> str:
    """What is said of layers whose keys carry a large constant, and what to do."""
    layers = ", ".join(map(str, large))
    spec = f"centered:theta={theta:.12g}" + (f",rotary={rotary}" if rotary else "")
    return (
        f"warning: keys of layers {layers} carry a constant up to {max(large.values()):g} times as large as what "
        "differs between tokens; int8, int4, fp8, rotated4 and cachegen spend their bits on it and lose the rest. "
        f"Take {spec} or lossless"
    )


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; give plain text files") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8 text; give plain text files") from error
    if not text.strip():
        raise ConfigError(f"{str(path)!r} is empty; give plain text files")
    return text
