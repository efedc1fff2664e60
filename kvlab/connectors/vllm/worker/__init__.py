"""The worker side of the connector: copies what the scheduler side decided. One per rank."""
