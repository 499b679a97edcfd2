"What several files of tests need"

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    "The number of threads decides the order of sums"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64():
    "There the order of a sum changes the sixteenth digit"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
