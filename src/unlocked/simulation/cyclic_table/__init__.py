"""Table 5.1 of Fournier's thesis (cyclic data parallelism) by measurement: each row is run on the simulated clock.

    rows.py        the ten rows: which program, which workers share a device, and what the table says
    measuring.py   a row and N → what its timeline shows
    held.py        what devices hold, from the recorded acts
    sent.py        what devices send, and how many messages wait for each other
    zero_dp.py     the one program that is nowhere else: ZeRO-DP with trees of messages

N = J equal stages, N micro-batches; a forward and a backward of a stage take one unit each, messages and updates no
time.
"""

from .measuring import Measured, measure
from .rows import ROWS, Expected, Row

__all__ = ["ROWS", "Expected", "Measured", "Row", "measure"]
