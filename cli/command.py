"""Commands whose help shows options in groups, and whose typing errors are answered with the right name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click

from calib.jobs.options import GROUPS, RENAMED

HEADINGS = {
    "basic": "Options", "data": "Data", "method": "Method", "proof": "Proof", "advanced": "Advanced",
}  # fmt: skip
Hidden = Callable[[Sequence[str]], set[str]]  # a command line's words -> names of options that its help leaves out


class GroupedOption(click.Option):
    """An option that help shows under a heading; of several names it shows the first."""

    def __init__(self, *arguments: Any, group: str = "basic", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        assert group in GROUPS, group
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return f"'{self.opts[0]}'"


class GroupedCommand(click.Command):
    """A command with options in groups and examples below them.

    `examples` are command lines as they are typed, with what each does. `hidden` says which options the help leaves
    out, by the words that were typed beside --help.
    """

    def __init__(
        self, *arguments: Any, examples: Mapping[str, str] = {}, hidden: Hidden = lambda words: set(), **keywords: Any
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **keywords)
        self.examples, self.hidden_by = dict(examples), hidden

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["parewell.words"] = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if (new := new_name(self.name or "", error.option_name)) is not None:
                raise click.UsageError(f"{error.option_name} is called {new} now", ctx) from error
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left_out = self.hidden_by(ctx.meta.get("parewell.words", []))
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):
            shown = isinstance(param, click.Option) and param.name not in left_out
            record = param.get_help_record(ctx) if shown else None
            if record is not None:
                records[getattr(param, "group", "basic")].append(record)
        for group, rows in records.items():
            if rows:
                with formatter.section(HEADINGS[group]):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line, text in self.examples.items():
                    formatter.write(f"  # {text}\n  {line}\n")


class CommandGroup(click.Group):
    """Commands in the order in which they were added; an unknown one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], self.commands, 1, cutoff=0.5)
            hint = f"; is {near[0]} meant?" if near else f"; choose from {', '.join(self.commands)}"
            raise click.UsageError(f"no such command '{args[0]}'{hint}", ctx) from error


def new_name(command: str, option: str) -> str | None:
    """The present name of an option that was renamed in November 2026; None for any other."""
    old = option.lstrip("-").removeprefix("no-").replace("-", "_")
    new = RENAMED.get(command, {}).get(old)
    if new is None:
        return None
    return "--optimizer adamw8bit" if old == "eight_bit" else f"--{new.replace('_', '-')}"
