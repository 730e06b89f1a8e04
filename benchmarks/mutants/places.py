"""Places of a source file where one token can be changed so that the program still compiles, and the tokens that can
replace it.

Left out are places without behaviour, or whose behaviour a right program does not show: docstrings and all strings,
annotations, decorators, `raise` statements, messages of `assert`, code under TYPE_CHECKING, arguments of loggers and
warnings, and `strict=` of zip, which asserts. Formatting stays: only the token's text is replaced.
"""

import ast
import io
import tokenize
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS = {
    "+": ("-",),
    "-": ("+",),
    "*": ("/", "+"),
    "/": ("*",),
    "//": ("*",),
    "%": ("//",),
    "**": ("*",),
    "@": (),
    "<<": (">>",),
    ">>": ("<<",),
    "&": ("|",),
    "|": ("&",),
    "^": ("&",),
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
    "and": ("or",),
    "or": ("and",),
    "min": ("max",),
    "max": ("min",),
    "minimum": ("maximum",),
    "maximum": ("minimum",),
    "amin": ("amax",),
    "amax": ("amin",),
    "argmin": ("argmax",),
    "argmax": ("argmin",),
    "any": ("all",),
    "all": ("any",),
    "True": ("False",),
    "False": ("True",),
}
"""The replacements of a token."""
_QUIET = {"warn", "warning", "info", "debug", "print", "isinstance", "cast", "TypeVar"}
"""Calls whose arguments are left alone: messages and types."""


@dataclass(frozen=True, slots=True)
class Place:
    """One token (of `is not` two)."""

    line: int
    columns: tuple[int, int]  # in characters: the first, and the one behind the last
    old: str
    changes: tuple[str, ...]
    statement: tuple[int, int]  # lines of the innermost statement; of a compound one, of its header
    names: tuple[str, ...] | None  # what a statement assigns that runs at import; None: it runs in a call

    def apply(self, source: str, new: str) -> str:
        """Return the source with the token changed."""
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1]
        lines[self.line - 1] = text[: self.columns[0]] + new + text[self.columns[1] :]
        return "".join(lines)


def places(source: str) -> list[Place]:
    """Find the places of a file, by line and column."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda place: (place.line, place.columns))


def _numbers(text: str, value: complex) -> tuple[str, ...]:
    """Return the replacements of a number: its neighbours, and of a fraction its double."""
    if isinstance(value, int):
        return ("1",) if value == 0 else (str(value + 1), str(value - 1))
    return ("1.0",) if value == 0 else (f"{value * 2!r}",)


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self._tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER)
        ]
        self.found: list[Place] = []
        self._statement = (0, 0)
        self._names: tuple[str, ...] | None = ()
        self._class = ""

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outside = self._statement, self._names
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
        self._statement = node.lineno, max(node.lineno, last)
        if self._names is not None:
            self._names = tuple(_assigned(node, self._class))
        super().visit(node)
        self._statement, self._names = outside

    def _add(self, begin: tuple[int, int], old: str, changes: tuple[str, ...]) -> None:
        line, column = begin
        if changes and self._lines[line - 1].isascii():
            columns = column, column + len(old)
            self.found.append(Place(line, columns, old, changes, self._statement, self._names))

    def _between(self, left: ast.AST, right: ast.AST) -> None:
        """Add the operator between two operands: all text between them except brackets and commas."""
        begin, end = _end(left), _begin(right)
        first = bisect_left(self._tokens, begin, key=lambda token: token.start)
        behind = bisect_left(self._tokens, end, key=lambda token: token.start)
        found = [token for token in self._tokens[first:behind] if token.string not in "(),"]
        old = " ".join(token.string for token in found)
        on_one_line = {token.start[0] for token in found} == {found[0].start[0]}
        if on_one_line and found[-1].end[1] - found[0].start[1] == len(old):
            self._add(found[0].start, old, SWAPS[old])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit(node.args)
        outside, self._names = self._names, None
        for child in node.body:
            self.visit(child)
        self._names = outside

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside, self._class = self._class, node.name
        for child in node.body:
            self.visit(child)
        self._class = outside

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    visit_JoinedStr = visit_Raise  # type: ignore[assignment]  # positions inside are not told

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_If(self, node: ast.If) -> None:
        named = {child.id for child in ast.walk(node.test) if isinstance(child, ast.Name)}
        if not named & {"TYPE_CHECKING", "__name__"}:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _QUIET:
            return
        if name in SWAPS:
            end = _end(node.func)
            self._add((end[0], end[1] - len(name)), name, SWAPS[name])
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":
            self.visit(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        of_types = isinstance(node.op, ast.BitOr) and self._names is not None
        if not of_types and not isinstance(node.left, ast.JoinedStr):
            self._between(node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        token = self._tokens[bisect_left(self._tokens, _end(node.target), key=lambda t: t.start)]
        self._add(token.start, token.string, tuple(f"{new}=" for new in SWAPS[token.string[:-1]]))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self._between(left, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(node.op, ast.USub) and isinstance(number, int):
            text = self._lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            self._add(_begin(node), text, ("0", str(-number - 1)))
            return
        text = {ast.Not: "not", ast.USub: "-", ast.Invert: "~"}.get(type(node.op), "")
        self._add(_begin(node), text, ("",) if text else ())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        text = self._lines[node.lineno - 1][node.col_offset : node.end_col_offset]
        if isinstance(node.value, bool):
            self._add(_begin(node), text, SWAPS[text])
        elif isinstance(node.value, int | float):
            self._add(_begin(node), text, _numbers(text, node.value))


def _assigned(node: ast.stmt, inside: str) -> Iterator[str]:
    """Return the names that a statement assigns; for `__init__` its class, which callers name."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield inside if node.name == "__init__" else node.name
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    for target in targets:
        for child in ast.walk(target) if target is not None else ():
            if isinstance(child, ast.Name):
                yield child.id


def _begin(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
