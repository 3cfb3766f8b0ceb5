"""Benchmarks: `pytest bench/`. README.md tells how they are measured and how to read them."""
