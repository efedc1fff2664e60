"""Several tiers as one store."""

from kvlab.stores.tiered.store import TieredStore

__all__ = ["TieredStore"]
