"""The reference server application."""
