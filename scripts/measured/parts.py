"""Pages of the parts alone: stores, tiers beside an engine, serdes, simulation, signing, fingerprints, memory."""

from collections.abc import Sequence

from measured.pages import Goal, Page, Row, Table, num, percent, pivot, read


def _columns(rows: Sequence[Row], names: Sequence[str], digits: int = 2) -> list[list[str]]:
    """Cells of these columns; numbers get so many digits."""
    return [[_cell(row[name], digits) for name in names] for row in rows]


def _cell(value: str, digits: int) -> str:
    try:
        return num(value, digits) if "." in value else value
    except ValueError:
        return value


def first_steps() -> Page:
    rows = read("first_steps.csv")
    served = {row["what"].rpartition(", ")[2]: row for row in rows if row["first_ms"]}
    small = [row for row in rows if row["ms"]]
    long = list(served.values())
    return Page(
        "first_steps",
        "What does a hit bring on a CPU?",
        f"The second run's first token comes after {percent(float(served['memory']['second_over_first']))} of the first run's time from memory, {percent(float(served['disk']['second_over_first']))} from disk.",
        [
            Table(
                "TTFT in ms, SmolLM2-135M, 900 tokens",
                ["backend", "first", "second", "second / first", "first / none"],
                [[name, *(num(row[c], d) for c, d in (("first_ms", 1), ("second_ms", 1), ("second_over_first", 3), ("first_over_none", 3)))] for name, row in served.items()],
                long,
                "*none again* shows how far two equal runs lie apart.",
            ),
            Table("Before a byte moves", ["what", "ms"], [[row["what"], num(row["ms"], 3)] for row in small], small),
        ],
        files=["first_steps.csv"],
    )  # fmt: skip


def stores() -> Page:
    rows = [row for row in read("stores.csv") if row["ratio"]]
    ours = [row for row in rows if "redis-py" not in row["what"]]
    shared = read("shared_folder.csv")
    low, high = (end(float(row["ratio"]) for row in ours) for end in (min, max))
    return Page(
        "stores",
        "How fast is each store beside its bare medium?",
        f"{low:.2f} to {high:.2f} of memcpy, disk or socket.",
        [
            Table(
                "One value of 14 MiB, GB/s",
                ["what", "medium", "store", "share of the medium"],
                [[row["what"], num(row["medium_gb_s"]), num(row["tier_gb_s"]), num(row["ratio"])] for row in rows],
                rows,
                "Medians of pairs: store and medium in turns. Rows of redis-py are that client as it comes.",
            ),
            Table("A folder of 1,200 files that another process writes to", ["what", "ms"], [[row["what"], num(row["ms"], 3)] for row in shared], shared),
        ],
        files=["stores.csv", "shared_folder.csv"],
    )  # fmt: skip


def tier_loads() -> Page:
    rows = read("tier_loads.csv")
    tiers = list(dict.fromkeys(row["tier"] for row in rows))
    counts = sorted({int(row["objects"]) for row in rows})

    def rate(row: Row) -> float:
        return float(row["gb_per_s"])

    def of(tier: str, reader: str, count: int) -> list[Row]:
        return [r for r in rows if (r["tier"], r["reader"], int(r["objects"])) == (tier, reader, count)]

    def line(tier: str, count: int) -> list[str]:
        bare = max(of(tier, "bare", count), key=rate)
        ours = next(row for row in of(tier, "worker", count) if int(row["threads"]) == int(row["cores"]) // 2)
        spread = f"{num(ours['ms'], 1)} ({num(ours['ms_min'], 1)} to {num(ours['ms_max'], 1)})"
        share = num(rate(ours) / rate(bare), 3)
        return [tier, str(count), ours["mib"], spread, num(rate(ours)), num(rate(bare)), bare["threads"], share]

    shares = {tier: float(line(tier, counts[-1])[-1]) for tier in tiers}
    return Page(
        "tier_loads",
        "How fast does a tier worker fill an engine's slots?",
        f"{counts[-1]} objects of 14 MiB: {', '.join(f'{share:.2f} of the bare medium ({tier})' for tier, share in shares.items())}.",
        [
            Table(
                "A request's objects, asked for at once, to the last one checked",
                ["tier", "objects", "MiB", "ms, median (least to most)", "GB/s", "bare GB/s", "bare threads", "share of bare"],
                [line(tier, count) for tier in tiers for count in counts],
                rows,
                "*Bare*: the same bytes read by the number of threads that does best, into memory that is used again, with no check; the tier worker has as many readers as half the cores. From memory itself (a tmpfs) the check and the second pass over the bytes show; from a medium they hide.",
            )
        ],
        [
            Goal("a disk: at least 0.95 of the best direct reader", num(shares["disk"], 3), shares["disk"] >= 0.95),
            Goal("Redis: at least 0.9 of the best bare sockets", num(shares["Redis, TCP"], 3), shares["Redis, TCP"] >= 0.9),
        ],
        files=["tier_loads.csv"],
    )  # fmt: skip


def serde_quality() -> Page:
    rows, extra = read("serde_quality.csv"), read("serde_quality_first_token.csv")
    more = [row for row in extra if row["kind"] not in {each["kind"] for each in rows}]
    plain = [row for row in rows if not any(word in row["kind"] for word in ("without", "global", "tables in"))]
    good = [row for row in plain if float(row["perplexity_rise"]) <= 0.005]
    best = min(good, key=lambda row: float(row["bits_per_element"]))
    by = {row["kind"]: row for row in [*rows, *more]}
    channel, level = by["int8"], by["cachegen:level=0.125"]
    fewer = 1 - float(level["bits_per_element"]) / float(channel["bits_per_element"])

    constants = read("serde_constants.csv")
    of = {(row["kind"], row["keys"]): row for row in constants}
    constant_cells = [
        [
            kind,
            num(of[kind, "plain"]["bits_per_element"]),
            *(
                num(of[kind, keys][f"key_error_{end}"], 3)
                for keys in ("plain", "with a bias")
                for end in ("first", "last")
            ),
        ]
        for kind in dict.fromkeys(row["kind"] for row in constants)
    ]

    engine = read("codec_quality.csv")
    engine_cells = [
        [
            row["kind"],
            row["block_tokens"],
            num(row["bits_per_element"]),
            percent(float(row["greedy_agreement"])),
            percent(float(row["first_token_equal"])),
            num(row["first_logprob_difference"], 4),
            num(row["first_kl"], 5),
        ]
        for row in engine
    ]

    def cells(row: Row) -> list[str]:
        share = float(row["greedy_agreement"])
        errors = [num(row[name], 3) for name in ("key_error", "value_error")]
        return [row["kind"], num(row["bits_per_element"]), num(row["ratio"]), *errors, f"{float(row['perplexity_rise']):+.2%}", percent(share)]  # fmt: skip

    return Page(
        "serde_quality",
        "What does each bit buy?",
        f"Fewest bits within 0.5% of bf16's perplexity: `{best['kind']}` at {num(best['bits_per_element'])}.",
        [
            Table(
                "Quality",
                ["kind", "bits", "ratio", "K error", "V error", "perplexity rise", "greedy tokens equal"],
                [cells(row) for row in [*rows, *more]],
                [*rows, *more],
                "SmolLM2-135M, 12 contexts of 768 tokens (8 ShareGPT, 4 Python source), chunks of 256; then 255 further tokens and 64 greedy ones with the decoded KV in the cache, the model computing in float32. Bits include the container's header.",
            ),
            Table(
                "Through vLLM: hits decoded from slots of a memory tier",
                ["kind", "tokens of a block", "bits", "greedy tokens equal", "first token equal", "its logprob moved by", "KL of the first token"],
                engine_cells,
                engine,
                f"{engine[0]['model']}, {engine[0]['prompts']} prompts of {engine[0]['prompt_tokens']} tokens of Python source, then {engine[0]['greedy_tokens']} greedy ones, up to the first that is another; each prompt computed and then loaded. vLLM {engine[0]['vllm']} on a CPU, computing in float32. Bits are those of a slot.",
            ),
            Table(
                "Keys with a large constant",
                ["kind", "bits", "plain keys: first layer", "last", "with a bias: first layer", "last"],
                constant_cells,
                constants,
                "K error in units of what differs between tokens. SmolLM2-135M's keys of 3,072 tokens, and the same with a bias of norm 605 in the first layer and 921 in the last (Qwen2.5-7B's), turned as RoPE turns it. Tables of `cachegen` come from other texts with the same bias.",
            ),
        ],
        reading=f"""
- A small model is a hard judge: codecs below five bits hurt it more than one of 7B.
- CacheGen at level 0.125 needs {percent(fewer)} fewer bits than int8 by token. A plain `int4` with K by channel needs fewer still, without tables: the strong baseline is grouping.
- *Deltas* are larger than the values on this model, so leaving them out saves bits. Perplexity is worse without, because the first token, where attention sinks, loses its 8-bit anchor; with only that token kept it is nearly restored.
- *Layer groups* do not pay here: one bin for all layers needs fewer bits at a smaller rise.
- *Tables in the chunk* are out of the question at 256 tokens.
- The paper's own bins (level 1) are too coarse for a model this small.
- *Keys with a large constant*: RoPE turns the constant, so a scale by channel does not catch it, and every plain kind spends its bits on it. `centered` turns it back and takes it away: its error is that of plain keys. Perplexity was not taken, as this model was not trained with such a bias.
""",
        files=["serde_quality.csv", "serde_quality_first_token.csv", "codec_quality.csv", "serde_constants.csv"],
    )  # fmt: skip


def serde_speed() -> Page:
    rows, gpu = read("serde_speed.csv"), read("serde_gpu.csv")
    coded = [row for row in rows if float(row["ratio"]) > 1.001]
    best = max(coded, key=lambda row: float(row["break_even_serial_gb_s"]))
    return Page(
        "serde_speed",
        "How fast is each serde, and where does it pay?",
        f"On one core `{best['kind']}` pays on links up to {num(best['break_even_serial_gb_s'], 1)} GB/s, decoding after the transfer.",
        [
            Table(
                "One core, one chunk of 256 tokens of real bf16 KV, GB/s of raw KV",
                ["kind", "ratio", "encode", "decode", "pays below, decode after transfer", "during", "memcpy beside it"],
                _columns(rows, ("kind", "ratio", "encode_gb_s", "decode_gb_s", "break_even_serial_gb_s", "break_even_pipelined_gb_s", "copy_gb_s")),
                rows,
                "Kernels of `cachegen` hold no lock, so chunks decode side by side on several cores. *naive* encodes without a copy.",
            ),
            Table(
                "Decoding on a GPU, GB/s of raw KV",
                ["kind", "chunks", "ratio", "ms", "GB/s", "device copy", "host to device"],
                _columns(gpu, ("kind", "chunks", "ratio", "ms", "gb_s", "device_copy_gb_s", "h2d_gb_s")),
                gpu,
            ),
        ],
        files=["serde_speed.csv", "serde_gpu.csv"],
    )  # fmt: skip


def simulation() -> Page:
    rates, speed, plain = read("simulate_rates.csv"), read("simulate_speed.csv"), read("eviction.csv")
    once = [row for row in rates if row["store_threshold"] == "1"]
    tables = []
    for traffic in dict.fromkeys(row["traffic"] for row in once):
        of = [row for row in once if row["traffic"] == traffic]
        head, cells = pivot(of, "policy", "capacity", lambda row: f"{float(row['block_hit_rate']):.2%}")
        tables.append(
            Table(
                f"Block hit rate by capacity in blocks: {traffic.replace('_', ' ')}",
                head,
                cells,
                of,
                "The engine's calls on the stores' own policies; `belady` is the bound.",
            )
        )
    for trace in dict.fromkeys(row["trace"] for row in plain):
        of = [row for row in plain if row["trace"] == trace]
        head, cells = pivot(of, "policy", "blocks", lambda row: f"{float(row['hit_rate']):.2%}")
        tables.append(Table(f"Plain accesses, block by block: {trace}", head, cells, of))
    single = [row for row in speed if row["accesses_per_cpu_s"]]
    sweeps = [row for row in speed if row["sweep_wall_s"]]
    keyed = [{**row, "column": f"{row['traffic'].split('_')[1]}, {int(row['blocks']):,} blocks"} for row in single]
    head, cells = pivot(keyed, "what", "column", lambda row: num(float(row["accesses_per_cpu_s"]) / 1e6))
    tables.append(
        Table("Speed: million block accesses for each second of CPU time", ["policy", *head[1:]], cells, single)
    )
    tables.append(
        Table(
            "Speed: a sweep",
            ["traffic", "what", "seconds"],
            [[row["traffic"].replace("_", " "), row["what"], num(row["sweep_wall_s"])] for row in sweeps],
            sweeps,
        )
    )
    lru = min(float(row["accesses_per_cpu_s"]) for row in single if row["what"] == "lru")
    return Page(
        "simulation",
        "Which eviction policy keeps the right blocks, and how fast is the simulator?",
        f"On public traces the policy matters while the cache is small, and none is near the bound. LRU replays {lru / 1e6:.1f} million accesses a second and more.",
        tables,
        files=["simulate_rates.csv", "simulate_speed.csv", "eviction.csv"],
    )  # fmt: skip


def s3_clients() -> Page:
    rows = read("s3_clients.csv")
    at = {(row["server"], row["client"], row["what"], row["bytes"]): row for row in rows}
    size = max((row["bytes"] for row in rows), key=int)
    ours, other = (at["bare", client, "get", size] for client in ("kvlab", "obstore"))
    columns = ("server", "client", "what", "bytes", "ms", "ms_min", "cpu_ms", "gb_per_s")
    return Page(
        "s3_clients",
        "Which client for S3?",
        f"Reading 14 MiB into the caller's buffer takes kvlab's own client {num(ours['ms'], 1)} ms ({num(ours['cpu_ms'], 1)} of CPU), obstore {num(other['ms'], 1)} ({num(other['cpu_ms'], 1)}).",
        [
            Table(
                "Medians",
                ["server", "client", "what", "bytes", "ms", "least", "CPU ms", "GB/s"],
                _columns(rows, columns),
                rows,
                "*bare* is a server that sends a file and drops what it gets: the rest is the client. On *seaweedfs* the server sets the pace. Other work ran on the machine.",
            )
        ],
        files=["s3_clients.csv"],
    )  # fmt: skip


def store_clients() -> Page:
    rows = read("store_clients.csv")
    size = max((row["bytes"] for row in rows), key=int)
    large = [row for row in rows if row["bytes"] == size]
    rates: dict[tuple[str, str], dict[bool, float]] = {}
    for row in large:
        rates.setdefault((row["server"], row["what"]), {})[row["client"] == "kvlab"] = float(row["gb_per_s"])
    shares = {at: rate[True] / rate[False] for at, rate in rates.items()}
    least = min(shares, key=lambda at: shares[at])
    columns = ("server", "client", "what", "bytes", "ms", "ms_min", "cpu_ms", "gb_per_s")
    return Page(
        "store_clients",
        "How fast are kvlab's clients beside the servers' own?",
        f"With objects of 14 MiB kvlab reaches {shares[least]:.2f} times the rate of the server's own client and more (least: {least[1]} with {least[0]}://).",
        [
            Table(
                "Medians",
                ["server", "client", "what", "bytes", "ms", "least", "CPU ms", "GB/s"],
                _columns(rows, columns),
                rows,
                "A put ends with a question (`has`) by both clients: LMCache's server does not confirm puts. kvlab's puts to it hold such a question of their own. Other work ran on the machine.",
            )
        ],
        files=["store_clients.csv"],
    )  # fmt: skip


def auth() -> Page:
    rows = read("auth.csv")
    at = {(row["what"], row["how"]): row for row in rows}
    load, signed = (float(at["load", how]["ms"]) for how in ("no auth", "auth"))
    return Page(
        "auth",
        "What does signing objects cost?",
        f"Loading 14 MiB from a file in the page cache takes {signed:.1f} ms with a key and {load:.1f} without.",
        [
            Table(
                "Medians",
                ["what", "how", "MiB", "ms", "least", "GB/s"],
                _columns(rows, ("what", "how", "mib", "ms", "ms_min", "gb_per_s")),
                rows,
                "*seal* and *check* are a container's whole checksum and MAC; *save* and *load* go through a folder. Other work ran on the machine.",
            )
        ],
        files=["auth.csv"],
    )


def fingerprint() -> Page:
    rows = read("fingerprint.csv")
    at = {row["start"]: row for row in rows}
    names = {
        "read": "reading the files alone",
        "first": "first start",
        "first blake3": "first start, BLAKE3 throughout",
        "second": "second start",
    }
    return Page(
        "fingerprint",
        "How long does it take to name weights by content?",
        f"{num(at['first']['seconds_per_15_gb'], 1)} s for 15 GB in the page cache the first time, {float(at['second']['seconds']) * 1e3:.1f} ms for all files afterwards.",
        [
            Table(
                "Four files, 4 GiB, in the page cache",
                ["start", "seconds", "GB/s", "seconds for 15 GB"],
                [[names[row["start"]], num(row["seconds"], 4), num(row["gb_per_s"]), num(row["seconds_per_15_gb"])] for row in rows],
                rows,
                "A cold disk sets its own pace. Other work ran on the machine.",
            )
        ],
        files=["fingerprint.csv"],
    )  # fmt: skip


def fresh_memory() -> Page:
    rows = read("fresh_memory.csv")
    gain = [float(row["ratio"]) for row in rows]
    return Page(
        "fresh_memory",
        "What do huge pages bring?",
        f"First writes run {min(gain):.1f} to {max(gain):.1f} times as fast as in plain pages.",
        [
            Table(
                "First write of 512 MiB, GB/s",
                ["what", "plain pages", "as kvlab reserves it", "ratio"],
                [[row["what"], num(row["medium_gb_s"]), num(row["tier_gb_s"]), num(row["ratio"])] for row in rows],
                rows,
            )
        ],
        files=["fresh_memory.csv"],
    )


PAGES = (
    first_steps,
    stores,
    tier_loads,
    serde_quality,
    serde_speed,
    simulation,
    s3_clients,
    store_clients,
    auth,
    fingerprint,
    fresh_memory,
)
