"""The terms of the data that all rooms share, and settings: frozen dataclasses, nested by room, one beside its user.

    changed(profile, histogram__weight=0.0)         one field of a part, by scikit-learn's double underscore
    with_settings(profile, "histogram.weight=0")    the same from text, checked against the field's type

The presets (`quick`, `paper`, …) stand in `notebooks/study/profiles.py`.
"""

import ast
import dataclasses
import shlex
import types
import typing

SUBTYPES = ("solid", "part-solid", "ground-glass")  # labels 0, 1, 2 (Section 5)
SIZE_BINS_MM = ((6.0, 10.0), (10.0, 20.0), (20.0, 30.0))  # columns of Fig. 4, rows of Table 3
HU_MIN, HU_MAX = -1000.0, 1000.0  # intensity window of the model (Section 5)
HIST_HU_MIN, HIST_HU_MAX = -1000.0, 400.0  # HU range of c_hist (Section 5)

Config = typing.TypeVar("Config")


def changed(config: Config, **changes) -> Config:
    """The settings with some fields changed: ``part__field=value``, or ``field=value`` of `config` itself.

    Raises:
        ValueError: unknown field (a misspelt one must not be ignored).
    """
    parts: dict[str, dict] = {}
    for name, value in changes.items():
        first, _, rest = name.partition("__")
        if first not in {f.name for f in dataclasses.fields(config)}:
            raise ValueError(f"unknown setting {name.replace('__', '.')!r}; {_known(config)}")
        parts.setdefault(first, {})[rest] = value
    new = {}
    for first, inner in parts.items():
        part = getattr(config, first)
        if dataclasses.is_dataclass(part) != ("" not in inner):
            whole = "is a part; give one of its fields" if "" in inner else "has no fields"
            raise ValueError(f"{first} {whole}")
        new[first] = inner[""] if "" in inner else changed(part, **inner)
    return dataclasses.replace(config, **new)


def with_settings(config: Config, text: str) -> Config:
    """The settings with those of a text, as ``make reproduce SET="histogram.weight=0 unet.channels=32,64"`` gives them.

    Raises:
        ValueError: not of the form part.field=value, unknown field, or a value of another type.
    """
    changes = {}
    for word in shlex.split(text):
        path, given, value = word.partition("=")
        if not given:
            raise ValueError(f"setting {word!r}: give part.field=value, as in histogram.weight=0")
        owner, (*parts, name) = config, path.split(".")
        for part in parts:
            owner = getattr(owner, part, None)
        if not dataclasses.is_dataclass(owner) or name not in {f.name for f in dataclasses.fields(owner)}:
            known = owner if dataclasses.is_dataclass(owner) else config
            raise ValueError(f"unknown setting {path!r}; {_known(known)}")
        changes[path.replace(".", "__")] = _value(value, typing.get_type_hints(type(owner))[name], path)
    return changed(config, **changes)


def _known(config: object) -> str:
    return "known are " + ", ".join(f.name for f in dataclasses.fields(config))


def _value(text: str, wanted: type, path: str) -> object:
    """The text as a value of the annotated type: 0, 1.5, True, None, 32,64 or a word."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is str:
            return text
        if kind is tuple and not isinstance(value, str | tuple):
            value = (value,)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind:
            return value
    raise ValueError(f"setting {path}={text}: give {' or '.join(getattr(o, '__name__', str(o)) for o in options)}")


def from_header(kind: type[Config], stored: dict) -> Config:
    """Settings as a checkpoint's JSON header stores them; what it lacks takes its default, what is unknown is passed over."""
    hints, values = typing.get_type_hints(kind), {}
    for name in {f.name for f in dataclasses.fields(kind)} & stored.keys():
        value = stored[name]
        if dataclasses.is_dataclass(hints[name]):
            value = from_header(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
