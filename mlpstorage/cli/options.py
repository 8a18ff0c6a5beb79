"""Arguments generated from a spec's fields, so that a flag's name, default, range and meaning have one owner."""

import argparse
import enum
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpstorage.spec.fields import ENVIRONMENT_PREFIX, NONE, Option, Spec, outside_name

GIVEN = "given"
"""Attribute of the namespace: names of the arguments that stood on the command line, as opposed to parser defaults."""


def add_options(parser: argparse.ArgumentParser, model: type[Spec], command: str) -> dict[str, argparse._ArgumentGroup]:
    """Add the flags of `model` that `command` takes; returns their groups by title."""
    parser.set_defaults(**{GIVEN: ()})
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in model.options().items():
        if command not in option.commands:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(*option.flags, **_argument(model, name, option))
    return groups


def _argument(model: type[Spec], name: str, option: Option) -> dict[str, Any]:
    field = model.model_fields[name]
    default = field.get_default(call_default_factory=True)
    value_type = _value_type(field.annotation)
    keywords: dict[str, Any] = {
        "action": _Given,
        "dest": outside_name(model, name),
        "help": _help(str(field.description), default, option),
    }
    if value_type is bool:
        return {**keywords, "switch": True}
    # A worked-out or environment-dependent default is None here; the spec has the last word.
    keywords["default"] = None if option.default_text or isinstance(default, (Path, dict)) else default
    if option.choices:
        keywords["choices"] = (*option.choices, NONE) if option.none else option.choices
        keywords["help"] = f"{keywords['help']}; one of {', '.join(option.choices)}"
    elif isinstance(value_type, type) and issubclass(value_type, enum.Enum):
        # As texts, so that a wrong one is told what there is; the spec makes values of them.
        keywords["choices"] = [str(member.value) for member in value_type]
    elif value_type in (int, float) and not option.none:
        keywords["type"] = value_type
    if option.metavar:
        keywords["metavar"] = option.metavar
    if option.nargs:
        keywords["nargs"] = option.nargs
        keywords["default"] = list(default) if isinstance(default, tuple) and default else None
    if option.repeat:
        keywords["repeat"] = True
    return keywords


def _value_type(annotation: object) -> object:
    """The type of a value, without `None`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    return annotation


def _help(description: str, default: object, option: Option) -> str:
    if default is False:
        return _escaped(description)
    if option.default_text:
        shown = option.default_text
    elif isinstance(default, Path):
        shown = f"${ENVIRONMENT_PREFIX}RESULTS_DIR, else ./{default}"
    elif isinstance(default, enum.Enum):
        shown = str(default.value)
    elif isinstance(default, tuple):
        shown = " ".join(default)
    elif isinstance(default, (dict, types.NoneType)):
        shown = ""
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    return _escaped(f"{description} (default: {shown})" if shown else description)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


class _Given(argparse.Action):
    """Stores a value, a further one, or True, and notes in the namespace that the argument was given.

    argparse calls an action only for what stood on the command line; it sets defaults without one.
    """

    def __init__(self, *, switch: bool = False, repeat: bool = False, **keywords: Any) -> None:  # noqa: ANN401 - argparse's own keywords
        if switch:
            keywords |= {"nargs": 0, "default": False}
        super().__init__(**keywords)
        self._switch = switch
        self._repeat = repeat

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - as argparse calls it
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - as argparse calls it
    ) -> None:
        value: object = True if self._switch else values
        if self._repeat:
            value = [*(getattr(namespace, self.dest) or []), values]
        setattr(namespace, self.dest, value)
        setattr(namespace, GIVEN, (*getattr(namespace, GIVEN, ()), self.dest))
