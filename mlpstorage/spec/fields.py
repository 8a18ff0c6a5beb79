"""How a spec's fields meet the outside: each field's flag beside it, and values from five sources merged.

Precedence: flag, environment, config file, profile, default.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, UsageError

ENVIRONMENT_PREFIX = "MLPSTORAGE_"
"""An option `--some-name` is also read from the environment variable `MLPSTORAGE_SOME_NAME`."""

NONE = "none"
"""With this word a value that may be None is None, whatever a profile or a config file says."""

Source = Literal["flag", "env", "file", "profile", "default", "auto"]
"""Where a parameter's value came from. `auto`: worked out from the machine or from other parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What the command line needs to know of a field, beside its type, default and description.

    Attributes:
        flags: Flag names, the long one first.
        group: Heading under which `--help` shows it.
        metavar: Name of the value in `--help`.
        commands: Commands that take it.
        default_text: What `--help` says of a default that is worked out.
        rank: Whether a rank's own command line carries it.
        nargs: As of argparse, where the flag takes several values.
        repeat: Whether the flag may be given several times, each adding to the value.
        choices: The values that there are, where the field's type does not tell them.
        none: Whether the word `none` stands for None.
    """

    flags: tuple[str, ...]
    group: str
    metavar: str | None = None
    commands: tuple[str, ...] = ("run",)
    default_text: str | None = None
    rank: bool = True
    nargs: str | None = None
    repeat: bool = False
    choices: tuple[str, ...] | None = None
    none: bool = False


class Spec(BaseModel):
    """Base of all specs: frozen, unknown keys forbidden, finite numbers only."""

    # A field may begin with `model_`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The fields that have a flag, in their order."""
        found = {}
        for name, field in cls.model_fields.items():
            for item in field.metadata:
                if isinstance(item, Option):
                    found[name] = item
        return found

    @classmethod
    def profile_values(cls, given: Mapping[str, Any]) -> Mapping[str, object]:  # noqa: ARG003 - for those that have profiles
        """Values that stand between the defaults and the config file, for fields that were not given.

        Args:
            given: What flags, environment and config file say, unchecked.
        """
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_value(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("takes a value, not true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object, info: ValidationInfo) -> object:
        if value != NONE:
            return value
        option = cls.options().get(str(info.field_name))
        return None if option is not None and option.none else value


SpecT = TypeVar("SpecT", bound=Spec)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[SpecT]):
    """A spec and the source of each of its values."""

    spec: SpecT
    sources: Mapping[str, Source]


def resolve(
    model: type[SpecT],
    args: Namespace,
    *,
    environment: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Resolved[SpecT]:
    """Merge flags, environment, config file, profile and defaults into a checked spec.

    Args:
        model: The spec to build.
        args: Parsed flags. Where it has `given` (our parser adds it), only the names in it count as given, so that a
            parser's defaults never override a config file; a namespace made by a script counts wherever it is not None.
        environment: The environment; None for the process's own.
        config_file: A YAML file of the fields' names and values.

    Raises:
        UsageError: A flag's value is out of range.
        ConfigurationError: A value of the environment or the config file is, or a key is unknown.
        MissingFileError: The config file is not there.
        AccessError: The config file cannot be read.
    """
    surroundings = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(model.model_fields, "default")
    layers: tuple[tuple[Source, Mapping[str, Any]], ...] = (
        ("file", _file_values(config_file, model)),
        ("env", _environment_values(model, surroundings)),
        ("flag", _flag_values(model, args)),
    )
    for source, layer in layers:
        for name, value in layer.items():
            values[name] = value
            sources[name] = source
    for name, value in model.profile_values(values).items():
        if name not in values:
            values[name] = value
            sources[name] = "profile"
    try:
        spec = model.model_validate(values)
    except ValidationError as error:
        raise _explained(error, model, sources, config_file) from None
    for name, source in sources.items():
        if source == "default" and not _is_default(model, name, getattr(spec, name)):
            sources[name] = "auto"
    return Resolved(spec, sources)


def flag_of(model: type[Spec], name: str) -> str:
    """The long flag of a field."""
    return model.options()[name].flags[0]


def environment_variable(model: type[Spec], name: str) -> str:
    """The environment variable of a field."""
    return ENVIRONMENT_PREFIX + outside_name(model, name).upper()


def outside_name(model: type[Spec], name: str) -> str:
    """What a field is called in a config file, the environment and a namespace: its flag, as a name.

    That is the field's own name, but where a model may not have such a field.
    """
    option = model.options().get(name)
    return name if option is None else option.flags[0].removeprefix("--").replace("-", "_")


def number_text(value: float) -> str:
    """A number as one would write it; it reads back to the last bit."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _flag_values(model: type[Spec], args: Namespace) -> dict[str, Any]:
    given = vars(args)
    known = {
        name: given[outside]
        for name in model.model_fields
        if given.get(outside := outside_name(model, name)) is not None
    }
    if not hasattr(args, "given"):
        return known
    # What a script has changed since the parser ran counts as given, too.
    return {
        name: value
        for name, value in known.items()
        if outside_name(model, name) in args.given or not _is_default(model, name, value)
    }


def _is_default(model: type[Spec], name: str, value: object) -> bool:
    default = model.model_fields[name].get_default(call_default_factory=True)
    return value == default or (isinstance(value, list) and isinstance(default, tuple) and tuple(value) == default)


def _environment_values(model: type[Spec], environment: Mapping[str, str]) -> dict[str, str]:
    names = {name: environment_variable(model, name) for name in model.options()}
    return {name: environment[variable] for name, variable in names.items() if environment.get(variable)}


def _file_values(path: Path | None, model: type[Spec]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"--config-file: {path} is not there") from None
    except OSError as error:
        raise AccessError(f"--config-file: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigurationError(f"--config-file: {path} is not YAML: {detail}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigurationError(f"--config-file: {path} must hold `name: value` lines, one an option")
    names = {outside_name(model, name): name for name in model.options()}
    unknown = sorted(str(key) for key in document if key not in names)
    if unknown:
        known = ", ".join(sorted(names))
        raise ConfigurationError(f"--config-file: {path}: unknown key {', '.join(unknown)}; known are {known}")
    return {names[key]: value for key, value in document.items()}


def _explained(
    error: ValidationError, model: type[Spec], sources: Mapping[str, Source], config_file: Path | None
) -> MLPStorageError:
    """The first problem as one line that names where the value came from and what is allowed."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    message = _plain(problem)
    if name not in model.options():
        return UsageError(message)
    flag = flag_of(model, name)
    match sources.get(name):
        case "env":
            return ConfigurationError(f"environment variable {environment_variable(model, name)} ({flag}): {message}")
        case "file":
            return ConfigurationError(f"{config_file}: {outside_name(model, name)} ({flag}): {message}")
        case _:
            return UsageError(f"{flag}: {message}")


def _plain(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    value = problem["input"]
    return f"{text} (got {value!r})" if isinstance(value, (str, int, float)) else text
