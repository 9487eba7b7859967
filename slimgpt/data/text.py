"""Where text comes from: what the user names, local data (SLIMGPT_DATA), the hub, or what every CPython carries.

In that order, never silently: ``TextSource`` says which it was, and reports and tables repeat it.
Local data is a folder that holds c4/train.jsonl, wikitext-2-raw/wiki.test.raw, wikitext-2-raw/wiki.train-head.raw and
alpaca/train.jsonl.
"""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimgpt.checkpoints.hub import asking, hub_obstacle
from slimgpt.data import python_text
from slimgpt.data.documents import Documents
from slimgpt.data.text_files import SUFFIXES, read_answered, read_documents, read_parquet
from slimgpt.files import exists, expanded

DATA_VARIABLE = "SLIMGPT_DATA"
Origin = Literal["file", "local data", "hub", "python"]
C4_DOCUMENTS = 20_000  # of the shard's 356,317: about 9 M tokens, enough for 4096 sequences of 2048


@dataclass(frozen=True)
class _OnHub:
    """A file of a data set: pinned, since a data set can change under its name, and fetched as it is.

    Names of configurations and loading scripts have changed and vanished before; a file of a commit cannot.
    """

    name: str
    local: str
    repo: str
    revision: str
    path: str


_C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
_C4 = _OnHub("c4", "c4/train.jsonl", "allenai/c4", _C4_REVISION, "en/c4-train.00000-of-01024.json.gz")
_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
_WIKITEXT_TRAIN = _OnHub(
    "wikitext",
    "wikitext-2-raw/wiki.train-head.raw",
    "Salesforce/wikitext",
    _WIKITEXT_REVISION,
    "wikitext-2-raw-v1/train-00000-of-00001.parquet",
)
_WIKITEXT_TEST = _OnHub(
    "wikitext2",
    "wikitext-2-raw/wiki.test.raw",
    "Salesforce/wikitext",
    _WIKITEXT_REVISION,
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
)
_WIKITEXT_VALIDATION = _OnHub(
    "wikitext2-validation",
    "wikitext-2-raw/wiki.valid.raw",
    "Salesforce/wikitext",
    _WIKITEXT_REVISION,
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
)
_C4_VALIDATION = _OnHub(
    "c4-validation", "c4/validation.jsonl", "allenai/c4", _C4_REVISION, "en/c4-validation.00000-of-00008.json.gz"
)
_FOR_PERPLEXITY = {
    "wikitext2": _WIKITEXT_TEST,
    "wikitext2-validation": _WIKITEXT_VALIDATION,
    "c4-validation": _C4_VALIDATION,
}
_IN_ROWS = {"wikitext2-rows": _WIKITEXT_TEST, "wikitext2-validation-rows": _WIKITEXT_VALIDATION}  # by blank lines
_PERPLEXITY_NAMES = (*_FOR_PERPLEXITY, *_IN_ROWS)
ALPACA = _OnHub(
    "alpaca",
    "alpaca/train.jsonl",
    "tatsu-lab/alpaca",
    "dce01c9b08f87459cf36a430d809084718273017",
    "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
)
_FOR_CALIBRATION = {"c4": _C4, "wikitext": _WIKITEXT_TRAIN, "alpaca": ALPACA}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text and where it is from.

    Args:
        name: short name, part of metric names: "c4", "wikitext2", "python", or the file's name.
        documents: the text; one string holds an entire document, or an entire file that is one stream. Of a file that
            the user named it can be a ``Chat``.
        origin: "file" (named by the user), "local data" (SLIMGPT_DATA), "hub" or "python".
    """

    name: str
    documents: Documents
    origin: Origin

    @property
    def sha256(self) -> str:
        """sha256 over the documents, joined by a NUL character; of one document that is its file's own sum."""
        return self.documents.sha256

    def __str__(self) -> str:
        return f"{self.name} ({self.origin}, sha256 {self.sha256[:12]})"


def calibration_text(source: str = "auto") -> TextSource:
    """The text that calibration sequences are drawn from.

    Args:
        source: a .jsonl (also .gz, .zst) or .parquet file (field ``text``, else ``messages`` or ``conversations``, else
            ``instruction``, ``input`` and ``output``: Alpaca's prompt and the answer behind it), a .txt or .raw file,
            or a folder of such files;
            "c4", "wikitext" or "alpaca" (local data, else the hub); "python"; or "auto": C4 where it can be had, else
            "python".

    Raises:
        FileNotFoundError: there is no such file, or a data set that is neither local nor on a reachable hub.
        ValueError: a file of another kind, an empty or damaged one, or rows without such a field.
    """
    source = _settled(source)
    if source == "python":
        return _source("python", python_text.calibration_documents(), "python")
    if source in _FOR_CALIBRATION:
        return _data_set(_FOR_CALIBRATION[source])
    return _named(source, "the text", "c4, wikitext, alpaca, python or auto")


def same_text(source: str) -> str:
    """What a calibration text's name stands for: equal for two names of one text, be it a data set's or a file's."""
    source = _settled(source)
    if source == "python":
        return source
    data = _FOR_CALIBRATION.get(source)
    path = _local(data.local) if data else expanded(source)
    return str(path.resolve()) if path and exists(path) else source


def _settled(source: str) -> str:
    """What "auto" is here; any other name as it is."""
    return ("c4" if _at_hand(_C4) else "python") if source == "auto" else source


def perplexity_text(name: str = "auto") -> TextSource:
    """The text that perplexity is measured on, as one stream.

    Args:
        name: "wikitext2" (the raw test split) or "wikitext2-validation", as their files stand; the same with "-rows":
            the hub's rows joined by blank lines, as GPTQ, LLM-Pruner and SlimGPT read them; "c4-validation" (the first
            documents of the first shard); all of them local data, else from the hub; "python" (the part that
            calibration does not see); a file or folder as for ``calibration_text``, whose documents (also prompts with
            their answers, scored alike) are joined by blank lines; or "auto": WikiText-2 where it can be had, else
            "python".

    Returns:
        a TextSource with exactly one document.

    Raises:
        FileNotFoundError, ValueError: as for ``calibration_text``; conversations are refused, too.
    """
    if name == "python" or (name == "auto" and not _at_hand(_WIKITEXT_TEST)):
        return _source("python", ["\n\n".join(python_text.held_out_documents())], "python")
    if name == "auto":
        return _data_set(_WIKITEXT_TEST)
    if (data := _FOR_PERPLEXITY.get(name)) is not None:
        found = _data_set(data)
        return _source(name, ["\n\n".join(found.documents)], found.origin)
    if (data := _IN_ROWS.get(name)) is not None:
        found = _data_set(data)
        return _source(name, ["\n\n".join(wikitext_rows(found.documents[0]))], found.origin)
    named = _named(name, "the perplexity text", f"{', '.join(_PERPLEXITY_NAMES)}, python or auto")
    if named.documents.has_chats:
        raise ValueError(f"{name!r} holds conversations; perplexity takes plain text: a field 'text'")
    return _source(named.name, ["\n\n".join(named.documents)], "file")


def local_data() -> Path | None:
    """The folder that SLIMGPT_DATA names, or None where it is not set.

    Raises:
        FileNotFoundError: it names something that is not a folder.
    """
    name = os.environ.get(DATA_VARIABLE, "")
    folder = expanded(name)
    if name and not (exists(folder) and folder.is_dir()):
        raise FileNotFoundError(f"{DATA_VARIABLE} is {name!r}, which is not a folder; correct it or unset it")
    return folder if name else None


def _local(path: str) -> Path | None:
    folder = local_data()
    return folder / path if folder and (folder / path).is_file() else None


def _at_hand(data: _OnHub) -> bool:
    if _local(data.local):
        return True
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(data.repo, data.path, revision=data.revision, repo_type="dataset")
    return isinstance(cached, str) or not hub_obstacle()


def fetched(data: _OnHub) -> tuple[Path, Origin]:
    """The file of a data set and where it is from: local data, else the hub.

    Raises:
        FileNotFoundError: when it is neither local nor on a reachable hub.
    """
    if local := _local(data.local):
        return local, "local data"
    from huggingface_hub import hf_hub_download

    try:
        with asking(data.repo, data.revision) as offline:
            path = hf_hub_download(
                data.repo, data.path, repo_type="dataset", revision=data.revision, local_files_only=offline
            )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{data.name} is not available: {error}, and {DATA_VARIABLE} does not name a folder with {data.local}; "
            f"set {DATA_VARIABLE}, name a {'/'.join(SUFFIXES)} file, or use 'python' (text that ships with Python)"
        ) from None
    return Path(path), "hub"


def _data_set(data: _OnHub) -> TextSource:
    path, origin = fetched(data)
    if data is ALPACA:  # the hub's file has a column text, too: local data and hub are read alike
        return _source(data.name, ("".join(pair) for pair in read_answered(path)), origin)
    if origin == "local data":
        return _source(data.name, read_documents(path), origin)
    if data in (_C4, _C4_VALIDATION):
        return _source(data.name, read_documents(path, C4_DOCUMENTS), "hub")
    return _source(data.name, [join_wikitext_rows(read_parquet(path))], "hub")


def _source(name: str, documents: Iterable[str], origin: Origin) -> TextSource:
    return TextSource(name=name, documents=Documents(documents), origin=origin)


def _named(source: str, what: str, names: str) -> TextSource:
    path = expanded(source)
    there = exists(path)
    if there and path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith(".") and p.is_file()
        )
        if not files:
            raise ValueError(f"{what} {source!r} is a folder without a {', '.join(SUFFIXES)} file")
        return _source(path.resolve().name, (text for file in files for text in read_documents(file)), "file")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{what} is {source!r}; it must be a {', '.join(SUFFIXES)} file, a folder of such files, or {names}"
        )
    if not there or not path.is_file():
        raise FileNotFoundError(f"{what} {source!r} does not exist; name a file that does, or {names}")
    return _source(path.name, read_documents(path), "file")


def wikitext_rows(text: str) -> list[str]:
    """The hub's rows of a raw file: its lines with their ends, where a line of blanks is an empty row."""
    return [line if line.strip() else "" for line in io.StringIO(text)]


def join_wikitext_rows(rows: Iterable[str]) -> str:
    """The raw file that the hub's rows were made from: its lines, where a line of blanks became an empty row."""
    return "".join(row or " \n" for row in rows)
