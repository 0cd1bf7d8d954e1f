"""`python -m fintune`."""

from fintune.cli import main

main()
