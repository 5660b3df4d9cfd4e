"""The median of the clients, with one client whose labels are wrong."""
