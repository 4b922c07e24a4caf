"""The click group: grouped help, lazily imported commands, global options in either place, and every failure in one form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

from client import output
from client.control import Control
from client.params import BadWord
from client.proxy import Failure
from gatewayd import api

PIPE_BROKEN = 141  # 128 + SIGPIPE: what a program that nobody reads any more ends with

# name → (module below client.commands, one line of help), in the order and the groups of the help text.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Sandboxes": {
        "create": ("boxes", "Create a sandbox and wait until it is ready."),
        "list": ("boxes", "List sandboxes."),
        "get": ("boxes", "Show everything about one sandbox."),
        "status": ("status", "Show the status of one sandbox; without a name, of the daemon."),
        "update": ("boxes", "Change a sandbox: its name, its resources, its times."),
        "wait": ("power", "Wait until a sandbox is ready or stopped."),
        "start": ("power", "Start a stopped sandbox."),
        "stop": ("power", "Stop a sandbox; its files stay."),
        "delete": ("power", "Delete sandboxes and their files."),
    },
    "Running things": {
        "exec": ("exec", "Run a command in a sandbox; input, output and exit code are passed on."),
        "console": ("console", "Open a shell in a sandbox; it survives lost connections."),
        "egress": ("egress", "Show what a sandbox reached of the network, and what it was refused."),
        "ps": ("ps", "List the sessions of exec and console in a sandbox."),
        "attach": ("attach", "Go on with one of them."),
    },
    "Snapshots": {
        "snapshot": ("snapshot", "Build, capture, list, get, wait for and delete snapshots."),
    },
    "Connecting": {
        "tunnel": ("tunnel", "Make a port of a sandbox a local port, or a pipe."),
        "ssh-setup": ("ssh_setup", "Set up `ssh sandbox-NAME`, scp, rsync and the like, once."),
    },
    "The daemon": {
        "up": ("daemon", "Start the daemon (every other command does it, too)."),
        "down": ("daemon", "Stop the daemon, its connections and the embedded service."),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}

EXAMPLES = (
    "sandbox create demo --memory 1gb",
    "sandbox exec demo -- python3 --version",
    "sandbox tunnel demo --remote-port 5432",
    "sandbox ssh-setup && ssh sandbox-demo",
    "sandbox list --format pretty",
)


class Settings:
    """The global options of one invocation, wherever on the command line they stood."""

    def __init__(self) -> None:
        self.profile = ""  # --profile, or ""; the environment is looked at by gatewayd.api
        self.format = "json"  # --format
        self.format_given = False  # whether it was given

    def control(self, *, start: bool = True) -> Control:
        """The daemon, asked with the profile of this invocation."""
        return Control(self.profile, start=start)

    def show(self, value: object, pretty: Callable[[], str], ids: Sequence[object]) -> None:
        """`output.show` in the format asked for."""
        output.show(self.format, value, pretty, ids)


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def _global_options() -> list[click.Parameter]:
    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None and param.name is not None:
            settings = ctx.ensure_object(Settings)
            setattr(settings, param.name, value)
            settings.format_given |= param.name == "format"

    return [
        click.Option(
            ["--format"],
            type=click.Choice(output.FORMATS),
            callback=keep,
            expose_value=False,
            help="json (default), tables for people, or names alone.",
        ),
        click.Option(
            ["--profile"],
            metavar="NAME",
            callback=keep,
            expose_value=False,
            help="Which service: local, env, or a profile of the configuration file.",
        ),
    ]


class Command(click.Command):
    """A command that takes the global options, too, and shows its examples below its help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples  # command lines, each of which works as it stands in a documented situation
        self.params = [*self.params, *_global_options()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(formatter, self.examples)


class Family(click.Group):
    """A command of several: takes the global options, and shows its examples below its help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples  # as in `Command`
        self.params = [*self.params, *_global_options()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(formatter, self.examples)


class Group(click.Group):
    """`sandbox` itself. Its `main` is the only place where a failure becomes a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"client.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_") + "_command")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=1)
            does = f"did you mean `sandbox {near[0]}`?" if near else "`sandbox --help` shows the commands"
            raise _Unknown(f"there is no command {output.clean(name)!r}", name, does)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, without importing any."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()], col_max=12)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(formatter, EXAMPLES)
        formatter.write_paragraph()
        formatter.write_text("Everything after -- goes to the sandbox untouched. `sandbox COMMAND --help` tells more.")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Interrupts and broken pipes end it here, before click gives them a meaning of its own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Failure(api.ErrorKind.INTERRUPTED, "") from None
        except BrokenPipeError:
            raise click.exceptions.Exit(PIPE_BROKEN) from None

    def main(  # type: ignore[override]  # click's two overloads cannot be told apart here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run the command line and exit with its code, or return the code when not in `standalone_mode`."""
        words = list(sys.argv[1:] if args is None else args)
        code = self._run(words, **extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, words: list[str], **extra: Any) -> int:
        try:
            code = super().main(words, "sandbox", standalone_mode=False, **extra)
            return code if isinstance(code, int) else 0
        except click.UsageError as exc:
            _explain(exc, words)
            return exc.exit_code
        except click.ClickException as exc:
            output.note(exc.format_message())
            return exc.exit_code
        except Failure as exc:
            report(exc)
            return api.EXIT_CODES.get(exc.kind, api.EXIT_CODES[api.ErrorKind.INTERNAL])
        except (click.Abort, KeyboardInterrupt):
            output.after_interrupt()
            return api.EXIT_CODES[api.ErrorKind.INTERRUPTED]
        except Exception as exc:  # noqa: BLE001 - the last boundary: a defect becomes one line
            output.note(f"internal error: {type(exc).__name__}: {exc}{_where(exc)}")
            return api.EXIT_CODES[api.ErrorKind.INTERNAL]


class _Unknown(click.UsageError):
    """A word that is no command."""

    def __init__(self, message: str, word: str, hint: str) -> None:
        super().__init__(message)
        self.word = word  # as typed
        self.hint = hint  # what may have been meant


def report(failure: Failure) -> None:
    """Show a failure on standard error; one without a message (an interrupt) shows nothing."""
    if not failure.message:
        return
    first, *more = failure.message.splitlines()
    output.note(first)
    for line in more:  # the end of a log
        output.message(f"  {output.clean(line)}")
    if failure.hint:
        output.message(f"hint: {output.clean(failure.hint)}")


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{' ' * formatter.current_indent}{example}\n")


def _explain(exc: click.UsageError, words: list[str]) -> None:
    """Say what is wrong with the command line, and point at the word."""
    path = exc.ctx.command_path if exc.ctx else "sandbox"
    text, word, hint = exc.format_message(), "", f"`{path} --help` tells more"
    if isinstance(exc, _Unknown):
        word, hint = exc.word, exc.hint
    elif isinstance(exc, click.NoSuchOption):
        word = exc.option_name
        if exc.ctx and exc.ctx.info_name == "exec" and not exc.possibilities:
            hint = "options of the sandbox's command go after --: sandbox exec NAME -- COMMAND…"
    elif isinstance(exc, BadWord):
        word = exc.word
        if exc.param is not None:
            text = f"{exc.param.get_error_hint(exc.ctx).strip(chr(39))}: {exc.message}"
    output.message(f"{path}: {output.clean(text)}")
    for line in _pointer(words, word):
        output.message(line)
    output.message(f"hint: {output.clean(hint)}")


def _pointer(words: list[str], word: str) -> list[str]:
    """The word (with its option, if it stands alone after one) and a line of carets below it; nothing if it is not found.

    Only these words are shown: others may be secrets.
    """
    if not word or not word.isprintable():
        return []
    for number, candidate in enumerate(words):
        if candidate == word or (candidate.startswith("-") and candidate.endswith("=" + word)):
            before = words[number - 1] if number and words[number - 1].startswith("--") and "=" not in words[number - 1] else ""
            shown = f"{before} {candidate}" if before and candidate == word and not word.startswith("-") else candidate
            start = output.width(shown) - output.width(word)
            return [f"  {shown}", f"  {' ' * start}{'^' * output.width(word)}"]
    return []


def _where(exc: Exception) -> str:
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno})" if trace is not None else ""


@click.group(
    cls=Group,
    invoke_without_command=True,
    params=_global_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(api.VERSION, "-V", "--version", prog_name="sandbox", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Create sandboxes, run things in them, and reach their ports and shells as if they were local."""
    if ctx.invoked_subcommand is None:
        output.write(ctx.get_help() + "\n")
