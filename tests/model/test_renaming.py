from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from halfbyte.errors import CheckpointError
from halfbyte.model.renaming import ExcludingConverter, align_renamings


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({str(i): nn.Linear(4, 4, bias=False) for i in range(2)})
        self.experts["0"] = nn.Module()
        self.experts["0"].register_buffer("qweight", torch.zeros(4, 4))


def merge() -> WeightConverter:
    return WeightConverter("experts.*.weight", "experts.fused", operations=[MergeModulelist(dim=0)])


def test_rule_that_moves_a_packed_tensor_elsewhere_is_refused_by_both_names():
    rules = [WeightRenaming("specialists", "others")]
    with pytest.raises(
        CheckpointError, match=r"specialists\.0\.qweight: .* rename it to others\.0\.qweight"
    ):
        align_renamings(Model(), rules, {"experts.0": "specialists.0"}, ["specialists.0.qweight"])


def test_matching_rules_are_unchanged():
    rules = [WeightRenaming("old", "new"), merge()]
    found = align_renamings(
        Model(), rules, {"experts.0": "experts.0"}, ["experts.0.qweight", "experts.1.weight"]
    )
    assert found == rules


def test_dense_tensor_beside_packed_ones_is_excluded_from_merging():
    rules = [WeightRenaming("specialists", "experts"), merge()]
    keys = ["specialists.0.qweight", "specialists.1.weight"]
    found = align_renamings(Model(), rules, {"experts.0": "specialists.0"}, keys)
    assert found[0] is rules[0]
    assert isinstance(found[1], ExcludingConverter)
    assert found[1].rename_source_key("experts.1.weight") == ("experts.1.weight", None)
    # Others are still merged.
    assert found[1].rename_source_key("experts.7.weight")[0] == "experts.fused"
