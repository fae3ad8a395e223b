"""Match regular expressions from other people's checkpoints within limits of time and memory."""

from __future__ import annotations

import re

import regex

MAX_MATCH_SECONDS = 1
"""Time limit for matching one pattern against one name: backtracking can take years."""
MAX_EXPANDED_CHARS = 200_000
"""Total length of the patterns with counted repeats (``a{3}``) written out (``aaa``).

`regex` compiles a repeat by copying its operand as often as its minimum count says, at about 300
bytes per character: ``((a{1000}){1000}){1000}`` would exhaust memory before any time limit.
"""

_REPEAT_COUNT = re.compile(r"\{([0-9\s]*)(#?)")
"""Minimum count of a repeat; in verbose mode, it may contain spaces and comments."""


class PatternError(ValueError):
    """A pattern cannot be used; the message continues a sentence that begins with the pattern."""


def match_pattern(pattern: str, name: str) -> bool:
    """Match a pattern from the start of a module's name.

    Args:
        pattern: A regular expression.
        name: The name of a module.

    Returns:
        Whether it matches.

    Raises:
        PatternError: It is not a regular expression, or takes too much time or memory.
    """
    check_expanded_chars(count_expanded_chars(pattern))
    try:
        # vLLM uses `regex` too; `re` has no timeout.
        return regex.match(pattern, name, timeout=MAX_MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise PatternError(f"takes more than {MAX_MATCH_SECONDS} s to match {name[:80]}") from error
    except MemoryError as error:
        raise PatternError(f"takes too much memory to match {name[:80]}") from error
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternError(f"is not a regular expression: {error}") from error


def check_expanded_chars(chars: int) -> None:
    """Check the length of patterns with their repeats written out.

    Args:
        chars: The sum of :func:`count_expanded_chars` over the patterns up to this one.

    Raises:
        PatternError: It is too long.
    """
    if chars > MAX_EXPANDED_CHARS:
        raise PatternError(
            "has too many counted repeats: written out, it and the patterns before it have at "
            f"least {chars} characters; {MAX_EXPANDED_CHARS} are allowed"
        )


def count_expanded_chars(pattern: str) -> int:
    """Bound the length of a pattern with its repeats written out; 0 if it has none.

    All minimum counts are multiplied, as if every repeat contained the others: what contains what
    depends on inline flags, and the patterns of real configs have few counts.

    Args:
        pattern: A regular expression.

    Returns:
        The bound in characters.
    """
    factor = 1
    for count, comment in _REPEAT_COUNT.findall(pattern):
        # The first ten digits are enough to exceed the limit. A comment may hide more of them.
        digits = "".join(count.split()).lstrip("0")[:10]
        factor *= MAX_EXPANDED_CHARS if comment else int(digits or 1)
        if factor > MAX_EXPANDED_CHARS:
            break
    return 0 if factor == 1 else factor * len(pattern)
