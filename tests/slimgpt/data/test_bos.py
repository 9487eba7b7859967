"""Where BOS stands: what auto becomes, the tokens of the blocks, and figures that do not compare."""

import math

import pytest
import torch
from mlflow.pyfunc import PythonModelContext
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimgpt.checkpoints.building import building
from slimgpt.config import PruneConfig, paper_preset
from slimgpt.data.bos import blocks_of, lost_bos, resolve_bos
from slimgpt.data.calibration import calibrate, token_blocks
from slimgpt.data.text import calibration_text
from slimgpt.evaluation.harness import EvalConfig, evaluate
from slimgpt.evaluation.perplexity import perplexity, ratio_interval
from tasks.registry.pyfunc_model import TextGenerator
from tests.tiny_families import write_family

BOS = 1


def with_bos(folder, *, adds=False):
    """The tokenizer of a folder with token 1 as BOS, which it adds by itself or not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    if adds:
        token = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, BOS)]
        )
    return tokenizer


@pytest.mark.parametrize(
    ("adds", "model_type", "policy", "resolved"),
    [
        (True, "llama", "auto", "block"),
        (False, "llama", "auto", "none"),  # SmolLM2: has one, and was trained without
        (False, "slim_gemma2", "auto", "block"),  # made from GGUF: the flag is lost
        (True, "llama", "none", "none"),
        (False, "llama", "stream", "stream"),
        (False, "qwen2", "block", "block"),
    ],
)
def test_auto_is_the_habit_of_the_tokenizer_or_the_family(dense, adds, model_type, policy, resolved):
    assert resolve_bos(policy, with_bos(dense, adds=adds), model_type) == resolved


@pytest.mark.parametrize(
    ("model_type", "token", "resolved"),
    [
        ("llama", "<|begin_of_text|>", "block"),  # Llama 3
        ("slim_mistral", "<s>", "block"),
        ("llama", "<s>", "none"),  # Llama 2's own tokenizer adds it; Baichuan's has the same token and does not
        ("llama", "<|im_start|>", "none"),  # SmolLM2
        ("phi3", "<s>", "none"),
    ],
)
def test_families_are_known_by_their_bos_where_the_tokenizer_lost_the_flag(dense, model_type, token, resolved):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"bos_token": token})
    assert resolve_bos("auto", tokenizer, model_type) == resolved


def test_prompts_get_bos_only_where_the_tokenizer_should_add_it_and_does_not(dense):
    forgetful, habitual = with_bos(dense), with_bos(dense, adds=True)
    assert lost_bos(forgetful, "slim_gemma2") == forgetful.bos_token
    assert lost_bos(habitual, "slim_gemma2") == ""
    assert lost_bos(forgetful, "llama") == ""


def test_a_registered_model_begins_prompts_with_the_bos_that_its_tokenizer_lost(tmp_path):
    folder = write_family(tmp_path / "gemma", "gemma2")
    tokenizer = with_bos(folder)
    tokenizer.save_pretrained(folder)
    registered = TextGenerator()
    registered.load_context(PythonModelContext({"model": str(folder)}, {}))
    request = {"max_new_tokens": 6}
    [text] = registered.predict(None, ["def main"], request)
    ids_BT = torch.tensor([[BOS, *tokenizer("def main", add_special_tokens=False)["input_ids"]]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected_BT = model.generate(ids_BT, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert text == tokenizer.decode(expected_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)
    assert registered.predict(None, [f"{tokenizer.bos_token}def main"], request) == [text]  # not twice


def test_a_tokenizer_without_bos_has_none_and_none_can_be_requested(dense):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert tokenizer.bos_token_id is None
    assert resolve_bos("auto", tokenizer, "gemma2") == "none"
    with pytest.raises(
        ValueError, match="bos is 'block', but the model's tokenizer has no BOS token; use none or auto"
    ):
        calibrate(dense, "python", num_samples=2, seq_len=8, seed=0, bos="block")


def test_blocks_are_full_and_bos_is_one_of_their_tokens():
    ids = list(range(10, 21))
    assert blocks_of(ids, "none", BOS, 4) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert blocks_of(ids, "stream", BOS, 4) == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]
    assert blocks_of(ids, "block", BOS, 4) == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]


def test_calibration_reads_the_same_text_behind_bos(dense):
    text, tokenizer = calibration_text("python"), with_bos(dense)
    plain = token_blocks(tokenizer, text, num_samples=3, seq_len=16, seed=2)
    stream = token_blocks(tokenizer, text, num_samples=3, seq_len=16, seed=2, bos="stream")
    block = token_blocks(tokenizer, text, num_samples=3, seq_len=16, seed=2, bos="block")
    assert stream.ids_NT.flatten().tolist() == [BOS, *plain.ids_NT.flatten()[:-1].tolist()]
    assert block.ids_NT[:, 0].tolist() == [BOS] * 3
    assert block.ids_NT[:, 1:].flatten().tolist() == plain.ids_NT.flatten()[:45].tolist()
    assert [made.facts["bos"] for made in (plain, stream, block)] == ["none", "stream", "block"]
    assert len({made.facts["ids_sha256"] for made in (plain, stream, block)}) == 3


@pytest.mark.parametrize("bos", ["stream", "block"])
def test_perplexity_with_bos_is_the_formula(dense, bos):
    text, tokenizer = calibration_text("python"), with_bos(dense)
    with building:
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    measured = perplexity(model, tokenizer, text, seq_len=8, max_blocks=3, bos=bos)
    ids = tokenizer("\n\n".join(text.documents)[:2000], add_special_tokens=False)["input_ids"]
    nats = []
    for block in range(3):
        tokens = [BOS, *ids[7 * block : 7 * block + 7]] if bos == "block" else [BOS, *ids][8 * block : 8 * block + 8]
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
        nats.append(functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).item())
    assert measured.perplexity == pytest.approx(math.exp(sum(nats) / 3), rel=1e-5)
    assert (measured.bos, measured.tokens, measured.blocks) == (bos, 21, 3)
    plain = perplexity(model, tokenizer, text, seq_len=8, max_blocks=3)
    assert ratio_interval(plain, measured) is None  # other blocks: they do not compare


def test_an_evaluation_records_what_auto_became_and_lm_eval_follows(tmp_path):
    folder = write_family(tmp_path / "gemma2", "gemma2")
    tokenizer = with_bos(folder)
    tokenizer.save_pretrained(folder)
    given = {"tasks": ("continuation",), "limit": 2, "perplexity": "python", "seq_len": 32, "max_blocks": 2}
    auto = evaluate(folder, EvalConfig(**given))
    without = evaluate(folder, EvalConfig(**given, bos="none"))
    assert (auto.config["bos"], without.config["bos"]) == ("block", "none")
    assert auto.results["config"]["add_bos_token"] is True and without.results["config"]["add_bos_token"] is False
    assert auto.metrics["python/perplexity"] != without.metrics["python/perplexity"]
    drawn = [calibrate(folder, "python", num_samples=1, seq_len=8, seed=0, bos=bos) for bos in ("auto", "none")]
    assert drawn[0].ids_NT[0, 0] == BOS != drawn[1].ids_NT[0, 0]


def test_the_papers_preset_reads_text_without_bos():
    assert PruneConfig(**paper_preset(0.2)).bos == "none"
    assert PruneConfig().bos == EvalConfig().bos == "auto"
