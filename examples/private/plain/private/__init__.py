"""Differentially private training of a linear model, with Opacus."""
