"""Benchmarks: demo model, datasets, serving runs, simulation."""
