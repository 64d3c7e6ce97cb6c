"""``braid eval``: strategies against each other on one set of problems, at a running server."""
