"""Text sources: which one is used, its name, and the errors where it is not available."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from slimgpt.data import text as sources
from slimgpt.data.text import calibration_text, join_wikitext_rows, perplexity_text
from tests.slimgpt.data.test_text_files import ROWS, write_jsonl


@pytest.fixture
def local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    (folder / "c4").mkdir(parents=True)
    (folder / "wikitext-2-raw").mkdir()
    write_jsonl(folder / "c4/train.jsonl", ROWS)
    (folder / "wikitext-2-raw/wiki.test.raw").write_bytes(b" \n = Title = \n \n A line .\r\n")
    (folder / "wikitext-2-raw/wiki.train-head.raw").write_text("training text")
    monkeypatch.setenv("SLIMGPT_DATA", str(folder))
    return folder


def test_a_named_file_wins_over_local_data(local_data: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", ["mine"])
    source = calibration_text(str(tmp_path / "mine.jsonl"))
    assert (source.name, source.origin, list(source.documents)) == ("mine.jsonl", "file", ["mine"])


@pytest.mark.parametrize("name", ["a" * 300 + ".txt", "a\0.txt", "~nobody-of-that-name/a.txt"])
def test_a_name_that_no_file_can_have_is_of_no_file(name: str) -> None:
    for read in (calibration_text, perplexity_text):
        with pytest.raises(FileNotFoundError, match="does not exist; name a file that does"):
            read(name)


def test_perplexity_text_is_always_one_stream(tmp_path: Path) -> None:
    source = perplexity_text(str(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    assert list(source.documents) == ["\n\n".join(ROWS)]


@pytest.mark.parametrize("source", ["auto", "c4"])
def test_local_c4(local_data: Path, source: str) -> None:
    text = calibration_text(source)
    assert (text.name, text.origin, list(text.documents)) == ("c4", "local data", ROWS)


def test_local_wikitext(local_data: Path) -> None:
    test_split, train = perplexity_text("wikitext2"), calibration_text("wikitext")
    raw = (local_data / "wikitext-2-raw/wiki.test.raw").read_bytes()
    assert (test_split.name, test_split.origin) == ("wikitext2", "local data")
    assert test_split.sha256 == hashlib.sha256(raw).hexdigest()
    assert list(train.documents) == ["training text"]


def test_the_other_texts_that_papers_measure_on(local_data: Path) -> None:
    """Row by row, joined by blank lines, is what LLM-Pruner's and SlimGPT's perplexity reads: the hub's rows."""
    raw = " \n = Title = \n \n A line . \n"
    (local_data / "wikitext-2-raw/wiki.valid.raw").write_text(raw)
    (local_data / "c4/validation.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ("a", "b")))
    rows = ["", " = Title = \n", "", " A line . \n"]
    expected = {"wikitext2-validation": raw, "wikitext2-validation-rows": "\n\n".join(rows), "c4-validation": "a\n\nb"}
    for name, text in expected.items():
        source = perplexity_text(name)
        assert (source.name, source.origin, list(source.documents)) == (name, "local data", [text])
    with pytest.raises(ValueError, match="it must be .*c4-validation"):
        perplexity_text("c4-validation-rows")


def test_the_local_wikitext_equals_the_published_file() -> None:
    """With the real data: the published checksum, and the hub's rows (lines, blank ones empty) give the same stream."""
    source = perplexity_text("auto")
    if source.origin != "local data":
        pytest.skip("SLIMGPT_DATA does not hold WikiText-2")
    assert source.sha256.startswith("173c87a53759")
    raw = source.documents[0]
    rows = ["" if not line.strip() else line for line in raw.splitlines(keepends=True)]
    assert join_wikitext_rows(rows) == raw


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="c4, wikitext, alpaca, python or auto"):
        calibration_text("c5")
    known = "wikitext2, wikitext2-validation, c4-validation, wikitext2-rows, wikitext2-validation-rows, python or auto"
    with pytest.raises(ValueError, match=known):
        perplexity_text("ptb")


def test_the_data_folder_may_begin_with_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SLIMGPT_DATA", "~/data")
    assert sources.local_data() == tmp_path / "data"


def test_a_missing_data_folder_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMGPT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="SLIMGPT_DATA"):
        calibration_text("auto")


def test_python_text_is_prose_and_the_held_out_part_is_disjoint() -> None:
    calibration, held_out = calibration_text("python"), perplexity_text("python")
    assert calibration.origin == held_out.origin == "python"
    assert sum(map(len, calibration.documents)) > 1_000_000  # enough for 32 x 1024 tokens many times over
    assert len(held_out.documents[0]) > 200_000
    paragraphs = {p.strip() for text in calibration.documents for p in text.split("\n\n") if len(p) > 80}
    assert not [p for p in held_out.documents[0].split("\n\n") if p.strip() in paragraphs]


def run_alone(code: str, *arguments: str, **environment: str) -> str:
    """Run code in its own process: whether the hub is reachable is checked once per process."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("SLIMGPT_DATA", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_DATA = """
from slimgpt.data import text as sources
from slimgpt.data.text import calibration_text, perplexity_text
for read in (calibration_text, perplexity_text):
    source = read("auto")
    print(source.name, source.origin, source.sha256)
named = [(calibration_text, name) for name in ("c4", "wikitext", "alpaca")]
for read, name in (*named, (perplexity_text, "wikitext2")):
    try:
        read(name)
    except FileNotFoundError as error:
        print(error)
"""


def test_without_data_or_hub_auto_is_python_and_named_texts_are_errors(tmp_path: Path) -> None:
    lines = run_alone(WITHOUT_DATA, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert lines[0] == f"python python {calibration_text('python').sha256}"  # the same text in every process
    assert lines[1] == f"python python {perplexity_text('python').sha256}"
    assert [line.split()[0] for line in lines[2:]] == ["c4", "wikitext", "alpaca", "wikitext2"]
    assert all("HF_HUB_OFFLINE is set" in line and "set SLIMGPT_DATA" in line for line in lines[2:])


class Endpoint(BaseHTTPRequestHandler):
    """Responds to /STATUS with that status, and to everything else with 404."""

    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/")) if self.path.strip("/").isdigit() else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD


@contextmanager
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


HUB_ANSWERS = """
import sys
from huggingface_hub import constants
from slimgpt.checkpoints.hub import hub_obstacle
from slimgpt.data.text import perplexity_text
for status in (200, 404, 403, 503):
    constants.ENDPOINT = f"{sys.argv[1]}/{status}"
    hub_obstacle.cache_clear()
    print(hub_obstacle())
constants.ENDPOINT = sys.argv[1]
hub_obstacle.cache_clear()
try:
    perplexity_text("wikitext2")
except FileNotFoundError as error:
    print(error)
"""


def test_hub_responses_are_recognised_and_missing_data_gives_a_one_line_error(tmp_path: Path) -> None:
    with endpoint() as url:
        lines = run_alone(HUB_ANSWERS, url, HF_ENDPOINT=url, NO_PROXY="127.0.0.1", HF_HOME=str(tmp_path)).splitlines()
    assert lines[:4] == ["", "", "the hub answers with status 403", "the hub answers with status 503"]
    assert lines[4].startswith(
        "wikitext2 is not available: the hub answers with status 404 for Salesforce/wikitext, and"
    )
    assert len(lines) == 5


def test_a_hub_that_never_responds_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code = "from slimgpt.checkpoints.hub import hub_obstacle; print(hub_obstacle())"
        assert "does not answer" in run_alone(code, HF_ENDPOINT=f"http://127.0.0.1:{port}", NO_PROXY="127.0.0.1")
