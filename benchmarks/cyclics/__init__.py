"""The parts of benchmarks/cyclic_memory.py."""
