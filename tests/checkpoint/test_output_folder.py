from __future__ import annotations

import stat

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.output_folder import share_weights


@pytest.mark.parametrize(
    ("folder_mode", "expected"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600), (0o777, 0o644)]
)
def test_weights_are_readable_by_whoever_may_read_their_folder(tmp_path, folder_mode, expected):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    path.chmod(0o600)
    tmp_path.chmod(folder_mode)
    share_weights(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == expected
