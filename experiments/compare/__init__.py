"""The comparison: every scheme on the same clients, data, seeds and latency draws, in virtual time."""
