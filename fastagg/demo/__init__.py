"""The federated loop on an embedded default: ten clients of unequal ranks, two rounds by each method.

No network, no GPU, no data but what CPython ships. ``fastagg demo`` calls
:func:`fastagg.demo.run.run_demo`.
"""

import os

# OpenMP reads it when torch is loaded, so it does nothing where torch already is. Threads that spin
# while they wait make small steps 4 times slower as soon as another program wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
