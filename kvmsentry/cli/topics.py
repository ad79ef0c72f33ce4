"""`kvmsentry help`: commands, and tables of what the sandbox supports, made from the code that does it."""

from __future__ import annotations

import click

from kvmsentry.errors import UserError

TOPICS = {"syscalls": "every system call, and how true its answer is"}


@click.command("help")
@click.argument("topic", required=False, metavar="COMMAND|TOPIC")
@click.pass_context
def topics(context: click.Context, topic: str | None) -> None:
    """Help on a command or a topic.

    Topics: syscalls (the table of supported system calls).
    """
    parent = context.parent
    assert parent is not None
    if topic is None:
        click.echo(parent.get_help())
        click.echo("\nTopics for 'kvmsentry help':")
        for name, text in TOPICS.items():
            click.echo(f"  {name}  {text}")
        return
    if topic == "syscalls":
        _syscalls()
        return
    group = parent.command
    assert isinstance(group, click.Group)
    command = group.get_command(parent, topic)
    if command is None:
        raise UserError(f"no command or topic {topic}")
    with click.Context(command, info_name=topic, parent=parent) as inner:
        click.echo(command.get_help(inner))


def _syscalls() -> None:
    from kvmsentry.syscall import table

    table.load()
    rows = [row for row in table.rows if row is not None]
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        remarks = "; ".join(text for text in (row.partial, row.note) if text)
        click.echo(f"{row.nr:4}  {row.name:{width}}  {row.status:7}  {remarks}".rstrip())
    full = sum(row.status == "full" for row in rows)
    click.echo(f"{len(rows)} system calls: {full} full, {len(rows) - full} partial; every other one is ENOSYS.")
