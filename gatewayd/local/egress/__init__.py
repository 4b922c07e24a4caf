"""What sandboxes reach of the network, and with what credentials: DNS, connections, TLS interception, the record of decisions."""
