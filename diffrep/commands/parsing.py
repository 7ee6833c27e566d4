"""From a command line to a command: tyro reads it, this module explains it.

A command is a frozen dataclass; its fields, and those of the dataclasses inside it, are its options. `options_of`
lists them with the comment that stands beside each field as its help. `read_command` has tyro fill the dataclass and
adds three things: defaults that depend on other options, a record of what was typed, and errors of one line that
name the option at fault.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import shutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast

import tyro

from diffrep.files import number_of
from diffrep.settings import near_names

LARGEST = 2**63  # whole numbers below it are what PyTorch and NumPy take

WORDS = {  # what a field of this name means wherever no comment says more
    "batch_size": "images or samples that go through the network together",
    "benchmark": "which data set",
    "calls": "network calls that every sampler may make",
    "categories": "of the rendered objects that take part",
    "checkpoint_seconds": "between checkpoints",
    "depth": "layers",
    "dtype": "number format in which features are kept",
    "epochs": "times that every sample is seen",
    "gamma": "factor by which the schedule lowers the learning rate at each step",
    "head": "what is measured: an embedded head, a folder or a hub id",
    "heads": "of the attention",
    "held_out": "samples that are set aside for validation",
    "kind": "what is kept: one pooled vector per image, whole maps, or points of them",
    "layers": "how many",
    "learning_rate": "step size of the optimiser, its highest",
    "members": "networks that vote",
    "metric": "how two vectors are compared",
    "momentum": "of the optimiser",
    "patience_from": "epoch after which training may stop early",
    "pool": "side of the grid to which maps are pooled",
    "reader": "network that reads the maps",
    "recipe": "which published system",
    "reference": "network calls of the solution that samplers are compared with",
    "samplers": "by name, those that are compared",
    "schedule": "how the learning rate falls",
    "scheduler": "of the denoising steps",
    "seed": "of all random draws",
    "spacing": "how the timesteps are laid out",
    "steps": "of denoising",
    "task": "what is predicted",
    "test_per_class": "samples of each class to test on",
    "validation_scenes": "held-out scenes that are measured",
    "weight_decay": "of the optimiser",
    "width": "channels",
}

FEW = 10  # options that `--help` shows; `--help-all` shows all of them


class UsageError(ValueError):
    """A command line that cannot be read; the message names the option or the place at fault."""


@dataclass(frozen=True)
class Command:
    """What every command has in common. A subclass has a method `run`, and may have `defaults`."""

    FIRST: ClassVar[str] = ""  # the options that `--help` shows before the others, as dotted fields

    typed: ClassVar[frozenset[str]] = frozenset()  # options on the command line, as dotted fields: "matching.mode"

    def defaults(self: CommandT) -> CommandT:
        """The values of the options that were not typed, for defaults that depend on other options.

        It is called on the command as it reads with the defaults of its class. What it gives must be of the same
        class; only its values of options that were not typed are used.
        """
        return self

    def run(self) -> None:
        """Do what the command is for."""
        raise NotImplementedError


CommandT = TypeVar("CommandT", bound=Command)


@dataclass(frozen=True)
class Option:
    """One option or positional argument of a command."""

    field: str  # dotted path of the field: "matching.mode"
    flags: tuple[str, ...]  # "-o", "--output"; none of a positional argument
    kind: Any  # its type, without None
    default: object  # `dataclasses.MISSING` where it has to be given
    help: str
    nested: bool  # it is a field of a dataclass inside the command
    append: bool = False  # it takes one value, each time that it stands there

    @property
    def positional(self) -> bool:
        return not self.flags

    @property
    def many(self) -> bool:
        """Whether it takes any number of values."""
        arguments = typing.get_args(self.kind)
        return typing.get_origin(self.kind) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis

    def values(self) -> tuple[Any, ...]:
        """The types of its values, one where it takes many, none of a flag."""
        if self.kind is bool:
            return ()
        if self.many:
            return typing.get_args(self.kind)[:1]
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is tuple else (self.kind,)

    def usage(self) -> str:
        """How it is written: ``-o, --output PATH``."""
        values = " ".join(_placeholder(kind) for kind in self.values()) + (" ..." if self.many else "")
        if self.positional:
            name = self.field.rpartition(".")[2].upper()
            return f"{name} ..." if self.many else name
        flags = list(self.flags[:-1] if self.kind is bool else self.flags)
        if self.kind is bool and self.default is not False:
            flags[-1] = self.flags[-1].replace("no-", "[no-]", 1)
        return f"{', '.join(flags)} {values}".rstrip()

    def text(self) -> str:
        """Its help, with the default where that says something."""
        value = self.default
        if value is dataclasses.MISSING or value is None or value is False or value in ("", ()):
            return self.help
        shown = " ".join(
            f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, tuple) else (value,))
        )
        return f"{self.help} (default: {'yes' if value is True else shown})".strip()


def options_of(kind: type) -> tuple[Option, ...]:
    """The options of a command: its positional arguments, its own fields, shared ones, those of its parts."""
    options = list(_options(kind, "", "", dataclasses.MISSING))
    inherited = {name for base in kind.__mro__[1:] for name in vars(base).get("__annotations__", {})}

    def order(option: Option) -> tuple[bool, bool, bool]:
        shared = option.field in inherited and option.field not in vars(kind).get("__annotations__", {})
        return (not option.positional, option.nested, shared)

    return tuple(sorted(options, key=order))


def _options(kind: type, field: str, flag: str, default: object, *, bare: bool = False) -> Iterator[Option]:
    # bare: a part around these options left its name out of them; tyro then leaves out those of the parts within, too
    hints = typing.get_type_hints(kind, include_extras=True)
    comments = comments_of(kind)
    for f in dataclasses.fields(kind):
        if not f.init:
            continue
        hint, extras = hints[f.name], list[Any]()
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        if any(extra in (tyro.conf.Suppress, tyro.conf.Fixed) for extra in extras):
            continue
        value: object = getattr(default, f.name) if default is not dataclasses.MISSING else f.default
        if value is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        path, name = f"{field}{f.name}", flag + f.name.replace("_", "-")
        hint = _without_none(hint)
        if dataclasses.is_dataclass(hint):
            if value is None:  # an optional part, absent by default, is a matter of Python
                continue
            omitted = bare or tyro.conf.OmitArgPrefixes in extras
            assert isinstance(hint, type)
            yield from _options(hint, f"{path}.", flag if omitted else f"{name}.", value, bare=omitted)
            continue
        aliases = tuple(alias for extra in extras for alias in getattr(extra, "aliases", None) or ())
        flags = (*aliases, f"--{name}", *([f"--{flag}no-{f.name.replace('_', '-')}"] if hint is bool else []))
        if tyro.conf.Positional in extras:
            flags = ()
        text = comments.get(f.name) or WORDS.get(f.name, "")
        append = tyro.conf.UseAppendAction in extras
        yield Option(path, flags, hint, value, text, nested=bool(field), append=append)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007  # made of values
    return hint


def _placeholder(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


@cache
def comments_of(kind: Any) -> dict[str, str]:
    """The comment beside or above each field of a dataclass; of a field without one, that of its bases.

    Lines that hold nothing but a comment belong to the field below them, never to the one above.
    """
    comments: dict[str, str] = {}
    bases: tuple[type[Any], ...] = kind.__mro__
    for base in reversed(bases):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(typing.cast("type[Any]", base)))
        lines = source.splitlines()
        marks = {
            token.start[0]: re.sub(r"\s*#?\s*(noqa|type: ignore)\b.*", "", token.string.lstrip("# "))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for statement in body.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            first, last = statement.lineno, statement.end_lineno or statement.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            name, text = statement.target.id, " ".join(marks[i] for i in range(first, last + 1) if marks.get(i))
            comments[name] = text or comments.get(name, "")
    return comments


def read_command(kind: type[CommandT], arguments: Sequence[str], program: str) -> CommandT:
    """Fill a command from the command line.

    Raises:
        UsageError: it cannot be read.
    """
    options = options_of(kind)
    arguments = _chosen(options, [_at_home(word) for word in arguments])
    typed, arguments = _typed(options, arguments), _joined(options, arguments)
    names = frozenset(option.field for option in typed)
    command = _parse(kind, arguments, program, options)
    object.__setattr__(command, "typed", names)
    if getattr(kind, "defaults", Command.defaults) is not Command.defaults:  # one that does not inherit has none
        # values of options that append would be added to themselves
        fresh = {option.field: option.default for option in typed if option.append}
        command = _parse(kind, arguments, program, options, dataclasses.replace(command.defaults(), **fresh))
    for option in typed:
        value = value_of(command, option)
        for number in value if isinstance(value, tuple) else (value,):
            if number == "" and option.default in (None, ()) and option.field != "prompt":
                raise UsageError(f"{option.flags[-1] if option.flags else option.usage()} is empty")
            if isinstance(number, int) and abs(number) >= LARGEST:
                raise UsageError(f"{option.flags[0]} takes whole numbers below 2^63, got {number}")
    object.__setattr__(command, "typed", names)
    return command


def values_of(command: Command, name: str) -> set[Any]:
    """The values of all options of a command whose fields have this name, its own and those of its parts."""
    options = [option for option in options_of(type(command)) if option.field.split(".")[-1] == name]
    return {value_of(command, option) for option in options}


def value_of(command: Command, option: Option) -> Any:
    """The value of one option."""
    return functools.reduce(getattr, option.field.split("."), cast(Any, command))


def _at_home(word: str) -> str:
    """A word with the ``~`` at the beginning of a path, or behind ``OPTION=``, that the shell left where it was quoted.

    >>> _at_home("--work=~/runs") == f"--work={Path.home()}/runs", _at_home("~ the sea")
    (True, '~ the sea')
    """
    return re.sub(r"^((?:[\w.-]+=){0,2})~(?=/|$)", lambda match: match[1] + str(Path.home()), word)


def _parse(
    kind: type[CommandT],
    arguments: Sequence[str],
    program: str,
    options: Sequence[Option],
    default: CommandT | None = None,
) -> CommandT:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=program, add_help=False)
            return tyro.cli(kind, args=arguments, prog=program, default=default, add_help=False)
    except SystemExit as stop:
        if stop.code != 2:  # not tyro's: the command was terminated while it was read
            raise
        problem = _problem(options, arguments) or _flat(said.getvalue())
        raise UsageError(f"{problem}; `{program} --help` explains the options") from None


def _flags(options: Sequence[Option]) -> dict[str, Option]:
    return {flag: option for option in options for flag in option.flags}


def _split(token: str, flags: dict[str, Option]) -> tuple[str, str | None] | None:
    """The flag that a token begins with and the value joined to it; None where it is a value."""
    if token.startswith("--") and len(token) > 2:
        name, equals, value = token.partition("=")
        return name.replace("_", "-"), value if equals else None
    if token.startswith("-") and token[1:2].isalpha():
        return token[:2], token[2:].removeprefix("=") or None
    return None


def _chosen(options: Sequence[Option], arguments: Sequence[str]) -> list[str]:
    """The command line with hyphens in choices of several words, which Python's functions have with spaces."""
    flags, words, option = _flags(options), list[str](), None
    for token in arguments:
        split = _split(token, flags)
        option = flags.get(split[0]) if split else option
        value = split[1] if split else token
        choice = re.sub("[ _]", "-", value or "")
        if value and option is not None and any(choice in typing.get_args(kind) for kind in option.values()):
            token = token.removesuffix(value) + choice
        words.append(token)
        option = option if value is None or (option is not None and option.many) else None
    return words


def _joined(options: Sequence[Option], arguments: Sequence[str]) -> list[str]:
    """The command line with the values of an option that takes many behind one flag, however often it stands there.

    A flag that is neither yes nor no where it is left out, for which tyro wants a value, gets it.

    Raises:
        UsageError: it stands there several times, once without a value.
    """
    flags, parts, places = _flags(options), [list[str]()], dict[Option, list[list[str]]]()
    for token in arguments:
        split = _split(token, flags)
        option = flags.get(split[0]) if split else None
        if split is None:
            parts[-1].append(token)
        elif option is not None and option.kind is bool and option.default is None and split[1] is None:
            parts.append([f"{option.flags[-2]}={split[0] != option.flags[-1]}"])  # as one word, which has its place
        elif option is None or not option.many or option.append:
            parts.append([token])
        else:
            parts.append([] if split[1] is None else [split[1]])
            places.setdefault(option, []).append(parts[-1])
    for option, values in places.items():
        if len(values) > 1 and not all(values):
            raise UsageError(f"{option.flags[-1]} takes at least one value each time that it is there")
        values[0][:] = [option.flags[-1], *(word for part in values for word in part)]
        for part in values[1:]:
            part.clear()
    return [token for part in parts for token in part]


def _typed(options: Sequence[Option], arguments: Sequence[str]) -> set[Option]:
    flags = _flags(options)
    names = [split[0] for token in arguments if (split := _split(token, flags))]
    return {flags[name] for name in names if name in flags}


def _problem(options: Sequence[Option], arguments: Sequence[str]) -> str:
    """What is wrong with a command line that tyro refused, as far as its words show it."""
    flags = _flags(options)
    places = [option for option in options if option.positional]
    values: dict[Option, list[str]] = {}
    option: Option | None = None
    loose: list[str] = []
    for token in arguments:
        if split := _split(token, flags):
            if split[0] not in flags:
                near = near_names(split[0], [flag for flag in flags if flag.startswith("--")])
                return f"there is no option {split[0]}" + (f"; {near}" if near else "")
            option = flags[split[0]]
            taken = values[option] = []
            if split[1] is not None:
                taken.append(split[1])
                option = None
        elif option is not None and (option.many or len(values[option]) < len(option.values())):
            values[option].append(token)
        else:
            loose.append(token)
    for place in places:
        take = len(loose) if place.many else 1
        values[place], loose = loose[:take], loose[take:]
        if not values[place] and place.default is dataclasses.MISSING:
            return f"{place.usage()} is missing: {place.help}"
    for option, words in values.items():
        name = option.usage() if option.positional else option.flags[-1 if option.kind is not bool else 0]
        kinds = option.values()
        if len(words) < len(kinds) and not option.many and not option.positional:
            return f"{name} needs {' '.join(_placeholder(kind) for kind in kinds)}"
        for word, kind in zip(words, kinds * len(words) if option.many else kinds, strict=False):
            if wanted := _unfit(word, kind):
                return f"{name} must be {wanted}, got {word!r}"
    if loose:
        return f"cannot place {loose[0]!r}: it is no option, and every argument has its value"
    for option in options:
        if option.default is dataclasses.MISSING and option not in values:
            return f"{option.usage()} is missing: {option.help}"
    return ""


def _unfit(word: str, kind: Any) -> str:
    """What a word should have been for a type, or nothing where it fits."""
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        near = difflib.get_close_matches(word, choices, n=1)
        return "" if word in choices else "one of " + ", ".join(choices) + (f" (near: {near[0]})" if near else "")
    if kind in (int, float):
        try:
            kind(word)
        except ValueError:
            return "a whole number" if kind is int else "a number"
    return ""


def _flat(box: str) -> str:
    """The message in one of tyro's boxes."""
    rows = [line.strip(" │\t") for line in box.splitlines() if not line.startswith(("╭", "╰", "+"))]
    rules = [i for i, row in enumerate(rows) if set(row) <= set("─-") and row]
    if rules[:1] == [1]:  # plain boxes have their title above a rule
        rows, rules = rows[2:], [i - 2 for i in rules[1:]]
    text = " ".join(" ".join(rows[: rules[0] if rules else None]).split())
    return re.sub(r"^Error parsing [\w.-]+: ", "", text)


def help_text(kind: type[Command], program: str, *, everything: bool = False) -> str:
    """The help of a command.

    Args:
        everything: all options instead of the first `FEW`, those of `Command.FIRST` before the others.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    options = options_of(kind)
    places = [option for option in options if option.positional]
    flagged = [option for option in options if not option.positional]
    first = {field: place for place, field in enumerate(getattr(kind, "FIRST", "").split())}
    few = sorted(flagged, key=lambda option: first.get(option.field, len(first)))[:FEW]
    shown = flagged if everything else few
    lines = [" ".join([f"usage: {program}", *(place.usage() for place in places), "[options]"]), ""]
    lines += [*_paragraphs(inspect.getdoc(kind) or "", width), ""]
    lines += [line for place in places for line in _entry(place.usage(), place.text(), width)]
    lines += [""] if places else []
    group = None
    for option in shown:
        if (name := option.field.rpartition(".")[0]) != group and everything:
            lines += [""] if group is not None else []
            lines.append(f"{name.replace('_', ' ').replace('.', ', ')} options:" if name else "options:")
            group = name
        lines += _entry(option.usage(), option.text(), width)
    if left := len(flagged) - len(shown):
        more = number_of(left, "more option")
        lines += ["", f"{more}: {program} --help-all"]
    return "\n".join(lines)


def _paragraphs(text: str, width: int) -> list[str]:
    parts = [
        textwrap.wrap(part, width, break_on_hyphens=False) if not part.startswith(" ") else part.splitlines()
        for part in text.split("\n\n")
    ]
    return [line for i, part in enumerate(parts) for line in ([""] if i else []) + part]


def _entry(name: str, text: str, width: int) -> list[str]:
    column = 26
    rows = textwrap.wrap(text, max(width - column, 20), break_on_hyphens=False) or [""]
    if len(name) > column - 4:
        return [f"  {name}", *(" " * column + row for row in rows if row)]
    return [f"  {name:<{column - 2}}{rows[0]}", *(" " * column + row for row in rows[1:])]
