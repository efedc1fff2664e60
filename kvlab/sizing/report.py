"""What a `KVSize` shows: rows per layer, the formula with numbers, plain text, HTML, JSON values."""

from html import escape
from itertools import groupby
from typing import Any

from kvlab.sizing.cache_specs import Conventions, HeadsKV, Layer, spec_bytes
from kvlab.sizing.curve import KVCurve
from kvlab.sizing.reserved import ENGINE_VERSION, reserve
from kvlab.units import format_bytes

LENGTHS = (1024, 4096, 32768, 131072)


def layer_row(layer: Layer, conventions: Conventions, tp: int) -> dict[str, Any]:
    """One row of `KVSize.per_layer`; bytes are summed over the `tp` ranks, before any serde factor."""
    specs = [spec.shard(tp) for spec in layer.specs]
    heads = [spec for spec in layer.specs if isinstance(spec, HeadsKV)]
    return {
        "layer": layer.index,
        "kind": layer.kind,
        "kv_heads": heads[0].num_kv_heads if heads else 0,
        "k_dim": heads[0].k_dim if heads else 0,
        "v_dim": heads[0].v_dim if heads else 0,
        "window": next((spec.window for spec in layer.specs if spec.window), None),
        "bytes_per_token": tp * sum(spec.token_bytes(conventions) for spec in specs if spec.fixed_tokens is None),
        "fixed_bytes": tp * sum(spec_bytes(spec, 0, conventions) for spec in specs),
        "formula": " + ".join(spec.formula(conventions) for spec in layer.specs),
    }


def _alike(size: KVCurve) -> list[tuple[int, Layer]]:
    """Layers that keep the same, counted; in order of first appearance."""
    seen: dict[tuple[str, Any], list[Layer]] = {}
    for layer in size.layers:
        kind = "shares KV of an earlier layer" if layer.kind.startswith("shares") else layer.kind
        seen.setdefault((kind, layer.specs), []).append(Layer(layer.index, kind, layer.specs))
    return [(len(layers), layers[0]) for layers in seen.values()]


def formula_lines(size: KVCurve) -> list[str]:
    lines = []
    for count, layer in _alike(size):
        if not layer.specs:
            lines.append(f"{count} layers: {layer.kind}, 0 B")
            continue
        for spec in layer.specs:
            if spec.fixed_tokens is not None:
                tail = f"x {spec.fixed_tokens:,} encoder tokens, fixed"
                total = spec.token_bytes(size.conventions) * spec.fixed_tokens * count
            elif per_token := spec.token_bytes(size.conventions):
                tail = f"per token within a window of {spec.window:,}" if spec.window else "per token"
                total = per_token * count
            else:
                tail, total = "fixed per sequence", spec.fixed_bytes(size.conventions) * count
            lines.append(
                f"{count} layers ({layer.kind}): {count} x {spec.formula(size.conventions)} = {total:,} B {tail}"
            )
    return lines


def curve_line(size: KVCurve) -> str:
    terms = [f"{size.growing_bytes:,} n"] if size.growing_bytes else []
    terms += [f"{per_token:,} min(n, {window:,})" for window, per_token in size.windows.items()]
    terms += [f"{size.fixed_bytes:,}"] if size.fixed_bytes else []
    return "bytes(n) = " + " + ".join(terms)


def explain(size: KVCurve) -> str:
    """See `KVSize.explain`."""
    lines = [
        f"{size.name}: KV in {size.dtype}, tp={size.tp}, pp={size.pp}, by the conventions of {size.conventions.engine}"
    ]
    lines += [f"  {line}" for line in formula_lines(size)]
    if size.tp > 1:
        lines.append(
            f"  x tp={size.tp}: each rank keeps its heads and whole latents; all ranks together hold "
            f"{size.replication:.2f} x the bytes of one"
        )
    if size.factor != 1:
        lines.append(f"  x {float(size.factor):g}: stored bytes per raw byte")
    lines.append(f"  {curve_line(size)}")
    if size.has_state:
        lines.append(f"  recurrent states are counted at {size.conventions.state_bytes} B per element (state_dtype)")
    lines += [f"  note: {note}" for note in size.config.notes]
    lines.append(f"  source: {size.config.source} [{size.config.source_kind}]")
    return "\n".join(lines)


def table(size: KVCurve, lengths: tuple[int, ...] = LENGTHS, **engine: Any) -> list[tuple[str, str, str, str]]:
    """Rows (tokens, logical over all ranks, fullest rank, vLLM reserves per rank), as text."""
    rows = []
    for n in lengths:
        modelled = size.conventions.engine == "vllm" and n > 0
        reserved = format_bytes(reserve(size, n, **engine).bytes) if modelled else "-"
        rows.append((f"{n:,}", format_bytes(size.at(n)), format_bytes(size.rank_bytes(n)), reserved))
    return rows


def headings(size: KVCurve) -> tuple[str, str, str, str]:
    return ("tokens", "logical", "per rank", f"{ENGINE_VERSION} reserves, per rank")


def text(size: KVCurve, lengths: tuple[int, ...] = LENGTHS, **engine: Any) -> str:
    """The table and the explanation, for a terminal."""
    rows = [headings(size), *table(size, lengths, **engine)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return explain(size) + "\n\n" + "\n".join(lines)


def html(size: KVCurve) -> str:
    """See `KVSize._repr_html_`."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings(size))
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:right'>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table(size)
    )
    config = size.config
    notes = "".join(f"<li>{escape(note)}</li>" for note in config.notes)
    formula = "<br>".join(escape(line) for line in (*formula_lines(size), curve_line(size)))
    return (
        f"<div><b>{escape(size.name)}</b>: KV in {escape(size.dtype)}, tp={size.tp}, pp={size.pp}"
        f"<div style='font-family:monospace;font-size:90%'>{formula}</div>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{f'<ul>{notes}</ul>' if notes else ''}"
        f"<small>source: {escape(config.source)} [{escape(config.source_kind)}]</small></div>"
    )


def as_dict(size: KVCurve, tokens: int, **engine: Any) -> dict[str, Any]:
    """See `KVSize.to_dict`."""
    result: dict[str, Any] = {
        "model": size.name,
        "dtype": size.dtype,
        "engine": size.conventions.engine,
        "tp": size.tp,
        "pp": size.pp,
        "factor": float(size.factor),
        "growing_bytes": size.growing_bytes,
        "windows": {str(window): per_token for window, per_token in size.windows.items()},
        "fixed_bytes": size.fixed_bytes,
        "tokens": tokens,
        "bytes": size.at(tokens),
        "rank_bytes": size.rank_bytes(tokens),
        "chunk_256_bytes": size.chunk_bytes(256),
        "notes": list(size.config.notes),
        "source": size.config.source,
        "source_kind": size.config.source_kind,
        "layers": [
            {"kind": kind, "count": len(list(run))} for kind, run in groupby(layer.kind for layer in size.layers)
        ],
    }
    if size.conventions.engine == "vllm" and tokens > 0:
        reserved = reserve(size, tokens, **engine)
        result["reserved"] = {
            "engine": reserved.engine,
            "rank_bytes": reserved.bytes,
            "blocks": reserved.num_blocks,
            "block_size": reserved.block_size,
            "bytes_per_block": reserved.bytes_per_block,
        }
    return result
