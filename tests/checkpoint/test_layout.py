from __future__ import annotations

import pytest

from halfbyte.checkpoint.layout import infer_linear_layout
from halfbyte.errors import CheckpointError


def shapes(bits=4, in_features=64, out_features=32, groups=2, **changes):
    found = {
        "qweight": (in_features * bits // 32, out_features),
        "qzeros": (groups, out_features * bits // 32),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
        **changes,
    }
    return {suffix: shape for suffix, shape in found.items() if shape is not None}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", [None, -1, 32, 77])
def test_shapes_decide_whatever_the_label_says(bits, label):
    layout = infer_linear_layout("m", shapes(bits=bits, bias=(32,)), label)
    assert (layout.bits, layout.in_features, layout.out_features) == (bits, 64, 32)
    assert (layout.num_groups, layout.group_size, layout.is_ragged) == (2, 32, False)
    assert layout.has_g_idx
    assert layout.has_bias


@pytest.mark.parametrize(
    ("in_features", "groups", "label", "group_size", "ragged"),
    [
        (576, 5, 128, 128, True),
        (576, 5, None, 128, True),  # the only power of two that gives five groups
        (576, 9, 128, 64, False),
        (576, 1, 128, 576, False),
        (96, 2, 64, 64, True),
        (96, 2, None, 48, False),
        (960, 20, 48, 48, False),
    ],
)
def test_label_counts_only_where_shapes_leave_a_choice(
    in_features, groups, label, group_size, ragged
):
    found = infer_linear_layout("m", shapes(in_features=in_features, groups=groups), label)
    assert (found.group_size, found.is_ragged) == (group_size, ragged)


@pytest.mark.parametrize("suffix", ["qzeros", "scales", "qweight"])
def test_missing_tensor_is_named(suffix):
    with pytest.raises(CheckpointError, match=rf"no m\.{suffix}, only .*\(bias, g_idx, [qs]"):
        infer_linear_layout("m", shapes(**{suffix: None, "bias": (32,)}), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": (8,)}, r"m\.qweight has shape \[8\]; a matrix"),
        ({"scales": (0, 32)}, r"m\.scales has shape \[0, 32\]"),
        ({"scales": (2, 64)}, r"m\.scales has 64 columns, but m\.qweight has 32"),
        ({"qzeros": (3, 4)}, r"m\.qzeros has 3 groups, but m\.scales has 2"),
        ({"qzeros": (2, 5)}, r"m\.qzeros has 5 columns for 32 outputs, which is 5 bits"),
        ({"qzeros": (2, 6)}, r"which is 6 bits; allowed are \(2, 3, 4, 8\)"),
        ({"qzeros": (2, 3)}, r"m\.qweight has 8 rows, which is not a whole number of 3-bit inputs"),
        ({"g_idx": (63,)}, r"m\.g_idx has shape \[63\]; \[64\] is needed"),
        ({"bias": (64,)}, r"m\.bias has shape \[64\]; \[32\] is needed"),
        ({"scales": (65, 32), "qzeros": (65, 4)}, "8 rows, .* for 65 groups"),
        ({"scales": (33, 32), "qzeros": (33, 4)}, r"m\.scales has 33 groups for 64 inputs"),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        infer_linear_layout("m", shapes(**change), 32)
