"""Without this package: a Python with torch, transformers and their dependencies, and the code in the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.isolated_python import isolated_python
from tests.tiny_families import CASES

PROMPTS = [[5, 80, 200, 31, 7], [300, 12, 9, 411, 66]]
SCRIPT = """
import importlib.util, json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

names = ("slimgpt", "deploy", "tasks", "flows", "vllm", "datasets", "accelerate", "peft", "mlflow", "prefect")
assert not [name for name in names if importlib.util.find_spec(name)]
ids = torch.tensor(json.loads(sys.argv[1]))
results = []
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    base, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not loading["missing_keys"] and type(base).__name__ == type(model).__name__.replace("ForCausalLM", "Model")
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("def")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    results.append([sum(p.numel() for p in model.parameters()), out.tolist()])
print(json.dumps(results))
"""


def saved_again(folder: Path, out: Path) -> Path:
    """As after a training, or when a LoRA was merged: the code must come along."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights that Windows users seldom have")
def test_every_family_gives_the_same_tokens_with_the_code_in_its_checkpoint(tmp_path, pruned_family):
    folders: list[Path] = [pruned_family(case)[1] for case in CASES]
    folders.append(saved_again(pruned_family("llama")[1], tmp_path / "again"))
    python = isolated_python(tmp_path / "venv", ("torch", "transformers"))
    done = subprocess.run(
        [python, "-I", "-c", SCRIPT, json.dumps(PROMPTS), *folders],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (parameters, tokens) in zip(folders, json.loads(done.stdout.splitlines()[-1]), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # with the package's own classes
        assert type(model).__module__.startswith("slimgpt.")
        assert parameters == sum(p.numel() for p in model.parameters())
        ids = torch.tensor(PROMPTS)
        own = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == own.tolist(), folder.parent.name
