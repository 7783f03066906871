"""The parts of benchmarks/population_accuracy.py and benchmarks/population_figures.py."""
