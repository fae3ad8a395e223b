"""`python -m halfbyte` does what the `halfbyte` command does."""

from __future__ import annotations

import sys

from halfbyte.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
