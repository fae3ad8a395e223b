import pytest
import torch
from tests.helpers.checkpoints import Recipe, edit_tensors, tiny_llama_config, write_checkpoint

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.divergence import divergence
from halfbyte.evaluate.perplexity import perplexity

IDS = torch.randint(0, 128, (96,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_folder_gives_the_perplexity_of_its_dense_model(tmp_path, bits):
    dense = write_checkpoint(tmp_path, tiny_llama_config(), Recipe(bits=bits))
    result = divergence(dense, tmp_path, IDS, window=32)
    assert result.kl_nats == pytest.approx(0, abs=1e-5)
    assert result.top1_agreement == 1.0
    assert result.quantized.dtype == "float32"
    alone = perplexity(tmp_path, IDS, window=32)
    assert alone.perplexity == pytest.approx(result.base.perplexity, rel=1e-4)


def test_missing_tensor_is_named(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    lost = "model.layers.0.mlp.down_proj.scales"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(HalfbyteError, match=r"layers\.0\.mlp\.down_proj\.scales"):
        perplexity(tmp_path, IDS, window=32)
