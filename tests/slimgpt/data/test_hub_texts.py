"""Data sets by hub name: the real client against a small server with the hub's API."""

import io

import pyarrow as pa
import pytest
from pyarrow import parquet

from slimgpt.data.text import calibration_text, perplexity_text
from tests.hub_server import C4, c4_shard, one_line

ALPACA = (
    "tatsu-lab/alpaca",
    "dce01c9b08f87459cf36a430d809084718273017",
    "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
)
WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-raw-v1/")


def parquet_bytes(rows, **columns):
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": rows, **columns}), buffer)
    return buffer.getvalue()


def test_c4_is_the_pinned_first_shard(hub, monkeypatch):
    repo, commit, path = C4
    hub.push(repo, {path: c4_shard([f"Document {i}" for i in range(9)])}, kind="datasets", commit=commit)
    hub.push(repo, {path: c4_shard(["changed under its name"])}, kind="datasets")
    monkeypatch.setattr("slimgpt.data.text.C4_DOCUMENTS", 5)
    for source in ("c4", "auto"):
        text = calibration_text(source)
        assert (text.name, text.origin, list(text.documents)) == ("c4", "hub", [f"Document {i}" for i in range(5)])
    assert hub.paths(path, "HEAD") == [f"/datasets/{repo}/resolve/{commit}/{path}"]  # once: then it is in the cache


def test_wikitext_is_the_pinned_parquet_with_its_lines_as_published(hub):
    repo, commit, folder = WIKITEXT
    rows = ["", " = Title = \n", "", " A line . \n"]
    files = {
        f"{folder}{split}-00000-of-00001.parquet": parquet_bytes(rows) for split in ("train", "test", "validation")
    }
    hub.push(repo, files, kind="datasets", commit=commit)
    expected = [" \n = Title = \n \n A line . \n"]
    for read, name, split in (
        (calibration_text, "wikitext", "train"),
        (perplexity_text, "wikitext2", "test"),
        (perplexity_text, "wikitext2-validation", "validation"),
    ):
        text = read(name)
        assert (text.name, text.origin, list(text.documents)) == (name, "hub", expected)
        paths = hub.paths(f"{split}-00000-of-00001.parquet", "HEAD")
        assert paths[0].startswith(f"/datasets/{repo}/resolve/{commit}/")
    assert list(perplexity_text("auto").documents) == expected
    assert list(perplexity_text("wikitext2-rows").documents) == ["\n\n".join(rows)]


def test_c4_s_validation_text_is_the_first_shard_of_its_split(hub):
    repo, commit, _ = C4
    path = "en/c4-validation.00000-of-00008.json.gz"
    hub.push(repo, {path: c4_shard(["one", "two"])}, kind="datasets", commit=commit)
    text = perplexity_text("c4-validation")
    assert (text.name, text.origin, list(text.documents)) == ("c4-validation", "hub", ["one\n\ntwo"])


def test_alpaca_is_the_pinned_parquet_read_by_its_fields(hub):
    """Not by its column text, which has rows without an answer."""
    repo, commit, path = ALPACA
    fields = {"instruction": ["Add.", "Be silent."], "input": ["1 1", ""], "output": ["2", ""]}
    hub.push(repo, {path: parquet_bytes(["...", "..."], **fields)}, kind="datasets", commit=commit)
    text = calibration_text("alpaca")
    (document,) = text.documents
    assert (text.name, text.origin) == ("alpaca", "hub")
    assert document.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2")
    assert hub.paths(path, "HEAD") == [f"/datasets/{repo}/resolve/{commit}/{path}"]


def test_fetched_data_sets_are_available_offline(hub, offline):
    repo, commit, path = C4
    hub.push(repo, {path: c4_shard(["kept"])}, kind="datasets", commit=commit)
    before = calibration_text("auto")
    offline()
    for name in ("auto", "c4"):
        again = calibration_text(name)
        assert (str(again), list(again.documents)) == (str(before), ["kept"])
    assert perplexity_text("auto").origin == "python"  # WikiText was never fetched
    with pytest.raises(
        FileNotFoundError, match="wikitext2 is not available: .*HF_HUB_OFFLINE.* set SLIMGPT_DATA"
    ) as error:
        perplexity_text("wikitext2")
    one_line(error)
    assert hub.requests == []


def test_a_data_set_missing_on_the_hub_is_named_also_for_auto(hub):
    repo, commit, path = C4
    for source in ("c4", "auto"):
        with pytest.raises(
            FileNotFoundError, match=f"c4 is not available: the hub has no {repo}.*or use 'python'"
        ) as error:
            calibration_text(source)
        one_line(error)
    hub.push(repo, {path: c4_shard(["cut"])[:-9]}, kind="datasets", commit=commit)
    with pytest.raises(ValueError, match="cannot be read: Truncated compressed stream") as error:
        calibration_text("c4")
    one_line(error)
