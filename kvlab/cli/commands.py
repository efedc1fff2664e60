"""The subcommands, each a module that is imported on use."""

from typing import NamedTuple


class Command(NamedTuple):
    """`module` has ``parser()`` and ``main(arguments)``, which gives the exit status; it is imported on use."""

    module: str
    about: str
    example: str


COMMANDS = {
    "size": Command("kvlab.cli.size", "how big the KV cache of a model is, and why", "kvlab size Qwen2.5-7B"),
    "simulate": Command(
        "kvlab.cli.simulate", "what a cache would do for given traffic", 'kvlab simulate chat --tiers "1000 blocks"'
    ),
    "store": Command(
        "kvlab.cli.store", "look into a tier: list, verify, evict, clear", "kvlab store ls file:///data/kv"
    ),
    "config": Command(
        "kvlab.cli.config",
        "the JSON of vLLM's --kv-transfer-config, checked; also from LMCache's settings",
        "kvlab config 'memory://?size=8GiB' 'file:///data/kv?size=1TiB'",
    ),
    "serve": Command(
        "kvlab.cli.serve", "hold a cache for all engines of this host", "kvlab serve --listen /run/kvlab.sock"
    ),
    "bench": Command(
        "kvlab.cli.bench",
        "serving benchmarks: backends side by side, first and second run",
        "kvlab bench --backends none,kvlab-memory",
    ),
    "judge": Command(
        "kvlab.cli.judge",
        "put any KV connector of vLLM through traps: is a hit a recompute?",
        "kvlab judge my_package.connector:MyConnector --traps edges,forks",
    ),
    "chaos": Command(
        "kvlab.cli.chaos",
        "break what a cache stores in a Redis or a folder, with a seed",
        "kvlab chaos redis --to 127.0.0.1:6379",
    ),
    "warm": Command(
        "kvlab.cli.warm", "send prompts to a running server, so that it keeps their KV", "kvlab warm prompt.txt --pin"
    ),
    "quality": Command(
        "kvlab.cli.quality",
        "what a codec costs in words: prompts to a running server, computed and decoded",
        "kvlab quality prompts.jsonl --url http://gpu-1:8000",
    ),
    "watch": Command(
        "kvlab.cli.watch", "follow the KV events of a running vLLM: what is held, where", "kvlab watch tcp://gpu-1:5557"
    ),
    "profile": Command(
        "kvlab.cli.profile", "make a model's tables for the cachegen serde", "kvlab profile path/to/model text.txt"
    ),
    "completion": Command("kvlab.cli.completion", "completion for bash, zsh or fish", "kvlab completion bash"),
}
