"""This machine: child processes, a Redis and an S3 server, and where a measured number comes from."""
