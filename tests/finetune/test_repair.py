from __future__ import annotations

import json

import peft
import pytest
import torch
from tests.helpers.checkpoints import build_model, tiny_llama_config
from tests.helpers.families import token_lists, write_decided_family
from tests.helpers.runs import quantize
from transformers import AutoModelForCausalLM

from halfbyte.errors import ConfigError, ModelError
from halfbyte.finetune import repair as repairing
from halfbyte.finetune.repair import approximate, measure_moments, repair
from halfbyte.quant_config import CalibrationConfig, QuantConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CALIBRATION = CalibrationConfig(samples=8, length=32)
TEXT = token_lists(8, 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and its 2-bit version."""
    folder = tmp_path_factory.mktemp("repair")
    build_model(tiny_llama_config(vocab_size=256)).save_pretrained(folder / "original")
    quantize(folder / "original", folder / "base", QuantConfig(bits=2, group_size=32))
    return folder / "base", folder / "original"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_moment(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -2, width, dtype=torch.float64)
    return x.t() @ x


def output_error(error, moment):
    return float(((error @ moment) * error).sum())


def test_full_rank_gives_the_whole_error_back():
    error = torch.randn(12, 16, dtype=torch.float64)
    b, a = approximate(error, random_moment(16), 12)
    torch.testing.assert_close(b @ a, error, rtol=1e-9, atol=1e-9)


def test_no_product_of_that_rank_leaves_less_output_error():
    """Eckart-Young in the metric of the inputs, against descent from many starts in float64."""
    torch.manual_seed(0)
    error, moment = torch.randn(10, 14, dtype=torch.float64), random_moment(14)
    b, a = approximate(error, moment, 3)
    best = output_error(error - b @ a, moment)
    plain = torch.linalg.svd(error, full_matrices=False)
    by_weight = (plain.U[:, :3] * plain.S[:3]) @ plain.Vh[:3]
    assert best < 0.9 * output_error(error - by_weight, moment)
    for _ in range(5):
        u = (b + 0.1 * torch.randn(b.shape, dtype=b.dtype)).contiguous().requires_grad_()
        v = (a + 0.1 * torch.randn(a.shape, dtype=a.dtype)).contiguous().requires_grad_()
        optimizer = torch.optim.LBFGS([u, v], max_iter=300, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, u=u, v=v):
            optimizer.zero_grad()
            left = error - u @ v
            loss = ((left @ moment) * left).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert output_error((error - u @ v).detach(), moment) >= best * (1 - 1e-9)


def test_rank_beyond_the_error_is_filled_with_zeros():
    error = torch.randn(4, 16, dtype=torch.float64)
    b, a = approximate(error, random_moment(16), 9)
    assert (b.shape, a.shape) == ((4, 9), (9, 16))
    assert not b[:, 4:].any()
    assert not a[4:].any()


@torch.no_grad()
def test_moments_are_those_of_each_linears_own_input(folders):
    model = load(folders[1])
    seen = {}
    names = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    ]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, x, name=name: seen.setdefault(name, []).append(
                x[0].reshape(-1, x[0].shape[-1])
            )
        )
    found = measure_moments(model, names, [torch.tensor(TEXT[:4]), torch.tensor(TEXT[4:])])
    assert list(found) == names
    for name in names:
        x = torch.cat(seen[name]).double()
        torch.testing.assert_close(found[name].double(), x.t() @ x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_repaired_model_is_nearer_to_the_original(folders, tmp_path, monkeypatch):
    base, original = folders
    report = repair(base, original, tmp_path / "a", rank=8, text=TEXT, calibration=CALIBRATION)
    assert len(report.kept_error) == 14
    assert all(0 < share < 1 for share in report.kept_error.values())
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    ids = torch.tensor(token_lists(4, 32, seed=7))
    exact = load(original)(ids).logits
    plain = load(base)
    before = (plain(ids).logits - exact).norm()
    repaired = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert (repaired(ids).logits - exact).norm() < 0.9 * before
    # In several passes over the text it is the same.
    monkeypatch.setattr(repairing, "MOMENT_BYTES", 4 * 64 * 64 * 3)
    again = repair(base, original, tmp_path / "b", rank=8, text=TEXT, calibration=CALIBRATION)
    assert again.kept_error == pytest.approx(report.kept_error, rel=1e-6)


@torch.no_grad()
def test_gpt2_whose_weights_are_transposed_is_repaired(tmp_path):
    write_decided_family(tmp_path / "original", "gpt2", n_layer=1)
    quantize(tmp_path / "original", tmp_path / "base", QuantConfig(bits=2, group_size=32))
    folders = (tmp_path / "base", tmp_path / "original")
    repair(*folders, tmp_path / "a", rank=16, text=TEXT, calibration=CALIBRATION)
    ids = torch.tensor(token_lists(4, 32, seed=7))
    plain, exact = (load(folder) for folder in folders)
    before = (plain(ids).logits - exact(ids).logits).norm()
    repaired = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert (repaired(ids).logits - exact(ids).logits).norm() < 0.9 * before


def test_unrelated_models_are_refused(folders, tmp_path):
    base, original = folders
    with pytest.raises(ModelError, match=r"no linear in it is quantized"):
        repair(original, original, tmp_path / "a", text=TEXT, calibration=CALIBRATION)
    with pytest.raises(ModelError, match=r"the second is quantized too"):
        repair(base, base, tmp_path / "a", text=TEXT, calibration=CALIBRATION)
    other = tiny_llama_config(vocab_size=256, intermediate_size=128)
    build_model(other).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match=r"mlp\.gate_proj is 64 -> 96 in the first, and in the second Linear"
    ):
        repair(base, tmp_path / "other", tmp_path / "a", text=TEXT, calibration=CALIBRATION)
    (tmp_path / "in-use").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        repair(base, original, tmp_path)
    for model in folders:
        with pytest.raises(ConfigError, match=r"/a is inside the model's own folder"):
            repair(base, original, model / "a")
    with pytest.raises(ConfigError, match=r"rank is 0; it must be a whole number, 1 or more"):
        repair(base, original, tmp_path / "a", rank=0)
