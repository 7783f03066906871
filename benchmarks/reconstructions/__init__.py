"""Parts of benchmarks/reconstruction.py: rounding, training, what is drawn."""
