#!/usr/bin/env python3
"""The entry point: `python3 torchchat.py COMMAND`, the same as the console script `torchchat`."""

import sys

from cli.main import main

if __name__ == "__main__":
    sys.exit(main())
