"""A ProxyCommand: connect to the Unix socket named by the argument and pass the descriptor to ssh."""

import array
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection, socket.socket(fileno=1) as ssh:
    connection.connect(sys.argv[1])
    ssh.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])
