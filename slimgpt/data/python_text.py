"""English text that every CPython carries: its language reference and the standard library's docstrings.

With it the whole way from calibration to evaluation runs on a machine that has no data and no network.
Every fifth document is held out: calibration never sees what perplexity and the ``continuation`` task are measured on.
The text depends on the Python version alone, so figures can be compared between machines of one version.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HELD_OUT_EVERY = 5
MIN_DOCSTRING_CHARS = 200  # shorter ones are signatures rather than prose
REPEATABLE_CHARS = 60  # shorter paragraphs are headings and the like, which may stand in many documents
# Not prose, not always installed, or generated (pydoc_data is read by itself).
LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


def calibration_documents() -> list[str]:
    """Four of five documents: Python's reference topics, then each library module's docstrings."""
    return [text for i, text in enumerate(_documents()) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


def held_out_documents() -> list[str]:
    """The fifth document of each five, disjoint from ``calibration_documents``."""
    return [text for i, text in enumerate(_documents()) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]


@cache
def _documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics  # half a megabyte, read only where it is needed

    seen: set[str] = set()
    documents = [_new_paragraphs(topics[name], seen) for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]
    documents += [_new_paragraphs("\n\n".join(_docstrings(path)), seen) for path in modules]
    return tuple(text for text in documents if len(text) >= MIN_DOCSTRING_CHARS)


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """The text without paragraphs that an earlier document has: a copy would leak from one part into the other."""
    new = [paragraph for paragraph in text.strip().split("\n\n") if paragraph.strip() not in seen]
    seen.update(paragraph.strip() for paragraph in new if len(paragraph) >= REPEATABLE_CHARS)
    return "\n\n".join(new)


def _docstrings(path: Path) -> list[str]:
    """The docstrings of one source file that are long enough to be prose, in the order in which they stand."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # a template or a deliberately broken file: there is no docstring to read
    texts = []
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING_CHARS:
                texts.append(text.strip())
    return texts


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """As ``ast.walk``, breadth first, but past expressions, which hold no definitions: a third of the time."""
    level = [tree]
    while level:
        yield from level
        level = [
            below
            for node in level
            for field in ("body", "cases", "handlers", "orelse", "finalbody")  # in the order in which they stand
            for below in getattr(node, field, ())
        ]
