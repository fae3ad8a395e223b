"""The description of a mutation, and invalid content that mutations write."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.bases import Base, Files


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Description of a mutation applied to a checkpoint."""

    kind: str
    what: str
    may_fool: bool = False
    """Whether the weights may change without an error, unless digests are verified.

    True for changes of codes, scales or asymmetric zeros, which give another valid file.
    """


Mutator = Callable[[random.Random, Base, Files], "Damage | None"]

JSON_GARBAGE = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"NaN",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 10_000,
    b"{}",
    b'{"bits": 1e999}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!DOCTYPE html><html>404</html>",
)
