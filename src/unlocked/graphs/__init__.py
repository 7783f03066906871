"""Graphs of workers: topologies, spectra, optimal rates, gossip processes, DADAO (Oyallon Chapter 5)."""

from typing import TYPE_CHECKING

from ..lazy import on_first_use
from .constants import Constants, communications, constants

if TYPE_CHECKING:
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

_HOMES = {
    "Graph": "graph",
    "TOPOLOGIES": "topologies",
    "Varying": "varying",
    "algebraic_connectivity": "spectra",
    "barbell": "topologies",
    "by_degree": "degrees",
    "by_largest_degree": "degrees",
    "chi1": "spectra",
    "chi2": "spectra",
    "commute_times": "walks",
    "complete": "topologies",
    "edge_resistances": "spectra",
    "eigenvalues": "spectra",
    "erdos_renyi": "random_graphs",
    "exponential": "topologies",
    "from_edges": "reading",
    "from_networkx": "reading",
    "grid": "topologies",
    "hitting_times": "walks",
    "hypercube": "topologies",
    "largest_eigenvalue": "spectra",
    "line": "topologies",
    "metropolis": "degrees",
    "named": "topologies",
    "one_peer_exponential": "varying",
    "random_geometric": "random_graphs",
    "random_tree": "random_graphs",
    "read_edges": "reading",
    "resistances": "spectra",
    "ring": "topologies",
    "simulated_commute_time": "walks",
    "spectral_gap": "spectra",
    "star": "topologies",
    "to_networkx": "reading",
    "torus": "topologies",
}
__getattr__ = on_first_use(__name__, _HOMES)  # SciPy takes a third of a second
