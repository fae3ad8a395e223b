from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels.contract import LinearSpec

VALUES = {
    "bits": 4,
    "group_size": 32,
    "in_features": 80,
    "out_features": 64,
    "symmetric": True,
    "act_order": False,
    "zero_offset": 1,
    "dtype": torch.float32,
    "device_type": "cpu",
}


def test_last_group_may_be_shorter():
    spec = LinearSpec(**VALUES)
    assert (spec.num_groups, spec.is_ragged) == (3, True)
    assert not LinearSpec(**VALUES | {"in_features": 96}).is_ragged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"bits=5; allowed: \(2, 3, 4, 8\)"),
        ({"in_features": 0}, r"0 -> 64; both sizes must be at least 1"),
        ({"group_size": 81}, r"group_size=81 and in_features=80; allowed group sizes: 1\.\.80"),
        ({"group_size": 0}, r"group_size=0 and in_features=80"),
        ({"zero_offset": 2}, r"zero_offset=2; allowed: 0, 1"),
        ({"dtype": torch.int8}, r"torch\.int8; it needs a floating dtype"),
    ],
)
def test_impossible_layer_is_refused_by_its_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        LinearSpec(**VALUES | change)
