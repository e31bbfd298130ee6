"""`python -m subquad` is the command line."""

from subquad.cli import main

main()
