"""``python -m tfb``."""

from tfb.cli.app import main

main()
