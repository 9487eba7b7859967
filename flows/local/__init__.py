"""``make up`` and ``make down``: servers, stores and a worker on this machine."""
