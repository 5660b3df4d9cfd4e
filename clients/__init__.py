"""A plain Flower client application in PyTorch: data, partitions, models, training."""
