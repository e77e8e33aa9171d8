"""From plain mappings to frozen dataclasses and back: the one door for YAML, the command line and saved runs.

A *table* is a field whose value is an object of one of several dataclasses. Its metadata names them:

    path: Path = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})

``table``     "module:NAME" of the registry, a plain dict name -> dataclass, imported when it is first needed;
``kind``      "module:Class", which dataclasses from outside have to be subclasses of;
``fallback``  "module:function", called with a NAME that is not in the registry but exists on disk; returns
              ``(registry name, its settings)``: so a bare folder can be a dataset;
``follows``   "field.attribute": without a NAME, the class is the one that this attribute of a sibling's class names.

A field that is no table may follow too: then that attribute is a mapping, which may hold a default for the field.

In YAML a table is a NAME or a block: ``path: vp`` or ``path: {name: vp, beta_max: 10}``. A block without ``name``
changes the settings of the default. A NAME may also be ``package.module:Class``, a dataclass from outside; nothing else
that stands in a configuration is ever imported or executed.
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
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import pydantic
import yaml

T = TypeVar("T")
ABSENT: Any = dataclasses.MISSING


class ConfigError(ValueError):
    """A mistake in a configuration, in one line. ``path`` is the dotted path of the setting, ``problem`` the rest."""

    def __init__(self, path: str, problem: str):
        super().__init__(" ".join(f"{path}: {problem}".split()) if path else " ".join(problem.split()))
        self.path, self.problem = path, problem


def suggest(given: object, allowed: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing where no allowed name is close."""
    close = difflib.get_close_matches(str(given), list(allowed), 1)
    return f"; did you mean {close[0]}?" if close else ""


short = reprlib.Repr()
short.maxstring = short.maxother = 100
show = short.repr


# ----------------------------------------------------------------------------------------------- the classes
def fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of the fields. Those of tables are not evaluated: their names may exist for type checkers only."""
    tables = {f.type: Any for f in dataclasses.fields(cls) if "table" in f.metadata and isinstance(f.type, str)}
    return typing.get_type_hints(cls, localns=tables, include_extras=True)


def load(where: str) -> Any:
    """The object that ``"module:NAME"`` names."""
    module, _, name = where.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def lookup(meta: Mapping[str, Any], name: object, path: str) -> tuple[type, dict[str, Any]]:
    """The dataclass that ``name`` means in this table, and settings that come with it."""
    registry = load(meta["table"])
    known = {k.replace("_", "-"): cls for k, cls in registry.items()}
    if str(name).replace("_", "-") in known:
        return known[str(name).replace("_", "-")], {}
    if "fallback" in meta and isinstance(name, str) and "\0" not in name and os.path.exists(name):
        try:
            found, settings = load(meta["fallback"])(name)
        except ValueError as e:
            raise ConfigError(path, str(e)) from e
        return registry[found], settings
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return outside(name, path, load(meta["kind"]) if "kind" in meta else object), {}
    allowed = [*registry, "package.module:Class", *(["a path that exists"] if "fallback" in meta else [])]
    raise ConfigError(path, f"given {show(name)}; allowed: {', '.join(allowed)}{suggest(name, registry)}")


def outside(name: str, path: str, kind: type) -> type:
    """The dataclass ``package.module:Class``. An error inside that module is its author's, and keeps its traceback."""
    try:
        cls = load(name)
    except ModuleNotFoundError as e:
        if not name.startswith(e.name or "\0"):
            raise
        raise ConfigError(path, f"given {name}; there is no module {e.name}; is it on PYTHONPATH?") from None
    except AttributeError:
        raise ConfigError(path, f"given {name}; the module has no such class") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(path, f"given {name}; needs a dataclass, and this is a {type(cls).__name__}")
    if not issubclass(cls, kind):
        raise ConfigError(path, f"given {name}; needs a subclass of {kind.__module__}.{kind.__name__}")
    return cls


# ------------------------------------------------------------------------------- mapping -> outline -> object
@dataclasses.dataclass(frozen=True)
class Block:
    """A class and checked values for its fields, not yet an object; the values of its tables are blocks."""

    cls: type
    values: dict[str, Any]


def from_dict(cls: Callable[..., T], tree: object) -> T:
    """The object that ``tree`` describes; what it does not mention stays at its default."""
    return build(outline(cast(type, cls), tree))


def override(cfg: T, **changes: Any) -> T:
    """``cfg`` with some settings changed, checked as those of a file. A table takes a name, a block or an object."""
    return build(outline(type(cfg), changes, base=as_block(cfg)))


def narrow(cfg: Any, base: type[T]) -> T:
    """The fields of ``cfg`` that its base class ``base`` has, as an object of that class."""
    return base(**{name: getattr(cfg, name) for name in fields(base)})


def outline(cls: type, tree: object, path: str = "", base: Block | None = None) -> Block:
    """``tree`` checked against the fields of ``cls``; what it does not mention comes from ``base``, or the defaults."""
    if not isinstance(tree, Mapping):
        raise ConfigError(path, f"given {show(tree)}; needs a mapping of settings")
    known = fields(cls)
    for key in tree:
        if key not in known:
            allowed = ", ".join(known) or f"nothing, {cls.__name__} has no settings"
            raise ConfigError(join(path, str(key)), f"unknown; allowed here: {allowed}{suggest(key, known)}")
    values: dict[str, Any] = {}
    for name, f in sorted(known.items(), key=lambda item: "follows" in item[1].metadata):  # followers last
        given, here = tree.get(name, ABSENT), join(path, name)
        value = base.values.get(name, ABSENT) if base else default(f)
        if "table" in f.metadata:
            if "follows" in f.metadata and not base:
                value = follow(f.metadata, values, here, value)
            value = outline_table(f.metadata, given, here, value)
        elif given is not ABSENT:
            value = check(hints(cls)[name], given, here)
        elif "follows" in f.metadata and not base:
            value = suggested(f.metadata, values, name, value)
        values[name] = value
    return Block(cls, {name: values[name] for name in known if values[name] is not ABSENT})


def outline_table(meta: Mapping[str, Any], given: object, path: str, value: Any) -> Any:
    """The block that ``given`` makes of a table; ``value`` is the block that it changes if it has no NAME."""
    if given is ABSENT:
        given = {}
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return outline_object(meta, given, path)
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise ConfigError(path, f"given {show(given)}; needs a name or a block like {{name: ..., setting: ...}}")
    rest = {k: v for k, v in given.items() if k != "name"}
    if "name" in given:
        cls, settings = lookup(meta, given["name"], path)
        return outline(cls, {**settings, **rest}, path)
    if value is ABSENT:
        raise ConfigError(path, f"needs a name; allowed: {', '.join(load(meta['table']))}")
    return outline(value.cls, rest, path, value)


def outline_object(meta: Mapping[str, Any], given: Any, path: str) -> Block:
    """The block of an object that stands for itself, as in Python: ``TrainSettings(objective=Flow())``."""
    kind = load(meta["kind"]) if "kind" in meta else object
    if not isinstance(given, kind):
        raise ConfigError(path, f"given {show(given)}; needs a {kind.__name__}")
    return as_block(given)


def follow(meta: Mapping[str, Any], values: Mapping[str, Any], path: str, value: Any) -> Any:
    sibling, attribute = meta["follows"].split(".")
    name = getattr(values[sibling].cls, attribute, ABSENT)  # a class from outside need not say
    return value if name is ABSENT else outline_table(meta, name, path, value)


def suggested(meta: Mapping[str, Any], values: Mapping[str, Any], name: str, value: Any) -> Any:
    sibling, attribute = meta["follows"].split(".")
    return getattr(values[sibling].cls, attribute, {}).get(name, value)


def default(f: dataclasses.Field) -> Any:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return as_block(value) if "table" in f.metadata and value is not ABSENT else value


def as_block(obj: Any) -> Block:
    values = {name: getattr(obj, name) for name in fields(type(obj))}
    inner = {name: as_block(values[name]) for name, f in fields(type(obj)).items() if "table" in f.metadata}
    return Block(type(obj), {**values, **inner})


def build(block: Block, path: str = "") -> Any:
    """The object, or ``ConfigError`` where a value is missing or the class itself refuses them."""
    values = {k: build(v, join(path, k)) if isinstance(v, Block) else v for k, v in block.values.items()}
    for name in fields(block.cls):
        if name not in values:
            raise ConfigError(join(path, name), "is missing, and has no default")
    try:
        return block.cls(**values)
    except ValueError as e:
        raise ConfigError(path, str(e)) from e


def tables(block: Block, path: str = "") -> Iterator[str]:
    """The dotted paths of all tables, outer ones first; ``block`` may lack some."""
    for name, f in fields(block.cls).items():
        if "table" in f.metadata:
            yield join(path, name)
            if name in block.values:
                yield from tables(block.values[name], join(path, name))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -------------------------------------------------------------------------------------------- single settings
@functools.cache
def adapter(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def check(hint: Any, given: object, path: str) -> Any:
    """``given`` as a value of type ``hint``. Text may be a number ("1e-4" is text in YAML), a bool may not."""
    if has_bool(given) and bool not in atoms(hint):
        raise ConfigError(path, f"given {show(given)}; needs {words(hint)}")
    try:
        return adapter(hint).validate_python(given)
    except pydantic.ValidationError as e:
        errors = e.errors(include_url=False)
    where = path + "".join(f"[{i}]" for i in errors[0]["loc"] if isinstance(i, int))
    problems = dict.fromkeys(re.sub("^(Input|Value) ", "", x["msg"]).replace("Tuple", "the list") for x in errors)
    names = re.findall("'([^']*)'", str(errors[0].get("ctx", {}).get("expected", "")))
    optional = " (or null)" if type(None) in atoms(hint) else ""
    problem = f"given {show(errors[0]['input'])}; {' or '.join(problems)}{optional}{suggest(errors[0]['input'], names)}"
    raise ConfigError(where, problem)


def atoms(hint: Any) -> set[Any]:
    """The types that ``hint`` is made of: ``tuple[int | None, ...]`` gives tuple, int, NoneType."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(x) for x in typing.get_args(hint)}
    return {typing.get_origin(hint) or hint}.union(*map(atoms, typing.get_args(hint)))


def words(hint: Any) -> str:
    nouns = {int: "an integer", float: "a number", str: "text", type(None): "null", tuple: "a list"}
    return " or ".join(nouns[t] for t in nouns if t in atoms(hint)) or str(hint)


def has_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(isinstance(v, bool) for v in value))


# ----------------------------------------------------------------------------------------- object -> mapping
def dump(cfg: Any) -> dict[str, Any]:
    """``cfg`` as YAML can hold it: ``from_dict(type(cfg), dump(cfg)) == cfg``."""
    return {name: dump_field(f, getattr(cfg, name)) for name, f in fields(type(cfg)).items()}


def dump_field(f: dataclasses.Field, value: Any) -> Any:
    return {"name": name_of(f.metadata, type(value)), **dump(value)} if "table" in f.metadata else plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def name_of(meta: Mapping[str, Any], cls: type) -> str:
    """The name of ``cls`` in its table, ``package.module:Class`` for one from outside."""
    return next((k for k, v in load(meta["table"]).items() if v is cls), f"{cls.__module__}:{cls.__qualname__}")


def to_yaml(cfg: Any) -> str:
    tree = dump(cfg)
    nested = any(isinstance(v, (dict, list)) for v in tree.values())
    style = None if nested else False  # None: the innermost collections, and only they, on one line
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=style, width=110)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys, without that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = yaml.load(f, Loader)
    except OSError as e:
        raise ConfigError(str(path), f"cannot be read ({e.strerror})") from None
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}{line}", f"not valid YAML: {e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(str(path), f"not valid YAML: {e}") from None
    if not isinstance(tree, (dict, type(None))):
        raise ConfigError(str(path), f"given {show(tree)}; a configuration is a mapping such as 'steps: 1000'")
    return tree or {}
