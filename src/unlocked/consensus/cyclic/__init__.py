"""The forms of cyclic data parallelism: one rule, several executions (cdp.py says which is what)."""
