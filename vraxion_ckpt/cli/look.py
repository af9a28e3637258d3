"""The commands that only read: inspect, diff, check, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vraxion_ckpt.cli import arguments, output
from vraxion_ckpt.cli.command import command
from vraxion_ckpt.cli.completion import complete_format
from vraxion_ckpt.support import signals


@command(short_help="Show the contents of a checkpoint.")
@click.argument("path", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor: dtype, shape, bytes.")
@click.option("--values", is_flag=True, help="Also read all data; show minimum, maximum, NaN and infinite counts.")
@arguments.visits_options
@arguments.read_options
@arguments.as_json
def inspect(path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Show the contents of PATH: experts, ring, optimizer, history.

    Tensor data is read only with --values.
    """
    arguments.must_exist(path)
    from vraxion_ckpt.analysis.inspection import inspect as run
    from vraxion_ckpt.cli import show_inspection

    facts = run(path, param_names=arguments.load_names(param_names), **options)
    arguments.print_facts(facts, show_inspection.print_inspection, as_json=as_json)


@command(short_help="Compare two checkpoints.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--from-b", metavar="F[:k=v]", shell_complete=complete_format, help="Format of B; --from is the format of A."
)
@arguments.read_options
@arguments.as_json
@click.pass_context
def diff(context: click.Context, /, a: str, b: str, param_names: Path | None, as_json: bool, **options: Any) -> int:
    """Compare A and B, in any two formats: tensors bit by bit, experts, ring, optimizer, payload, rows, history.

    The exit code is 0 if they are identical, and 1 if anything differs.
    """
    arguments.must_exist(a)
    arguments.must_exist(b)
    from vraxion_ckpt.analysis.difference import diff as run
    from vraxion_ckpt.cli import show_difference

    facts = run(a, b, param_names=arguments.load_names(param_names), **options)
    if as_json or not context.find_root().params["quiet"]:
        arguments.print_result(facts, show_difference.print_difference, as_json=as_json)
    return 0 if facts.identical else 1


@command(short_help="Check a checkpoint for damage and inconsistencies.")
@click.argument("path", type=click.Path())
@click.option("--manifest", type=click.Path(), metavar="FILE", help="Compare the files with the digests in a manifest.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def check(context: click.Context, /, path: str, param_names: Path | None, as_json: bool, **options: Any) -> int:
    """Read all of PATH and print every finding: files, checksums, invariants, values that are not finite.

    The exit code is 0 if no finding is an error, and 1 if one is.
    """
    arguments.must_exist(path)
    from vraxion_ckpt.analysis.checking import check as run
    from vraxion_ckpt.cli import show_findings

    facts = run(path, param_names=arguments.load_names(param_names), **options)
    if as_json or not context.find_root().params["quiet"]:
        arguments.print_result(facts, show_findings.print_findings, as_json=as_json)
    return 0 if facts.sound else 1


@command(short_help="Draw a checkpoint as a page or a picture.")
@click.argument("path", type=click.Path())
@arguments.visits_options
@click.option("-o", "--output", "page", type=click.Path(), metavar="OUT.html", help="Write the page to this file.")
@click.option("--png", "picture", type=click.Path(), metavar="OUT.png", help="Write the picture to this file.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def report(context: click.Context, /, path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Draw PATH: the ring before and after, shares of the visits, similarity of the experts, changes.

    The page is one file and works offline. It needs the extra [report]; the picture needs the extra [png].
    """
    arguments.must_exist(path)
    from vraxion_ckpt.cli import show_report
    from vraxion_ckpt.reporting.report import report as run

    names = arguments.load_names(param_names)
    with output.unless_too_late(*filter(None, (options["page"], options["picture"]))):
        facts = run(path, param_names=names, **options)
        if as_json or not context.find_root().params["quiet"]:
            arguments.print_result(facts, show_report.print_report, as_json=as_json)
        signals.ignore_signals()


LOOK_COMMANDS = (inspect, diff, check, report)
