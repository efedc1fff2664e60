"""What a cache would do for given traffic: replay, eviction, cost."""
