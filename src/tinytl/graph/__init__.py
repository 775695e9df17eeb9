"""Networks as graphs: a forward of the user's own, traced module by module, and run with lean operations."""
