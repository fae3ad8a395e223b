"""The reload check detects and names differences between checkpoint and run.

Checksums are rewritten after each change, so that only the comparison under test can see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.helpers.families import token_lists, write_family
from torch import Tensor

import halfbyte
from halfbyte.checkpoint.checksums import TENSOR_DIGITS, ShardDigest, write_checksums
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import VerificationError
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize import attempt

Q_PROJ = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, Tensor]


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change tensors of a checkpoint and write its checksums anew."""
    files = sorted(folder.glob("*.safetensors"))
    shards: dict[Path, list[str]] = {}
    tensors: Tensors = {}
    for path in files:
        with safe_open(path, "pt") as shard:
            shards[path] = list(shard.keys())
            tensors |= {name: shard.get_tensor(name) for name in shards[path]}
    change(tensors)
    digests = []
    for path, names in shards.items():
        part = {name: tensors[name].contiguous() for name in names}
        save_file(part, path, metadata={"format": "pt"})
        data = {n: t.view(-1).view(torch.uint8).numpy().tobytes() for n, t in part.items()}
        digests.append(
            ShardDigest(
                file_name=path.name,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                num_bytes=path.stat().st_size,
                tensor_bytes=sum(map(len, data.values())),
                tensors={
                    name: hashlib.sha256(raw).hexdigest()[:TENSOR_DIGITS]
                    for name, raw in data.items()
                },
            )
        )
    checkpoint = open_checkpoint(folder)
    write_checksums(folder, digests, checkpoint.labels.raw)
    checkpoint.verify()


def quantize_and_change(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    **options: object,
) -> None:
    """Quantize; between the writing and the comparison something changes the folder."""
    write_family(tmp_path / "base", "llama", num_hidden_layers=2)
    check_bytes = attempt.check_bytes

    def after_a_change(folder: Path, checksums: dict[str, int], device: torch.device) -> None:
        change(folder)
        check_bytes(folder, checksums, device)

    monkeypatch.setattr(attempt, "check_bytes", after_a_change)
    halfbyte.quantize(
        tmp_path / "base",
        tmp_path / "out",
        config=QuantConfig(group_size=32, **options),
        calibration=CalibrationConfig(samples=4, length=32),
        text=token_lists(4, 32),
    )


def flip_code(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.qweight"][3, 7] ^= 1


def change_scale(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.scales"][1, 5] *= 1.001


def change_zero(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.qzeros"][0, 0] ^= 0x30


def shift_groups(tensors: Tensors) -> None:
    g_idx = tensors[f"{Q_PROJ}.g_idx"]
    g_idx[[0, 63]] = g_idx[[63, 0]]


def swap(tensors: Tensors) -> None:
    for suffix in ("qweight", "scales", "qzeros"):
        one, other = f"{Q_PROJ}.{suffix}", f"{Q_PROJ.replace('q_proj', 'o_proj')}.{suffix}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize(
    "change", [flip_code, change_scale, change_zero, shift_groups, swap], ids=lambda f: f.__name__
)
def test_changed_weight_is_reported_by_module(
    change: Callable[[Tensors], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        VerificationError,
        match=rf"does not reproduce the weight of {Q_PROJ} that the run used",
    ):
        quantize_and_change(
            tmp_path,
            monkeypatch,
            lambda folder: change_tensors(folder, change),
            symmetric=change is not change_zero,
            desc_act=change is shift_groups,
        )


def test_unchanged_checkpoint_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_and_change(tmp_path, monkeypatch, lambda f: change_tensors(f, lambda _: None))


def test_changed_norm_in_a_block_is_detected_by_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.input_layernorm.weight"].mul_(2)

    with pytest.raises(
        VerificationError,
        match=r"The saved model\.layers\.1 does not reproduce the run: its output "
        r"has a relative difference of .*, allowed is 0\.01",
    ):
        quantize_and_change(tmp_path, monkeypatch, lambda f: change_tensors(f, change))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_changed_tail_is_detected_by_the_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name][:5] *= 3

    with pytest.raises(
        VerificationError,
        match=r"logits have a relative difference .*, allowed is 0\.02\. Its blocks agree",
    ):
        quantize_and_change(tmp_path, monkeypatch, lambda f: change_tensors(f, change))


def test_non_finite_tensor_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.input_layernorm.weight"][0] = float("nan")

    with pytest.raises(VerificationError, match=r"The saved model\.layers\.0 does not reproduce"):
        quantize_and_change(tmp_path, monkeypatch, lambda f: change_tensors(f, change))


def test_changed_byte_is_reported_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    with pytest.raises(
        VerificationError, match=r"is not what was written: Tensor model\.layers\.1\..*SHA-256"
    ):
        quantize_and_change(tmp_path, monkeypatch, change)


def test_missing_shard_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        (folder / "model-00001-of-00003.safetensors").unlink()

    with pytest.raises(VerificationError, match=r"is not what was written: .*00001-of-00003"):
        quantize_and_change(tmp_path, monkeypatch, change)


def test_missing_and_extra_modules_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: dict[str, int] = {}

    def more(folder: Path) -> None:
        sums.update(dict.fromkeys(open_checkpoint(folder).linears, 0))

    quantize_and_change(tmp_path, monkeypatch, more)
    monkeypatch.undo()
    with pytest.raises(VerificationError, match=r"differ in 1 quantized modules, such as extra"):
        attempt.check_bytes(tmp_path / "out", {**sums, "extra": 1}, torch.device("cpu"))


def test_run_can_be_resumed_after_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was wrong may have been the disk: the finished blocks are not lost, but not trusted."""
    with pytest.raises(VerificationError):
        quantize_and_change(tmp_path, monkeypatch, lambda f: change_tensors(f, flip_code))
    assert (tmp_path / "out" / ".halfbyte" / "journal.jsonl").is_file()
    assert not (tmp_path / "out" / "quantization_report.json").exists()
