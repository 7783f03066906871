"""Parts of benchmarks/pipeline.py, one idea each."""
