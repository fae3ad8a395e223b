"""The column kernel in Triton's interpreter, compared with the plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.interpreted import interpret
from tests.kernels.test_gpu_machine_code import count, disassemble

from halfbyte.quantize import columns
from halfbyte.quantize.columns import Steps, move_columns, round_columns

pytest.importorskip("triton")

NAME = "halfbyte.quantize.column_kernel"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, re-imported while Triton interprets."""
    interpret(monkeypatch, NAME)


def problem(
    width: int, rows: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, Steps, list[int]]:
    torch.manual_seed(width + rows)
    wanted = torch.randn(width, rows)
    root = torch.randn(width, 2 * width)
    hessian = root @ root.t() / (2 * width)
    scales = (torch.rand(3, rows) + 0.5) / 2 ** (bits - 1)
    scales[1] *= -1  # symmetric scales may be negative
    zeros = torch.randint(1, 2**bits, (3, rows)).float()
    steps = Steps(scales=scales, lowest=-zeros, highest=2**bits - 1 - zeros)
    return wanted, hessian, steps, [(7 * k // 5) % 3 for k in range(width)]


@pytest.mark.parametrize(("width", "rows", "bits"), [(64, 9, 4), (33, 7, 3), (1, 8, 2)])
def test_kernel_rounds_like_the_loop(width: int, rows: int, bits: int, interpreted: None) -> None:
    wanted, hessian, steps, groups = problem(width, rows, bits)
    feedback = (hessian / hessian.diagonal()).tril(-1)
    target = wanted.clone()
    expected, errors = round_columns(target, wanted, feedback, steps, groups)
    values, codes, off = wanted.clone(), torch.empty_like(wanted), torch.empty_like(wanted)
    columns._run_kernel(values, wanted, codes, off, feedback, wanted, steps, groups, polish=False)
    # Sums have another order, so codes may differ at ties.
    same = (codes == expected).all(0)
    assert float(same.float().mean()) > 0.7
    torch.testing.assert_close(off[:, same], errors[:, same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[:, same], target[:, same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "rows", "bits"), [(64, 9, 4), (33, 7, 2)])
def test_kernel_moves_like_the_loop(width: int, rows: int, bits: int, interpreted: None) -> None:
    wanted, hessian, steps, groups = problem(width, rows, bits)
    index = torch.tensor(groups)
    codes = torch.round(wanted / steps.scales[index])
    codes = torch.clamp(codes, steps.lowest[index], steps.highest[index])
    gradient = hessian @ (wanted - codes * steps.scales[index])
    start = codes.clone()
    diagonal = hessian.diagonal().contiguous()
    moved = move_columns(gradient, codes, diagonal, hessian, steps, groups)
    assert not torch.equal(codes, start)
    found, off = start.clone(), torch.zeros_like(moved)
    columns._run_kernel(
        gradient.clone(), gradient, found, off, -hessian, diagonal, steps, groups, polish=True
    )
    same = (found == codes).all(0)
    assert float(same.float().mean()) > 0.7
    torch.testing.assert_close(off[:, same], moved[:, same], rtol=1e-4, atol=1e-5)


def test_kernel_is_checked_before_use(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    columns.find_kernel_obstacle.cache_clear()
    assert columns.find_kernel_obstacle(torch.device("cpu")) is None
    real = columns._run_kernel

    def broken(values, plain, codes, *rest, **keywords):
        real(values, plain, codes, *rest, **keywords)
        codes += 1

    columns.find_kernel_obstacle.cache_clear()
    monkeypatch.setattr(columns, "_run_kernel", broken)
    assert "differ from the loop" in columns.find_kernel_obstacle(torch.device("cpu"))
    columns.find_kernel_obstacle.cache_clear()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("polish", [False, True])
def test_block_stays_in_registers_when_compiled_for_gpus(
    architecture: str, polish: bool, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halfbyte.quantize.column_kernel import column_kernel

    names = [parameter.name for parameter in column_kernel.params]
    kinds = dict.fromkeys(names[:9], "*fp32") | {"groups": "*i32", "num_columns": "i32"}
    kinds |= {"num_rows": "i32", "POLISH": "constexpr", "COLUMNS": "constexpr", "ROWS": "constexpr"}
    constants = {
        "POLISH": polish,
        "COLUMNS": columns.MAX_BLOCK_COLUMNS,
        "ROWS": columns.PROGRAM_ROWS,
    }
    source = ASTSource(fn=column_kernel, signature=kinds, constexprs=constants)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1})
    found = disassemble(compiled.asm["cubin"], tmp_path)
    assert count(found, "LDL", "STL") == 0, "registers are spilled"
    assert count(found, "FFMA", "FADD", "FMUL") > 0
