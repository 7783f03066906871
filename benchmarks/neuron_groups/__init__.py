"""Parts of benchmarks/groups.py: Patel's tables by counting, and what two processes gain."""
