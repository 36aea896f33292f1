"""A real federation on this machine: server, gateway and site daemons as processes, over TLS."""
