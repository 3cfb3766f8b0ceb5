"""Benchmarks: `pytest bench/`. README.md tells how they are measured and how to read them."""

OURS = "dinofast"
"""What the name of every contender of our own begins with: the others are its peers."""
