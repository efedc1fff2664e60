"""A tier in a bucket of S3, or of any server that speaks its protocol."""

from kvlab.stores.s3.store import S3Store

__all__ = ["S3Store"]
