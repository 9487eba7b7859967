"""A file for llama.cpp computes what transformers computes: every family that can be written, widths of every kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.llamacpp.export import export, neighbours, plan_export
from slimgpt.checkpoints.headers import read_json
from slimgpt.checkpoints.lineage import checkpoint_digest
from slimgpt.checkpoints.shards import Shards
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.files import json_bytes
from tests.tiny_families import write_family
from tests.tiny_models import write_dense

pytest.importorskip("llama_cpp_py_sync", reason="it has no wheel for this machine")
from tests.deploy.llamacpp.runtime import LlamaCpp

PER_LAYER = ("llama", "llama3", "vicuna", "mistral", "qwen2", "qwen2_sliding")
STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PROMPTS = [
    "The assert statement",
    "def f(x):\n    return x",
    "1984, naïve café ☕!!",
    "A class",
    "import os",
    "For each",
    "\n\n\t  spaces",
    "If the",
    "It's",
    "Zen",
]


def as_f16(folder: Path) -> AutoModelForCausalLM:
    """The model with the weights that an f16 file holds: matrices rounded, vectors not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    return model


@torch.no_grad()
def assert_same(file: Path, folder: Path, length: int = 24) -> None:
    """The same tokens, and after each of them the same logits, but for llama.cpp's products in 16 bits."""
    runtime, model, tokenizer = LlamaCpp(file), as_f16(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert runtime.tokens(prompt) == ids, prompt
    ids = [int(i) for i in torch.randint(1, model.config.vocab_size, (length,), generator=torch.manual_seed(1))]
    expected = model(torch.tensor([ids])).logits[0].numpy()
    spread = float(expected.std())
    assert np.abs(runtime.logits(ids) - expected).max() < 0.03 * spread
    # the same with the tokens in another order would not be
    assert np.abs(runtime.logits(ids[::-1]) - expected).max() > spread
    runtime.close()


@pytest.mark.parametrize("case", PER_LAYER)
def test_layers_that_differ(case, pruned_family, tmp_path):
    """Per-layer heads, kv heads and widths; biases, LLaMA 3's rotary factors, tied and separate heads."""
    _, pruned = pruned_family(case)
    file = export(plan_export(pruned, "f16"), tmp_path / "a.gguf")
    reader = GGUFReader(file)
    shapes = read_json(pruned / "config.json")["per_layer_config"].values()
    assert reader.get_field("general.architecture").contents() == "deci"
    for key, name in (
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("feed_forward_length", "intermediate_size"),
    ):
        assert reader.get_field(f"deci.{key}").contents() == [shape[name] for shape in shapes]
    assert_same(file, pruned)


@pytest.mark.parametrize("case", STOCK)
def test_layers_that_are_alike(case, tmp_path):
    """They go under the family's own architecture, which every older llama.cpp knows."""
    folder = write_family(tmp_path / "dense", case)
    file = export(plan_export(folder, "f16"), tmp_path / "a.gguf")
    assert GGUFReader(file).get_field("general.architecture").contents() == STOCK[case]
    assert_same(file, folder)


@torch.no_grad()
def test_greedy_tokens(tmp_path):
    """Ten prompts, 32 tokens each: llama.cpp chooses as transformers does, but where two tokens are as good."""
    dense = write_dense(tmp_path / "dense", hidden_size=128, intermediate_size=256)
    pruned = tmp_path / "pruned"
    prune(dense, pruned, PruneConfig(ratio=0.3, ffn_multiple=8, calibration="python", num_samples=8, seq_len=48))
    runtime = LlamaCpp(export(plan_export(pruned, "f16"), tmp_path / "a.gguf"))
    model, tokenizer = as_f16(pruned), AutoTokenizer.from_pretrained(pruned)
    answers, ties = set(), 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
        first = ids.shape[1] - 1  # the logits after the prompt's last token
        logits_TV = model(made[None]).logits[0, first:-1]
        mine, theirs = made[first + 1 :], torch.tensor(runtime.chosen(made.tolist())[first:-1])
        gaps = logits_TV.gather(1, mine[:, None]) - logits_TV.gather(1, theirs[:, None])
        assert float(gaps.max()) < 0.01 * float(logits_TV.std()), prompt
        ties += int((mine != theirs).sum())
        answers.add(tuple(made.tolist()))
    assert len(answers) > 5 and ties < 5
    runtime.close()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("qwen3", "it is a qwen3; of those with layers that differ in width, llama, mistral, qwen2 can"),
        ("gemma3", "it is a gemma3_text"),
        ("phi3", "it is a phi3"),
        ("smollm3", "it is a smollm3"),
        ("olmo2", "it is a olmo2"),
        ("granite", "it is a granite"),
    ],
)
def test_families_that_llama_cpp_cannot_express(case, reason, pruned_family):
    _, pruned = pruned_family(case)
    with pytest.raises(ValueError, match=f"cannot become GGUF: {reason}.*serve it with vLLM instead"):
        plan_export(pruned, "f16")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its rotary embedding is dynamic",
        ),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu"),
    ],
)
def test_what_would_compute_something_else(changes, reason, tmp_path):
    folder = write_dense(tmp_path / "dense")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_bytes(json_bytes(config | changes))
    with pytest.raises(ValueError, match=reason):
        plan_export(folder, "f16")


def test_linear_rotary_scaling(tmp_path):
    """The one scaling that llama.cpp computes itself."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    folder = write_dense(tmp_path / "dense", rope_parameters=rope)
    assert_same(export(plan_export(folder, "f16"), tmp_path / "a.gguf"), folder)


def test_rows_for_a_rotation_of_neighbours():
    """By hand: two heads of four rows."""
    weight = torch.arange(8.0)[:, None] * torch.ones(1, 3)
    assert neighbours(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert neighbours(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("kind", "largest_error"), [("q8_0", 0.007), ("q4_k_m", 0.08)])
def test_blocks(kind, largest_error, tmp_path):
    """Blocks as llama.cpp's own program lays them out, in numbers that gguf's reader gives back."""
    folder = write_dense(tmp_path / "dense", hidden_size=256, intermediate_size=288, num_hidden_layers=8, head_dim=32)
    plan = plan_export(folder, kind)
    file = export(plan, tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    kinds = {name: GGMLQuantizationType(tensor.tensor_type).name for name, tensor in tensors.items()}
    if kind == "q8_0":
        assert {kinds[name] for name in kinds if "norm" not in name} == {"Q8_0"}
    else:
        assert kinds["token_embd.weight"] == "Q6_K"
        assert [kinds[f"blk.{i}.attn_v.weight"] for i in range(8)] == [
            *("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K")  # ends, and every third
        ]
        assert {kinds[f"blk.{i}.attn_q.weight"] for i in range(8)} == {"Q4_K"}
        # rows of 288 are no multiple of 256: blocks of 32 instead
        assert {kinds[f"blk.{i}.ffn_down.weight"] for i in (1, 2, 4, 5)} == {"Q5_0"}
        assert {kinds[f"blk.{i}.ffn_down.weight"] for i in (0, 3, 6, 7)} == {"Q8_0"}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    for name, source in (("blk.1.attn_v", "self_attn.v_proj"), ("blk.1.ffn_up", "mlp.up_proj")):
        stored = tensors[f"{name}.weight"]
        weight = Shards(folder).load([f"model.layers.1.{source}.weight"]).popitem()[1].numpy()
        numbers = dequantize(stored.data, stored.tensor_type).reshape(weight.shape)
        assert np.sqrt(np.mean((numbers - weight) ** 2)) < largest_error * weight.std()
    assert file.stat().st_size - plan.bytes < 200_000
    # Both read the same blocks; llama.cpp rounds what it multiplies them with to 8 bits as well.
    runtime = LlamaCpp(file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ids = list(range(1, 25))
    expected = model(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.corrcoef(runtime.logits(ids).ravel(), expected.ravel())[0, 1] > 0.99
    runtime.close()


def test_what_the_file_says(tmp_path):
    folder = write_dense(tmp_path / "dense")
    out = tmp_path / "new" / "a.gguf"
    reader = GGUFReader(export(plan_export(folder, "q8_0"), out, name="tiny"))
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("slimgpt.checkpoint").contents() == checkpoint_digest(folder)
    positions = read_json(folder / "config.json")["max_position_embeddings"]
    assert (out.parent / "a.Modelfile").read_text() == (
        f'FROM ./a.gguf\nPARAMETER num_ctx {positions}\nPARAMETER stop "<|endoftext|>"\n'
    )


def test_sliding_attention_is_read_as_far_as_one_window(tmp_path):
    """llama.cpp's llama does not slide: beyond the window it would compute something else."""
    folder = write_family(tmp_path / "dense", "mistral")
    assert plan_export(folder, "f16").architecture.context_length == 24


class TestTarget:
    """What stands there stays until the new file is complete."""

    @pytest.fixture
    def dense(self, tmp_path):
        return write_dense(tmp_path / "dense")

    def test_another_type(self, dense):
        with pytest.raises(ValueError, match="type is 'q3_k'; it must be one of f16, q8_0, q4_k_m"):
            plan_export(dense, "q3_k")

    @pytest.mark.parametrize("name", ["a.bin", "a"])
    def test_another_ending(self, dense, tmp_path, name):
        with pytest.raises(ValueError, match="give the name of a file that ends in .gguf"):
            export(plan_export(dense, "f16"), tmp_path / name)

    def test_something_else(self, dense, tmp_path):
        (tmp_path / "a.gguf").write_text("my notes")
        with pytest.raises(ValueError, match="is no GGUF file, so it is not replaced"):
            export(plan_export(dense, "f16"), tmp_path / "a.gguf")
        assert (tmp_path / "a.gguf").read_text() == "my notes"

    def test_a_folder_with_the_modelfiles_name(self, dense, tmp_path):
        """Before the weights are written, which a real model takes minutes for."""
        (tmp_path / "a.Modelfile").mkdir()
        with pytest.raises(ValueError, match=r"a.Modelfile is a folder, and the Modelfile beside a.gguf has that name"):
            export(plan_export(dense, "f16"), tmp_path / "a.gguf")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.Modelfile", "dense"]

    def test_weights_beyond_16_bits(self, dense, tmp_path):
        """Found on the way: the older file stays, nothing half-written does, and q8_0 takes them."""
        out = export(plan_export(dense, "f16"), tmp_path / "a.gguf")
        before = out.read_bytes()
        model = AutoModelForCausalLM.from_pretrained(dense)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[3, 5] = 1e5
        model.save_pretrained(dense)
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj\.weight holds 1e\+05, and f16 reaches 65,504"):
            export(plan_export(dense, "f16"), out)
        assert out.read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.Modelfile", "a.gguf", "dense"]
        export(plan_export(dense, "q8_0"), out)
        assert out.read_bytes() != before
