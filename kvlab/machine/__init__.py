"""This machine: child processes, a Redis server, and where a measured number comes from."""
