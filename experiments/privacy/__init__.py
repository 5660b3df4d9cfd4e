"""Accuracy against epsilon: private training under stragglers, coded and not, in virtual time on real data."""
