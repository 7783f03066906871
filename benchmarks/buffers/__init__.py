"""The parts of benchmarks/async_buffers.py."""
