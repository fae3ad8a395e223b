"""Built-in text, for calibration and for evaluation.

There are five kinds: prose (WikiText-2; ``NOTICE`` in this folder names its authors and license),
source code, dialogue, thirteen other languages and technical prose (written for halfbyte).
Calibration and evaluation text share no document; for prose they are the validation and the test
split. But they are of the same kinds, so a model that is calibrated on this text scores a little
better on the evaluation text than on other kinds. Mention this when you publish such figures.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

PROSE = "prose"
CALIBRATION_FILES = {
    PROSE: "wikitext2_valid.txt",
    "code": "calibration_code.txt",
    "dialogue": "calibration_dialogue.txt",
    "languages": "calibration_languages.txt",
    "technical": "calibration_technical.txt",
}
EVALUATION_FILES = {
    PROSE: "wikitext2_test_head.txt",
    "code": "evaluation_code.txt",
    "dialogue": "evaluation_dialogue.txt",
    "languages": "evaluation_languages.txt",
    "technical": "evaluation_technical.txt",
}
SEPARATOR = "\n\n%%\n\n"
"""Separates the documents of a file; the prose is one document."""


def calibration_documents(kind: str) -> list[str]:
    """Return the calibration documents of one kind.

    Args:
        kind: A key of ``CALIBRATION_FILES``.

    Returns:
        The documents.
    """
    return _read(CALIBRATION_FILES[kind]).split(SEPARATOR)


def evaluation_documents(kind: str) -> list[str]:
    """Return the evaluation documents of one kind.

    Args:
        kind: A key of ``EVALUATION_FILES``.

    Returns:
        The documents.
    """
    return _read(EVALUATION_FILES[kind]).split(SEPARATOR)


def calibration_text() -> str:
    """Return the prose for calibration: about 60,000 words of WikiText-2's validation split."""
    return _read(CALIBRATION_FILES[PROSE])


def evaluation_text() -> str:
    """Return the prose for evaluation: the first eight articles of WikiText-2's test split."""
    return _read(EVALUATION_FILES[PROSE])


def builtin_facts() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return the facts that the built-in tasks ask for.

    Returns:
        For each table: its kind, its question with ``{}`` for the subject, and (subject, answer)
        pairs.
    """
    tables = []
    for line in _read("builtin_facts.txt").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        kind, question, pairs = (part.strip() for part in line.split("|"))
        split = [pair.split(" = ") for pair in pairs.split("; ")]
        tables.append((kind, question, [(subject, answer) for subject, answer in split]))
    return tables


def edge_cases() -> list[dict[str, Any]]:
    """Return the edge-case prompts, as objects with ``kind`` and ``prompt``."""
    # Not splitlines, which also splits at characters that are part of the prompts.
    return [json.loads(line) for line in _read("edge_cases.jsonl").split("\n") if line]


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
