from __future__ import annotations

import inspect
import re

import pytest

from halfbyte import errors
from halfbyte.errors import HalfbyteError, MissingExtraError, require_extra

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, HalfbyteError) and cls is not HalfbyteError
]


def test_drawing_in_the_docstring_names_every_error():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(cls.__name__ for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_one_step_below_the_base(cls):
    """Whoever catches HalfbyteError catches all of them, and nothing is nested deeper."""
    assert HalfbyteError in cls.__bases__
    assert str(cls("a message")) == "a message"


def test_errors_that_are_also_standard_ones():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_missing_extra_says_how_to_install_it():
    with pytest.raises(MissingExtraError) as caught:  # noqa: SIM117 - the inner one raises it
        with require_extra("gguf", "convert", "Writing model.gguf"):
            raise ImportError("No module named 'gguf'")
    assert str(caught.value) == (
        "Writing model.gguf needs the Python package 'gguf', which is not installed. "
        'Install it with: pip install "halfbyte[convert]"'
    )


def test_what_is_missing_within_is_named_as_it_was_there():
    with (
        pytest.raises(MissingExtraError, match="'httptools'"),
        require_extra("starlette", "serve", "halfbyte serve"),
        require_extra("httptools", "serve", "Reading a connection"),
    ):
        raise ImportError


def test_first_line_of_somebody_elses_error():
    assert errors.first_line(ValueError(" a.\nb")) == "a"
    assert errors.first_line(ValueError("a!\nb")) == "a!"
    assert errors.first_line(ValueError()) == "ValueError"
