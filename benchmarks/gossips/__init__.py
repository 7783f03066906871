"""The parts of benchmarks/gossip_rates.py."""
