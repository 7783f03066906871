"""What acid.py consists of."""
