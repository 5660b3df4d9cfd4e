"""A small network on handwritten digits, in PyTorch."""
