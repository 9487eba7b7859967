"""Start, watch and stop a server."""
