"""The parts of benchmarks/self_supervised.py."""
