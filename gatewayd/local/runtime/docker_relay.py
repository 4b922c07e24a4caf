"""The program that relays a Unix socket out of a container; python3 runs it there, by exec, as the socket's user.

Its argument is the token. It makes a socket below /tmp, says "open PATH" or "refused ERRNO", and then relays connections, by
numbers, until the end of its stdin. Records out (`docker_wire`): "new N", "data N BASE64", "eof N" (it sends no more), "close N"
(it is gone), "ack N". Lines in: "data N BASE64", "close N" (after what was sent before), "ack N". Each way one piece of data of a
connection is under way at most: the next one follows its "ack". Needs no module that Debian's python3-minimal lacks.
"""

LISTEN = r"""
import binascii, os, select, socket, sys
token = sys.argv[1].encode()
def say(text):
    data = b"\x1e\xff" + token + b" " + text + b"\x1e"
    while data:
        data = data[os.write(1, data):]
folder = "/tmp/gatewayd-" + os.urandom(8).hex()
try:
    os.mkdir(folder, 0o700)
    os.chdir(folder)
    found = os.stat(".")
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(1, "not ours")
    os.umask(0o177)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind("socket")
    server.listen(64)
    server.setblocking(False)
except OSError as exc:
    say(b"refused %d" % (exc.errno or 5))
    raise SystemExit
class Connection:
    unsent, ended, closing, held = b"", False, False, False
poll, connections, serial, lines = select.poll(), {}, 0, b""
poll.register(0, select.POLLIN)
poll.register(server, select.POLLIN)
def watch(one):
    wanted = (select.POLLOUT if one.unsent else 0) | (0 if one.held or one.ended else select.POLLIN)
    if wanted or not one.held:  # without any, only the other side's close is told
        poll.register(one.sock, wanted)
    else:
        try:
            poll.unregister(one.sock)
        except KeyError:
            pass
def drop(one):
    try:
        poll.unregister(one.sock)
    except KeyError:
        pass
    del connections[one.number]
    one.sock.close()
    say(b"close %d" % one.number)
def flush(one):
    try:
        one.unsent = one.unsent[one.sock.send(one.unsent):]
    except BlockingIOError:
        pass
    except OSError:
        one.unsent, one.closing = b"", True
    if one.closing and not one.unsent:
        drop(one)
        return
    if not one.unsent:
        say(b"ack %d" % one.number)
    watch(one)
def receive(one):
    try:
        data = one.sock.recv(8192)
    except BlockingIOError:
        return
    except OSError:
        drop(one)
        return
    if data:
        one.held = True
        say(b"data %d " % one.number + binascii.b2a_base64(data).strip())
    else:
        one.ended = True
        say(b"eof %d" % one.number)
    watch(one)
def obey(line):
    word, number, rest = (line + b"  ").split(b" ", 2)
    one = connections.get(int(number))
    if one is None:
        return
    if word == b"data":
        one.unsent += binascii.a2b_base64(rest)
        flush(one)
    elif word == b"ack":
        one.held = False
        watch(one)
    elif word == b"close":
        one.closing = one.held = True
        if one.unsent:
            watch(one)
        else:
            drop(one)
say(b"open " + os.fsencode(folder) + b"/socket")
running = True
while running:
    for fd, event in poll.poll():
        if fd == 0:
            data = os.read(0, 65536)
            running = bool(data)
            *whole, lines = (lines + data).split(b"\n")
            for line in whole:
                obey(line)
        elif fd == server.fileno():
            try:
                sock = server.accept()[0]
            except OSError:
                continue
            one = Connection()
            serial += 1
            one.sock, one.number = sock, serial
            sock.setblocking(False)
            connections[serial] = one
            say(b"new %d" % serial)
            watch(one)
        else:
            one = next((each for each in connections.values() if each.sock.fileno() == fd), None)
            if one is None:
                continue
            if one.unsent and event & (select.POLLOUT | select.POLLHUP | select.POLLERR):
                flush(one)
            elif not one.held and not one.ended:
                receive(one)
            elif one.ended:
                drop(one)
for one in list(connections.values()):
    one.sock.close()
try:
    os.unlink("socket")
    os.rmdir(folder)
except OSError:
    pass
"""
