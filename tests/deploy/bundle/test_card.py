"""The model card: the hub's own parsers read the recorded figures from it, and its command repeats the run."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deploy.bundle.card import model_card
from flows.cli.app import app
from flows.cli.flags import config_from, given
from slimgpt.checkpoints.lineage import Lineage, load_lineage, prune_step
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.perplexity import PerplexityResult
from slimgpt.quantities import in_millions
from slimgpt.report import PruneReport
from tests.tiny_models import write_dense

BUNDLE = {"image": "t:1", "remote_code": True, "tensor_parallel": [1, 2]}
METRICS = {
    "wikitext2/perplexity": 31.5,
    "piqa/acc": 0.70,
    "piqa/acc_stderr": 0.01,
    "piqa/acc_norm": 0.71,
    "piqa/acc_norm_stderr": 0.02,
    "mine/acc": 0.25,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("card") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def report(model, tmp_path_factory) -> PruneReport:
    config = PruneConfig(
        schedule="explicit",
        layer_ratios=(0.2, 0.4),
        ratio=0.3,
        calibration="python",
        num_samples=4,
        seq_len=32,
        ffn_multiple=4,
        head_error="paper",
    )
    return prune(model, tmp_path_factory.mktemp("pruned") / "out", config)


@pytest.fixture(scope="module")
def evaluations() -> dict:
    perplexity = PerplexityResult(
        perplexity=31.5,
        tokens=3069,
        blocks=3,
        seq_len=1024,
        text="wikitext2",
        origin="hub",
        sha256="",
        block_nats=[3.4, 3.45, 3.5],
    )
    result = EvalResult(
        model="tiny",
        metrics=METRICS,
        perplexity=perplexity,
        results={"n-shot": {"piqa": 0, "mine": 5}},
        texts=(),
        config={"limit": 20, "tasks": ["piqa", "mine"]},
        device="cpu",
        dtype="float32",
        seconds=1.0,
        versions={"lm_eval": "0.4.13"},
    )
    dense = dataclasses.replace(result, metrics={**METRICS, "wikitext2/perplexity": 21.0})
    return {"dense": dense.to_dict(), "pruned": result.to_dict()}


@pytest.fixture
def card(model, report, evaluations):
    """A card of the model, or of another folder, report, evaluations."""

    def make(folder: Path = model, report: PruneReport | None = report, evaluations: dict = evaluations) -> ModelCard:
        text = model_card(
            "me/t",
            folder,
            **BUNDLE,
            lineage=Lineage((prune_step(report),)) if report else Lineage(),
            evaluations=evaluations,
        )
        read = ModelCard(text)
        assert text.startswith("---\n") and str(read) == text  # the hub's writer gives the same text
        return read

    return make


def test_the_hub_reads_the_cards_metadata_and_every_figure(card):
    data = card().data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"slimgpt", "pruned"} <= set(data.tags)
    assert {r.metric_name: r.metric_value for r in data.eval_results} == {
        name: value for name, value in METRICS.items() if "stderr" not in name
    }
    results = {r.metric_name: r for r in data.eval_results}
    piqa, perplexity = results["piqa/acc"], results["wikitext2/perplexity"]
    assert (piqa.dataset_type, piqa.dataset_split, piqa.metric_type) == ("baber/piqa", "validation", "accuracy")
    assert piqa.metric_args == {"num_fewshot": 0, "limit": 20}
    assert results["mine/acc"].metric_args == {"num_fewshot": 5, "limit": 20}
    assert (perplexity.dataset_type, perplexity.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert perplexity.metric_args == {"seq_len": 1024, "blocks": 3}


def test_the_card_shows_dense_and_pruned_figures_data_and_limits(card, report):
    text = card().text
    assert "| Perplexity, wikitext2 | 21.00 | 31.50 | x 1.50 |" in text
    assert f"{100 * report.ratio:.1f} % of the parameters" in text
    assert "1. prune: " in text and "128 tokens of python" in text
    assert "the first 20 documents of each task" in text
    assert "lm-eval 0.4.13, examples in the prompt: none for piqa; 5 for mine. " in text
    assert "baked in" in text
    for heading in ("## Figures", "## Serve", "## Limits", "## How to reproduce"):
        assert heading in text


def test_a_bar_in_the_name_of_a_text_does_not_part_a_row(card, evaluations):
    named = {"a|b.txt/perplexity": 30.0}
    text = card(evaluations={side: {**figures, "metrics": named} for side, figures in evaluations.items()}).text
    assert r"| Perplexity, a\|b.txt | 30.00 | 30.00 | x 1.00 |" in text


def test_a_card_without_figures_says_so(card):
    bare = card(evaluations={})
    assert bare.data.eval_results is None and "model-index" not in str(bare)
    assert "was not measured" in bare.text and "| Parameters |" in bare.text


def test_a_model_that_was_not_pruned_is_not_called_pruned(card):
    plain = card(report=None, evaluations={})
    assert plain.data.tags == ["vllm"]
    assert "pruned" not in plain.text.lower().replace("structured-pruning", "")


def test_the_command_repeats_the_settings(card, report):
    line = next(line for line in card().text.splitlines() if line.startswith("slimgpt prune "))
    _, bound, _ = app.parse_args(line.split()[1:], exit_on_error=False, print_error=False)
    assert bound.arguments["model"] == "tiny"
    assert config_from(PruneConfig(), given(bound.arguments["options"])).to_dict() == report.config


@pytest.fixture(scope="module")
def twice(model, report, tmp_path_factory) -> Path:
    """The model pruned, and the result pruned again."""
    folder = tmp_path_factory.mktemp("twice")
    config = PruneConfig(**{**report.config, "ratio": 0.1, "schedule": "log", "layer_ratios": ()})
    prune(model, folder / "first", PruneConfig(**report.config))
    prune(folder / "first", folder / "second", config)
    return folder


def test_two_steps_are_both_named_with_the_ratio_against_the_first_dense_model(twice, evaluations):
    lineage = load_lineage(twice / "second")
    text = model_card("me/t", twice / "second", **BUNDLE, lineage=lineage, evaluations={})
    first, second = lineage.steps
    assert f"tiny without {100 * lineage.ratio:.1f} % of the parameters" in text
    assert lineage.ratio > first.figures["ratio"] > second.figures["ratio"]
    for number, step in ((1, first), (2, second)):
        assert f"{number}. prune: {step.figures['ratio']:.2%} of the parameters of the decoder's projections" in text
    commands = [line for line in text.splitlines() if line.startswith("slimgpt prune ")]
    for command, step, model, out in zip(commands, lineage.steps, ("tiny", "step1"), ("step1", "out"), strict=True):
        _, bound, _ = app.parse_args(command.split()[1:], exit_on_error=False, print_error=False)
        assert (bound.arguments["model"], str(bound.arguments["out"])) == (model, out)
        assert config_from(PruneConfig(), given(bound.arguments["options"])).to_dict() == step.config
    dense = f"| Parameters | {in_millions(first.figures['parameters_before'])} M |"
    assert dense in text and "which was itself pruned" not in text


def test_figures_beside_a_pruned_model_say_that_it_was_pruned(twice, evaluations):
    lineage = load_lineage(twice / "second")
    measured = {**evaluations, "dense": {**evaluations["dense"], "digest": lineage.steps[1].input}}
    text = model_card("me/t", twice / "second", **BUNDLE, lineage=lineage, evaluations=measured)
    assert "tiny after prune (" in text and "which was itself pruned" in text
    assert f"| Projection parameters removed |  | {lineage.steps[1].figures['ratio']:.2%} | requested 10.00% |" in text
    assert f"| ... of tiny |  | {lineage.ratio:.2%} |  |" in text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlicense: mit\nlanguage: [en]\n---\n# It\n", "mit"),
        ("README.md", "---\nlicense: other\nlicense_name: own\nlicense_link: there\n---\n", "other"),
        ("LICENSE", "\n                                 Apache License\n    Version 2.0, January 2004\n", "apache-2.0"),
        ("LICENSE.txt", "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: ...", "llama2"),
        ("LICENSE", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("LICENSE", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1"),
        ("LICENSE", "Gemma Terms of Use\n", "gemma"),
        ("LICENSE", "Nobody may use this on Sundays.", "other"),
    ],
)
def test_the_licence_is_read_from_the_files_beside_the_weights(card, tmp_path, name, text, expected):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    read = card(folder=tmp_path)
    assert read.data.license == expected
    assert "licence of the original model is not known" not in read.text
    if "Sundays" in text:
        assert read.data.license_link == "LICENSE"
    if "license_name" in text:
        assert (read.data.license_name, read.data.license_link) == ("own", "there")
    if "language" in text:
        assert read.data.language == ["en"]


@pytest.mark.parametrize("readme", ["", "# Notes, no metadata\n", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_an_unknown_licence_is_omitted_with_a_note(card, tmp_path, readme):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(readme)
    read = card(folder=tmp_path)
    assert read.data.license is None and "\nlicense" not in str(read)
    assert "licence of the original model is not known" in read.text


@pytest.mark.parametrize(
    ("model_type", "base", "expected", "terms"),
    [
        ("gemma3_text", "gemma-3-270m", "gemma", "the Gemma Terms of Use"),
        ("slim_gemma2", "mine", "gemma", "the Gemma Terms of Use"),
        ("slim_llama", "meta-llama/Llama-2-7b-hf", "llama2", "the Llama 2 Community License"),
        ("slim_llama", "Llama-3.1-8B-Instruct", "llama3.1", "the Llama 3.1 Community License"),
        ("slim_llama", "openlm-research/open_llama_3b_v2", None, ""),  # Apache, but that is not known from its name
        ("slim_llama", "TinyLlama-1.1B", None, ""),
    ],
)
def test_gemmas_and_llamas_are_known_without_a_licence_and_their_terms_go_along(
    card, report, tmp_path, model_type, base, expected, terms
):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    read = card(report=dataclasses.replace(report, base_model=base), folder=tmp_path)
    assert read.data.license == expected
    assert ("stays under that model's terms: " + terms in read.text) is bool(expected)


def test_a_quantised_models_card_says_so_and_how_to_repeat_it(model, report, evaluations):
    config = QuantizeConfig(calibration="c4", num_samples=8).to_dict()
    figures = dict(prune_step(report).figures)
    figures |= {f"{name}_after": figures[f"{name}_before"] for name in ("parameters", "projections")}
    changed = {"step": "quantize", "summary": "w4a16: in 4 bits", "config": config, "figures": figures}
    step = dataclasses.replace(prune_step(report), data={}, layers=[], **changed)
    lineage = Lineage((prune_step(report), step))
    text = model_card("me/t", model, **BUNDLE, lineage=lineage, evaluations=evaluations)
    assert {"pruned", "quantized", "compressed-tensors"} <= set(ModelCard(text).data.tags)
    assert "2. quantize: w4a16: in 4 bits" in text
    assert "slimgpt quantize step1 out --calibration c4 --num-samples 8" in text
    alone = model_card("me/t", model, **BUNDLE, lineage=Lineage((step,)), evaluations={})
    assert "pruned" not in ModelCard(alone).data.tags and "tiny, made with SlimGPT" in alone


def test_weights_out_of_a_gguf_file_are_named(card, tmp_path):
    (tmp_path / "config.json").write_text('{"dequantized_from": "tiny.gguf (Q4_K_M)"}')
    assert "- Weights before the first step: de-quantised from tiny.gguf (Q4_K_M)\n" in card(folder=tmp_path).text
    assert "de-quantised" not in card().text


def test_the_base_model_is_a_hub_id_or_left_out(card, report, tmp_path):
    def based_on(base: str) -> ModelCard:
        return card(report=dataclasses.replace(report, base_model=base))

    assert based_on("org/Model-1.0").data.base_model == "org/Model-1.0"
    assert based_on("mine").data.base_model is None
    hidden = based_on(str(tmp_path / "secret" / "mine"))
    assert hidden.data.base_model is None
    assert "secret" not in str(hidden) and "mine without" in hidden.text
    built_in = based_on("smollm2-135m-instruct").data
    assert (built_in.base_model, built_in.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("c4", ["allenai/c4"]), ("alpaca", ["tatsu-lab/alpaca"]), ("python", None), ("/home/me/own.jsonl", None)],
)
def test_calibration_data_from_the_hub_is_listed_as_a_dataset(card, report, name, expected):
    config = {**report.config, "calibration": name}
    changed = dataclasses.replace(report, calibration={**report.calibration, "name": Path(name).name}, config=config)
    read = card(report=changed)
    assert read.data.datasets == expected
    assert "/home/me" not in str(read)


def test_a_recovered_models_card_names_its_texts_with_their_licences_and_shows_what_it_says(model, report, evaluations):
    data = {"use": "training", "name": "c4:0.8, notes.txt:0.2", "tokens": 1000}
    answers = [{"prompt": "The sky is", "teacher": " blue.", "pruned": " green", "recovered": " blue"}]
    config = {**RecoverConfig(tokens="1000", rank=4).to_dict(), "teacher": "org/tiny"}
    recovered = dataclasses.replace(
        prune_step(report), step="recover", summary="trained", config=config, data=data, layers=[], answers=answers
    )
    lineage = Lineage((prune_step(report), recovered))
    text = model_card("me/t", model, **BUNDLE, lineage=lineage, evaluations=evaluations)
    assert "- Text for training: c4 (ODC-BY 1.0 and Common Crawl's terms of use)" in text
    assert "- Text for training: notes.txt (its licence is not known here)" in text
    assert "- recovered: `blue`" in text
    assert "slimgpt recover step1 out --tokens 1000 --teacher org/tiny --rank 4" in text
    assert ModelCard(text).data.datasets == ["allenai/c4"]
