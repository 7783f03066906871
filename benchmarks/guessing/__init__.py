"""The parts of benchmarks/forward_gradients.py."""
