"""The texts of ``--help``: what a field, its bounds and the names of a block mean."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from dataclasses import is_dataclass
from typing import Annotated, Any, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from genkit.config.blocks import get_fields, load_object
from genkit.config.names import NameIn
from genkit.config.paths import expand_path

LARGE = 1e5  # a bound beyond it only keeps numbers within a machine's range; the help does not mention it


@functools.cache
def read_field_docs(cls: type) -> dict[str, tuple[str, str]]:
    """Return the help and the heading of each field, from the source of a dataclass and its bases.

    The help is the text under a field, or the comment after it. A comment line ``# -- logging`` begins a heading.
    """
    docs: dict[str, tuple[str, str]] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(cast(type, base)))
        except (OSError, TypeError):  # a class typed at a prompt, or made by a function
            continue
        lines = source.splitlines()
        headings = {i: match[1] for i, line in enumerate(lines, 1) if (match := re.fullmatch(r"    # -- (.+)", line))}
        body = cast(ast.ClassDef, ast.parse(source).body[0]).body
        for field, after in itertools.zip_longest(body, body[1:]):
            group = next((title for i, title in reversed(headings.items()) if i < field.lineno), "")
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.replace("``", "").split()), group
                case ast.AnnAssign(target=ast.Name(id=name), end_lineno=int(line), end_col_offset=int(column)), _:
                    rest = lines[line - 1].encode()[column:].decode()
                    docs[name] = rest.partition("#")[2].strip(), group
    return docs


def find_marks(hint: Any) -> list[Any]:
    """Return the annotations of a type and of the types that it is made of, ``annotated_types.Ge(1)`` and the like."""
    inner = [mark for part in get_args(hint) if part is not Ellipsis for mark in find_marks(part)]
    return [*inner, *hint.__metadata__] if get_origin(hint) is Annotated else inner


def add_sentence(doc: str, sentence: str) -> str:
    """Return ``doc`` with one more sentence, which may be empty."""
    if not doc or not sentence:
        return doc or sentence
    return f"{doc}{'' if doc.endswith(('.', '!', '?')) else '.'} {sentence}"


def describe_bounds(hint: Any) -> str:
    """Return the bounds of a number as a sentence: ``"At least 1."``; empty without bounds that a user may meet."""
    texts: list[str] = []
    for mark in find_marks(hint):
        match mark:
            case Ge(ge=low):
                texts.append(f"at least {low}")
            case Gt(gt=low):
                texts.append(f"above {low}")
            case Le(le=high) if abs(float(cast(Any, high))) < LARGE:
                texts.append(f"at most {high}")
            case Lt(lt=high) if abs(float(cast(Any, high))) < LARGE:
                texts.append(f"below {high}")
            case MultipleOf(multiple_of=step):
                texts.append(f"a multiple of {step}")
    text = ", ".join(dict.fromkeys(texts))
    return f"{text[0].upper()}{text[1:]}." if text else ""


def format_metavar(metavar: str, hint: Any) -> str:
    """Return tyro's ``metavar`` without the None that leaving the flag out means, or the names of a registry."""
    names = [mark for mark in find_marks(hint) if isinstance(mark, NameIn)]
    if names:
        return "{" + ",".join(names[0].names()) + "}" + (f"[{names[0].separator}...]" if names[0].separator else "")
    metavar = metavar.replace("{None}|", "").replace("{None,", "{")
    if any(getattr(mark, "func", None) is expand_path for mark in find_marks(hint)):
        metavar = metavar.replace("STR", "PATH")
    return metavar[1:-1] if re.fullmatch(r"\{[A-Z]+( [A-Z]+)*\}", metavar) else metavar


def describe_choices(cls: type) -> str:
    """Return what the names of a command's blocks stand for, a line each, from the classes' docstrings."""
    sections = []
    for name, f in get_fields(cls).items():
        registry = load_object(f.metadata["table"]) if "table" in f.metadata else {}
        if len(registry) > 1:
            width = max(map(len, registry)) + 2
            summaries = {key: (inspect.getdoc(kind) or "").partition("\n\n")[0] for key, kind in registry.items()}
            lines = [f"  {key:<{width}}{summarize(text, 110 - width)}" for key, text in summaries.items()]
            sections.append("\n".join([f"\n{'--' + name.replace('_', '-')}:", *lines, ""]))
    return "".join(sections)


def summarize(text: str, width: int) -> str:
    """Return the first sentence of ``text`` without reST's quotes, cut to ``width`` characters."""
    sentence = re.split(r"(?<!al\.)(?<!eq\.)(?<!Fig\.)(?<=[.:]) ", " ".join(re.sub(r":\w+:|[`~]", "", text).split()))[
        0
    ].rstrip(".:")
    return textwrap.shorten(sentence, width, placeholder=" ...")
