"""Tests, laid out as `src/swap_prune`; a package, so that they share `cases` and `reference`.

One thread a process: pytest-xdist runs as many processes as there are cores, and with as many threads in each
of them the small problems of these tests take several times as long.
"""

import torch

torch.set_num_threads(1)
