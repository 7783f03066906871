"""What `acco.py` consists of: throughput on processes, on a clock, and loss curves."""
