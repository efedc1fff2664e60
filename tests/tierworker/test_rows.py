"""What a tier worker tells of its tiers is what its engine can read."""

import json

from kvlab.container import parse_json
from kvlab.tierworker.rows import shown


def test_a_tier_without_a_budget_does_not_end_the_link():
    """Numbers of more than 15 digits are no JSON to the link."""
    told = shown({"tier": "s3", "used_bytes": 1 << 62, "max_bytes": 1 << 62, "evictions": 3})
    row = parse_json(json.dumps(told))
    assert row["max_bytes"] == row["used_bytes"] == 10**15 - 1
    assert (row["evictions"], row["put_bytes"]) == (3, 0)
