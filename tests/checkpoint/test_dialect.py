from __future__ import annotations

import pytest
import torch

from halfbyte.checkpoint.dialect import detect_zero_dialect, infer_group_size, make_trivial_g_idx
from halfbyte.checkpoint.layout import LinearLayout
from halfbyte.errors import CheckpointError
from halfbyte.packing import pack_zeros


def uniform(bits: int, zero_offset: int) -> torch.Tensor:
    return pack_zeros(torch.full((32, 3), 2 ** (bits - 1)), bits, zero_offset)


def detect(qzeros, bits=4, declared_offset=1, declared_symmetric=True):
    return detect_zero_dialect(
        "m",
        qzeros,
        bits,
        declared_offset=declared_offset,
        declared_symmetric=declared_symmetric,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [0, 1])
@pytest.mark.parametrize("declared", [0, 1])
@pytest.mark.parametrize("symmetric", [True, None])
def test_symmetric_zeros_tell_their_dialect(bits, stored, declared, symmetric):
    found = detect(uniform(bits, stored), bits, declared, symmetric)
    assert (found.zero_offset, found.is_symmetric) == (stored, True)
    assert (found.note is None) == (stored == declared)


def test_note_of_a_mislabelled_file_names_tensor_and_value():
    note = detect(uniform(4, 0)).note
    assert note is not None
    assert "m.qzeros stores 8 everywhere, which is gptq_v2; the config says gptq" in note


@pytest.mark.parametrize("declared", [0, 1])
def test_asymmetric_label_is_followed_even_where_zeros_are_uniform(declared):
    found = detect(uniform(4, 1), declared_offset=declared, declared_symmetric=False)
    assert found.zero_offset == declared
    assert found.is_symmetric == (declared == 1)


@pytest.mark.parametrize("symmetric", [False, None])
def test_asymmetric_zeros_follow_the_label(symmetric):
    qzeros = pack_zeros(torch.arange(96).reshape(32, 3) % 15 + 1, 4, 1)
    for declared in (0, 1):
        found = detect(qzeros, declared_offset=declared, declared_symmetric=symmetric)
        assert (found.zero_offset, found.is_symmetric) == (declared, False)


def test_one_odd_zero_in_a_symmetric_file_is_refused():
    qzeros = uniform(4, 1)
    qzeros[1, 2] ^= 1 << 9
    with pytest.raises(CheckpointError, match=r"m\.qzeros does not store 7 \(v1\) or 8 \(v2\)"):
        detect(qzeros)


@pytest.mark.parametrize(
    ("g_idx", "groups", "size"),
    [([0, 0, 1, 1], 2, 2), ([0, 0, 0, 1], 2, 3), ([1, 0, 1, 0], 2, 2), ([0, 0], 1, 2)],
)
def test_group_size_is_measured(g_idx, groups, size):
    assert infer_group_size("m", torch.tensor(g_idx), groups) == size


@pytest.mark.parametrize(
    ("g_idx", "groups", "message"),
    [
        ([0, 0, 2, 1], 2, r"m\.g_idx has values 0\.\.2; allowed are 0\.\.1"),
        ([0, -1, 1, 1], 2, r"m\.g_idx has values -1\.\.1"),
        ([0, 1, 1, 1], 2, r"m\.g_idx gives its 2 groups 1 to 3 columns"),
        ([0, 0, 0, 1, 2, 2], 3, r"m\.g_idx gives its 3 groups 1 to 3 columns"),
        ([0, 0, 1, 1], 3, r"m\.g_idx gives its 3 groups 0 to 2 columns"),
    ],
)
def test_impossible_groups_are_refused(g_idx, groups, message):
    with pytest.raises(CheckpointError, match=message):
        infer_group_size("m", torch.tensor(g_idx), groups)


def test_trivial_g_idx_of_a_ragged_layer():
    layout = LinearLayout(
        bits=4,
        in_features=5,
        out_features=8,
        num_groups=3,
        group_size=2,
        has_g_idx=False,
        has_bias=False,
    )
    g_idx = make_trivial_g_idx(layout)
    assert g_idx.dtype == torch.int32
    assert g_idx.tolist() == [0, 0, 1, 1, 2]
