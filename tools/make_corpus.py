"""Gathers real English text that every machine has, as a corpus to train small models on.

    python tools/make_corpus.py --output corpus.jsonl --max-megabytes 12

1. Sources: licences, the topics of `pydoc`, the descriptions of installed packages, and the
   documentation strings of Python's standard library and of installed packages. Python files are
   parsed, never imported. Texts come first, Python files after them in the order of a hash of
   their names, so that a smaller corpus is a mixture too.
2. Each text is cut into paragraphs; headings, code, tables and lists of parameters are dropped,
   markup is taken off, and only paragraphs that read like English sentences stay.
3. A paragraph that has been seen, also under other names and numbers, is dropped. What remains of a
   class, a function or a module is one document if it has several sentences.
4. The documents, one JSON object a line with the keys `text` and `source`, are written in the order
   of a hash of their text, so that any stretch of them is a fair sample.

The same machine with the same packages gives the same file.
"""

import argparse
import ast
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.files import written_aside
from megatron.data.progress import Progress
from megatron.errors import DataError, run_command

MIN_SENTENCES = 3
MIN_WORDS = 6
MIN_LETTERS = 0.9
MIN_FUNCTION_WORDS = 0.18
MAX_FILE_BYTES = 2_000_000
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"}
LICENCES = Path("/usr/share/common-licenses")

# The commonest English words; sentences hold a good share of them, lists of names do not.
_COMMONEST = (
    "a about all also an and any are as at be because been before but by can could do does each "
    "for from had has have he her his how however i if in into is it its may might more must no "
    "not of on one only or other our same should since so some such than that the their them "
    "then there these they this those to up use used using was we were what when where whether "
    "which while who will with without would you your"
)
FUNCTION_WORDS = frozenset(_COMMONEST.split())

BLANK_LINES = re.compile(r"\n[ \t]*\n")
UNDERLINE = re.compile(r"^\s*([-=~^\"'`#*+_])\1{2,}\s*$")
TABLE = re.compile(r"^\s*(\||\+[-=+]+\+|={3,}\s+={3,})", re.MULTILINE)
PROMPT = re.compile(r"^\s*(>>>|\.\.\. |In \[\d+\]:|\$ )", re.MULTILINE)
FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^\s*:\w[^:`\n]*:(?!`)|^\s*@\w+\b|^\s*\.\. ")
BULLET = re.compile(r"^\s*([-*+•]|\(?(\d{1,2}|[a-z])[.)])\s+")
# Sections of documentation strings that list names rather than tell something.
LISTING = re.compile(
    r"^\s*(args|arguments|parameters|params|other parameters|keyword arg(ument)?s|attributes|"
    r"returns?|yields?|raises|warns|shape|inputs?|outputs?|methods|see also|references|examples?|"
    r"usage|bibliography)\s*:{0,2}\s*$",
    re.IGNORECASE,
)
MARKUP = (
    (re.compile(r"<!--.*?-->|</?[a-zA-Z][^>\n]{0,200}>", re.DOTALL), ""),
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*\)"), r"\1"),  # Markdown links
    (re.compile(r":[a-zA-Z:]+:`~?([^`<]+?)(\s*<[^>]*>)?`"), r"\1"),  # :class:`~name`
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?"), r"\1"),  # `text <link>`_
    (re.compile(r"``?([^`\n]+)``?_?"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\n]+)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[\d+\]_"), ""),  # footnotes
    (re.compile(r"\\(?=[*_`|])"), ""),
)
# A documentation string follows a line that ends in a colon, or opens the file. Statements that are
# not indented tell whether it belongs to a class of the module.
DOCSTRING = re.compile(
    r"^(?P<statement>class|def|async|if|try)\b"
    r"|(?:\A(?:[ \t]*(?:\#[^\n]*)?\n)*|:[ \t]*(?:\#[^\n]*)?\n\s*)"
    r"(?P<literal>[rRuU]?(?P<quote>\"{3}|'{3}).*?(?P=quote))",
    re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass(frozen=True)
class Source:
    """A file to read, and the name that it goes by in the corpus on every machine."""

    name: str
    path: Path

    @property
    def order(self) -> tuple[bool, bytes]:
        """Sorting key: texts, then Python files, each in the order of a hash of the name."""
        is_code = self.path.suffix == ".py" and not self.name.startswith("pydoc_data/")
        return is_code, hashlib.sha256(self.name.encode()).digest()


@dataclass(frozen=True)
class Document:
    """Paragraphs that belong together."""

    source: str
    paragraphs: list[str]


def main() -> None:
    """Read the command line and write the corpus."""
    parser = argparse.ArgumentParser(prog="make_corpus.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--max-megabytes", type=float, default=12, help="size to stop at")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    if options.max_megabytes <= 0:
        parser.error(f"argument --max-megabytes: {options.max_megabytes:g} is not above 0")
    if options.workers < 1:
        parser.error(f"argument --workers: {options.workers} is not at least 1")

    started = time.monotonic()
    lines = gather(find_sources(), int(options.max_megabytes * 1e6), options.workers)
    if not lines:
        raise DataError("found no English text in this Python installation")
    with written_aside(options.output) as (file,):
        file.writelines(line.encode() for line in lines)
    print(
        f"{options.output}: {len(lines):,} documents, {options.output.stat().st_size / 1e6:.1f} MB,"
        f" {time.monotonic() - started:.0f} s"
    )


def gather(sources: list[Source], max_bytes: int, workers: int) -> list[str]:
    """The lines of the corpus: documents of `sources` up to `max_bytes`, shuffled."""
    seen: set[bytes] = set()
    lines: list[str] = []
    size = 0
    progress = Progress("gathering", "files", total=len(sources))
    with ProcessPoolExecutor(workers, initializer=gc.disable) as pool:
        for read, documents in enumerate(_map_ahead(pool, sources, 8 * workers), start=1):
            for document in documents:
                line = _line(document, seen)
                lines.append(line)
                size += len(line.encode())
                if size >= max_bytes:
                    break
            progress.advance(read, note=f"{size / 1e6:.1f} of {max_bytes / 1e6:g} MB")
            if size >= max_bytes:
                break
    progress.close()
    return sorted(filter(None, lines), key=lambda line: hashlib.sha256(line.encode()).digest())


def _map_ahead(
    pool: ProcessPoolExecutor, sources: Iterable[Source], ahead: int
) -> Iterator[list[Document]]:
    """`pool.map` in chunks that starts only a few chunks ahead, so that it can stop early."""
    remaining = iter(sources)
    chunks = iter(lambda: list(islice(remaining, 16)), [])
    pending = [pool.submit(read_chunk, chunk) for chunk in islice(chunks, ahead)]
    while pending:
        yield from pending.pop(0).result()
        pending += [pool.submit(read_chunk, chunk) for chunk in islice(chunks, 1)]


def _line(document: Document, seen: set[bytes]) -> str:
    """The document without paragraphs in `seen`, as a line of JSON; "" where too little is new."""
    fresh = []
    for paragraph in document.paragraphs:
        # Names and numbers left out: documentation repeats itself with other ones filled in.
        words = " ".join(re.findall(r"\b[a-z]{2,}\b", paragraph))
        key = hashlib.sha256(words.encode()).digest()[:12]
        if key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    text = "\n\n".join(fresh)
    if len(SENTENCE_END.findall(text)) < MIN_SENTENCES:
        return ""
    return json.dumps({"text": text, "source": document.source}, ensure_ascii=False) + "\n"


def find_sources() -> list[Source]:
    """All files to read, in the order to read them in."""
    found = [Source(f"licences/{path.name}", path) for path in sorted(LICENCES.glob("*"))]
    library = Path(sysconfig.get_path("stdlib"))
    found += [Source(str(path.relative_to(library)), path) for path in _python_files(library)]
    # One installed twice on the path is found first where Python would find it.
    packages = {d.metadata["Name"]: d for d in reversed(list(importlib.metadata.distributions()))}
    for name, package in packages.items():
        for entry in package.files or ():
            if _is_text(entry) or _is_code(entry):
                found.append(Source(f"{name}/{entry}", Path(str(package.locate_file(entry)))))
    return sorted((s for s in found if s.path.is_file()), key=lambda source: source.order)


def _is_text(entry: importlib.metadata.PackagePath) -> bool:
    in_info = any(part.endswith((".dist-info", ".egg-info")) for part in entry.parts)
    return in_info and bool(
        re.match(r"(?i)metadata|pkg-info|licen[cs]e|copying|notice", entry.name)
    )


def _is_code(entry: importlib.metadata.PackagePath) -> bool:
    return entry.suffix == ".py" and ".." not in entry.parts and not _is_skipped(entry.parts)


def _is_skipped(folders: Iterable[str]) -> bool:
    return not SKIPPED_FOLDERS.isdisjoint(folders)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def read_chunk(sources: list[Source]) -> list[list[Document]]:
    """The documents of each source."""
    return [read_source(source) for source in sources]


def read_source(source: Source) -> list[Document]:
    """The documents of one source; none where it cannot be read as text or parsed as Python."""
    if source.path.stat().st_size > MAX_FILE_BYTES:
        return []
    text = source.path.read_text(encoding="utf-8", errors="replace")
    if source.name == "pydoc_data/topics.py":
        texts = pydoc_topics(text)
    elif source.path.suffix == ".py":
        texts = docstrings(text)
    elif source.path.name in ("METADATA", "PKG-INFO"):
        texts = [text.partition("\n\n")[2]]
    else:
        texts = [text]
    return [Document(source.name, found) for text in texts if (found := paragraphs(text))]


def docstrings(code: str) -> list[str]:
    """The documentation strings of each top-level class of a module, then those of all the rest.

    They are found by their shape, since parsing a whole installation would take minutes.
    """
    texts: list[list[str]] = [[]]
    current = texts[0]
    for match in DOCSTRING.finditer(code):
        if match["statement"]:
            current = texts[0]
            if match["statement"] == "class":
                texts.append(current := [])
        else:
            current.append(_value(match["literal"]))
    return ["\n\n".join(text) for text in [*texts[1:], texts[0]]]


def _value(literal: str) -> str:
    """The string that Python code means by `literal`, without its indentation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return inspect.cleandoc(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""


def pydoc_topics(code: str) -> list[str]:
    """The texts of the dictionary that `pydoc` shows help topics from."""
    assigned = [node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    topics = [node for node in assigned if isinstance(node, ast.Dict)]
    return [text for node in topics for text in ast.literal_eval(node).values()]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are English prose, on one line each."""
    kept = []
    hidden_from: int | None = None  # the indentation from which on lines belong to a listing
    for block in BLANK_LINES.split(FENCE.sub("", inspect.cleandoc(text))):
        lines = block.strip("\n").expandtabs().split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        underlined = len(lines) > 1 and UNDERLINE.match(lines[1])
        if LISTING.match(lines[0]) or FIELD.match(lines[0]):
            # Under an underlined heading the listing is not indented; it ends at the next heading.
            hidden_from = 0 if underlined else indent + 1
            continue
        if hidden_from is not None and indent >= hidden_from and not underlined:
            continue
        hidden_from = indent + 1 if lines[-1].rstrip().endswith("::") else None
        if not PROMPT.search(block) and not TABLE.search(block):
            kept += [p for part in _parts(lines[2:] if underlined else lines) if (p := prose(part))]
    return kept


def _parts(lines: list[str]) -> Iterator[str]:
    """The items of a block that is a list, else the whole block; without lines that only rule."""
    part: list[str] = []
    for line in lines:
        if LISTING.match(line) or FIELD.match(line):
            break
        if BULLET.match(line) and part:
            yield "\n".join(part)
            part = []
        if not UNDERLINE.match(line):
            part.append(BULLET.sub("", line))
    yield "\n".join(part)


def prose(part: str) -> str:
    """The text without its markup on one line, or "" where it does not read like sentences."""
    for pattern, replacement in MARKUP:
        part = pattern.sub(replacement, part)
    part = " ".join(part.split())
    if part.endswith("::"):
        part = part[:-1]
    words = WORD.findall(part.lower())
    if len(words) < MIN_WORDS or not re.match(r"[\"'(]?[A-Z]", part) or "\ufffd" in part:
        return ""
    if "http" in part:
        return ""
    if part[-1].isalpha():  # many one-line descriptions lack their full stop
        part += "."
    if not re.search(r"[.!?][\"')\]]*$", part):
        return ""
    if sum(c.isalpha() or c in " ,.;'\"" for c in part) < MIN_LETTERS * len(part):
        return ""
    common = sum(word in FUNCTION_WORDS for word in words)
    return part if common >= MIN_FUNCTION_WORDS * len(words) else ""


if __name__ == "__main__":
    run_command(main)
