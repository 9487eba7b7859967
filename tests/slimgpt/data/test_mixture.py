"""Several calibration texts with their shares of the sequences."""

import pytest
import torch

from slimgpt.data.calibration import calibrate
from slimgpt.data.mixture import parts_of


@pytest.mark.parametrize(
    ("source", "samples", "parts"),
    [
        ("c4", 8, [("c4", 8)]),
        ("c4,python:0.25", 8, [("c4", 6), ("python", 2)]),
        ("c4,a.txt,python:0.5", 8, [("c4", 2), ("a.txt", 2), ("python", 4)]),
        ("c4:0.5, python:0.5", 3, [("c4", 2), ("python", 1)]),  # the rest of two equals goes to the first
        ("c4,python:0.2", 32, [("c4", 26), ("python", 6)]),
        (r"C:\\texts\\a.txt", 4, [(r"C:\\texts\\a.txt", 4)]),
    ],
)
def test_shares_are_rounded_to_whole_sequences_and_all_are_drawn(source, samples, parts):
    assert parts_of(source, samples) == parts
    assert sum(count for _, count in parts) == samples


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("c4:0.7,python:0.5", "shares are 1.2 in total; they must be 1 together"),
        ("c4:0.7,python:0.2", "shares are 0.9 in total; they must be 1 together"),
        ("c4,python:1", "shares are 1 in total; they must leave room for the parts without one"),
        ("c4,python:1.5", "'python:1.5'; a share must be more than 0 and at most 1"),
        ("c4,python:0.01", "0.01 of 8 sequences leave none for python; ask for more sequences, or a larger share"),
        ("c4,", "every part needs a text's name"),
        ("c4,python:0.2,c4:0.5", "names c4 twice; give it once, with its whole share"),
    ],
)
def test_shares_that_cannot_be_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        parts_of(source, 8)


def test_a_file_that_is_named_in_two_ways_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"names \./notes.txt twice"):
        parts_of(f"{tmp_path}/notes.txt,./notes.txt", 8)


def test_a_data_set_and_what_stands_for_it_are_one_text(tmp_path, monkeypatch):
    """The same sequences would be drawn twice, and the facts say "c4:0.5, c4:0.5"."""
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4/train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setenv("SLIMGPT_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for source, said in (
        ("auto,c4", r"names c4 twice \(auto is the same text\)"),
        (f"c4,{tmp_path}/c4/train.jsonl", r"train.jsonl twice \(c4 is the same text\)"),
        (f"~/c4/train.jsonl,{tmp_path}/c4/train.jsonl", r"train.jsonl twice \(~/c4/train.jsonl is the same text\)"),
    ):
        with pytest.raises(ValueError, match=f"{said}; give it once, with its whole share"):
            parts_of(source, 8)
    assert parts_of("auto,python", 8) == [("auto", 4), ("python", 4)]
    (tmp_path / "c4/train.jsonl").unlink()
    monkeypatch.setattr("slimgpt.data.text.hub_obstacle", lambda: "there is none here")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="names python twice"):
        parts_of("auto,python", 8)


def test_more_files_than_a_name_may_have_letters_are_several_texts(tmp_path):
    """No disk holds a file whose name is the whole list, and to ask for one raises."""
    files = [str(tmp_path / f"{'part' * 10}-{i}.txt") for i in range(12)]
    assert parts_of(",".join(files), 24) == [(file, 2) for file in files]


def test_the_sequences_are_those_of_each_text_alone_and_the_facts_name_both(dense, tmp_path):
    notes = tmp_path / "notes, of a day.txt"
    notes.write_text("the river runs to the sea and the sea gives back the rain\n" * 400)
    alone = calibrate(dense, str(notes), num_samples=2, seq_len=32, seed=0)
    (tmp_path / "notes.txt").write_text(notes.read_text())
    mixed = calibrate(dense, f"python,{tmp_path / 'notes.txt'}:0.25", num_samples=8, seq_len=32, seed=0)
    python = calibrate(dense, "python", num_samples=6, seq_len=32, seed=0)
    assert torch.equal(mixed.ids_NT, torch.cat([python.ids_NT, alone.ids_NT]))
    assert mixed.facts["name"] == "python:0.75, notes.txt:0.25"
    assert mixed.facts["num_samples"] == 8
    assert len({facts["ids_sha256"] for facts in (alone.facts, mixed.facts, python.facts)}) == 3
