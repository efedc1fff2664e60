"""The traps: what is asked of an engine so that a connector's fault shows. Prompts of each are its own."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

from kvlab.judge import damage
from kvlab.judge.answers import Ask
from kvlab.judge.stage import Stage
from kvlab.judge.storm import storm

BLOCK = 32
EDGES = [n + d for n in (BLOCK, 2 * BLOCK, 4 * BLOCK, 8 * BLOCK, 16 * BLOCK) for d in (-1, 0, 1)]  # and of chunks
FIRST_TOKEN, END_TOKEN = 64, 4096  # ids that every vocabulary has


@dataclass(frozen=True)
class Group:
    """Traps that share an engine. `fill`: the engine comes after another process, which has asked the same."""

    settings: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    needs_storage: bool = False
    needs_adapters: bool = False


COMMON = {
    "enforce_eager": True, "dtype": "float32", "block_size": BLOCK, "max_model_len": 1024, "max_num_seqs": 8,
    "max_num_batched_tokens": 2048, "enable_prefix_caching": False, "num_gpu_blocks_override": 400,
    "scheduling_policy": "priority", "distributed_executor_backend": "uni", "gpu_memory_utilization": 0.15,
    "kv_cache_memory_bytes": 1 << 30, "skip_tokenizer_init": True, "disable_log_stats": True,
}  # fmt: skip
FEW = {"num_gpu_blocks_override": 41, "max_num_batched_tokens": 128}
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
GROUPS = {
    "plain": Group({}),
    "exact": Group({}, {"enable_prefix_caching": True}),
    "few": Group(FEW),
    "prefix": Group({**FEW, "enable_prefix_caching": True, "num_gpu_blocks_override": 61}),
    "lora": Group(LORA, LORA, needs_adapters=True),
    "storage": Group({}, needs_storage=True),
}


@dataclass(frozen=True)
class Trap:
    """`play` asks; `before` asks in another process, over the same storage, before. `hits`: a connector that loads
    nothing proves nothing here."""

    name: str
    about: str
    group: str
    play: Callable[[Stage], None]
    before: Callable[[Stage], None] | None = None
    hits: bool = True
    fresh: bool = False  # in an engine of its own


TRAPS: dict[str, Trap] = {}


def trap(about: str, group: str = "plain", **more: Any) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    def keep(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = play.__name__
        TRAPS[name] = Trap(name, about, group, play, **more)
        return play

    return keep


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN, END_TOKEN) for _ in range(count))


@trap("prompts that end just before, at and after the ends of pages and chunks, asked twice")
def edges(stage: Stage) -> None:
    for length in EDGES:
        prompt = words(stage.rng, length)
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt))


@trap("prompts shorter than a page, down to one token", hits=False)
def short(stage: Stage) -> None:
    for length in (BLOCK // 2, 3, 2, 1):
        prompt = words(stage.rng, length)
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt), Ask(prompt))


@trap("prompts that part after a shared beginning; shorter and longer ones; pages of the same tokens elsewhere")
def forks(stage: Stage) -> None:
    trunk = words(stage.rng, 10 * BLOCK)
    stage.ask(Ask(trunk))
    for length in (2, BLOCK - 1, BLOCK, BLOCK + 5, 5 * BLOCK, 9 * BLOCK + 9):
        stage.ask(Ask(trunk[:length] + words(stage.rng, 40)))
        stage.ask(Ask(trunk[:length]))
    stage.ask(Ask(trunk[: 9 * BLOCK + 8] + words(stage.rng, 12)))  # parts at the last token of one that is stored
    longer = trunk + words(stage.rng, 3 * BLOCK + 7)
    stage.ask(Ask(longer))
    stage.ask(Ask(longer[:-3]))
    other = words(stage.rng, 2 * BLOCK)
    stage.ask(Ask(other + trunk[2 * BLOCK :]))  # the same tokens at the same places, after others
    stage.ask(Ask(trunk[BLOCK:]))  # and one page earlier
    stage.ask(Ask(trunk))


@trap("eight prompts at once, and one prompt eight times at once")
def together(stage: Stage) -> None:
    asks = [Ask(words(stage.rng, 120 + 13 * at)) for at in range(8)]
    stage.ask(*asks)
    stage.ask(*asks)
    same = Ask(words(stage.rng, 200))
    stage.ask(*[same] * 8)
    stage.ask(*[same] * 8)


@trap("what was stored under one cache salt is not loaded under another, or none")
def salts(stage: Stage) -> None:
    prompt = words(stage.rng, 9 * BLOCK + 3)
    for salt in ("one", "two", ""):
        ask = Ask(prompt, salt=salt)
        stage.first(ask, "of another salt")
        stage.ask(ask)
    stage.ask(*(Ask(prompt, salt=salt) for salt in ("one", "two", "", "one")))


@trap("turns of conversations: the answer, and more, is the next prompt")
def turns(stage: Stage) -> None:
    for length, more in ((BLOCK - 12, BLOCK - 12), (3 * BLOCK - 1, 9), (5 * BLOCK + 7, 9)):  # the first: whole pages
        prompt = words(stage.rng, length)
        for _ in range(3):
            (answer,) = stage.ask(Ask(prompt, max_tokens=44))
            prompt += (*answer.tokens[:44], *words(stage.rng, more))
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt[: length + 44]))  # ends with the last token that was answered


@trap("several answers to one prompt", "plain")
def choices(stage: Stage) -> None:
    for length in (BLOCK + 1, 4 * BLOCK, 200):
        prompt = words(stage.rng, length)
        stage.ask(Ask(prompt, n=3), Ask(prompt))
        stage.ask(Ask(prompt, n=3, max_tokens=4))


@trap("logprobs of a prompt's own tokens are all there, although its KV is stored", hits=False)
def prompt_logprobs(stage: Stage) -> None:
    for length in (3 * BLOCK, 200):
        prompt = words(stage.rng, length)
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt, prompt_logprobs=True))
        stage.ask(Ask(prompt))


@trap("requests that are aborted, in any step, and then asked again; all pages come back", "few")
def aborts(stage: Stage) -> None:
    prompts = [words(stage.rng, 6 * BLOCK + 11 * at) for at in range(6)]
    for steps in (1, 2, 3, 5):
        stage.ask(*(Ask(prompt, max_tokens=40, patience=steps) for prompt in prompts), settle=False)
        stage.ask(*(Ask(prompt) for prompt in prompts[::2]), settle=False)
        prompts = [prompt[: len(prompt) - BLOCK] + words(stage.rng, BLOCK) for prompt in prompts]
    stage.ask(*(Ask(prompt) for prompt in prompts))
    stage.ask(*(Ask(prompt) for prompt in prompts))
    stage.pages_come_back()


@trap("the same logprobs, bit for bit, as a hit of the same length in the engine's own prefix cache", "exact")
def bits(stage: Stage) -> None:
    for length in (BLOCK + 1, 2 * BLOCK + 1, 8 * BLOCK + 1, 16 * BLOCK + 1, 4 * BLOCK + 20, 9 * BLOCK + 20):
        stage.exactly(Ask(words(stage.rng, length)))


@trap("prompts that are computed in several steps", "few")
def chunked(stage: Stage) -> None:
    for length in (127, 128, 129, 480, 700):
        prompt = words(stage.rng, length)
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt))
        stage.ask(Ask(prompt[:-5] + words(stage.rng, 30)))
    long, short = words(stage.rng, 600), [words(stage.rng, 60 + at) for at in range(4)]
    for _ in range(2):
        stage.ask(
            *(Ask(prompt, max_tokens=20) for prompt in short), Ask(long)
        )  # steps end within pages of the long one


@trap("requests that the engine preempts for want of pages, and resumes", "few")
def preemption(stage: Stage) -> None:
    asks = [Ask(words(stage.rng, 180 + 5 * at), max_tokens=48) for at in range(8)]
    with stage.preemptions() as preempted:
        answers = stage.ask(*asks)
        stage.ask(*asks)
    for ask, answer in zip(asks, answers, strict=True):
        stage.ask(Ask((*ask.tokens, *answer.tokens[:48], 77)))
    if not preempted and not stage.is_rehearsal:
        stage.fail("the engine preempted nothing, so that this proves nothing", "8 requests")
    stage.pages_come_back()


def one_a_step(later: Iterator[Ask], _live: int) -> list[Ask] | None:
    arrived = next(later, None)
    return None if arrived is None else [arrived]


@trap("requests of higher priority that come later and preempt", "few")
def priorities(stage: Stage) -> None:
    asks = [Ask(words(stage.rng, 250 + 7 * at), max_tokens=30, priority=9 - at) for at in range(9)]
    for _ in range(2):
        later = iter(asks)
        stage.answer(partial(one_a_step, later))
        stage.settle()


@trap("pages are overwritten when the engine frees them and when it gives them out", "few")
def freed_pages(stage: Stage) -> None:
    asks = [Ask(words(stage.rng, 200 + 9 * at)) for at in range(9)]
    with stage.overwritten():
        stage.ask(*(replace(ask, max_tokens=1) for ask in asks))  # freed as soon as they are computed
        for _ in range(2):
            stage.ask(*asks)
    stage.pages_come_back()


@trap("random traffic with forks, aborts, salts and priorities, while pages are scarce and overwritten", "few")
def traffic(stage: Stage) -> None:
    with stage.overwritten():
        storm(stage, [words(stage.rng, stage.rng.randrange(250, 420)) for _ in range(4)])
    stage.pages_come_back()


@trap("together with the engine's own prefix cache, which holds more, less, or nothing", "prefix")
def prefix_caching(stage: Stage) -> None:
    long = words(stage.rng, 480)
    for prompt in (long, long, long[:129], long[:300] + words(stage.rng, 50), long):
        stage.ask(Ask(prompt))
    stage.reset()
    for prompt in (long[:129], long, long[:300], long):
        stage.ask(Ask(prompt))
    for _ in range(6):  # the engine's cache is filled with others
        stage.ask(Ask(words(stage.rng, 300)))
    stage.ask(Ask(long), Ask(long[:200]), Ask(long))


@trap("nothing that was stored before a reset of the cache (reset_connector=True) is loaded after it", "prefix")
def resets(stage: Stage) -> None:
    for settle in (True, False):  # at rest, and as soon as the requests have ended: saves may be under way
        prompts = [words(stage.rng, length) for length in (3 * BLOCK, 130, 9 * BLOCK + 3, 200)]
        for prompt in prompts:
            stage.ask(Ask(prompt))
        stage.reset()
        for prompt in prompts:  # hits
            stage.ask(Ask(prompt))
        last = words(stage.rng, 3 * BLOCK + 9)  # computed in one step
        stage.ask(Ask(last, max_tokens=1), settle=settle)
        stage.reset(connector=True)
        for prompt in (*prompts[:2], last, prompts[2][:200] + words(stage.rng, 40)):
            stage.first(Ask(prompt), "of before the reset")
        stage.reset()
        for prompt in (last, *prompts):
            stage.ask(Ask(prompt))


@trap("random traffic while the engine's own prefix cache evicts", "prefix")
def prefix_traffic(stage: Stage) -> None:
    with stage.overwritten():
        storm(stage, [words(stage.rng, stage.rng.randrange(250, 420)) for _ in range(4)])
    stage.pages_come_back()


@trap("the base model, adapters (LoRA) and salts share prompts, in every order; each finds its own KV", "lora")
def lora(stage: Stage) -> None:
    lengths = (BLOCK + 3, 2 * BLOCK + 3, 4 * BLOCK, 200, 5 * BLOCK + 1, 300)
    for length, adapters in zip(lengths, permutations((0, 1, 2)), strict=True):
        prompt, salts = words(stage.rng, length), ("", "one")[:: stage.rng.choice((1, -1))]
        asks = [Ask(prompt, adapter=adapter, salt=salt, max_tokens=4) for salt in salts for adapter in adapters]
        for ask in asks:
            stage.first(ask, "of another adapter or salt")
        stage.ask(*(ask for ask in asks if ask.adapter))  # on a CPU, vLLM gives the base model an adapter beside others
        stage.ask(*(ask for ask in asks if not ask.adapter))


def stored(stage: Stage) -> None:
    """Prompts whose KV is in the storage when the engine of the trap starts."""
    stage.ask(*(Ask(words(stage.rng, length)) for length in (2 * BLOCK, 130, 8 * BLOCK + 1, 300)))


@trap("another process finds what was stored", "storage", before=stored, fresh=True)
def restart(stage: Stage) -> None:
    stored(stage)
    stored_forks = [Ask(words(stage.rng, 100)) for _ in range(2)]
    stage.ask(*stored_forks)


def _damaged(name: str, about: str, kind: Any) -> None:
    def play(stage: Stage) -> None:
        stage.damage(kind)
        seed = stage.rng.getstate()
        for _ in range(2):
            stage.rng.setstate(seed)
            stored(stage)

    TRAPS[name] = Trap(name, about, "storage", play, before=stored, hits=False, fresh=True)


_damaged("cut_objects", "objects in the storage end in their middle", damage.cut_short)
_damaged("empty_objects", "objects in the storage are empty", damage.make_empty)
_damaged("flipped_objects", "bits of objects in the storage are flipped", damage.flip_bits)
_damaged("swapped_objects", "objects in the storage have each other's content", damage.swap_content)
_damaged("lost_objects", "objects in the storage are gone", damage.remove)


@trap("objects vanish from the storage while the engine runs", "storage", hits=False, fresh=True)
def vanishing_objects(stage: Stage) -> None:
    asks = [Ask(words(stage.rng, length)) for length in (130, 8 * BLOCK, 300)]
    stage.ask(*asks)
    stage.ask(*asks)
    stage.damage(damage.remove)
    stage.ask(*asks)
    stage.ask(*asks)


@trap("objects are gone or cut between the lookup that found them and their load", "storage", before=stored, fresh=True)
def failing_loads(stage: Stage) -> None:
    seed = stage.rng.getstate()
    for kind in (damage.cut_short, damage.remove):
        stage.rng.setstate(seed)
        with stage.damaged_after_lookups(kind):
            stored(stage)
        stage.rng.setstate(seed)
        stored(stage)
    stage.pages_come_back()
