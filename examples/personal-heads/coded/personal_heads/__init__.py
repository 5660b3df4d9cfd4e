"""A shared body, and a head of its own for each client."""
