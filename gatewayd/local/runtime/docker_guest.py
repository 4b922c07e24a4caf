"""The shell scripts that Docker runs inside a sandbox for us.

They need a POSIX shell and the GNU coreutils with setsid, as in the default snapshot. Each says what it has to say in records
(`docker_wire`); paths go in octal-escaped for ``printf %b`` and come out as hexadecimal digits, so that any byte may be in them.
Whatever these scripts say is said by the sandbox, and checked outside.
"""

from __future__ import annotations

import os

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SCRIPT = ("/bin/sh", "-c")
SPAWN = ("/bin/sh", "/run/gatewayd/spawn")  # with GATEWAYD_SPAWN in its environment

# say TEXT: one record on stdout; fail TEXT: the last one. account: sets the variables of user $__who, as in /etc/passwd.
_COMMON = r"""
say() { printf '\036\377%s %.16000s\036' "$__token" "$1"; }
fail() { say "error $1"; exit 0; }
why() { LC_ALL=C ls -dL -- "$1" 2>&1 >/dev/null; }
account() {
    __name=$__who __home=/ __shell=/bin/sh
    [ -r /etc/passwd ] || return 0
    while IFS=: read -r __n __x __u __g __c __h __s; do
        if [ "$__n" = "$__who" ]; then __name=$__n __home=${__h:-/} __shell=${__s:-/bin/sh}; return 0; fi
        if [ "$__u" = "$__who" ] && [ "$__home" = / ]; then __name=$__n __home=${__h:-/} __shell=${__s:-/bin/sh}; fi
    done < /etc/passwd
}
"""

# A file, and its arguments in GATEWAYD_SPAWN, so that what a process is called shows once in the list of processes and `pkill -f`
# finds nothing else: token, user without group, names of the variables to set, cwd, size of the terminal as "COLS ROWS" or "",
# argv…
# Without a terminal the program's output passes through two `cat`. They keep Docker's exec alive while a background process
# holds a pipe (Docker would break it 2 s after the program's exit), and the exit record follows the program's last byte.
_SPAWN = (
    _COMMON
    + r"""
eval "set -- $GATEWAYD_SPAWN"
unset GATEWAYD_SPAWN
__token=$1 __who=$2 __defaults=$3 __cwd=$4 __size=$5
shift 5
umask 022
__path=$PATH
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
account
for __n in $__defaults; do
    case $__n in
        HOME) HOME=$__home; export HOME ;;
        USER) USER=$__name; export USER ;;
        LOGNAME) LOGNAME=$__name; export LOGNAME ;;
        SHELL) SHELL=$__shell; export SHELL ;;
    esac
done
if [ -n "$__cwd" ]; then
    case $__cwd in /*) ;; *) __cwd=$__home/$__cwd ;; esac
    if ! cd -P -- "$__cwd" 2>/dev/null; then
        __x=$(why "$__cwd")
        [ -n "$__x" ] || if [ -d "$__cwd" ]; then __x='cwd: Permission denied'; else __x='cwd: Not a directory'; fi
        fail "$__x"
    fi
else
    cd -P -- "$__home" 2>/dev/null || cd /
fi
export PWD
unset OLDPWD
__found= __x='program: No such file or directory'
try() {
    if [ -f "$1" ] && [ -x "$1" ]; then __found=$1; return 0; fi
    if [ -e "$1" ]; then __x='program: Permission denied'; fi
    return 1
}
case $1 in
    */*) try "$1" || { __y=$(why "$1"); __x=${__y:-$__x}; } ;;
    '') ;;
    *)
        set -f
        IFS=:
        for __d in $__path; do try "$__d/$1" && break; done
        unset IFS
        set +f
        ;;
esac
[ -n "$__found" ] || fail "$__x"
case $1 in -*) shift; set -- "$__found" "$@" ;; esac

if [ -n "$__size" ]; then
    stty cols "${__size% *}" rows "${__size#* }" 2>/dev/null
    say "pid $$"
    PATH=$__path
    exec "$@"
fi

__inner='printf "\036\377%s pid %d\036" "$1" $$; PATH=$2; shift 2; exec "$@"'
hold() { trap : HUP INT QUIT TERM ALRM USR1 USR2; }
pass() { trap '' HUP INT QUIT TERM ALRM USR1 USR2; exec 5<&-; exec cat; }
main() {
    hold
    (exec setsid /bin/sh -c "$__inner" sh "$__token" "$__path" "$@" <&5 2>&8 5<&- 6>&- 7>&- 8>&-)
    __code=$?
    say "exit $__code"
    say "exit $__code" >&8
}
hold
exec 5<&0 6>&1 7>&2 </dev/null 2>/dev/null
{ hold; { main "$@" | pass >&6 6>&- 7>&- 8>&-; } 8>&1 >/dev/null; } | pass >&7 6>&- 7>&-
"""
)

# Pid 1 reads this from its stdin. It writes the script for processes, gives every account its home, says "ready", and lives as
# long as its first child. SIGTERM is a request to end: it passes it on to everybody and goes when all are gone. As a shell that
# waits it also reaps orphans.
_INIT = r"""
main() {
    trap 'ending=1' TERM
    mkdir -p /run/gatewayd
    while IFS=: read -r name x uid gid gecos home shell; do
        case $uid in ''|*[!0-9]*) continue ;; esac
        if [ "$uid" -ge 1000 ] && [ "$uid" -lt 65534 ] && [ ! -e "$home" ]; then
            mkdir -p "$home" && chown "$uid:$gid" "$home" && chmod 755 "$home"
        fi
    done 2>/dev/null < /etc/passwd
    cat > /run/gatewayd/spawn <<'END OF SCRIPT'
SPAWN
END OF SCRIPT
    exec 3>&1 >/dev/null 2>&1 </dev/null
    printf 'ready\n' >&3
    exec 3>&-
    sleep 2147483647 &
    wait $!
    [ -n "$ending" ] || exit 0
    trap '' TERM
    kill -s TERM -- -1
    kill -s CONT -- -1
    while kill -s 0 -- -1; do sleep 0.02; done
    exit 0
}
main
"""

INIT = _INIT.replace("SPAWN\n", _SPAWN.strip() + "\n", 1)

# Arguments: token, user, path. Then the file's bytes on stdout, after a record of what it is.
READ = (
    _COMMON
    + r"""
__token=$1 __who=$2
account
p=$(printf '%b.' "$3"); p=${p%.}
case $p in /*) ;; *) p=$__home/$p ;; esac
x=$(LC_ALL=C stat -L -- "$p" 2>&1 >/dev/null) || fail "$x"
[ ! -d "$p" ] || fail 'path: Is a directory'
[ -f "$p" ] || fail 'path: Invalid argument'
[ -r "$p" ] || fail 'path: Permission denied'
exec < "$p"
x=$(LC_ALL=C stat -L -c '%s %f %u %g %i %d %.9Y' /proc/self/fd/0 2>&1) || fail "$x"
[ -f /proc/self/fd/0 ] || fail 'path: Invalid argument'
say "file $x"
exec cat
"""
)

# Arguments: token, user, path. Makes the temporary neighbour; records: mode, temporary path, final path, these in hexadecimal.
WRITE = (
    _COMMON
    + r"""
__token=$1 __who=$2
umask 022
account
p=$(printf '%b.' "$3"); p=${p%.}
case $p in /*) ;; *) p=$__home/$p ;; esac
x=$(LC_ALL=C realpath -m -- "$p" 2>&1 >/dev/null) || fail "$x"
p=$(realpath -m -- "$p"; printf .); p=${p%??}
d=${p%/*}; d=${d:-/}
x=$(LC_ALL=C mkdir -p -- "$d" 2>&1) || fail "$x"
[ ! -d "$p" ] || fail 'path: Is a directory'
mode=644 owner=
if [ -e "$p" ]; then
    [ -f "$p" ] || fail 'path: Invalid argument'
    x=$(LC_ALL=C stat -c '%a %u:%g' -- "$p" 2>&1) || fail "$x"
    mode=${x% *} owner=${x#* }
fi
t=$(LC_ALL=C mktemp -- "$d/.gatewayd-XXXXXXXXXXXX" 2>&1; printf .); t=${t%??}
case $t in "$d"/.gatewayd-*) ;; *) fail "$t" ;; esac
if [ -n "$owner" ]; then
    x=$(LC_ALL=C chown -- "$owner" "$t" 2>&1) || { rm -f -- "$t"; fail "$x"; }
fi
say "mode $mode"
digits() { printf %s "$1" | od -An -v -tx1 | tr -d ' \n'; }
say "temporary $(digits "$t")"
say "final $(digits "$p")"
"""
)

# Arguments: token, user, temporary path, final path, size, mode. The content is stdin.
COMMIT = (
    _COMMON
    + r"""
__token=$1 __who=$2
t=$(printf '%b.' "$3"); t=${t%.}
p=$(printf '%b.' "$4"); p=${p%.}
undo() { rm -f -- "$t"; fail "$1"; }
x=$( { LC_ALL=C cat > "$t"; } 2>&1) || undo "$x"
[ "$(stat -c %s -- "$t")" = "$5" ] || undo 'path: Input/output error'
x=$(LC_ALL=C chmod -- "$6" "$t" 2>&1) || undo "$x"
x=$(LC_ALL=C mv -fT -- "$t" "$p" 2>&1) || undo "$x"
say done
"""
)

# Arguments: token, user, temporary path.
ABORT = r"""t=$(printf '%b.' "$3"); rm -f -- "${t%.}" """

# Arguments: token, user, signal number, process group.
SIGNAL = r"""kill -s "$3" -- "-$4" """

# For python3 inside: arguments are token and port. Says "open PID" or "refused ERRNO", then is the connection; "eof" when the
# server has no more to send.
RELAY = r"""
import os, socket, sys, threading
token, port = sys.argv[1].encode(), int(sys.argv[2])
def write(data):
    while data:
        data = data[os.write(1, data):]
def say(text):
    write(b"\x1e\xff" + token + b" " + text + b"\x1e")
sock, number = None, 111
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect((address, port))
        break
    except OSError as exc:
        number, sock = exc.errno or 110, None
if sock is None:
    say(b"refused %d" % number)
    raise SystemExit
sock.settimeout(None)
say(b"open %d" % os.getpid())
def upstream():
    try:
        while data := os.read(0, 65536):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
thread = threading.Thread(target=upstream, daemon=True)
thread.start()
try:
    while data := sock.recv(65536):
        write(data)
except OSError:
    os._exit(1)
say(b"eof")
thread.join()
"""


def escape(path: str | bytes) -> str:
    """A path as an argument that ``printf %b`` turns back into the same bytes. Raises ValueError for a NUL."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ValueError("a NUL byte in a path")
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-"
    return "".join(chr(byte) if byte in plain else f"\\0{byte:03o}" for byte in raw)


def unescape(digits: str) -> bytes:
    """A path that a script told in hexadecimal. Raises ValueError for what is none."""
    raw = bytes.fromhex(digits)
    if not raw.startswith(b"/") or b"\0" in raw:
        raise ValueError("no absolute path")
    return raw


def account_name(user: str | None) -> str:
    """The user of ``user``, ``user:group`` or None."""
    return (user or "root").partition(":")[0]
