"""Comparisons and benchmarks; may import everything, and nothing imports it."""
