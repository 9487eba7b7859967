"""Everything that reads a checkpoint names a damaged small file, with the fault and the remedy."""

import pytest

from deploy.bench.config import BenchConfig, check_model
from deploy.bundle.folder import write_bundle
from deploy.engines.tensor_parallel import family_config
from flows.cli.show import checkpoint_facts
from slimgpt.checkpoints.headers import read_json
from slimgpt.checkpoints.source import resolve_model
from slimgpt.checkpoints.weight_files import count_parameters
from slimgpt.config import EvalConfig
from slimgpt.engine.plan import plan
from slimgpt.evaluation.harness import evaluate
from tests.slimgpt.checkpoints.found_checkpoints import store, tensors_of

READERS = {
    "resolve": lambda folder, _: resolve_model(folder),
    "plan": lambda folder, config: plan(folder, config()),
    "evaluate": lambda folder, _: evaluate(folder, EvalConfig(tasks="continuation")),
    "inspect": lambda folder, _: checkpoint_facts(folder),
    "package": lambda folder, _: write_bundle(folder, folder.parent / "bundle", name="tiny"),
    "bench": lambda folder, _: check_model(folder, BenchConfig()),
    "tensor parallel": lambda folder, _: family_config(folder),
}
DAMAGED = {
    '{"model_type": "lla': r"is damaged: Unterminated string .* line 1 column 16 .*; download or copy it again",
    "": "is damaged: Expecting value: line 1 column 1 .*; download or copy it again",
    "\x00\x00": "is damaged: Expecting value",
    "[1]": "is damaged: it holds a JSON list, not an object",
    "version https://git-lfs.github.com/spec/v1\n": "is damaged: it is a pointer of git-lfs; run git lfs pull",
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_names_a_damaged_config(copy, tiny_config, read):
    for text, message in DAMAGED.items():
        (copy / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read(copy, tiny_config)
        assert str(error.value).startswith(f"{copy / 'config.json'} is damaged")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_names_a_folder_without_a_config(copy, tiny_config, read):
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{copy} has no config.json: it is not a model folder, or its download"):
        read(copy, tiny_config)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_names_a_pointer_of_git_lfs(copy, tiny_config, read, name):
    """Above all a bundle, which would carry it as the tokenizer."""
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match=f"{name} is damaged: it is a pointer of git-lfs; run git lfs pull"):
        read(copy, tiny_config)


@pytest.mark.parametrize("read", [READERS[name] for name in ("plan", "inspect", "package")])
def test_readers_of_weights_name_a_damaged_index(copy, tiny_config, read):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}')
    with pytest.raises(ValueError, match=r"index\.json is damaged: it has no weight_map of file names; download"):
        read(copy, tiny_config)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=f"{path} is damaged: 'utf-8' codec can't decode byte 0xff in position 7"):
        read_json(path)


def test_parameters_are_counted_over_the_shards_that_the_index_names(copy):
    one_file = count_parameters(copy)
    assert one_file == sum(tensor.numel() for tensor in tensors_of(copy).values())
    store(copy, tensors_of(copy), parts=3)
    assert count_parameters(copy) == one_file
