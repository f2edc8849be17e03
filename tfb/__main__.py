"""``python -m tfb``."""

from tfb.cli import main

main()
