"""Logistic regression on handwritten digits, in scikit-learn."""
