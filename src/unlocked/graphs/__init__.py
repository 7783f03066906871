"""Graphs of workers: topologies, spectra, optimal rates, gossip processes, DADAO (Oyallon Chapter 5)."""

from .constants import Constants, communications, constants
from .degrees import by_degree, by_largest_degree, metropolis
from .graph import Graph
from .random_graphs import erdos_renyi, random_geometric, random_tree
from .reading import from_edges, from_networkx, read_edges, to_networkx
from .spectra import (
    algebraic_connectivity,
    chi1,
    chi2,
    edge_resistances,
    eigenvalues,
    largest_eigenvalue,
    resistances,
    spectral_gap,
)
from .topologies import (
    TOPOLOGIES,
    barbell,
    complete,
    exponential,
    grid,
    hypercube,
    line,
    named,
    ring,
    star,
    torus,
)
from .varying import Varying, one_peer_exponential
from .walks import commute_times, hitting_times, simulated_commute_time

__all__ = [
    "TOPOLOGIES",
    "Constants",
    "Graph",
    "Varying",
    "algebraic_connectivity",
    "barbell",
    "by_degree",
    "by_largest_degree",
    "chi1",
    "chi2",
    "communications",
    "commute_times",
    "complete",
    "constants",
    "edge_resistances",
    "eigenvalues",
    "erdos_renyi",
    "exponential",
    "from_edges",
    "from_networkx",
    "grid",
    "hitting_times",
    "hypercube",
    "largest_eigenvalue",
    "line",
    "metropolis",
    "named",
    "one_peer_exponential",
    "random_geometric",
    "random_tree",
    "read_edges",
    "resistances",
    "ring",
    "simulated_commute_time",
    "spectral_gap",
    "star",
    "to_networkx",
    "torus",
]
