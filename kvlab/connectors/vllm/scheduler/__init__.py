"""The scheduler side of the connector: what is loaded, what is saved, and where it lies in host memory."""
