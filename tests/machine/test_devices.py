from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.machine.devices import resolve_device


def test_auto_is_an_existing_device():
    assert torch.ones(1, device=resolve_device("auto")).item() == 1


def test_device_may_be_a_torch_device():
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", ""])
def test_missing_device_is_named(name):
    with pytest.raises(ConfigError, match=f"^device is '{name}', which this machine or this build"):
        resolve_device(name)
