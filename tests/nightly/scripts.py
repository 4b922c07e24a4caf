"""Which of OpenSSH's regression scripts are run, what is known to fail, and why the others say nothing about this server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.nightly.bench import Outcome

TIMED_OUT = "the script takes too long"
TIMEOUT_CODE = 124  # timeout(1)


@dataclass(frozen=True)
class Known:
    """Complaints that are expected."""

    pattern: str  # found in ``STEP: COMPLAINT``
    why: str
    defect: bool = False  # something to be put right; else a feature of sshd that this server does not have
    always: bool = True  # false: a race, which may go well


@dataclass(frozen=True)
class Case:
    """A script that is run."""

    name: str
    timeout: int = 120  # seconds
    known: tuple[Known, ...] = ()
    note: str = ""
    data: str = "/usr/bin/ssh-agent"  # the file it copies to and fro, and OpenSSH's choice
    beside_sshd: bool = True  # whether it can pass against sshd in the same place
    # option of sshd_config that it sets, without effect → what that means for its result; "": the known complaints say it
    ignored: dict[str, str] = field(default_factory=dict)

    def judge(self, outcome: Outcome) -> tuple[list[str], list[str]]:
        """Complaints that were not expected, and expected ones that did not come."""
        said = [f"{step}: {what}" for step, what in outcome.failures]
        if outcome.code and not said:
            said = [f"exit {outcome.code}"]
        said += [line for line in outcome.output.splitlines() if line.startswith("SKIPPED: ")]
        if outcome.code == TIMEOUT_CODE:
            said.append(TIMED_OUT)
        unexpected = [text for text in said if not any(re.search(known.pattern, text) for known in self.known)]
        certain = [known.pattern for known in self.known if known.always]
        missed = [pattern for pattern in certain if not any(re.search(pattern, text) for text in said)]
        unexpected += [f"sets {name} in sshd_config" for name in outcome.ignored if name not in self.ignored]
        missed += [f"sets {name} in sshd_config" for name in self.ignored if name not in outcome.ignored]
        return unexpected, missed

    @property
    def state(self) -> str:
        """A word for the table."""
        if any(known.defect for known in self.known):
            return "fails"
        return "passes in part" if self.known else "passes"

    @property
    def remark(self) -> str:
        """What the word leaves out."""
        parts = [self.note] if self.note else []
        parts += [f"{name}: {meaning}" for name, meaning in sorted(self.ignored.items()) if meaning]
        for word, defect in (("not passed", True), ("not for this server", False)):
            reasons = [known.why for known in self.known if known.defect is defect]
            parts += [f"{word}: {', '.join(reasons)}"] if reasons else []
        return "; ".join(parts)


SFTP_D = "`sftp -D` leads to the front end's sftp"
CLIENT = "judges the client more than the server"
ONLY_OFFERED = "with the algorithms that the front end has"
HOST_KEY = "wants host keys of its own making, or of several kinds: the front end has one, Ed25519"
CONFIGURATION = "is about sshd_config"

CASES = (
    Case("agent", ignored={"PubkeyAcceptedAlgorithms": "DSA keys are taken without it"}),
    Case("brokenkeys"),
    Case("cert-file"),
    Case(
        "cert-userkey",
        timeout=400,
        known=(
            Known("(authorized_principals|AuthorizedPrincipalsFile)", "no AuthorizedPrincipalsFile"),
            Known(" revoked (key|via KRL|CA key): ssh cert connect succeeded", "no RevokedKeys"),
            Known(": empty principals auth authorized_keys ", "a certificate without principals is for nobody, here always"),
        ),
        ignored={
            "AuthorizedPrincipalsFile": "",
            "PubkeyAcceptedAlgorithms": "",
            "RevokedKeys": "",
        },
    ),
    Case(
        "channel-timeout",
        known=(Known("(command|command wildcard|sftp) timeout: ", "no ChannelTimeout"),),
        ignored={"ChannelTimeout": ""},
    ),
    Case("connect"),
    Case("connect-uri"),
    Case("dynamic-forward"),
    Case(
        "envpass",
        known=(
            Known(", don't accept: environment found", "no AcceptEnv: every variable is passed"),
            Known(": server setenv wins: environment not found", "no SetEnv"),
        ),
        ignored={"SetEnv": ""},
    ),
    Case("exit-status"),
    Case("exit-status-signal"),
    Case(
        "forward-control",
        timeout=400,
        known=(
            Known(
                " AllowTcpForwarding=((local|remote|no)|yes, !Permit(Open|Listen)$)",
                "`permitopen=` and `no-port-forwarding` of keys are obeyed, sshd_config's are not",
            ),
        ),
        ignored={"AllowTcpForwarding": "", "PermitListen": "", "PermitOpen": ""},
    ),
    Case("forwarding", timeout=300),
    Case("host-expand", note=CLIENT),
    Case("integrity", timeout=300, note=ONLY_OFFERED, ignored={"Ciphers": "the client's choice", "MACs": "the client's choice"}),
    Case("kextype", note=ONLY_OFFERED, ignored={"KexAlgorithms": "the client's choice"}),
    Case(
        "key-options",
        known=(Known("key option from=.* not restricted", "`from=`: every client comes from 127.0.0.1 here"),),
        ignored={"PermitUserEnvironment": "`environment=` is obeyed without it"},
    ),
    Case("knownhosts", note=CLIENT),
    Case("localcommand", note=CLIENT),
    Case("multiplex", timeout=300),
    Case("percent", note=CLIENT),
    Case("portnum", note=CLIENT),
    Case("proto-version"),
    Case(
        "proxy-connect",
        known=(
            Known(": bad SSH_CONNECTION ", "SSH_CONNECTION names addresses where sshd on a pipe says UNKNOWN"),
            Known("username with style: ", "no styles in user names (`user:style`)"),
        ),
    ),
    Case(
        "rekey",
        timeout=600,
        note=ONLY_OFFERED,
        known=(
            Known("server rekeylimit .*: no rekeying occurred", "no RekeyLimit of the server's: clients ask for new keys"),
            Known("rekeylimit parsing: ", "no `sshd -T`"),
        ),
        ignored={"rekeylimit": ""},
    ),
    Case("scp", note="`scp -O` has its other end in the sandbox, not in place"),
    Case("scp-uri", note="the same"),
    Case("scp3", note=SFTP_D),
    Case("sftp", timeout=600, note=f"{SFTP_D}; with a file of 48 KB, 5 bytes at a time", data="/usr/bin/env"),
    Case("sftp-badcmds", note=SFTP_D),
    Case("sftp-batch", note=SFTP_D),
    Case("sftp-cmds", timeout=300, note=SFTP_D),
    Case("sftp-glob", note=SFTP_D),
    Case(
        "sftp-perm",
        timeout=200,
        beside_sshd=False,  # the server it chooses itself is not the one it gets
        note=SFTP_D,
        known=(
            Known(
                "sftp permissions: .*: (read-only .* succeeded|blacklisted .* succeeded|no whitelist .* succeeded|"
                "postcondition check failed: .* (readonly|blacklisted|not in whitelist))",
                "no `sftp-server -R -p -P`",
            ),
        ),
    ),
    Case("sftp-uri", ignored={"ForceCommand": "the front end has an sftp of its own"}),
    Case("stderr-after-eof"),
    Case("stderr-data"),
    Case("transfer"),
    Case("try-ciphers", note=ONLY_OFFERED, ignored={"Ciphers": "the client's choice", "MACs": "the client's choice"}),
    Case("yes-head"),
)

# script → why it says nothing about this server
ELSEWHERE = {
    "agent-restrict": HOST_KEY,
    "allow-deny-users": CONFIGURATION,
    "authinfo": f"{CONFIGURATION}: ExposeAuthInfo",
    "banner": f"{CONFIGURATION}: Banner",
    "broken-pipe": "names a configuration that does not exist: connects to nothing",
    "cert-hostkey": HOST_KEY,
    "connect-privsep": f"{CONFIGURATION}: UsePrivilegeSeparation",
    "connection-timeout": f"{CONFIGURATION}: UnusedConnectionTimeout",
    "dhgex": "begins with 3des-cbc, which is not offered",
    "forcecommand": f"{CONFIGURATION}: ForceCommand, Match",
    "hostbased": "the front end knows public keys alone",
    "hostkey-agent": HOST_KEY,
    "hostkey-rotate": HOST_KEY,
    "keys-command": f"{CONFIGURATION}: AuthorizedKeysCommand",
    "keyscan": HOST_KEY,
    "keytype": HOST_KEY,
    "knownhosts-command": HOST_KEY,
    "limit-keytype": f"{CONFIGURATION}: PubkeyAcceptedAlgorithms",
    "login-timeout": f"{CONFIGURATION}: LoginGraceTime, MaxStartups",
    "multipubkey": f"{CONFIGURATION}: AuthenticationMethods",
    "principals-command": f"{CONFIGURATION}: AuthorizedPrincipalsCommand",
    "proto-mismatch": "judges sshd's exit status",
    "reconfigure": "restarts sshd by a signal",
    "reexec": "replaces sshd's program while it runs",
    "sftp-chroot": f"{CONFIGURATION}: ChrootDirectory",
    "sshfp-connect": "wants a name server with SSHFP records",
}
# Programs of OpenSSH alone, other clients, and parts of the suite: no connection to a server under test.
_LOCAL = (
    "addrmatch agent-getpeereid agent-pkcs11 agent-ptrace agent-subprocess agent-timeout cfginclude cfgmatch cfgmatchlisten "
    "cfgparse cipher-speed conch-ciphers keygen-change keygen-comment keygen-convert keygen-knownhosts keygen-moduli "
    "keygen-sshfp krl putty-ciphers putty-kex putty-transfer scp-ssh-wrapper servcfginclude ssh-com ssh-com-client "
    "ssh-com-keygen ssh-com-sftp ssh2putty sshcfgparse sshd-log-wrapper sshsig test-exec valgrind-unit"
)
LOCAL = frozenset(_LOCAL.split())
