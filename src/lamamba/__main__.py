"""Run the command line: `python -m lamamba`, and so `torchrun -m lamamba`."""

from lamamba.cli import main

main()
