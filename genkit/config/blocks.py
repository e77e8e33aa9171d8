"""Conversion between plain mappings and frozen dataclasses. YAML, the command line and saved runs all go through it.

A *table* is a field whose value is an instance of one of several dataclasses. Its metadata names them:

    path: ProbabilityPath = table("genkit.diffusion.paths:PATHS", "linear")

``table``     "module:NAME" of the registry, a plain dict name -> dataclass, imported when it is first needed;
``kind``      "module:Class", the base class that external dataclasses must derive from;
``adapt``     "module:function", called with an external class, or an object given in Python, which is of another kind
              (a data set of torch); it returns a dataclass or an object of one;
``fallback``  "module:function", called with a name that is not in the registry but exists as a path. It returns
              ``(registry name, settings)``; this is how a bare folder can be a data set;
``follows``   "field.attribute": if no name is given, the class is the one that this attribute of a sibling field's
              class names.

The attribute may also be a mapping that may hold a default for the field, which need not be a table then. Of several
``follows``, separated by spaces, the last that has a default counts.

In YAML a table is a name or a block: ``path: vp`` or ``path: {name: vp, beta_max: 10}``. A block without ``name``
changes settings of the default. A name may also be ``package.module:Class``, an external dataclass. Nothing else in
a configuration is ever imported or executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import operator
import os
import re
import reprlib
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import pydantic
import yaml

T = TypeVar("T")
MAX_INT = 2**62  # leaves room for the sum of a seed and a row within 64 bits
MAX_FLOAT = 1e30  # leaves room for a product with 1e8 within 32 bits
ABSENT: Any = dataclasses.MISSING  # "no value given", where None is a value


class ConfigError(ValueError):
    """An error in a configuration, in one line: ``path`` is the dotted path of the setting, ``problem`` the rest."""

    def __init__(self, path: str, problem: str):
        super().__init__(" ".join(f"{path}: {problem}".split()) if path else " ".join(problem.split()))
        self.path, self.problem = path, problem


def suggest(given: object, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean X?"``, or an empty string if no allowed name is close to ``given``."""
    close = difflib.get_close_matches(str(given), list(allowed), 1)
    return f"; did you mean {close[0]}?" if close else ""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def abbreviate(value: object) -> str:
    """Return the ``repr`` of ``value``, shortened to fit into an error message."""
    return _REPR.repr(value)


# -------------------------------------------------------------------------------------------------- the classes
def get_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields that the constructor of a dataclass accepts, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@functools.cache
def get_hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields. A table's is ``Any``: its annotation may exist for type checkers only."""
    tables = {f.type: Any for f in dataclasses.fields(cls) if "table" in f.metadata and isinstance(f.type, str)}
    return typing.get_type_hints(cls, localns=tables, include_extras=True)


def load_object(name: str) -> Any:
    """Import the object called ``"module:NAME"``."""
    module, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def find_class(meta: Mapping[str, Any], name: object, path: str) -> tuple[type, dict[str, Any]]:
    """Return the dataclass that ``name`` selects in a table, and the settings that come with that choice."""
    registry = load_object(meta["table"])
    known = {k.replace("_", "-"): cls for k, cls in registry.items()}
    if str(name).replace("_", "-") in known:
        return known[str(name).replace("_", "-")], {}
    if "fallback" in meta and isinstance(name, str) and "\0" not in name and os.path.exists(os.path.expanduser(name)):
        try:
            entry, settings = load_object(meta["fallback"])(name)
        except ValueError as e:
            raise ConfigError(path, str(e)) from e
        return registry[entry], settings
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return load_external_class(name, path, meta), {}
    allowed = [*registry, "package.module:Class", *(["a path that exists"] if "fallback" in meta else [])]
    raise ConfigError(path, f"given {abbreviate(name)}; allowed: {', '.join(allowed)}{suggest(name, registry)}")


def import_external(name: str) -> Any:
    """Import the object ``package.module:NAME``, also from the working directory, which is searched last."""
    try:
        return load_object(name)
    except ModuleNotFoundError as e:
        here = os.getcwd()
        if not name.startswith(e.name or "\0") or here in sys.path:
            raise
    sys.path.append(here)
    importlib.invalidate_caches()
    return load_object(name)


def load_external_class(name: str, path: str, meta: Mapping[str, Any]) -> type:
    """Import the dataclass ``package.module:Class``, which must derive from the class of the table's ``kind``.

    Its ``adapt`` may make one of what is none. An error inside that module is its author's and keeps its traceback.
    """
    kind = load_object(meta["kind"]) if "kind" in meta else object
    try:
        cls = import_external(name)
    except ModuleNotFoundError as e:
        if not name.startswith(e.name or "\0"):
            raise
        raise ConfigError(
            path, f"given {name}; there is no module {e.name} on PYTHONPATH or here, in {os.getcwd()}"
        ) from None
    except AttributeError:
        raise ConfigError(path, f"given {name}; the module has no such class") from None
    if "adapt" in meta:
        try:
            cls = load_object(meta["adapt"])(cls)
        except ValueError as e:
            raise ConfigError(path, f"given {name}; {e}") from e
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(path, f"given {name}, a {type(cls).__name__}; needs a dataclass")
    if not issubclass(cls, kind):
        raise ConfigError(path, f"given {name}; needs a subclass of {kind.__module__}.{kind.__name__}")
    return cls


# ------------------------------------------------------------------------------------- mapping -> block -> object
@dataclasses.dataclass(frozen=True)
class Block:
    """A class and checked values for its fields, before the object is made. The values of its tables are blocks."""

    cls: type
    values: dict[str, Any]


def from_dict(cls: Callable[..., T], tree: object) -> T:
    """Return the ``cls`` that a mapping describes. Settings that it does not mention keep their defaults.

    Raises ``ConfigError`` for an unknown, missing or invalid setting.
    """
    return build(parse_block(cast(type, cls), tree))


def override(cfg: T, **changes: Any) -> T:
    """Return ``cfg`` with some settings changed. A table takes a name, a block or an object.

    Raises ``ConfigError`` for an unknown or invalid setting, as :func:`from_dict` does.
    """
    return build(parse_block(type(cfg), changes, base=as_block(cfg)))


def narrow(cfg: Any, base: type[T]) -> T:
    """Return the settings of ``cfg`` that belong to its base class ``base``, as an instance of that class."""
    return base(**{name: getattr(cfg, name) for name in get_fields(base)})


def parse_block(cls: type, tree: object, path: str = "", base: Block | None = None) -> Block:
    """Check a mapping against the fields of ``cls``. Settings that it lacks come from ``base``, or are the defaults."""
    if not isinstance(tree, Mapping):
        raise ConfigError(path, f"given {abbreviate(tree)}; needs a mapping of settings")
    known = get_fields(cls)
    for key in tree:
        if key not in known:
            allowed = f"allowed: {', '.join(known)}" if known else f"{cls.__name__} has no settings"
            raise ConfigError(join_path(path, str(key)), f"unknown setting; {allowed}{suggest(key, known)}")
    tree = fill_preset(cls, tree, path)
    values: dict[str, Any] = {}
    for name, f in sorted(known.items(), key=lambda item: "follows" in item[1].metadata):  # followers last
        given, inner_path = tree.get(name, ABSENT), join_path(path, name)
        value = base.values.get(name, ABSENT) if base else get_default(f)
        if "table" in f.metadata:
            if "follows" in f.metadata and not base:
                value = follow_class(f.metadata, values, name, inner_path, value)
            value = parse_table(f.metadata, given, inner_path, value)
        elif given is not ABSENT:
            value = check_value(get_hints(cls)[name], given, inner_path)
        elif "follows" in f.metadata and not base:
            value = follow_default(f.metadata, values, name, value)
        values[name] = value
    return Block(cls, {name: values[name] for name in known if values[name] is not ABSENT})


def fill_preset(cls: type, tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return ``tree`` with the settings of the preset that it names, except for those that it gives itself.

    A class with presets has a field ``preset``, and a mapping ``presets`` from names to settings.
    """
    name, presets = tree.get("preset"), getattr(cls, "presets", None)
    if name is None or not presets or "preset" not in get_fields(cls):
        return tree
    if not isinstance(name, str) or name not in presets:
        problem = f"given {abbreviate(name)}; allowed: {', '.join(presets)}{suggest(name, presets)}"
        raise ConfigError(join_path(path, "preset"), problem)
    return {**presets[name], **tree}


def parse_table(meta: Mapping[str, Any], given: object, path: str, value: Any) -> Any:
    """Return the block that ``given`` describes; without a name in it, ``value`` is the block that it changes."""
    if given is ABSENT:
        given = {}
    if "adapt" in meta and not isinstance(given, str | Mapping):
        given = load_object(meta["adapt"])(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return parse_object(meta, given, path)
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise ConfigError(path, f"given {abbreviate(given)}; needs a name or a block like {{name: ..., setting: ...}}")
    rest = {k: v for k, v in given.items() if k != "name"}
    if "name" in given:
        cls, settings = find_class(meta, given["name"], path)
        return parse_block(cls, {**settings, **rest}, path)
    if value is ABSENT:
        raise ConfigError(path, f"needs a name; allowed: {', '.join(load_object(meta['table']))}")
    return parse_block(value.cls, rest, path, value)


def parse_object(meta: Mapping[str, Any], given: Any, path: str) -> Block:
    """Return the block of an object that was given in Python: ``TrainSettings(objective=Flow())``."""
    kind = load_object(meta["kind"]) if "kind" in meta else object
    if not isinstance(given, kind):
        raise ConfigError(path, f"given {abbreviate(given)}; needs a {kind.__name__}")
    return as_block(given)


def follow_class(meta: Mapping[str, Any], values: Mapping[str, Any], name: str, path: str, value: Any) -> Any:
    """Return the default block of a table that ``follows`` siblings, or ``value`` if none names a class for it."""
    default = followed_default(meta, values, name)
    return value if default is ABSENT else parse_table(meta, default, path, value)


def follow_default(meta: Mapping[str, Any], values: Mapping[str, Any], name: str, value: Any) -> Any:
    """Return the default of a field that ``follows`` siblings, or ``value`` if none of their classes has one for it."""
    default = followed_default(meta, values, name)
    return value if default is ABSENT else default


def followed_default(meta: Mapping[str, Any], values: Mapping[str, Any], name: str) -> Any:
    """Return what the last of the followed attributes that has it says of the field ``name``, or ``ABSENT``."""
    found = ABSENT
    for followed in meta["follows"].split():
        sibling, attribute = followed.split(".")
        given = getattr(values[sibling].cls, attribute, ABSENT)  # optional for an external class
        given = given.get(name, ABSENT) if isinstance(given, Mapping) else given
        found = found if given is ABSENT else given
    return found


def get_default(f: dataclasses.Field) -> Any:
    """Return the default of a field, as a block if it is a table; ``ABSENT`` if it has none."""
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return as_block(value) if "table" in f.metadata and value is not ABSENT else value


def as_block(obj: Any) -> Block:
    """Return the block that :func:`build` turns into an equal object."""
    fields = get_fields(type(obj))
    values = {name: getattr(obj, name) for name in fields}
    inner = {name: as_block(values[name]) for name, f in fields.items() if "table" in f.metadata}
    return Block(type(obj), {**values, **inner})


def build(block: Block, path: str = "") -> Any:
    """Create the object. Raises ``ConfigError`` if a value is missing or the class refuses one."""
    values = {k: build(v, join_path(path, k)) if isinstance(v, Block) else v for k, v in block.values.items()}
    for name in get_fields(block.cls):
        if name not in values:
            raise ConfigError(join_path(path, name), "is missing and has no default")
    try:
        return block.cls(**values)
    except ValueError as e:
        raise ConfigError(path, str(e)) from e


def find_tables(block: Block, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of all tables, outer ones first. ``block`` may be incomplete."""
    for name, f in get_fields(block.cls).items():
        if "table" in f.metadata:
            yield join_path(path, name)
            if name in block.values:
                yield from find_tables(block.values[name], join_path(path, name))


def find_settings(block: Block, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted paths of all settings with their types; a table's is None, and its settings follow it."""
    for name, f in get_fields(block.cls).items():
        inner_path = join_path(path, name)
        yield inner_path, None if "table" in f.metadata else get_hints(block.cls)[name]
        if "table" in f.metadata:
            yield from find_settings(block.values[name], inner_path)


def join_path(path: str, name: str) -> str:
    """Append ``name`` to a dotted path."""
    return f"{path}.{name}" if path else name


# ------------------------------------------------------------------------------------------------- single settings
@functools.cache
def make_adapter(hint: Any) -> pydantic.TypeAdapter:
    """Return pydantic's validator for a type. It refuses numbers that are not finite."""
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def check_value(hint: Any, given: object, path: str) -> Any:
    """Convert ``given`` to type ``hint``. Text may stand for a number ("1e-4" is text in YAML), a bool may not.

    Raises ``ConfigError`` if it does not fit the type.
    """
    if contains_bool(given) and bool not in find_types(hint):
        raise ConfigError(path, f"given {abbreviate(given)}; needs {describe_type(hint)}")
    try:
        value = make_adapter(hint).validate_python(given)
    except pydantic.ValidationError as e:
        errors = e.errors(include_url=False)
    else:
        require_machine_numbers(value, path)
        return value
    item_path = path + "".join(f"[{i}]" for i in errors[0]["loc"] if isinstance(i, int))
    other = [error for error in errors if not error["type"].endswith(("_type", "_parsing", "int_from_float"))]
    problems = dict.fromkeys(
        re.sub("^(Input|Value)( error,)? | after validation", "", x["msg"]).replace("Tuple", "the list") for x in other
    )
    names = re.findall("'([^']*)'", str(errors[0].get("ctx", {}).get("expected", "")))
    wrong = errors[0]["input"]
    problems = problems or {f"needs {describe_type(hint, of_item=item_path != path)}": None}
    raise ConfigError(item_path, f"given {abbreviate(wrong)}; {' or '.join(problems)}{suggest(wrong, names)}")


def require_machine_numbers(value: object, path: str) -> None:
    """Raise ``ConfigError`` if a number, or one in a list, is beyond a 64-bit integer or a 32-bit float."""
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ConfigError(path, f"given {abbreviate(value)}; allowed integers up to 2^62")
    if isinstance(value, float) and abs(value) > MAX_FLOAT:
        raise ConfigError(path, f"given {abbreviate(value)}; allowed numbers up to 1e30, which 32 bits can hold")
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            require_machine_numbers(item, f"{path}[{i}]")


def find_types(hint: Any) -> set[Any]:
    """Return the types that ``hint`` is made of: tuple, int and NoneType for ``tuple[int | None, ...]``."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(x) for x in typing.get_args(hint)}
    return {typing.get_origin(hint) or hint}.union(*map(find_types, typing.get_args(hint)))


def describe_type(hint: Any, of_item: bool = False) -> str:
    """Describe a type, or that of the items of a list, in words for an error message: ``"an integer or null"``."""
    nouns = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if not of_item:
        nouns |= {tuple: "a list", type(None): "null"}
    return " or ".join(nouns[t] for t in nouns if t in find_types(hint)) or str(hint)


def contains_bool(value: object) -> bool:
    """Return whether ``value`` is a bool or a list with one in it."""
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(isinstance(v, bool) for v in value))


# --------------------------------------------------------------------------------------------- object -> mapping
def dump(cfg: Any) -> dict[str, Any]:
    """Convert a configuration to values that YAML can hold: ``from_dict(type(cfg), dump(cfg)) == cfg``."""
    return {name: dump_field(f, getattr(cfg, name)) for name, f in get_fields(type(cfg)).items()}


def dump_field(f: dataclasses.Field, value: Any) -> Any:
    """Convert the value of one field; a table becomes a block with its name."""
    if "table" in f.metadata:
        return {"name": find_name(f.metadata, type(value)), **dump(value)}
    return to_plain(value)


def to_plain(value: Any) -> Any:
    """Convert tuples to lists and mappings to dicts, at every depth."""
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def find_name(meta: Mapping[str, Any], cls: type) -> str:
    """Return the name of ``cls`` in its table, or ``package.module:Class`` if it is external."""
    registry = load_object(meta["table"])
    return next((k for k, v in registry.items() if v is cls), f"{cls.__module__}:{cls.__qualname__}")


def to_yaml(cfg: Any) -> str:
    """Format a configuration as YAML, one line per setting or block."""
    tree = dump(cfg)
    nested = any(isinstance(v, (dict, list)) for v in tree.values())
    style = None if nested else False  # None: the innermost collections, and only they, on one line
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=style, width=110)


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error rather than the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a repeated key, then construct the mapping."""
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the mapping in a YAML file. An empty file is an empty mapping.

    Raises ``ConfigError``, with the line number if it is known, if the file cannot be read or is not a mapping.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as f:
            tree = yaml.load(f, UniqueKeyLoader)
    except OSError as e:
        raise ConfigError(str(path), f"cannot be read ({e.strerror})") from None
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}{line}", f"not valid YAML: {e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:  # PyYAML's on tags
        raise ConfigError(str(path), f"not valid YAML: {e}") from None
    if not isinstance(tree, (dict, type(None))):
        raise ConfigError(str(path), f"given {abbreviate(tree)}; a configuration is a mapping such as 'steps: 1000'")
    return tree or {}
