from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from halfbyte.errors import CheckpointError
from halfbyte.model.hidden_states import DeviceHiddenStates, HiddenStates

SHAPES = [(2, 5), (1, 3), (2, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_round_trip_bit_identically(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [torch.randn(*shape, 4).to(dtype) for shape in SHAPES]
    with HiddenStates(tmp_path / "h.bin", SHAPES, (4,), dtype) as states:
        for index in (2, 0, 1):
            states.write(index, batches[index])
        for index, batch in enumerate(batches):
            found = states.read(index)
            assert found.dtype == dtype
            assert torch.equal(found, batch)
        assert len(states) == 3
    assert (tmp_path / "h.bin").stat().st_size == (10 + 3 + 10) * 4 * dtype.itemsize


def test_existing_file_is_reused(tmp_path: Path) -> None:
    with HiddenStates(tmp_path / "h.bin", SHAPES, (4,), torch.float32) as states:
        states.write(1, torch.full((1, 3, 4), 7.0))
        digest = states.digest()
    with HiddenStates(tmp_path / "h.bin", SHAPES, (4,), torch.float32) as states:
        assert states.digest() == digest
        assert bool((states.read(1) == 7).all())


def test_read_returns_a_copy(tmp_path: Path) -> None:
    with HiddenStates(tmp_path / "h.bin", [(1, 2)], (4,), torch.float32) as states:
        states.write(0, torch.ones(1, 2, 4))
        states.read(0).zero_()
        assert bool((states.read(0) == 1).all())


def test_digest_depends_on_every_bit(tmp_path: Path) -> None:
    with HiddenStates(tmp_path / "h.bin", SHAPES, (4,), torch.float32) as states:
        for index, shape in enumerate(SHAPES):
            states.write(index, torch.randn(*shape, 4))
        before = states.digest()
        data = bytearray((tmp_path / "h.bin").read_bytes())
        data[-1] ^= 1
        (tmp_path / "h.bin").write_bytes(data)
        assert states.digest() != before


def test_other_dtype_is_cast_and_other_shape_refused(tmp_path: Path) -> None:
    with HiddenStates(tmp_path / "h.bin", [(1, 2)], (4,), torch.bfloat16) as states:
        states.write(0, torch.full((1, 2, 4), 1.5, dtype=torch.float32))
        assert bool((states.read(0) == 1.5).all())
        with pytest.raises(AssertionError, match=r"batch 0: \(2, 2, 4\) != \(1, 2, 4\)"):
            states.write(0, torch.zeros(2, 2, 4))


def test_truncated_file_raises(tmp_path: Path) -> None:
    with HiddenStates(tmp_path / "h.bin", [(1, 2)], (4,), torch.float32) as states:
        states.write(0, torch.ones(1, 2, 4))
        (tmp_path / "h.bin").write_bytes(b"1234")
        with pytest.raises(OSError, match=r"h\.bin ends early"):
            states.read(0)


def test_device_states_are_written_to_the_file_by_save(tmp_path: Path) -> None:
    old, new = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    with DeviceHiddenStates(tmp_path / "h.bin", SHAPES, (4,), torch.float32) as states:
        states.write(0, old)
        states.write(1, torch.ones(1, 3, 4))
        states.write(2, old)
        saved = states.save()
        states.write(2, new)
        assert states.read(2) is new or torch.equal(states.read(2), new)
        assert states.digest() == saved
    with HiddenStates(tmp_path / "h.bin", SHAPES, (4,), torch.float32) as states:
        assert states.digest() == saved
        assert torch.equal(states.read(2), old)


def test_writing_device_states_frees_the_replaced_batch(tmp_path: Path) -> None:
    with (
        DeviceHiddenStates(tmp_path / "0.bin", SHAPES, (4,), torch.float32) as before,
        DeviceHiddenStates(tmp_path / "1.bin", SHAPES, (4,), torch.float32) as behind,
    ):
        behind.replaced = before
        for batch, (sequences, tokens) in enumerate(SHAPES):
            before.write(batch, torch.full((sequences, tokens, 4), 1.0 + batch))
        behind.write(1, before.read(1) * 10)
        assert float(before.read(0)[0, 0, 0]) == 1
        assert float(behind.read(1)[0, 0, 0]) == 20
        assert float(before.read(1)[0, 0, 0]) == 0, "only the file, which has nothing, is left"


def test_full_disk_raises_with_the_size(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"Cannot write .*h\.bin, the hidden states of 1\.6"
        ):
            HiddenStates(tmp_path / "h.bin", [(1, 100)], (4,), torch.float32)
        with HiddenStates(tmp_path / "i.bin", [(1, 50)], (4,), torch.float32) as states:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
            with pytest.raises(CheckpointError, match=r"i\.bin, .* 800 B: File too large\. Free"):
                states.write(0, torch.zeros(1, 50, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
