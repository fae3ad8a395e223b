"""Text that ships with halfbyte: one to calibrate on, another to measure on. They share nothing.

Both come from WikiText-2 (see ``NOTICE`` beside this file for authors and licence). Calibration
uses the validation split and evaluation the test split, so the two never overlap; but both are
Wikipedia articles, so a model calibrated here looks a little better on the evaluation text than it
would on text of another kind. Say so beside such numbers.
"""

from __future__ import annotations

from importlib import resources

CALIBRATION_FILE = "wikitext2_valid.txt"
EVALUATION_FILE = "wikitext2_test_head.txt"


def calibration_text() -> str:
    """Give the built-in calibration text: about 60,000 words of WikiText-2's validation split."""
    return _read(CALIBRATION_FILE)


def evaluation_text() -> str:
    """Give the built-in evaluation text: the first eight articles of WikiText-2's test split."""
    return _read(EVALUATION_FILE)


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
