"""``python -m tfb``."""

import sys
from pathlib import Path

# Python puts the current folder in front. A file there is not what transformers and PEFT look for.
if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from tfb.cli.app import main

main()
