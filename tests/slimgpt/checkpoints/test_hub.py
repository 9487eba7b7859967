"""Models and data sets by hub name: the real client against a small server with the hub's API."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from slimgpt.checkpoints.hub import hub_obstacle
from slimgpt.checkpoints.source import model_name, resolve_model
from slimgpt.data.text import calibration_text
from slimgpt.engine.pruner import prune
from tests.hub_server import C4, TOKEN, c4_shard, one_line

MODEL = "some-org/Some-Model_1.0"
# What lies beside the weights of real repositories and is not needed: other formats, originals, logs, code.
NO_TOKEN = "HF_TOKEN is not set to a token that may read it"
JUNK = {
    "pytorch_model.bin": b"pickle",
    "model.Q4_K_M.gguf": b"gguf",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/tokenizer.model": b"again",
    "runs/events.json": b"{}",
    "modeling_other.py": b"raise SystemExit",
    ".gitattributes": b"*.bin filter=lfs",
    "README.md": b"# The dense model",
}
BESIDES = {
    "LICENSE": b"A licence",
    "NOTICE.txt": b"A notice",
    "USE_POLICY.md": b"A policy",
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_only_the_files_that_are_needed_are_fetched(hub, dense_mha):
    needed = files_of(dense_mha) | BESIDES
    assert sum(name.endswith(".safetensors") for name in needed) > 1  # sharded, and consolidated in JUNK
    hub.push(MODEL, needed | JUNK)
    folder = resolve_model(MODEL)
    assert hub.fetched() == set(needed)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(needed)
    assert all((folder / name).read_bytes() == data for name, data in needed.items())


def test_a_single_file_next_to_an_index_is_not_fetched(hub, dense_mha):
    hub.push(MODEL, {**files_of(dense_mha), "model.safetensors": b"stale"})
    assert not (resolve_model(MODEL) / "model.safetensors").exists()


def test_main_is_pinned_to_its_commit_which_is_recorded(hub, dense, dense_mha):
    first = hub.push(MODEL, files_of(dense))
    folder = resolve_model(MODEL)
    assert model_name(folder) == f"{MODEL}@{first}"
    assert all(f"/resolve/{first}/" in path for _, path, _ in hub.requests if "/resolve/" in path)
    second = hub.push(MODEL, files_of(dense_mha))
    assert first != second
    assert model_name(resolve_model(MODEL)) == f"{MODEL}@{second}"
    old = resolve_model(MODEL, revision=first)
    assert old == folder
    assert (old / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    hub.repos["models", MODEL].refs["v1"] = first
    assert resolve_model(MODEL, revision="v1") == folder


def test_a_model_updated_during_the_download_comes_from_one_commit(hub, dense, dense_mha):
    first = hub.push(MODEL, files_of(dense))
    hub.after["/config.json"] = lambda: hub.push(MODEL, files_of(dense_mha))
    folder = resolve_model(MODEL)
    assert hub.repos["models", MODEL].refs["main"] != folder.name == first
    assert files_of(folder) == files_of(dense)


def test_only_the_name_of_a_folder_is_recorded(dense, tmp_path, monkeypatch):
    assert model_name(dense) == dense.name
    monkeypatch.chdir(dense)
    assert model_name(Path()) == dense.name


def test_fetched_files_are_used_offline_and_missing_ones_are_named(hub, offline, dense):
    commit = hub.push(MODEL, files_of(dense))
    folder = resolve_model(MODEL)
    offline()
    assert resolve_model(MODEL) == resolve_model(MODEL, revision=commit) == folder
    with pytest.raises(
        FileNotFoundError, match="HF_HUB_OFFLINE is set.* its cache lacks files of other/model"
    ) as error:
        resolve_model("other/model")
    one_line(error)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"its cache lacks files of {MODEL}") as error:
        resolve_model(MODEL)
    one_line(error)
    assert hub.requests == []


def test_a_second_call_fetches_nothing(hub, dense):
    hub.push(MODEL, files_of(dense))
    resolve_model(MODEL)
    hub.requests.clear()
    resolve_model(MODEL)
    assert hub.fetched() == set()


def test_a_broken_download_resumes_where_it_stopped(hub, dense, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 15)  # what is kept of a broken connection: whole chunks
    hub.push(MODEL, files_of(dense))
    hub.cuts["model.safetensors"] = [100_000]
    folder = resolve_model(MODEL)
    assert (folder / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    ranges = [span for verb, path, span in hub.requests if verb == "GET" and path.endswith("model.safetensors")]
    assert ranges == ["", f"bytes={3 << 15}-"]


RESOLVE = "import sys; from slimgpt.checkpoints.source import resolve_model; print(resolve_model(sys.argv[1]))"


def child(hub, tmp_path, *words, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "SLIMGPT_DATA", "HF_TOKEN")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    ours["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.Popen(
        [sys.executable, *words],
        env=inherited | ours | environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_download_is_not_a_model_and_resumes_with_the_missing_files(hub, dense_mha, tmp_path):
    files = files_of(dense_mha)
    last = max(name for name in files if name.endswith(".safetensors"))
    hub.push(MODEL, files)
    hub.stall[last] = 1000
    first = child(hub, tmp_path, "-c", RESOLVE, MODEL)
    try:
        assert hub.stalled.wait(120)
        others = [name for name in files if name.endswith(".safetensors") and name != last]
        snapshot = tmp_path / "home/hub" / f"models--{MODEL.replace('/', '--')}"
        for _ in range(600):  # the other shards come over other connections
            if all(list(snapshot.glob(f"snapshots/*/{name}")) for name in others):
                break
            hub.stalled.clear()
            hub.stalled.wait(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    hub.stall.clear()
    hub.requests.clear()
    second = child(hub, tmp_path, "-c", RESOLVE, MODEL)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert hub.fetched() == {last}
    assert files_of(Path(out.strip())) == files


def test_gated_private_missing_and_misspelt_models_give_different_one_line_errors(hub, dense, monkeypatch):
    files = files_of(dense)
    hub.push("meta/gated", files, access="gated")
    hub.push("me/private", files, access="private")
    hub.push(MODEL, files)
    cases = {
        "meta/gated": "meta/gated is gated: accept its licence on its page, then set HF_TOKEN",
        "me/private": "the hub has no me/private, or it is private and HF_TOKEN is not set",
        "no/such": "no folder no/such, and the hub has no no/such",
        "two words/x": "is not a name that the Hub allows",
    }
    for name, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message) as error:
            resolve_model(name)
        one_line(error)
    with pytest.raises(FileNotFoundError, match=f"{MODEL} has no revision v9") as error:
        resolve_model(MODEL, revision="v9")
    one_line(error)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(FileNotFoundError, match="does not accept HF_TOKEN") as error:
        resolve_model(MODEL)
    one_line(error)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve_model("meta/gated") / "config.json").is_file()
    assert (resolve_model("me/private") / "config.json").is_file()


def test_hub_errors_are_reported_and_short_ones_are_retried(hub, dense):
    hub.push(MODEL, files_of(dense))
    hub.statuses[f"models/{MODEL}/revision/main"] = [503]
    with pytest.raises(FileNotFoundError, match="the hub answers with status 503.*try again later") as error:
        resolve_model(MODEL)
    one_line(error)
    hub.statuses["/model.safetensors"] = [502]
    assert (resolve_model(MODEL) / "model.safetensors").is_file()


def test_a_hub_that_goes_down_is_reported(hub, dense):
    hub.push(MODEL, files_of(dense))
    assert hub_obstacle() == ""
    hub.shutdown()
    hub.server_close()
    close_session()
    with pytest.raises(FileNotFoundError, match=f"no folder {MODEL}, and ConnectError") as error:
        resolve_model(MODEL)
    one_line(error)


def test_repositories_without_a_model_to_prune_are_refused_before_weights_are_fetched(hub, dense):
    files = files_of(dense)
    weights = files.pop("model.safetensors")
    hub.push("org/pickles", files | JUNK)
    with pytest.raises(
        ValueError, match=r"org/pickles has no safetensors weights.*python -c 'from transformers"
    ) as error:
        resolve_model("org/pickles")
    assert "use_safetensors=False" in one_line(error)
    hub.push("org/gguf", {"model.gguf": b"gguf", "README.md": b""})
    with pytest.raises((ValueError, FileNotFoundError), match="org/gguf|no config.json") as error:
        resolve_model("org/gguf")
    one_line(error)
    hub.push("org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights})
    with pytest.raises(ValueError, match="holds a LoRA adapter: merge it") as error:
        resolve_model("org/lora")
    one_line(error)
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".gguf", ".safetensors"))]


def test_pruning_with_hub_names_only_online_and_offline(hub, offline, dense, tmp_path, tiny_config):
    """Prune with model and C4 from the hub, then again offline: the same files."""
    repo, shard_commit, path = C4
    documents = calibration_text("python").documents[:40]
    hub.push(repo, {path: c4_shard(documents)}, kind="datasets", commit=shard_commit)
    hub.push(MODEL, files_of(dense) | JUNK | BESIDES)
    config = tiny_config(calibration="auto")
    report = prune(resolve_model(MODEL), tmp_path / "online", config)
    assert (report.calibration["name"], report.calibration["origin"]) == ("c4", "hub")
    offline()
    prune(resolve_model(MODEL), tmp_path / "offline", config)
    weights = [
        {p.name: p.read_bytes() for p in (tmp_path / out).glob("*.safetensors")} for out in ("online", "offline")
    ]
    assert weights[0] == weights[1]
    assert (tmp_path / "online/additional_chat_templates/rag.jinja").read_bytes() == BESIDES[
        "additional_chat_templates/rag.jinja"
    ]


def test_the_command_line_takes_the_hub_from_the_environment(hub, dense, tmp_path, text_file):
    commit = hub.push("org/tiny", files_of(dense))
    words = ["-m", "slimgpt", "prune", "org/tiny", "out", "--calibration", str(text_file), "--ratio", "0.3"]
    words += ["--ffn-multiple", "4", "--num-samples", "4", "--seq-len", "64", "--revision", commit]
    running = child(hub, tmp_path, *words, SLIMGPT_RUNS=str(tmp_path / "runs"))
    _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert (tmp_path / "out/config.json").is_file()
    gone = child(hub, tmp_path, "-m", "slimgpt", "prune", "org/gone", "out2", SLIMGPT_RUNS=str(tmp_path / "runs"))
    _, err = gone.communicate(timeout=300)
    assert gone.returncode == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: no folder org/gone, and the hub has no org/gone, or it is private and {NO_TOKEN}"]
