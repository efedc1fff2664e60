"""Pages of codecs where the pages are: programs on a GPU, slots, TTFT of hits."""

from measured.pages import Goal, Page, Row, Table, num, read

LENGTH = 15_000


def gpu_codecs() -> Page:
    rows, slots = read("gpu_codecs.csv"), read("gpu_coded_slots.csv")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    sizes = sorted({int(row["raw_mib"]) for row in rows})
    at = {(row["what"], row["kind"], int(row["raw_mib"])): row for row in rows}

    def line(what: str, kind: str) -> list[str]:
        found = [at.get((what, kind, size)) for size in sizes]
        return [what, f"`{kind}`", *(num(row["gb_s"], 0) if row else "" for row in found)]

    def least(what: str, kind: str) -> float:
        return min(float(row["gb_s"]) for (w, k, mib), row in at.items() if (w, k) == (what, kind) and mib >= 56)

    largest = max(int(row["raw_mib"]) for row in slots)
    shares = {r["kind"]: r["of_plain"] for r in slots if r["what"] == "load" and int(r["raw_mib"]) == largest}
    plain = [kind for kind in ("int8", "fp8", "int4", "lossless") if kind in kinds]
    columns = ("what", "kind", "raw_mib", "ratio", "ms", "gb_s", "plain_ms", "of_plain", "call_ms", "plain_call_ms")
    return Page(
        "gpu_codecs",
        "How fast do codecs move KV between a GPU's pages and host memory?",
        f"A load of {largest} MiB of KV takes {', '.join(f'{share} of a plain load as {kind}' for kind, share in shares.items())}.",
        [
            Table(
                "Slots of a memory tier: a block each, through the ring",
                ["what", "kind", "MiB raw", "ratio", "ms", "GB/s raw", "plain ms", "of plain", "call ms", "plain call ms"],
                [[row[name] for name in columns] for row in slots],
                slots,
                "Blocks of 16 tokens of Qwen2.5-7B (28 layers, 896 KiB), bf16. *plain*: the same blocks as they are, in the same turns. *call*: the calling thread's time, the GPU idle.",
            ),
            Table(
                "Programs alone, objects of 256 tokens, GB/s of raw KV",
                ["what", "kind", *(f"{size} MiB" for size in sizes)],
                [line(what, kind) for what in ("encode", "decode") for kind in kinds],
                rows,
                "Pages to encoded bytes in GPU memory and back, launches included: at 14 MiB they are most of it.",
            ),
        ],
        [
            Goal(
                f"{what}: at least {goal} GB/s of raw KV from 56 MiB on",
                ", ".join(f"{kind} {least(what, kind):.0f}" for kind in plain),
                min(least(what, kind) for kind in plain) >= goal,
            )
            for what, goal in (("decode", 150), ("encode", 75))
        ],
        files=["gpu_coded_slots.csv", "gpu_codecs.csv"],
    )  # fmt: skip


def ttft_codecs() -> Page:
    rows = read("gpu_ttft_codecs.csv")
    lengths = sorted({int(row["tokens"]) for row in rows})
    at: dict[tuple[str, str, int], Row] = {(r["medium"], r["backend"], int(r["tokens"])): r for r in rows}
    runs = list(dict.fromkeys((row["medium"], row["backend"]) for row in rows))

    def median(medium: str, backend: str) -> float:
        return float(at[medium, backend, LENGTH]["ttft_ms_median"])

    def cell(run: tuple[str, str], tokens: int) -> str:
        row = at[(*run, tokens)]
        return f"{num(row['ttft_ms_median'], 1)} ({num(row['ttft_ms_min'], 1)})"

    empty, raw = median("host memory", "vllm-prefix"), median("host memory", "kvlab")
    goals = []
    for kind, share in (("int8", 0.75), ("int4", 0.6)):
        bound, found = empty + share * (raw - empty), median("host memory", f"kvlab-{kind}")
        text = f"host memory, {LENGTH:,} tokens as {kind}: a prefix hit plus {share} of what the plain tier adds, {bound:.1f} ms"
        goals.append(Goal(text, f"{found:.1f} ms", found <= bound))
    disk = {kind: median("disk", f"kvlab-disk{kind}") for kind in ("", "-int4", "-lossless")}
    goals += [
        Goal(f"disk, {LENGTH:,} tokens as int4: at most 200 ms", f"{disk['-int4']:.0f} ms", disk["-int4"] <= 200),
        Goal(
            f"disk, {LENGTH:,} tokens as lossless: at most 0.72 of the plain tier",
            num(disk["-lossless"] / disk[""]),
            disk["-lossless"] <= 0.72 * disk[""],
        ),
    ]
    redis = median("Redis, TCP", "kvlab-redis-int4") / median("Redis, TCP", "kvlab-redis")
    return Page(
        "ttft_codecs",
        "What do codecs take off a hit's TTFT?",
        f"{LENGTH:,} tokens from a disk: {disk['']:.0f} ms as they are, {disk['-lossless']:.0f} as lossless, {disk['-int4']:.0f} as int4; from Redis {num(redis)} of the plain time as int4.",
        [
            Table(
                "TTFT in ms, one request at a time: median (least)",
                ["the hit lies in", "backend", *(f"{n:,} tokens" for n in lengths)],
                [[*run, *(cell(run, n) for n in lengths)] for run in runs],
                rows,
                "Qwen2.5-7B's shapes with random weights; the engines of one place side by side, asked in turns. Host memory with CUDA graphs for all but the attention, the others eager. *lossless* is decoded by the tier worker's threads, *int8*, *fp8* and *int4* where the pages are.",
            )
        ],
        goals,
        "In host memory the processor's time before the first byte moves is most of what a hit costs, so fewer bytes show at long prompts alone.",
        ["gpu_ttft_codecs.csv"],
    )  # fmt: skip


PAGES = (gpu_codecs, ttft_codecs)
