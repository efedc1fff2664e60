"""``kvlab profile MODEL TEXT``: make the tables that the cachegen serde needs, and lay them beside the model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvlab.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the file is written."""
    parser = argparse.ArgumentParser(prog="kvlab profile", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("text", type=Path, nargs="+", help="plain text files like what will be served; 4,000 tokens do")
    parser.add_argument("--out", type=Path, help="where to write (default: beside the model)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or args.chunk < 1:
        raise ConfigError(f"--max-tokens and --chunk must be at least 1, got {args.max_tokens} and {args.chunk}")
    from kvlab.connectors.transformers import capture, load_model  # heavy; argparse answers --help without it
    from kvlab.geometry import AXES
    from kvlab.serde.tables import FILE, LEVELS, profile, save_tables

    model = load_model(args.model)
    chunks = []
    for text in args.text:
        kv = capture(model, text.read_text(encoding="utf-8"), max_tokens=args.max_tokens).tensor()
        chunks += [kv[:, start : start + args.chunk] for start in range(0, kv.shape[1], args.chunk)]
    tables = [profile(chunks, AXES, level) for level in LEVELS]
    out = args.out or args.model / FILE
    save_tables(out, tables)
    num_tokens = sum(chunk.shape[1] for chunk in chunks)
    print(f"{out}: {len(tables)} levels from {num_tokens} tokens, {out.stat().st_size:,} bytes")
    for one in tables:
        print(f"  level {one.level:<7} table {one.digest}")
    return 0
