"""Add a model to kvlab/sizing/models.json from its config.json, with the source it came from.

    python scripts/add_model.py org/Name path/to/config.json --source "hub:org/Name@revision"

The entry keeps the fields that decide KV, is sized once, and is refused where it cannot be.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvlab.errors import KVLabError
from kvlab.sizing import size_calculator
from kvlab.sizing.model_config import flatten

CATALOG = Path(__file__).parents[1] / "kvlab" / "sizing" / "models.json"
ABOUT = ("source", "source_kind", "also_seen", "unknown")
# Large or personal to the checkpoint, and nothing that KV depends on.
DROPPED = {
    "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "rope_scaling", "rope_parameters", "rope_theta", "transformers_version", "quantization_config", "initializer_range",
    "suppress_tokens", "begin_suppress_tokens", "task_specific_params", "generation_config",
}  # fmt: skip


def entry_of(config: dict[str, Any], source: str, kind: str, unknown: list[str]) -> dict[str, Any]:
    """The catalog's entry: where it is from first, then the fields of the (language model's) config by name."""
    fields = {k: v for k, v in flatten(config).items() if k not in DROPPED and not k.endswith("_token_id")}
    quant = config.get("quantization_config") or {}
    if quant.get("kv_cache_scheme"):
        fields["kv_cache_scheme"] = quant["kv_cache_scheme"]
    if quant.get("quant_method"):
        fields["weight_quant_method"] = quant["quant_method"]
    about: dict[str, Any] = {"source": source, "source_kind": kind}
    if unknown:
        about["unknown"] = unknown
    return {**about, **{k: fields[k] for k in sorted(fields) if k not in unknown}}


def write(catalog: Path, models: dict[str, Any]) -> None:
    """One line per model, by name, so that a change shows as one line."""
    ordered = sorted(models, key=str.lower)
    lines = [f"  {json.dumps(name)}: {json.dumps(models[name], ensure_ascii=False)}" for name in ordered]
    body = ",\n".join(lines)
    catalog.write_text(f'{{\n "schema": 1,\n "models": {{\n{body}\n }}\n}}\n', encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="hub id, organisation/Name")
    parser.add_argument("config", type=Path, help="the model's config.json")
    parser.add_argument("--source", required=True, help="where the config was read, with its revision")
    parser.add_argument("--kind", default="config_json_copy", help="what the source is; see docs/guide/sizing.md")
    parser.add_argument("--unknown", action="append", default=[], help="a field the source lacks, not to be guessed")
    parser.add_argument("--replace", action="store_true", help="replace an entry of that name")
    parser.add_argument("--catalog", type=Path, default=CATALOG)
    args = parser.parse_args()
    models = json.loads(args.catalog.read_text(encoding="utf-8"))["models"]
    if args.name in models and not args.replace:
        print(f"add_model: the catalog already has {args.name}; give --replace", file=sys.stderr)
        return 2
    entry = entry_of(json.loads(args.config.read_text(encoding="utf-8")), args.source, args.kind, args.unknown)
    try:
        print(size_calculator(entry).explain())
    except KVLabError as e:
        if not args.unknown:
            print(f"add_model: {e}; or say --unknown FIELD to record that", file=sys.stderr)
            return 2
        print(f"recorded as refused: {e}")
    write(args.catalog, {**models, args.name: entry})
    return 0


if __name__ == "__main__":
    sys.exit(main())
