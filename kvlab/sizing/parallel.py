"""How layers are spread over pipeline stages, as vLLM 0.32 `distributed/utils.py` (get_pp_indices) does it."""

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import Layer


def stages_of(layers: list[Layer], pp: int) -> list[list[Layer]]:
    """`layers` in `pp` consecutive stages; a remainder goes to the stages before the last."""
    if pp > len(layers):
        raise ConfigError(f"pp must be at most the number of layers, {len(layers)}, got {pp}")
    sizes = [len(layers) // pp] * pp
    for i in range(2, len(layers) % pp + 2):
        sizes[-i] += 1
    stages, start = [], 0
    for size in sizes:
        stages.append(layers[start : start + size])
        start += size
    return stages
