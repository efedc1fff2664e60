"""One thread for torch: these tensors are tiny, and waking a second thread costs more than the work."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
