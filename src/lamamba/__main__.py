"""Run the command line: `python -m lamamba`, and so `torchrun -m lamamba`."""

from lamamba.cli import main

if __name__ == "__main__":  # processes that this one starts import it too
    main()
