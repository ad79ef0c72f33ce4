"""`kvmsentry images`: what the store holds."""

from __future__ import annotations

import click

from kvmsentry.cli.main import printable


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def images(context: click.Context) -> None:
    """List and remove the images that were unpacked into the store.

    The store is /var/lib/kvmsentry for root, ~/.local/share/kvmsentry for others; KVMSENTRY_STORE puts it elsewhere.
    """
    if context.invoked_subcommand is None:
        _list()


@images.command("list")
def list_() -> None:
    """List the images: tag, id, size unpacked, files."""
    _list()


def _list() -> None:
    from kvmsentry.image import list_images

    rows = [("TAG", "IMAGE ID", "SIZE", "FILES", "FROM")]
    for image in list_images():
        size = _readable(image.size)
        for tag in image.tags or ["<none>"]:
            rows.append((tag, image.id[:12], size, str(image.entries), image.source))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip()
        click.echo(printable(line))


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@images.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="TAG|ID...")
def remove(names: tuple[str, ...]) -> None:
    """Remove unpacked images; the archives they came from stay."""
    from kvmsentry.image import remove_image

    for name in names:
        click.echo(remove_image(name)[:12])
