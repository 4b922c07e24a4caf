#!/bin/sh
# Run one of OpenSSH's regression scripts inside a sandbox: run.sh NAME SERVER SECONDS DATA.
# SERVER: an sshd, or what stands in for one. DATA: a file that the script copies; the agent is a file of a good size for that.
top=$(cd "$(dirname "$0")/.." && pwd)
src=$top/src obj=$top/obj bin=$top/bin
unset SSH_CONNECTION SSH_CLIENT SSH_AUTH_SOCK
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

# What the script before has left: everything but the keys, which take long to make.
mkdir -p "$obj" /run/sshd
(
    cd "$obj" || exit 1
    ssh -Q key-plain | sed 'p; s/$/.pub/' >"$top/keys"
    for name in * .[!.]*; do
        grep -Fqx -e "$name" "$top/keys" || rm -rf -- "$name"
    done
)
cp "$src/netcat" "$src/modpipe" "$src/mkdtemp" "$obj"

TEST_SSH_SSHAGENT=$4 TEST_SHELL=sh TEST_SSH_SSHD=$2 TEST_SSH_SSH=$bin/ssh TEST_SSH_SFTPSERVER=$bin/sftp-server BUILDDIR=$src LOGNAME=$(id -un)
export TEST_SSH_SSHAGENT TEST_SHELL TEST_SSH_SSHD TEST_SSH_SSH TEST_SSH_SFTPSERVER BUILDDIR LOGNAME
cd "$obj" || exit 1
timeout -k 5 "$3" sh "$src/test-exec.sh" "$obj" "$src/$1.sh" </dev/zero >"$top/output" 2>&1
status=$?

# Whatever it has started and not ended.
for folder in /proc/[0-9]*; do
    [ "${folder#/proc/}" = $$ ] || ! tr '\0' ' ' <"$folder/cmdline" 2>/dev/null | grep -q "$obj" || kill -9 "${folder#/proc/}" 2>/dev/null
done
exit $status
