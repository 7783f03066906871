"""Instruments that look at a training run without changing it."""
