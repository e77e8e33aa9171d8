"""The command line in two passes: the NAMEs choose the classes, then tyro reads the flags that those classes have.

Precedence, low to high: dataclass defaults < YAML (``--config FILE``) < a NAME (``--objective flow``: always resets its
block to that class's defaults) < dotted flags (``--objective.std 2``). Order on the command line does not matter,
except that the last of two equal flags holds.

tyro knows the grammar (which flags there are, how many values each takes, what they look like, ``--help``); the values
themselves go through the same check as YAML. So a mistake reads the same wherever it was made.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import operator
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
)

from genkit.config.blocks import (
    ABSENT,
    Block,
    ConfigError,
    check,
    fields,
    from_dict,
    hints,
    join,
    load,
    load_yaml,
    name_of,
    outline,
    tables,
)

T = TypeVar("T")


def parse(
    cls: Callable[..., T],
    argv: Sequence[str],
    prog: str = "genkit",
    description: str | None = None,
    under: Mapping[str, Any] | None = None,
) -> T:
    """The ``cls`` that ``argv`` asks for. ``ConfigError`` for a user's mistake; ``--help`` prints and exits with 0.

    ``under`` are settings that stand in for the defaults: a file and the flags go before them.
    """
    file = peek(argv, "config")
    tree = over(under or {}, load_yaml(file) if file else {})
    flags: set[str] = set()  # the dotted paths that the command line gives
    try:
        block = choose(cast(type, cls), tree, argv, flags)
        for path, value in Flags(block, wants_help(argv)).read(argv, prog, description).items():
            put(tree, path, value)
            flags.add(path)
        return from_dict(cls, tree)
    except ConfigError as e:
        raise locate(e, file, tree, flags) from None


def over(below: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree``, and what it does not mention from ``below``. A block with a name of its own is taken whole."""
    out = dict(below)
    for key, value in tree.items():
        changes = isinstance(value, Mapping) and "name" not in value and isinstance(out.get(key), Mapping)
        out[key] = over(out[key], value) if changes else value
    return out


def locate(e: ConfigError, file: str | None, tree: Mapping[str, Any], flags: set[str]) -> ConfigError:
    """The same mistake, with the flag or the file that made it."""
    path, *index = re.split(r"(?=\[)", e.path)
    if path in flags:
        return ConfigError(flag(path) + "".join(index), e.problem)
    related = any(f"{path}.".startswith(f"{x}.") or x.startswith(f"{path}.") for x in flags)
    in_file = mentions(tree, path) or mentions(tree, path.rpartition(".")[0])
    return ConfigError(f"{file}: {e.path}", e.problem) if file and in_file and not related else e


def mentions(tree: object, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in map(str, tree):
            return False
        tree = tree.get(name)
    return True


# ----------------------------------------------------------------------------------------- pass 1: the NAMEs
def choose(cls: type, tree: dict[str, Any], argv: Sequence[str], flags: set[str]) -> Block:
    """Put the NAMEs of ``argv`` into ``tree``, outer tables first, and return the outline that this gives."""
    block = Block(cls, {})
    while True:
        before = list(tables(block))
        for path in before:
            name = peek(argv, path)
            if name is not None and path not in flags:
                put(tree, path, {"name": name})
                flags.add(path)
        block = outline(cls, tree)
        if list(tables(block)) == before:
            return block


def peek(argv: Sequence[str], path: str) -> str | None:
    """The last value of ``--path VALUE`` or ``--path=VALUE``."""
    found = None
    for token, following in itertools.zip_longest(argv, argv[1:]):
        if token == "--":
            break
        name, equals, value = token.partition("=")
        if path_of(name) == path:
            found = value if equals else following if following and not is_flag(following) else None
    return found


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """``tree[a][b][c] = value`` for the path "a.b.c"; a NAME on the way becomes a block."""
    *blocks, last = path.split(".")
    for name in blocks:
        inner = tree.get(name, {})
        tree[name] = dict(inner) if isinstance(inner, Mapping) else {"name": inner}
        tree = tree[name]
    tree[last] = value


def flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def path_of(token: str) -> str | None:
    return token[2:].replace("-", "_") if token.startswith("--") else None


def wants_help(argv: Sequence[str]) -> bool:
    """Whether tyro will print, and exit: help, or a script for the shell's completion."""
    options = itertools.takewhile(lambda token: token != "--", argv)
    return any(token in ("-h", "--help") or token.startswith("--tyro-") for token in options)


def is_flag(token: str) -> bool:
    return token.startswith("-") and token.lstrip("-")[:1].isalpha()


def no(path: str) -> str:
    """``data.flip`` -> ``data.no_flip``, the switch that turns it off."""
    return re.sub(r"([^.]+)$", r"no_\1", path)


# ---------------------------------------------------------------------------------------- pass 2: the flags
class Given(tuple):
    """The values of one flag, as text. Whatever is not ``Given`` in tyro's answer is a default."""


def syntax(hint: Any) -> PrimitiveConstructorSpec:
    """How tyro reads and describes a value of type ``hint``."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), f"tyro has no syntax for {hint}"
    return spec


def as_text(hint: Any) -> Any:
    """``hint`` for tyro, which shall hand on the text: values are refused in one place, by ``check``."""
    spec = syntax(hint)
    plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    text = replace(spec, instance_from_str=Given, choices=None)
    return Annotated[(plain | None, *marks, text)]  # pyright: ignore[reportReturnType]  # None: see Flags.required


@dataclass(frozen=True)
class Leaf:
    """One setting on the command line: its type, and its value without a flag."""

    hint: Any
    value: Any

    def read(self, given: Given) -> Any:
        """The value that tyro makes of the text; where it cannot, the text, as YAML would hold it."""
        spec = syntax(self.hint)
        with contextlib.suppress(ValueError):
            return spec.instance_from_str(list(given))
        return given[0] if len(given) == 1 and spec.nargs != "*" else list(given)


class Flags:
    """The flags that a configuration has. tyro sees a stand-in type for each block, and fills it as a plain dict."""

    def __init__(self, block: Block, help: bool):
        self.required = MISSING_NONPROP if help else None  # an error of from_dict's is clearer than one of tyro's
        self.leaves: dict[str, Leaf] = {}
        self.tables: list[str] = []
        self.specs: dict[type, StructConstructorSpec] = {}
        config = self.text("config", "config", "FILE", None, "Settings, in YAML.")
        self.root = self.block(block, "", [config])

    def block(self, block: Block, path: str, out: list[StructFieldSpec]) -> type:
        docs = field_docs(block.cls)
        for name, f in fields(block.cls).items():
            here, value, doc = join(path, name), block.values.get(name, ABSENT), docs.get(name)
            if "table" in f.metadata:
                self.tables.append(here)
                names = "{" + ",".join(load(f.metadata["table"])) + "}"
                out.append(self.text(f"{name} NAME", name, names, name_of(f.metadata, value.cls), doc))
                kind: Any = self.block(value, here, [])
                value, doc = kind(), (inspect.getdoc(value.cls) or "").partition("\n")[0]
            else:
                leaf = self.leaves[here] = Leaf(hints(block.cls)[name], value)
                kind = bool if leaf.hint is bool else as_text(leaf.hint)
            out.append(StructFieldSpec(name, kind, self.required if value is ABSENT else value, doc))
        stand_in = type(block.cls.__name__, (), {})
        self.specs[stand_in] = StructConstructorSpec(dict, tuple(out))
        return stand_in

    def text(self, key: str, name: str, metavar: str, value: str | None, doc: str | None) -> StructFieldSpec:
        """A flag that pass 1 has read already. tyro sees it for ``--help``, and to know that it takes a value."""
        hint = Annotated[as_text(str | None), tyro.conf.arg(name=name, metavar=metavar)]
        return StructFieldSpec(key, cast(Any, hint), value, doc)

    def read(self, argv: Sequence[str], prog: str, description: str | None) -> dict[str, Any]:
        """The settings that ``argv`` gives, by their dotted paths."""
        registry = ConstructorRegistry()
        registry.struct_rule(lambda info: self.specs.get(info.type))
        answer, left = tyro.cli(
            self.root,
            args=self.spell(argv),
            prog=prog,
            description=description,
            registry=registry,
            return_unknown_args=True,
            config=(tyro.conf.PositionalMetavarFromFieldName,),
        )
        if left:
            raise ConfigError("", f"unexpected argument {left[0]!r}; see {prog} --help")
        out = {}
        for path, leaf in self.leaves.items():
            value = functools.reduce(operator.getitem, path.split("."), answer)
            if isinstance(value, Given):
                out[path] = leaf.read(value)
            elif leaf.hint is bool and value != leaf.value:
                out[path] = value
        return out

    def spell(self, argv: Sequence[str]) -> list[str]:
        """``argv`` with ``--flip=false`` as ``--no-flip``. Unknown flags and missing values are errors here."""
        argv = list(argv)
        if wants_help(argv):
            return argv
        end = argv.index("--") if "--" in argv else len(argv)
        switches = {path for path, leaf in self.leaves.items() if leaf.hint is bool}
        for i, token in enumerate(argv[:end]):
            name, equals, value = token.partition("=")
            path = path_of(name)
            if path is None or path in map(no, switches):
                continue
            if path in switches:
                if equals:
                    argv[i] = flag(path if check(bool, value, flag(path)) else no(path))
            elif path in self.leaves or path in self.tables or path == "config":
                need = syntax(self.leaves[path].hint).nargs if path in self.leaves else 1
                given = itertools.takewhile(lambda token: not is_flag(token), argv[i + 1 : end])
                have = len(list(given)) + bool(equals)
                if isinstance(need, int) and have < need:
                    raise ConfigError("", f"{name} needs {need} value{'s' * (need > 1)}, given {have}")
            else:
                raise ConfigError("", f"unknown option {name}{self.near(path)}")
        return argv

    def near(self, path: str) -> str:
        """A flag that ``path`` may have meant: one of the same block, else one of the same name elsewhere."""
        block, _, leaf = path.rpartition(".")
        known = [*self.leaves, *self.tables]
        here = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == block}
        everywhere = {p.rpartition(".")[2]: p for p in reversed(known)}
        close = difflib.get_close_matches(leaf, here, 1) or difflib.get_close_matches(leaf, everywhere, 1)
        return f"; did you mean {flag({**everywhere, **here}[close[0]])}?" if close else "; see --help"


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The text under, or behind, each field in the source of a dataclass and its bases."""
    docs = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(cast(type, base)))
        except OSError:  # a class typed at a prompt
            continue
        body = cast(ast.ClassDef, ast.parse(source).body[0]).body
        for field, after in itertools.zip_longest(body, body[1:]):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
                case ast.AnnAssign(target=ast.Name(id=name), end_lineno=int(line), end_col_offset=int(column)), _:
                    rest = source.splitlines()[line - 1].encode()[column:].decode()
                    docs[name] = rest.partition("#")[2].strip()
    return docs
