"""The command line in two passes: names select the classes, then tyro reads the flags that those classes have.

Precedence, low to high: dataclass defaults < YAML (``--config FILE``) < a name (``--objective flow``, which resets its
block to that class's defaults) < dotted flags (``--objective.std 2``). The order on the command line does not matter,
except that the last of two equal flags wins.

tyro knows the grammar: which flags exist, how many values each takes, what they look like, ``--help``. The values
themselves pass the same checks as YAML, so a mistake reads the same in both places.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

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
    check_value,
    find_name,
    find_tables,
    find_types,
    from_dict,
    get_fields,
    get_hints,
    join_path,
    load_object,
    load_yaml,
    parse_block,
)
from genkit.config.help_text import add_sentence, describe_bounds, find_marks, format_metavar, read_field_docs
from genkit.config.names import NameIn

T = TypeVar("T")
TRUTH_VALUES = {"true", "false", "yes", "no", "on", "off"}


def parse(
    cls: Callable[..., T],
    argv: Sequence[str],
    prog: str = "genkit",
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Return the ``cls`` that a command line describes.

    ``defaults`` are settings that replace those of the classes; a file and flags take precedence over them. Raises
    ``ConfigError`` for a user's mistake; ``--help`` prints and exits with 0.
    """
    file = peek_option(argv, "config")
    if file == "":
        raise ConfigError("", "--config: given an empty text; name a YAML file (is a variable of the shell unset?)")
    tree = merge_trees(defaults or {}, load_yaml(file) if file else {})
    flags: set[str] = set()  # the dotted paths that the command line gives
    try:
        block = choose_classes(cast(type, cls), tree, argv, flags)
        given = FlagParser(block, wants_help(argv)).read(argv, prog, description)
        clear_presets(tree, block, given)
        for path, value in given.items():
            put_setting(tree, path, value)
            flags.add(path)
        return from_dict(cls, tree)
    except ConfigError as e:
        raise locate_error(e, file, tree, flags) from None


def format_completion(commands: Mapping[str, type | None], shell: str, prog: str) -> str:
    """Return a shell's completion script for a program whose first argument names a command.

    ``commands`` maps each name to the class of its settings, or to None if only the name can be completed. The options
    of blocks are those of the default classes.
    """
    specs: dict[type, StructConstructorSpec] = {}
    kinds = []
    for name, cls in commands.items():
        if cls is None:
            stand_in = type(name, (), {})
            specs[stand_in] = StructConstructorSpec(dict, ())
        else:
            parser = FlagParser(parse_block(cls, {}), help=True, choices=True)
            specs |= parser.specs
            stand_in = parser.root
        kinds.append(Annotated[stand_in, tyro.conf.subcommand(name, prefix_name=False)])
    registry = ConstructorRegistry()
    registry.struct_rule(lambda info: specs.get(info.type))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(
            functools.reduce(operator.or_, kinds),
            args=["--tyro-write-completion", shell, "-"],
            prog=prog,
            registry=registry,
        )
    # fish passes the completer as an argument, of which Linux allows 128 KiB
    return output.getvalue().replace('$python_cmd -c "$pycode"', 'printf "%s" "$pycode" | $python_cmd -')


def merge_trees(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated by ``changes``, block by block. A block with a name replaces the one in ``base``."""
    out = dict(base)
    for key, value in changes.items():
        merged = isinstance(value, Mapping) and "name" not in value and isinstance(out.get(key), Mapping)
        out[key] = merge_trees(out[key], value) if merged else value
    return out


def locate_error(e: ConfigError, file: str | None, tree: Mapping[str, Any], flags: set[str]) -> ConfigError:
    """Return the same error with the flag or the file that caused it."""
    path, *index = re.split(r"(?=\[)", e.path)
    if path in flags:
        return ConfigError(to_flag(path) + "".join(index), e.problem)
    related = any(f"{path}.".startswith(f"{x}.") or x.startswith(f"{path}.") for x in flags)
    in_file = mentions(tree, path) or mentions(tree, path.rpartition(".")[0])
    return ConfigError(f"{file}: {e.path}", e.problem) if file and in_file and not related else e


def mentions(tree: object, path: str) -> bool:
    """Return whether nested mappings have a value at a dotted path."""
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in map(str, tree):
            return False
        tree = tree.get(name)
    return True


# -------------------------------------------------------------------------------------------- pass 1: the names
def choose_classes(cls: type, tree: dict[str, Any], argv: Sequence[str], flags: set[str]) -> Block:
    """Put the names in ``argv`` into ``tree``, outer tables first, and return the block that results."""
    block = Block(cls, {})
    while True:
        before = list(find_tables(block))
        for path in before:
            name = peek_option(argv, path)
            if name is not None and path not in flags:
                put_setting(tree, path, {"name": name})
                flags.add(path)
        block = parse_block(cls, tree)
        if list(find_tables(block)) == before:
            return block


def peek_option(argv: Sequence[str], path: str) -> str | None:
    """Return the last value of ``--path VALUE`` or ``--path=VALUE``, or None. Nothing else is parsed."""
    last = None
    for token, following in itertools.zip_longest(argv, argv[1:]):
        if token == "--":
            break
        name, equals, value = token.partition("=")
        if to_path(name) == path:
            last = value if equals else following if following and not is_flag(following) else None
    return last


def find_given(argv: Sequence[str]) -> set[str]:
    """Return the dotted paths of all options in ``argv``, as they are written. Nothing else is parsed."""
    options = itertools.takewhile(lambda token: token != "--", argv)
    return {path for token in options if (path := to_path(token.partition("=")[0]))}


def put_setting(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``tree[a][b][c] = value`` for the path "a.b.c". A name in between becomes a block."""
    *blocks, last = path.split(".")
    for name in blocks:
        inner = tree.get(name, {})
        tree[name] = dict(inner) if isinstance(inner, Mapping) else {"name": inner}
        tree = tree[name]
    tree[last] = value


def clear_presets(tree: dict[str, Any], block: Block, given: Iterable[str]) -> None:
    """Remove from ``tree`` what a preset on the command line stands for, as flags take precedence over a file."""
    for path in given:
        *names, last = path.split(".")
        values: Any = functools.reduce(lambda v, name: v.get(name) if isinstance(v, Mapping) else None, names, tree)
        presets = getattr(functools.reduce(lambda b, name: b.values[name], names, block).cls, "presets", None)
        if last == "preset" and presets and names and isinstance(values, Mapping):
            filled = set().union(*presets.values())
            put_setting(tree, ".".join(names), {k: v for k, v in values.items() if k not in filled})


def to_flag(path: str) -> str:
    """Return the flag of a dotted path: ``objective.loss_space`` -> ``--objective.loss-space``."""
    return "--" + path.replace("_", "-")


def to_path(token: str) -> str | None:
    """Return the dotted path of a flag, in either spelling; None if ``token`` is not a flag."""
    return token[2:].replace("-", "_") if token.startswith("--") else None


def negate(path: str) -> str:
    """Return the path of the flag that turns a switch off: ``data.flip`` -> ``data.no_flip``."""
    return re.sub(r"([^.]+)$", r"no_\1", path)


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether tyro will print something and exit: help, or a script for the shell's completion."""
    options = itertools.takewhile(lambda token: token != "--", argv)
    return any(token in ("-h", "--help") or token.startswith("--tyro-") for token in options)


def is_flag(token: str) -> bool:
    """Return whether ``token`` is a flag rather than a value, which may be a negative number."""
    return token.startswith("-") and token.lstrip("-")[:1].isalpha()


# ---------------------------------------------------------------------------------------------- pass 2: the flags
class RawValues(tuple):
    """The values of one flag, as text. Anything else in tyro's answer is a default."""


def get_syntax(hint: Any) -> PrimitiveConstructorSpec:
    """Return how tyro reads and describes a value of type ``hint``."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), f"tyro has no syntax for {hint}"
    return spec


def as_raw(hint: Any, choices: bool = False) -> Any:
    """Return ``hint`` such that tyro passes the text on unchecked: ``check_value`` alone refuses values.

    With ``choices``, tyro still knows the names that the text may be.
    """
    spec = get_syntax(hint)
    plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    names = next((tuple(mark.names()) for mark in find_marks(hint) if isinstance(mark, NameIn)), spec.choices)
    known = tuple(name for name in names if name != "None") if choices and names else None
    raw = replace(spec, instance_from_str=RawValues, choices=known, metavar=format_metavar(spec.metavar, hint))
    return Annotated[(plain | None, *marks, raw)]  # pyright: ignore[reportReturnType]  # None: FlagParser.required


# a switch that is neither on nor off unless it is given
UNDECIDED = Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: None)")]


@dataclass(frozen=True)
class Setting:
    """One setting on the command line: its type, and its value if no flag is given."""

    hint: Any
    value: Any

    def read(self, raw: RawValues) -> Any:
        """Return the value that tyro makes of the text. If it cannot, return the text, as YAML would hold it."""
        spec = get_syntax(self.hint)
        optional = type(None) in find_types(self.hint)  # null as YAML has it, None as Python
        with contextlib.suppress(ValueError):
            return spec.instance_from_str(["None" if optional and text == "null" else text for text in raw])
        return raw[0] if len(raw) == 1 and spec.nargs != "*" else list(raw)


class FlagParser:
    """The flags of a configuration. tyro sees a stand-in type for each block and fills it as a plain dict."""

    def __init__(self, block: Block, help: bool, choices: bool = False):
        # a missing value is reported by from_dict, more clearly than by tyro
        self.required = MISSING_NONPROP if help else None
        self.help = help
        self.choices = choices  # whether tyro knows the names that a text may be, to complete them
        self.settings: dict[str, Setting] = {}
        self.tables: list[str] = []
        self.specs: dict[type, StructConstructorSpec] = {}
        config = self.make_text_flag("config", "config", "FILE", None, "Settings, in YAML.")
        self.root = self.add_block(block, "", [config])
        self.switches = {path for path, setting in self.settings.items() if is_switch(setting.hint)}

    def add_block(self, block: Block, path: str, specs: list[StructFieldSpec]) -> type:
        """Register the flags of ``block`` after ``specs``, and return the type that stands for it in tyro."""
        docs = read_field_docs(block.cls)
        flags: list[tuple[StructFieldSpec, str]] = [(spec, "") for spec in specs]
        inner: list[StructFieldSpec] = []
        for name, f in get_fields(block.cls).items():
            inner_path, value = join_path(path, name), block.values.get(name, ABSENT)
            doc, heading = docs.get(name, ("", ""))
            if "table" in f.metadata:
                # two entries: a flag for the name, and the block of the class that it selects
                self.tables.append(inner_path)
                names = "{" + ",".join(load_object(f.metadata["table"])) + "}"
                default = find_name(f.metadata, value.cls)
                names_hint: Any = str | None
                if self.choices:
                    names_hint = Literal[tuple(load_object(f.metadata["table"]))]
                flags.append((self.make_text_flag(f"{name} NAME", name, names, default, doc, names_hint), heading))
                kind = self.add_block(value, inner_path, [])
                doc = (inspect.getdoc(value.cls) or "").partition("\n")[0].replace("``", "")
                inner.append(StructFieldSpec(name, kind, kind(), doc))
            else:
                setting = self.settings[inner_path] = Setting(get_hints(block.cls)[name], value)
                kind = as_raw(setting.hint, self.choices)
                if is_switch(setting.hint):
                    kind = bool if value is not None else UNDECIDED
                    value = False if value is None else value
                doc = add_sentence(doc, describe_bounds(setting.hint))
                default = self.required if value is ABSENT else value
                flags.append((StructFieldSpec(name, cast(Any, kind), default, doc), heading))
        stand_in = type(block.cls.__name__, (), {})
        self.specs[stand_in] = StructConstructorSpec(dict, (*self.group_flags(flags), *inner))
        return stand_in

    def group_flags(self, specs: list[tuple[StructFieldSpec, str]]) -> list[StructFieldSpec]:
        """Return the flags under the headings that the help shows them with.

        A heading is a block in tyro, whose flags have no prefix. Only the help has such blocks.
        """
        out: dict[str, list[StructFieldSpec]] = {}
        for spec, heading in specs:
            is_positional = tyro.conf.Positional in get_args(spec.type)
            out.setdefault("" if is_positional or not self.help else heading, []).append(spec)
        plain = out.pop("", [])
        for heading, inner in out.items():
            stand_in = type(heading, (), {})
            flags = [replace(spec, type=Annotated[spec.type, tyro.conf.OmitArgPrefixes]) for spec in inner]
            self.specs[stand_in] = StructConstructorSpec(dict, tuple(flags))
            plain.append(StructFieldSpec(heading, stand_in, stand_in(), ""))
        return plain

    def make_text_flag(
        self, key: str, name: str, metavar: str, value: str | None, doc: str | None, hint: Any = str | None
    ) -> StructFieldSpec:
        """Return a flag that pass 1 has read. tyro needs it for ``--help`` and to know that it takes a value."""
        hint = Annotated[as_raw(hint, self.choices), tyro.conf.arg(name=name, metavar=metavar)]
        return StructFieldSpec(key, cast(Any, hint), value, doc)

    def read(self, argv: Sequence[str], prog: str, description: str | None) -> dict[str, Any]:
        """Return the settings that ``argv`` gives, by their dotted paths."""
        argv = self.normalize(argv)
        registry = ConstructorRegistry()
        registry.struct_rule(lambda info: self.specs.get(info.type))
        answer, rest = tyro.cli(
            self.root,
            args=argv,
            prog=prog,
            description=inspect.cleandoc(description) if description else None,  # Python 3.11 and 3.12 keep indents
            registry=registry,
            return_unknown_args=True,
            config=(tyro.conf.PositionalMetavarFromFieldName,),
        )
        if rest:
            for before, token in itertools.pairwise(argv):
                switch = self.find_switch(before)
                if switch and token == rest[0]:
                    raise switch_error(*switch)
            raise ConfigError("", f"unexpected argument {rest[0]!r}; see {prog} --help")
        out = {}
        for path, setting in self.settings.items():
            value = functools.reduce(operator.getitem, path.split("."), answer)
            if isinstance(value, RawValues):
                out[path] = setting.read(value)
        # the switches, which tyro cannot tell from their defaults
        for token in itertools.takewhile(lambda token: token != "--", argv):
            if switch := self.find_switch(token):
                out[switch[0]] = switch[1]
        return out

    def normalize(self, argv: Sequence[str]) -> list[str]:
        """Return ``argv`` with ``--flip=false`` as ``--no-flip``.

        Raises ``ConfigError`` for an unknown flag, a missing value and a value after a switch.
        """
        argv = list(argv)
        if wants_help(argv):
            return argv
        end = argv.index("--") if "--" in argv else len(argv)
        for i, token in enumerate(argv[:end]):
            name, equals, value = token.partition("=")
            path, switch = to_path(name), self.find_switch(name)
            if path is None:
                continue
            if switch:
                following = argv[i + 1 : min(i + 2, end)]
                if (equals and path not in self.switches) or (following and following[0].lower() in TRUTH_VALUES):
                    raise switch_error(*switch)
                if equals:
                    argv[i] = to_flag(path if check_value(bool, value, to_flag(path)) else negate(path))
            elif path in self.settings or path in self.tables or path == "config":
                need = get_syntax(self.settings[path].hint).nargs if path in self.settings else 1
                given = itertools.takewhile(lambda token: not is_flag(token), argv[i + 1 : end])
                have = len(list(given)) + bool(equals)
                if isinstance(need, int) and have < need:
                    raise ConfigError("", f"{name} needs {need} value{'s' * (need > 1)}, given {have}")
            else:
                raise ConfigError("", f"unknown option {name}{self.suggest_flag(path)}")
        return argv

    def find_switch(self, token: str) -> tuple[str, bool] | None:
        """Return ``(path, on)`` of a switch: on for ``--flip``, off for ``--no-flip``; None for any other token."""
        path = to_path(token)
        if path in self.switches:
            return path, True
        return next(((switch, False) for switch in self.switches if negate(switch) == path), None)

    def suggest_flag(self, path: str) -> str:
        """Return a hint at a flag with a similar name, in the same block if there is one."""
        block, _, leaf = path.rpartition(".")
        known = [*self.settings, *self.tables]
        siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == block}
        everywhere = {p.rpartition(".")[2]: p for p in reversed(known)}
        close = difflib.get_close_matches(leaf, siblings, 1) or difflib.get_close_matches(leaf, everywhere, 1)
        return f"; did you mean {to_flag({**everywhere, **siblings}[close[0]])}?" if close else "; see --help"


def is_switch(hint: Any) -> bool:
    """Return whether a setting is ``bool``, or ``bool | None``, where None leaves the choice to the program."""
    return hint is bool or hint == (bool | None)


def switch_error(path: str, on: bool) -> ConfigError:
    """Return the error for a value after a switch: ``--flip true``."""
    flag, opposite = to_flag(path), to_flag(negate(path))
    if on:
        return ConfigError("", f"{flag} takes no value; give it alone, or {flag}=false to switch it off")
    return ConfigError("", f"{opposite} takes no value; give it alone, or {flag} to switch it on")
