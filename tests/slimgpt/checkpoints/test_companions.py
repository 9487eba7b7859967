"""Files beside the dense weights: those that still apply are copied unchanged, and no others."""

import json

from transformers import AutoTokenizer

from slimgpt.engine.pruner import prune
from tests.slimgpt.checkpoints.found_checkpoints import edit

STILL_TRUE = {
    **{"LICENSE": "a", "LICENSE.txt": "b", "NOTICE": "c", "USE_POLICY.md": "d", "License.rtf": "e"},
    **{"tokenizer.model": "f", "special_tokens_map.json": "{}", "added_tokens.json": "{}", "merges.txt": "g"},
    **{"vocab.json": "{}", "qwen.tiktoken": "h", "generation_config.json": '{"temperature": 0.6,\r\n "top_p": 0.9}'},
    **{"chat_template.jinja": "{{ messages }}\r\n", "additional_chat_templates/rag.jinja": "{{ documents }}"},
}
NO_LONGER_TRUE = {
    **{"README.md": "135 M parameters", "params.json": '{"dim": 64}', "pytorch_model.bin": "pickle", "x.gguf": "x"},
    **{"trainer_state.json": "{}", "eval_results.json": "{}", "training_args.bin": "pickle", "x.onnx": "x"},
    **{"modeling_own.py": "raise SystemExit", "tokenization_own.py": "raise SystemExit", ".gitattributes": "x"},
    **{"original/params.json": "{}", "runs/events.out": "x", "additional_chat_templates/x.py": "raise SystemExit"},
}


def test_only_files_that_still_apply_are_copied(copy, tmp_path, tiny_config):
    for name, text in (STILL_TRUE | NO_LONGER_TRUE).items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(text.encode())
    prune(copy, tmp_path / "out", tiny_config())
    out = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    ours = {name for name in out if name.startswith("model")}
    ours |= {"config.json", "pruning.json", "lineage.json", "journal.jsonl"}
    ours |= {"slim_llama.py", "per_layer.py"}
    assert out - ours == STILL_TRUE.keys() | {"tokenizer.json", "tokenizer_config.json"}
    for name, text in STILL_TRUE.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()


def test_the_tokenizer_is_that_of_the_dense_model(copy, tmp_path, tiny_config):
    """Its own special tokens and both chat templates, as transformers reads them."""
    before = AutoTokenizer.from_pretrained(copy)
    before.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    before.chat_template = {"default": "{{ messages[0].content }}", "rag": "RAG {{ messages[0].content }}"}
    (copy / "chat_template.jinja").unlink()
    before.save_pretrained(copy)
    edit(copy, {"vocab_size": 512})
    prune(copy, tmp_path / "out", tiny_config())
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nA question<|im_end|>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.all_special_tokens == before.all_special_tokens
    chat = [{"role": "user", "content": "x"}]
    for template in ("default", "rag"):
        assert after.apply_chat_template(chat, chat_template=template, tokenize=False) == before.apply_chat_template(
            chat, chat_template=template, tokenize=False
        )


def test_code_of_the_model_is_neither_run_nor_copied_nor_referenced(copy, tmp_path, tiny_config):
    """The pruned model loads without remote code and, as in vLLM, with trust_remote_code and our own file."""
    trap = "raise SystemExit('the model ran its own code')"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (copy / name).write_text(trap)
    edit(copy, {"auto_map": {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}})
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}))
    prune(copy, tmp_path / "out", tiny_config())
    out = tmp_path / "out"
    assert {p.name for p in out.glob("*.py")} == {"slim_llama.py", "per_layer.py"}
    assert "own" not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("x") == AutoTokenizer.from_pretrained(out)("x")
