"""The tier worker: a process beside an engine that owns its secondary tiers. See docs/design/tier-worker.md."""
