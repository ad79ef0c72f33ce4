"""Entry point: finds the command, imports only what that one needs, turns errors into one line and a status."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import NoReturn

import click

from kvmsentry import __version__, log
from kvmsentry.errors import HostError, UserError

STATUS_OURS = 125  # what Docker and podman exit with when they, not the command, failed
STATUS_INTERRUPTED = 130

# name: (module, attribute, what it does)
COMMANDS = {
    "run": ("kvmsentry.cli.run", "run", "Run a command in the image of a docker or OCI archive."),
    "do": ("kvmsentry.cli.run", "do", "Run a command on this host's files, and throw its changes away."),
    "images": ("kvmsentry.cli.images", "images", "List and remove unpacked images."),
    "doctor": ("kvmsentry.cli.doctor", "doctor", "Say what this host's KVM can do and what to mend."),
    "bench": ("kvmsentry.cli.bench", "bench", "Measure what this host's platforms cost, natively and in sandboxes."),
    "help": ("kvmsentry.cli.topics", "topics", "Help on a command, or on what the sandbox supports."),
}


class LazyGroup(click.Group):
    """Commands are imported when they are asked for: `run` pays for `run` alone."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="kvmsentry")
def commands() -> None:
    """Run container images inside KVM, on a Linux-compatible kernel of our own.

    \b
    kvmsentry run image.tar                     the image's own command
    kvmsentry run -it image.tar sh              a shell
    kvmsentry do make test                      a command on this host, its writes thrown away
    kvmsentry doctor                            can this host do it, and how fast

    The exit status is that of the command in the sandbox; 125 when kvmsentry failed, 126 when the command cannot be
    executed, 127 when it does not exist.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line (sys.argv without `arguments`) and exit with its status."""
    log.mark("python")
    gc.disable()  # the imports to come make no garbage; the Sentry turns it on again (sandbox/boot.py)
    sys.exit(call(arguments))


def call(arguments: list[str] | None = None) -> int:
    """Like `main`, but returns the status."""
    try:
        result = commands.main(args=arguments, prog_name="kvmsentry", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _failed(str(error), error.status)
    except HostError as error:
        return _failed(str(error), STATUS_OURS)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return STATUS_OURS
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (try '{context.command_path} --help')" if context is not None else ""
        return _failed(error.format_message() + hint, STATUS_OURS)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _failed("interrupted", STATUS_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return STATUS_OURS


def _failed(message: str, status: int) -> int:
    sys.stderr.write(f"kvmsentry: {printable(' '.join(message.split()))}\n")
    return status


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey: it may quote an image."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
