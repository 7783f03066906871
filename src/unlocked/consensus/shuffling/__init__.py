"""The parts of WASH: what is shuffled (layers.py), optimizer states beside it (states.py), how values move (moving.py)."""
