"""A real ssh-agent on this machine, used by a real ssh-add and ssh-keygen inside a sandbox."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.sdk.sshagent import Client, RealAgent, attached

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

pytestmark = pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="ssh-agent is not installed")

# A connection that stays: sends one "list" of the agent's protocol for each line it reads, and prints the length of the answer.
HOLD = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(os.environ["SSH_AUTH_SOCK"])
print("connected", flush=True)
for line in sys.stdin:
    sock.sendall(bytes([0, 0, 0, 1, 11]))
    head = sock.recv(4, socket.MSG_WAITALL)
    print("answer of", int.from_bytes(head, "big") if len(head) == 4 else "nobody", flush=True)
    sock.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
"""
LIST = base64.b64encode(bytes([0, 0, 0, 1, 11])).decode()  # SSH_AGENTC_REQUEST_IDENTITIES
EMPTY = bytes([0, 0, 0, 5, 12, 0, 0, 0, 0])  # SSH_AGENT_IDENTITIES_ANSWER, with no key

Attach = Callable[..., AbstractContextManager[Client]]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealAgent]:
    """An agent with a key."""
    folder = tmp_path_factory.mktemp("agent")
    running = RealAgent(folder)
    yield running
    running.stop()


@pytest.fixture
def attach(service: Service, sandbox: Any, agent: RealAgent) -> Attach:
    """Attach to the module's sandbox; the agent answers unless a test does."""

    def attach(*, answering: bool = True, **message: Any) -> AbstractContextManager[Client]:
        if "type" not in message:
            message = {"type": "execute", "ssh_agent_forward": True, **message}
        return attached(sandbox.dataplane_url, service.key, agent.socket if answering else None, **message)

    return attach


def test_keys_are_listed_and_sign(attach: Attach, sandbox: Any, agent: RealAgent) -> None:
    sandbox.write("/root/key.pub", agent.key.with_suffix(".pub").read_bytes())
    script = "ssh-add -l && echo text > text && ssh-keygen -q -Y sign -n test -f key.pub text && cat text.sig"
    with attach(command=script) as client:
        assert client.finish() == 0
    listed, _, rest = client.output.partition("\n")
    assert listed == agent.ask("ssh-add", "-l").strip()
    signature = agent.key.with_suffix(".sig")
    signature.write_text(rest[rest.index("-----BEGIN") :])
    allowed = agent.key.with_suffix(".allowed")
    allowed.write_text("somebody " + agent.key.with_suffix(".pub").read_text())
    verify = f"echo text | ssh-keygen -Y verify -n test -I somebody -f {allowed} -s {signature}"
    assert "Good" in agent.ask("sh", "-c", verify)
    assert not sandbox.run("ls -d /tmp/gatewayd-*").stdout  # gone with the command
    assert {message["channel_id"] for message in client.seen if "data" in message} == {"1", "2"}  # ssh-add's, and ssh-keygen's
    assert {"type": "ssh_agent_close", "channel_id": "1"} in client.seen


def test_keys_can_be_added_from_inside(attach: Attach, sandbox: Any, agent: RealAgent) -> None:
    with attach(command="ssh-keygen -q -t ed25519 -N '' -C 'made inside' -f inside && ssh-add -q inside && rm inside") as client:
        assert client.finish() == 0, client.output
    assert "made inside" in agent.ask("ssh-add", "-l")
    with attach(command="ssh-add -q -d inside.pub", pty=True) as client:
        assert client.finish() == 0, client.output
    assert "made inside" not in agent.ask("ssh-add", "-l")


def test_the_socket_is_the_user_s_and_goes_before_the_caller_s(attach: Attach) -> None:
    script = "id -un; stat -c '%U %a' $SSH_AUTH_SOCK ${SSH_AUTH_SOCK%/*}; ssh-add -l"
    with attach(command=script, run_config={"user": "user", "env_vars": {"SSH_AUTH_SOCK": "/elsewhere"}}) as client:
        assert client.finish() == 0
    assert client.output.splitlines()[:3] == ["user", "user 600", "user 700"]
    assert "held outside" in client.output


def test_without_it_there_is_none(attach: Attach) -> None:
    with attach(command="ssh-add -l; echo $SSH_AUTH_SOCK.", ssh_agent_forward=False) as client:
        assert client.finish() == 0
    assert "Could not open a connection" in client.output
    assert client.output.endswith("\n.\n")
    assert not client.seen


def test_a_user_that_is_not_there(attach: Attach) -> None:
    with attach(command="true", run_config={"user": "nosuchuser"}) as client:
        message = client.receive()
    assert message["error_type"] == "CommandError"
    assert "nosuchuser" in message["error"]
    assert "SSH agent" in message["error"]


def test_channels_do_not_mix(attach: Attach) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do ssh-add -l & done; wait"
    with attach(command=script) as client:
        assert client.finish() == 0
    assert client.output.count("held outside") == 8, (client.output, client.seen)
    assert len({message["channel_id"] for message in client.seen}) == 8


def test_two_held_open_and_the_client_closes_one(attach: Attach, sandbox: Any) -> None:
    sandbox.write("/root/hold.py", HOLD)
    script = "mkfifo one; python3 hold.py < one & exec 3> one; echo >&3; python3 hold.py; exec 3>&-; wait"
    with attach(command=f"rm -f one; {script}", answering=False) as client:
        first = client.until("ssh_agent_data")
        client.send(type="input", data="\n")
        second = client.until("ssh_agent_data")
        assert (first["data"], second["data"]) == (LIST, LIST)
        assert first["channel_id"] != second["channel_id"]
        client.send(type="ssh_agent_close", channel_id=first["channel_id"])
        client.until_output("answer of nobody\n")
        answer = base64.b64encode(EMPTY).decode()
        for piece in (answer[:4], answer[4:]):  # three bytes, and the rest
            client.send(type="ssh_agent_data", channel_id=second["channel_id"], data=piece)
        client.until_output("answer of 5\n")
        client.send(type="close_stdin")
        assert client.finish() == 0
    closed = [message["channel_id"] for message in client.seen if message["type"] == "ssh_agent_close"]
    assert closed == [second["channel_id"]]  # told by the side that did not do it


def test_a_half_close_still_gets_its_answer(attach: Attach) -> None:
    script = (
        "import os,socket; s=socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']);"
        "s.sendall(bytes([0,0,0,1,11])); s.shutdown(1); print(len(s.recv(4096)) > 9)"
    )
    with attach(command=f'python3 -c "{script}"') as client:
        assert client.finish() == 0
    assert client.output == "True\n"
    assert [message["type"] for message in client.seen].count("ssh_agent_data") == 1


def test_a_number_names_a_channel_too(attach: Attach) -> None:
    with attach(command=f"python3 -c '{HOLD}'", answering=False) as client:
        client.send(type="input", data="\n")
        channel = int(client.until("ssh_agent_data")["channel_id"])
        client.send(type="ssh_agent_data", channel_id=channel, data=base64.b64encode(EMPTY).decode())
        client.until_output("answer of 5\n")
        client.send(type="close_stdin")
        assert client.finish() == 0


@pytest.mark.parametrize("data", ["!!!!", "AAA", "é===", 7, None, ["AAAA"], "A" * 400_000], ids=lambda data: repr(data)[:12])
def test_data_that_are_none_end_their_channel_only(attach: Attach, service: Service, data: Any) -> None:
    with attach(command=f"python3 -c '{HOLD}'", answering=False) as client:
        client.send(type="input", data="\n")
        asked = client.until("ssh_agent_data")
        others: list[object] = ["77", "", "1" * 5000, "-1", 9, -1, 1 << 70, True, None, 1.5, [], {}]
        for channel in others:  # no such channel: nothing happens
            client.send(type="ssh_agent_data", channel_id=channel, data=data)
            client.send(type="ssh_agent_close", channel_id=channel)
        client.send(type="ssh_agent_data", channel_id=asked["channel_id"], data=data)
        assert client.until("ssh_agent_close")["channel_id"] == asked["channel_id"]
        client.until_output("answer of nobody\n")
        client.send(type="close_stdin")
        assert client.finish() == 0
    assert f"agent channel {asked['channel_id']} closed" in service.text()


def test_an_answer_that_nobody_reads(attach: Attach) -> None:
    script = (
        "import os,socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']);"
        "s.sendall(b'x'); sys.stdin.read(1); print('still here')"
    )
    piece = base64.b64encode(bytes(200_000)).decode()
    with attach(command=f'python3 -c "{script}"', answering=False) as client:
        channel = client.until("ssh_agent_data")["channel_id"]
        for _ in range(12):
            client.send(type="ssh_agent_data", channel_id=channel, data=piece)
        assert client.until("ssh_agent_close")["channel_id"] == channel
        client.send(type="input", data="x")
        assert client.finish() == 0
    assert client.output == "still here\n"


def test_there_is_a_limit_to_channels(attach: Attach) -> None:
    script = (
        "import os,socket,sys; path=os.environ['SSH_AUTH_SOCK']; held=[]\n"
        "for i in range(40):\n s=socket.socket(socket.AF_UNIX); s.connect(path); held.append(s)\n"
        "print(sum(not s.recv(1) for s in held[32:]), flush=True)\n"
        "for s in held[:32]: s.close()\n"
        "sys.stdin.read(1)\n"
        "s=socket.socket(socket.AF_UNIX); s.connect(path); s.sendall(bytes([0,0,0,1,11])); print(len(s.recv(4096)) > 9)"
    )
    with attach(command=f'python3 -c "{script}"') as client:
        client.until_output("8\n")
        client.send(type="input", data="x")
        assert client.finish() == 0
    assert client.output == "8\nTrue\n"


def test_a_client_that_goes_and_comes_back(attach: Attach, sandbox: Any) -> None:
    script = (
        "ssh-add -l; while ! [ -e go ]; do sleep 0.05; done; ssh-add -l > away; echo $? >> away; touch gone;"
        "while ! [ -e again ]; do sleep 0.05; done; ssh-add -l"
    )
    with attach(command=script) as first:
        first.until_output("held outside")
    away = sandbox.run("touch go; while ! [ -e gone ]; do sleep 0.02; done; cat away", timeout=20).stdout
    assert away in ("1\n", "2\n", "141\n")  # no answer, or it is closed before ssh-add asks
    with attach(type="reconnect", command_id=first.command_id, stdout_offset=len(first.output)) as second:
        sandbox.run("touch again")
        assert second.finish() == 0
    assert "held outside" in second.output
    channels = [message["channel_id"] for client in (first, second) for message in client.seen if "data" in message]
    assert len(set(channels)) == 2  # ids are not used again


def test_a_channel_ends_with_its_client(attach: Attach) -> None:
    with attach(command=f"python3 -c '{HOLD}'", answering=False) as first:
        first.send(type="input", data="\n")
        first.until("ssh_agent_data")
    with attach(type="reconnect", command_id=first.command_id) as second:
        second.until_output("answer of nobody\n")
        second.send(type="kill")
        assert second.finish() == 137
    assert not second.seen


def test_the_client_that_came_last_is_asked(attach: Attach) -> None:
    with attach(command="while read line; do ssh-add -l; done") as first:
        first.until("started")
        with attach(type="reconnect", command_id=first.command_id, answering=False) as second:
            second.until("started")
            first.send(type="input", data="\n")
            asked = second.until("ssh_agent_data")
        first.until_output("agent")  # the second has gone: an error
        assert not first.seen
        with attach(command="never run", command_id=first.command_id, ssh_agent_forward=False, answering=False) as third:
            third.until("started")
            first.output = ""
            first.send(type="input", data="\n")
            first.until_output("held outside")
            assert not third.seen  # it did not offer its agent
        first.send(type="close_stdin")
        assert first.finish() == 0
    assert asked["channel_id"] not in {message["channel_id"] for message in first.seen}


def test_a_killed_command_leaves_no_socket(attach: Attach, sandbox: Any) -> None:
    with attach(command=f"echo $SSH_AUTH_SOCK; exec python3 -c '{HOLD}'") as client:
        client.until_output("connected")
        path = client.output.split()[0]
        client.send(type="input", data="\n")
        client.until("ssh_agent_data")
        client.send(type="kill")
        assert client.finish() == 137
    assert sandbox.run(f"ls -d {path} {Path(path).parent}").stdout == ""


def test_a_sandbox_that_stops_under_it(client: Any, service: Service, agent: RealAgent, name: str) -> None:
    with client.sandbox(name=name) as box:
        message = {"type": "execute", "command": f"exec python3 -c '{HOLD}'", "ssh_agent_forward": True}
        with attached(box.dataplane_url, service.key, agent.socket, **message) as one:
            one.until_output("connected")
            one.send(type="input", data="\n")
            one.until_output("answer of")
            box.stop()
            assert one.finish() == 137 or one.output


def test_what_is_not_read_does_not_keep_input_or_a_kill(attach: Attach) -> None:
    """Processes inside that ask all the time, and a client that answers nothing."""
    script = (
        "import os,socket,sys,threading; path=os.environ['SSH_AUTH_SOCK']\n"
        "def ask():\n while True:\n"
        "  try:\n   s=socket.socket(socket.AF_UNIX); s.connect(path); s.sendall(bytes(100)); s.close()\n"
        "  except OSError: pass\n"
        "for _ in range(4): threading.Thread(target=ask,daemon=True).start()\n"
        "print(sys.stdin.readline(), flush=True); sys.stdin.readline()"
    )
    with attach(command=f'python3 -c "{script}"', answering=False) as client:
        client.until("ssh_agent_close")
        client.send(type="input", data="heard\n")
        client.until_output("heard")
        client.send(type="kill")
        assert client.finish() == 137
