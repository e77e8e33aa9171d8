"""One process may train on several devices, one after the other, as a notebook does."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized

from genkit.training.distributed import join_ranks, leave_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_on_the_cpu_may_follow_what_chose_a_device_itself():
    """Of Accelerate: "AcceleratorState has already been initialized and cannot be changed, restart your runtime"."""
    Accelerator()
    assert join_ranks(CPU).device == CPU
    AcceleratorState().device = CUDA  # as if there were one
    assert join_ranks(CPU).device == CPU


def test_a_run_on_a_gpu_does_not_stay_on_the_cpu_of_the_run_before():
    """Accelerate keeps the first device, without a word, if the second is a GPU."""
    join_ranks(CPU)
    leave_device(CPU)
    assert is_initialized()
    leave_device(CUDA)
    assert not is_initialized()


def test_ranks_do_not_change_their_device():
    join_ranks(CPU)
    PartialState().num_processes = 2
    with pytest.raises(ValueError, match="device: given cuda; the ranks of this process are on cpu"):
        leave_device(CUDA)
