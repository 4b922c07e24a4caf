"""The SSH front end: an SSH server of the gateway's own, whose sessions run inside sandboxes."""
