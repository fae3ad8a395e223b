"""A real adapter, loaded into a running server by name, used, and unloaded."""

from __future__ import annotations

import openai
import pytest
import torch
from tests.cli.test_serve import running
from tests.serve.helpers_engine import load_float32, write_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

KEY = "secret-of-the-test"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and a folder with one adapter that fits it and one that does not."""
    model = write_model(tmp_path_factory.mktemp("models") / "tiny")
    adapters = tmp_path_factory.mktemp("adapters")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_float32(model), settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(adapters / "red")
    (adapters / "broken").mkdir()
    (adapters / "broken" / "adapter_config.json").write_text("{}")
    return model, adapters


def test_adapter_is_loaded_used_and_unloaded(places):
    model, adapters = places
    with running(model, "--adapters", adapters, HALFBYTE_API_KEYS=f"ann:{KEY}") as (_, address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)

        def write(name):
            answer = client.completions.create(
                model=name,
                prompt="abc",
                temperature=0,
                max_tokens=12,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        def change(what, name):
            return client.post(f"/{what}_lora_adapter", body={"lora_name": name}, cast_to=object)

        base = write("tiny")
        with pytest.raises(openai.NotFoundError):
            write("red")
        with pytest.raises(openai.BadRequestError, match="has no adapter_model") as caught:
            change("load", "broken")
        assert str(adapters) not in str(caught.value)
        change("load", "red")
        assert [entry.id for entry in client.models.list()] == ["tiny", "red"]
        assert write("red") != base
        assert write("tiny") == base
        with pytest.raises(openai.ConflictError):
            change("load", "red")
        change("unload", "red")
        with pytest.raises(openai.NotFoundError):
            write("red")
        assert write("tiny") == base
