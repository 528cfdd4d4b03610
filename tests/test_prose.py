"""The words of docstrings, messages and pages: PEP 257's first words, and no riddles."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "backends", "docs", "conformance", "examples", "mhc_core", "plugins", "tests")
REFUSED = frozenset({"give", "gives", "what", "say", "says", "whether"})
PHRASES = {  # that had to be read twice, and what to write instead
    r"answers? in kind": "return the same type",
    r"such as it is": "unchanged",
    r"(go|goes|going|gone|went) on with": "continue",
    r"(start|starts|started) anew": "start over",
    r"(only|is) taken by name": "run only when chosen by name",
    r"which is all that": "(name the reason in a sentence of its own)",
    r"cannot be told": "equivalent, unknown",
    r"nobody's to \w+": "the same for everyone",
    r"as good as nothing": "almost nothing",
    r"(is|are) what (holds?|stands)": "(name the thing)",
    r"what (stands|comes) on it": "(name the thing)",
    r"nowhere else either": "no other place",
    r"it knows nothing of": "it does not depend on",
    r"mended": "fixed",
}
PAGES = ("*.md", "docs/**/*.md", "plugins/*/README.md")


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of each bare string, those after assignments included."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(words))):
                yield node.lineno, words
            case _:
                pass


def refused(text: str) -> list[tuple[int, str]]:
    """Return the line and the first word of each docstring that begins with a refused word."""
    firsts = [(line, words.split()[0]) for line, words in docstrings(text) if words.split()]
    return sorted((line, word) for line, word in firsts if word.strip(",.:;").lower() in REFUSED)


def riddles(text: str) -> list[str]:
    """Return each refused phrase of a text with the better one, however its lines are broken."""
    lines = re.sub(r"\s*\n\s*(#|//)?\s*", " ", text)
    flat = re.sub(r"\s+", " ", re.sub(r"\" f?\"", "", lines))
    found = [(re.search(rf"\b(?:{p})\b", flat, re.IGNORECASE), good) for p, good in PHRASES.items()]
    return [f"{match[0]!r}: {good}" for match, good in found if match]


def python_files() -> list[Path]:
    """Return the Python files that git tracks; without a repository, all in the folders."""
    command = ["git", "ls-files", "-z", "--", *(f"{folder}/*.py" for folder in FOLDERS)]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in tracked if path.exists()]  # one may be deleted and not yet committed


def test_no_docstring_begins_with_a_refused_word() -> None:
    files = python_files()
    assert {file.relative_to(ROOT).parts[0] for file in files} >= {"mhc_core", "tests"}
    found = [
        f"{file.relative_to(ROOT)}:{line}: {word} ..."
        for file in files
        for line, word in refused(file.read_text(encoding="utf-8"))
    ]
    assert not found, "begin these with 'Return ...' or a noun (PEP 257):\n" + "\n".join(found)


def test_no_phrase_has_to_be_read_twice() -> None:
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    files = [file for file in (*python_files(), *pages) if file != Path(__file__)]
    assert {file.name for file in files} >= {"README.md", "CHANGELOG.md", "kernels.md"}
    found = [
        f"{file.relative_to(ROOT)}: {riddle}"
        for file in files
        for riddle in riddles(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "It answers in kind.",
        "the report goes\non with the rest",
        "# the report goes\n    # on with the rest",
        '"is only taken "\n    f"by name"',
    ],
)
def test_a_phrase_is_seen_across_lines_and_strings(text: str) -> None:
    assert len(riddles(text)) == 1
    assert not riddles("It returns the same type, and names what it took.")


BAD = '''"""What a module has."""
LIMIT = 3
"""Says how many."""

class Answer:
    """  Gives an answer."""

    field: int = 0
    """Say: a number."""

    async def right(self) -> bool:
        r"""
        Whether it is right.
        """

    def wrong(self) -> int:
        """Give it."""

def fine() -> str:
    """Return what to give, and say whether."""
    return """Give, in a string that is no docstring."""
'''


def test_a_refused_word_is_seen_in_every_kind_of_docstring() -> None:
    words = [(1, "What"), (3, "Says"), (6, "Gives"), (9, "Say:"), (12, "Whether"), (17, "Give")]
    assert refused(BAD) == words


@pytest.mark.parametrize("text", ["", '""', "Givens = 1", 'def f():\n    """Whatever it is."""'])
def test_other_words_and_empty_docstrings_pass(text: str) -> None:
    assert refused(text) == []
