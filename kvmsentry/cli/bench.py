"""`kvmsentry bench`: options, the progress bar, where the report goes. What is measured is in kvmsentry/bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from kvmsentry.errors import UserError

ROUNDS, QUICK_ROUNDS = 5, 2
STATUS_FAILED, STATUS_INTERRUPTED = 1, 130


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="NAME,...", help="Only these benchmarks or groups of them (--list tells the names).")
@click.option("--platform", metavar="NAME,...", help="Only these platforms beside native: kvm, ptrace, runsc-ptrace, "
              "runsc-kvm.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 100), help=f"Rounds that count (default: {ROUNDS}).")
@click.option("--quick", is_flag=True, help=f"{QUICK_ROUNDS} rounds and shorter ones: a rough picture in two minutes.")
@click.option("--runsc", is_flag=True, help="The system's runsc as well, on ptrace and on KVM (needs root).")
@click.option("--json", "json_file", metavar="FILE", help="Write all figures to FILE (- for standard output).")
@click.option("--html", "html_file", metavar="FILE", help="Write a page with plots to FILE.")
@click.option("--markdown", "markdown_file", metavar="FILE", help="Write a table in Markdown to FILE.")
@click.option("--from", "source", metavar="FILE", help="Measure nothing: show the figures that --json wrote.")
@click.option("--list", "listing", is_flag=True, help="List the benchmarks.")
def bench(only: str | None, platform: str | None, rounds: int | None, quick: bool, runsc: bool,
          json_file: str | None, html_file: str | None, markdown_file: str | None, source: str | None,
          listing: bool) -> int:  # fmt: skip
    """Measure what this host's platforms cost: the same programs natively and in sandboxes.

    The platforms take turns within each round; figures are medians over the rounds, with the least and the greatest,
    and ratios to native. A full run takes five to ten minutes. Ctrl-C stops it and shows what there is.

    \b
    kvmsentry bench --quick
    kvmsentry bench --only getpid,fork --rounds 10
    kvmsentry bench --runsc --html report.html

    Exit status 1 when something failed on a platform, 130 when interrupted.
    """
    from kvmsentry.bench import catalogue, session, table

    if listing:
        _list()
        return 0
    chosen = catalogue.choose(_names(only))
    for path in (json_file, html_file, markdown_file):
        _check_writable(path)
    if source is not None:
        facts = _load(source)
    else:
        facts = session.run(
            chosen, _names(platform), runsc, rounds or (QUICK_ROUNDS if quick else ROUNDS), quick, _progress
        )
    if json_file:
        _write(json_file, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if html_file:
        from kvmsentry.bench.html import page

        _write(html_file, page(facts))
    if markdown_file:
        _write(markdown_file, table.markdown(facts))
    if "-" not in (json_file, html_file, markdown_file):
        click.echo(table.text(facts), nl=False)
    if facts["interrupted"]:
        return STATUS_INTERRUPTED
    return STATUS_FAILED if session.failures(facts) else 0


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _list() -> None:
    from kvmsentry.bench import catalogue

    for group, title in catalogue.GROUPS.items():
        click.echo(f"{title} ({group})")
        for row in catalogue.BENCHMARKS.values():
            if row.group == group:
                click.echo(f"  {row.name:12}{row.what}")
    for name, what in catalogue.EXTRAS.items():
        click.echo(f"{name:14}{what}")


def _progress(session: Any) -> Callable[[str], None]:
    """A progress bar on a terminal, a line a step elsewhere would be noise."""
    if not sys.stderr.isatty():
        return lambda text: None
    bar: Any = click.progressbar(
        length=session.length, label="measuring", file=sys.stderr, item_show_func=lambda item: item or ""
    )
    bar.__enter__()

    def step(text: str) -> None:
        bar.update(1, text)
        if bar.finished:
            bar.render_finish()

    return step


def _check_writable(path: str | None) -> None:
    """Before minutes of measuring, not after."""
    if path and path != "-":
        try:
            open(path, "a").close()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", 125) from None


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", 125) from None


def _load(path: str) -> dict[str, Any]:
    from kvmsentry.bench.session import FORMAT

    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'no JSON'}", 125) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path} is not what `kvmsentry bench --json` writes", 125)
    return facts
