"""What the rules that gossip on a graph have in common."""
