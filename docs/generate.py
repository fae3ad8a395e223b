"""Generate the parts of docs/ that follow from the code: cli.md and environment.md.

python docs/generate.py            write them
python docs/generate.py --check    fail if they are out of date (part of make check)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.cli.main import VERBS, build_parser
from halfbyte.environment import VARIABLES

DOCS = Path(__file__).parent
NOTICE = "<!-- Generated from the code by docs/generate.py. Do not edit. -->\n"


def main() -> int:
    """Write or check the generated pages."""
    pages = {"cli.md": describe_cli(), "environment.md": describe_environment()}
    stale = [name for name, text in pages.items() if read(name) != text]
    if "--check" in sys.argv[1:]:
        for name in stale:
            sys.stderr.write(f"docs/{name} is out of date. Run: make docs\n")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")
    return 0


def read(name: str) -> str:
    """Return a page's current text; empty if it does not exist."""
    path = DOCS / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def describe_cli() -> str:
    """Generate cli.md from the parsers; their help output differs between Python versions."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = [
        f"# Commands\n\n{NOTICE}",
        "Every verb takes `--help`, which shows its options, and `--debug`, which shows the "
        "traceback of an error. Exit codes: 0 success, 1 failure, 2 invalid option or setting, 130 "
        "interrupted.\n",
        "\n".join(f"- [`halfbyte {name}`](#halfbyte-{name.replace(' ', '-')})" for name in VERBS)
        + "\n",
    ]
    parts += [describe_verb(name, verbs.choices[name]) for name in VERBS]
    return "\n".join(parts)


def describe_verb(name: str, parser: argparse.ArgumentParser) -> str:
    """Write one verb's section: what it does, its arguments, its options."""
    lines = [f"## halfbyte {name}\n", f"{parser.description}\n"]
    lines += describe_groups(parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                lines += [f"### halfbyte {name} {choice.dest}\n", f"{choice.help}\n"]
                lines += describe_groups(action.choices[choice.dest])
    return "\n".join(lines)


def describe_groups(parser: argparse.ArgumentParser) -> list[str]:
    """Write one table for each group of arguments."""
    lines = []
    for group in parser._action_groups:
        actions = [
            a
            for a in group._group_actions
            if a.dest not in ("help", "debug") and not isinstance(a, argparse._SubParsersAction)
        ]
        if actions:
            title = group.title or ""
            lines += [f"| {title} | meaning |", "|---|---|"]
            lines += [describe_action(parser, action) for action in actions]
            lines.append("")
    return lines


def describe_action(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Write one option's row."""
    formatter = parser._get_formatter()
    value = formatter._format_args(action, action.dest.upper())
    words = [f"{flag} {value}".strip() for flag in action.option_strings] or [value]
    meaning = formatter._expand_help(action) if action.help else ""
    names = ", ".join(f"`{word}`" for word in words)
    return f"| {names} | {meaning.replace('|', chr(92) + '|')} |"


def describe_environment() -> str:
    """Write environment.md from the one table of variables."""
    rows = [
        f"| `{v.name}` | {', '.join(f'`{a}`' for a in v.allowed) or 'see the meaning'} "
        f"| {'none' if v.default is None else f'`{v.default}`'} | {v.meaning} |"
        for v in VARIABLES
    ]
    return (
        f"# Environment variables\n\n{NOTICE}\n"
        "An invalid value is an error, never ignored. Options of the command line and arguments "
        "in Python come before them.\n\n"
        "| variable | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
