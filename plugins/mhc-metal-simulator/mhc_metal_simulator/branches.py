"""The marks that record, while a kernel runs, which side each of its choices takes.

The choices are those of the text: ``if``, ``?:`` and loops that are not unrolled, whether their
conditions are known at compile time or at run time. Each condition is wrapped in a call that marks
the side and returns the condition. An expression that must be a constant stays unchanged, and a
statement of its own marks its choices. Choices in template arguments, enums and the lengths of
arrays are not marked: they make types, and other choices follow from those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["MOST", "SIDES", "Branch", "find"]

MOST = 2048  # MAX_BRANCHES of runtime/abi.h

SIDES = {
    "if": ("true", "false"),
    "?:": ("true", "false"),
    "while": ("true", "false"),
    "for": ("enters", "again"),
}
"""The sides of each kind of choice; the bits of a mark are 1, 2 and 4 for true, false and again."""

_BITS = {"true": 1, "enters": 1, "false": 2, "again": 4}
_FUNCTION = re.compile(r"\bFUNCTION\b[^;{}()]*?\b(\w+)\(")
_KERNEL = re.compile(r"\[\[kernel\]\]\s+void\b")
_OPEN = {")": "(", "]": "[", "}": "{"}


class Token(Protocol):
    """The fields of a token that are read."""

    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Branch:
    """One choice: its function ("" for the kernel's own), its kind and its condition."""

    function: str
    kind: str
    condition: str

    def sides(self, mark: int) -> Iterator[str]:
        """Name the sides that a mark says were taken."""
        return (side for side in SIDES[self.kind] if mark & _BITS[side])


Edits = list[tuple[int, int, str]]
Tokenise = Callable[[str], Sequence[Token]]


def find(text: str, tokenise: Tokenise) -> tuple[Edits, tuple[Branch, ...]]:
    """Return the edits that mark the choices of a text, and those choices in the marks' order."""
    found = _Finder(text)
    for start, part in _parts(text):
        found.read(start, tokenise(part))
    # of edits that begin together, the one that ends last encloses the others
    begins: dict[int, str] = {}
    for start, _, call in sorted(found.calls):
        begins[start] = begins.get(start, "") + call
    calls = [(start, start, together) for start, together in begins.items()]
    return found.edits + calls, tuple(found.branches)


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Yield the text and the bodies of macros, which its tokens leave out, each with its offset."""
    yield 0, text
    for macro in re.finditer(r"^[ \t]*#define \w+(?:\([^)]*\))?((?:\\\n|[^\n])*)", text, re.M):
        body = macro[1].replace("\\\n", " \n")
        if "{" in body:  # the macro defines a function
            yield macro.start(1), body


class _Finder:
    def __init__(self, text: str) -> None:
        self.text = text
        self.edits: Edits = []
        self.calls: Edits = []  # a start, minus an end, a call's beginning
        self.offset = self.position = 0
        self.tokens: Sequence[Token] = ()
        self.closing: dict[int, int] = {}
        self.branches: list[Branch] = []
        kernel = _KERNEL.search(text)
        self.kernel = kernel.start() if kernel else 0
        self.functions = [(m.start(), m[1]) for m in _FUNCTION.finditer(text)]

    def read(self, offset: int, tokens: Sequence[Token]) -> None:
        self.offset, self.tokens = offset, tokens
        self.closing = _brackets(tokens)
        for at, token in enumerate(tokens):
            if token.text in ("if", "while") and tokens[at + 1].text == "(":
                self._around(token.text, at + 2, self.closing[at + 1])
            elif token.text == "for" and not self._unrolled(at):
                self._loop(at + 1)
            elif token.text == "?":
                self._conditional(at)

    # ---- kinds of choices

    def _unrolled(self, at: int) -> bool:
        before = at - 1
        if before >= 0 and self.tokens[before].text == ")":
            before = self._opening(before) - 1
        return before >= 0 and self.tokens[before].text.startswith("UNROLL")

    def _loop(self, bracket: int) -> None:
        close = self.closing[bracket]
        ends = [k for k in self._level(bracket + 1, close) if self.tokens[k].text == ";"]
        if len(ends) != 2 or ends[1] == ends[0] + 1:
            return
        if ends[1] + 1 == close:  # its body takes the step
            self._around("while", ends[0] + 1, ends[1])
            return
        self._around("for", ends[0] + 1, ends[1])
        self._insert(self.tokens[close].start, ", mhc::next_turn()")

    def _conditional(self, question: int) -> None:
        first = self._condition(question)
        if first is None or self._in_enum(question):
            return
        if self.tokens[self._statement(first)].text == "threadgroup":  # how long an array is
            return
        statement = self._constant(first)
        if statement is None:
            self._around("?:", first, question)
            return
        end, before = statement
        words = self._words(first, question)
        number = self._number("?:", words)
        self._insert(self.tokens[end].end, f" (void)({before}mhc::took({number}u, {words}));")

    def _in_enum(self, at: int) -> bool:
        while at >= 0 and self.tokens[at].text not in ("{", ";"):
            at = self._opening(at) - 1 if self.tokens[at].text in _OPEN else at - 1
        return at > 0 and self.tokens[at].text == "{" and self.tokens[at - 1].text == "enum"

    def _condition(self, question: int) -> int | None:
        """Return where a conditional's condition begins, or None in a template argument."""
        at, lists = question - 1, 0
        while at >= 0:
            token = self.tokens[at]
            tight = at > 0 and self.tokens[at - 1].end == token.start
            if token.text in _OPEN:
                at = self._opening(at)
            elif token.text == ">" and tight:
                lists += 1
            elif token.text == "<" and tight and self.tokens[at - 1].kind == "word":
                if not lists:
                    return None
                lists -= 1
            elif token.text in ("(", "[", "{", ",", ";", "?", ":", "return") or self._assigns(at):
                return at + 1
            at -= 1
        return 0

    def _assigns(self, at: int) -> bool:
        if self.tokens[at].text != "=":
            return False
        near = [k for k in (at - 1, at + 1) if 0 <= k < len(self.tokens)]
        touching = [
            self.tokens[k].text
            for k in near
            if self.tokens[k].end == self.tokens[at].start
            or self.tokens[k].start == self.tokens[at].end
        ]
        return not {"=", "!", "<", ">"} & set(touching)

    def _statement(self, at: int) -> int:
        """Return where the statement around a token begins."""
        while at > 0 and self.tokens[at - 1].text not in (";", "{", "}"):
            at = self._opening(at - 1) if self.tokens[at - 1].text in (")", "]") else at - 1
        return at

    def _constant(self, first: int) -> tuple[int, str] | None:
        """Return the end of a declaration of a constant, and what must be false before this choice.

        None where the condition may have a call around it.
        """
        start = self._statement(first)
        if [t.text for t in self.tokens[start : start + 2]] not in (
            ["const", "int"],
            ["const", "bool"],
        ):
            return None
        end = next(k for k in self._level(start, len(self.tokens)) if self.tokens[k].text == ";")
        earlier: list[str] = []
        if self.tokens[first - 1].text == ":":  # the else of another choice
            questions = [k for k in range(start, first) if self.tokens[k].text == "?"]
            for question in questions:
                begins = self._condition(question)
                if begins is not None:
                    earlier.append(f"({self._words(begins, question)}) || ")
        return end, "".join(earlier)

    # ---- places in the text

    def _around(self, kind: str, first: int, end: int) -> None:
        number = self._number(kind, self._words(first, end))
        again = "turned" if kind == "for" else "took"
        start, stop = self.tokens[first].start, self.tokens[end - 1].end
        self.calls.append((self.offset + start, -stop, f"mhc::{again}({number}u, bool("))
        self._insert(stop, "))")

    def _number(self, kind: str, condition: str) -> int:
        self.branches.append(Branch(self._function(), kind, condition))
        return len(self.branches) - 1

    def _function(self) -> str:
        if self.position > self.kernel:
            return ""
        before = [name for start, name in self.functions if start < self.position]
        return before[-1] if before else ""

    def _words(self, first: int, end: int) -> str:
        start, stop = self.tokens[first].start, self.tokens[end - 1].end
        self.position = self.offset + start
        words = self.text[self.offset + start : self.offset + stop].replace("\\\n", " ")
        return " ".join(words.split())

    def _insert(self, at: int, text: str) -> None:
        self.edits.append((self.offset + at, self.offset + at, text))

    def _level(self, first: int, end: int) -> Iterator[int]:
        """Yield the tokens outside of brackets."""
        at = first
        while at < end:
            if self.tokens[at].text in "([{":
                at = self.closing[at]
            yield at
            at += 1

    def _opening(self, close: int) -> int:
        return self.closing[close]


def _brackets(tokens: Sequence[Token]) -> dict[int, int]:
    """Return the index of each bracket's counterpart."""
    pairs: dict[int, int] = {}
    stack: list[int] = []
    for at, token in enumerate(tokens):
        if token.text in ("(", "[", "{"):
            stack.append(at)
        elif token.text in _OPEN and stack:
            start = stack.pop()
            pairs[start], pairs[at] = at, start
    return pairs
