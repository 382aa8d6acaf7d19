import copy

import pytest
import torch
from tiny_vlms import FAMILY, make_clip, make_vlm


@pytest.fixture(autouse=True, scope="session")
def _offline():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="session")
def _built():
    return {name: make_vlm(name) for name in FAMILY}


@pytest.fixture
def vlm_of(_built):
    return lambda name: copy.deepcopy(_built[name])


@pytest.fixture
def llava(vlm_of):
    return vlm_of("llava")


@pytest.fixture(scope="session")
def _clip():
    return make_clip()


@pytest.fixture
def clip(_clip):
    return copy.deepcopy(_clip)
