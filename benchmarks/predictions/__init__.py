"""Parts of benchmarks/prediction.py, one idea each."""
