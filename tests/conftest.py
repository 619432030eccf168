"""One thread for each test process: there are as many processes as cores, and threads that contend cost tenfold."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported after this, and for commands that tests start
