"""Graphs of workers: topologies, spectra, optimal rates, gossip processes, DADAO (Oyallon Chapter 5)."""

from .graph import Graph
from .spectra import chi1, chi2

__all__ = ["Graph", "chi1", "chi2"]
