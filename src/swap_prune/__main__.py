"""``python -m swap_prune``."""

from swap_prune.cli import main

main()
