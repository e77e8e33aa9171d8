import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads cost more than they bring, and ranks share cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in annotations are checked, under pytest only. Before anything of these rooms is imported.
install_import_hook("genkit.backbones", "beartype.beartype")
settings.register_profile("genkit", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("genkit")
torch.set_num_threads(1)
# Tests fork ranks. A process whose first backward pass comes after torch.compile was used can never fork a process that
# trains ("Unable to handle autograd's threading"); one whose first came before can, whatever it compiles later.
torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    os.environ.pop("GENKIT_TRUST", None)  # `genkit ... --trust` sets it for its process


def pytest_collection_modifyitems(items):
    """A test's name is the same in every process, or pytest-xdist refuses to run them: no address of an object."""
    if unnamed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{unnamed[0]}: names the address of an object; give the parameters ids")
