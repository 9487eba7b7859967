"""The comparison, whole, on a tiny model: figures that are kept, a run that goes on, the page."""

import json
import pydoc_data.topics

import pytest

from benchmarks import quality, quality_page
from tests.tiny_models import write_dense


@pytest.fixture
def data(tmp_path, monkeypatch):
    """SLIMGPT_DATA with Python's reference topics in place of C4 and WikiText-2, and figures and page in a folder."""
    topics = list(pydoc_data.topics.topics.values())
    (tmp_path / "data/c4").mkdir(parents=True)
    (tmp_path / "data/wikitext-2-raw").mkdir()
    for name, part in (("train", topics[::2]), ("validation", topics[1:20:2])):
        (tmp_path / f"data/c4/{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    (tmp_path / "data/wikitext-2-raw/wiki.test.raw").write_text("\n\n".join(topics[21:31:2]))
    monkeypatch.setenv("SLIMGPT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(quality, "SEQ_LEN", 256)  # the tiny model has 512 positions
    monkeypatch.setitem(quality.PRUNE, "seq_len", 256)
    monkeypatch.setitem(quality.PRUNE, "ffn_multiple", 8)
    monkeypatch.setattr(quality, "FIGURES", tmp_path / "quality.json")
    monkeypatch.setattr(quality_page, "PAGE", tmp_path / "results.md")
    return tmp_path


def test_methods_are_measured_once_and_stand_on_the_page(data, monkeypatch):
    dense = write_dense(data / "tiny", intermediate_size=256)
    words = ["quality", "--model", str(dense), "--methods"]
    monkeypatch.setattr("sys.argv", [*words, "magnitude", "--ratios", "0.25"])
    quality.main()
    first = json.loads((data / "quality.json").read_text())
    assert [row["method"] for row in first] == ["dense", "magnitude"]
    monkeypatch.setattr("sys.argv", [*words, "magnitude,default,no compensation", "--ratios", "0.25"])
    quality.main()
    rows = json.loads((data / "quality.json").read_text())
    assert rows[:2] == first  # seconds included: not measured again
    by_name = {row["method"]: row for row in rows}
    assert by_name["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    ours, bare = by_name["SlimGPT (default)"], by_name["no compensation"]
    assert ours["removed"] == bare["removed"] >= 0.25
    assert ours["kl"] < bare["kl"]  # the same units, without the refit
    assert not list(data.glob("*.svg"))  # one ratio is no line
    monkeypatch.setattr("sys.argv", [*words, "magnitude", "--ratios", "0.25,0.3"])
    quality.main()
    assert "magnitude" in (data / "results-tiny-float32.svg").read_text()
    page = (data / "results.md").read_text()
    assert "### 25%" in page
    order = [line.split(" | ")[0] for line in page.partition("### 30%")[0].splitlines() if line.startswith("| ")]
    assert order[1] == "| dense" and set(order[2:]) == {f"| {name}" for name in by_name if name != "dense"}


def test_tasks_are_shown_with_the_error_of_their_mean():
    row = {"tasks": {"a": [50.0, 3.0], "b": [60.0, 4.0]}, "limit": 100}
    assert quality_page._tasks(row) == "55.0 ± 2.5 (100 each)"
    assert quality_page._tasks({}) == ""
