from planted import attempt

__all__ = ["attempt"]  # a fixture
