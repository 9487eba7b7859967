"""A pruned model is trained again: it comes nearer to its teacher, and keeps its form; what cannot work is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer

from flows.cli.show import checkpoint_facts
from slimgpt.checkpoints.lineage import Checkpoint, load_lineage
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.engine.pruner import prune
from slimgpt.recovery.answers import NEW_TOKENS, PROMPTS, answer
from slimgpt.recovery.plan import plan
from slimgpt.recovery.recoverer import recover
from slimgpt.recovery.text import draw
from slimgpt.recovery.training import DistillationTrainer
from tests.tiny_families import CASES
from tests.tiny_models import write_dense


def kl_to(teacher, folder, ids_BT):
    """KL(teacher || model) per token, of whole logits."""
    with torch.no_grad():
        p, q = (load_causal_lm(f, torch.float32)(input_ids=ids_BT).logits.log_softmax(-1) for f in (teacher, folder))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def held_out(pruned, config):
    return torch.stack([row["input_ids"] for row in draw(pruned, config.filled()).held_out])


def test_the_written_model_is_nearer_to_its_teacher_by_what_was_measured(pruned, dense, recovered, config):
    step, ids_NT = load_lineage(recovered).steps[-1], held_out(pruned, config)
    assert kl_to(dense, pruned, ids_NT) == pytest.approx(step.figures["kl_before"], rel=1e-4)
    assert kl_to(dense, recovered, ids_NT) == pytest.approx(step.figures["kl_after"], rel=1e-4)
    assert step.figures["kl_after"] < 0.93 * step.figures["kl_before"]


def test_the_teacher_reads_the_held_out_text_once(pruned, dense, config, tmp_path, monkeypatch):
    read, target = [], DistillationTrainer._target
    monkeypatch.setattr(
        DistillationTrainer,
        "_target",
        lambda self, inputs: read.append(len(inputs["input_ids"])) or target(self, inputs),
    )
    recover(pruned, tmp_path / "out", config, teacher=dense)
    assert sum(read) == 20 * 4 + 4  # the steps' sequences, and those that are held out


def test_form_and_files_stay(pruned, recovered):
    names = {path.name for path in pruned.iterdir()} - {"journal.jsonl"}
    assert {path.name for path in recovered.iterdir()} == names | {"recovery.json"}
    assert (recovered / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    for path in pruned.glob("*.safetensors"):
        before, after = load_file(path), load_file(recovered / path.name)
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) != name.endswith("_proj.weight"), name


def test_the_lineage_gains_a_step_that_says_what_was_done(pruned, dense, recovered):
    lineage, source = load_lineage(recovered), Checkpoint.open(pruned)
    assert lineage.names == "prune, recover"
    assert lineage.ratio == source.lineage.ratio > 0
    assert (lineage.steps[1].input, lineage.steps[1].output) == (source.digest, Checkpoint.open(recovered).digest)
    assert lineage.steps[1].data["tokens"] == 2560
    assert [answers["prompt"] for answers in lineage.steps[1].answers] == list(PROMPTS)
    assert all(set(answers) == {"prompt", "teacher", "pruned", "recovered"} for answers in lineage.steps[1].answers)
    assert str(dense) not in json.dumps(lineage.to_dict())


def test_an_answer_is_the_most_probable_continuation_of_its_prompt_alone(dense):
    """Prompts of several lengths pass at once; each says what it says alone, without a cache."""
    model, tokenizer = load_causal_lm(dense, torch.float32), AutoTokenizer.from_pretrained(dense)
    for prompt, said in zip(PROMPTS, answer(model, dense), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(NEW_TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True) == said


def test_all_weights_of_the_layers_can_be_trained_and_nothing_else_changes(pruned, dense, config, tmp_path):
    all_weights = replace(config, trainable="all", learning_rate=3e-4)
    made = recover(pruned, tmp_path / "out", all_weights, teacher=dense)
    step, ids_NT = made.lineage.steps[-1], held_out(pruned, config)
    assert kl_to(dense, made.folder, ids_NT) == pytest.approx(step.figures["kl_after"], rel=1e-4)
    assert step.figures["kl_after"] < 0.95 * step.figures["kl_before"]
    for path in pruned.glob("*.safetensors"):
        after = load_file(made.folder / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, after[name]) != name.startswith("model.layers."), name


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_settings_for_generating_text_that_contradict_each_other_do_no_harm(trainable, pruned, dense, config, tmp_path):
    """LLaMA-2 has a temperature without sampling: transformers refuses to save such a model."""
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    told = '{"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 9.0, "stop_strings": ["a"]}'
    (model / "generation_config.json").write_text(told)
    few = replace(config, tokens="1.2k", trainable=trainable, learning_rate=0.0)
    steps = [
        recover(m, out, few, teacher=dense).lineage.steps[-1]
        for m, out in ((pruned, tmp_path / "plain"), (model, tmp_path / "out"))
    ]
    assert steps[0].answers == steps[1].answers
    assert (tmp_path / "out" / "generation_config.json").read_text() == told


def test_blocks_that_pass_one_by_one_give_the_step_of_all_together(pruned, dense, config, tmp_path, recovered):
    """The mean over a step's sequences, however many pass at once."""
    recover(pruned, tmp_path / "out", replace(config, block_tokens=32), teacher=dense)
    name = "model-00002-of-00006.safetensors"
    one, all_at_once = load_file(tmp_path / "out" / name), load_file(recovered / name)
    for key, tensor in all_at_once.items():
        assert torch.allclose(tensor, one[key], atol=1e-3), key


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_what_is_said_of_the_result_holds_of_its_rounded_weights(trainable, dense, config, tiny_config, tmp_path):
    """In bfloat16 a small change may be rounded away: the figure is that of the file."""
    half, pruned = tmp_path / "half", tmp_path / "pruned"
    shutil.copytree(dense, half)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    prune(half, pruned, tiny_config(ratio=0.5))
    slow = replace(config, trainable=trainable, learning_rate=3e-5)
    made = recover(pruned, tmp_path / "out", slow, teacher=half)
    figures = made.lineage.steps[-1].figures
    assert kl_to(half, made.folder, held_out(pruned, config)) == pytest.approx(figures["kl_after"], rel=1e-5)
    same = all(path.read_bytes() == (made.folder / path.name).read_bytes() for path in pruned.glob("*.safetensors"))
    assert same == (figures["kl_after"] == figures["kl_before"])
    assert same == ("the weights are as they came" in made.lineage.steps[-1].summary)


def test_of_several_texts_each_keeps_its_share(pruned, config, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    text = draw(pruned, replace(config, text=f"{text_file},{short}:0.25").filled())
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    of_foxes = sum("fox" in tokenizer.decode(row["input_ids"]) for row in text.train)
    assert of_foxes == pytest.approx(0.25 * len(text.train), abs=1)
    assert text.facts["name"] == "topics.txt:0.75, short.txt:0.25"
    with pytest.raises(ValueError, match=r"short.txt has \d+ sequences of 32 tokens, and 50 are to be held out"):
        draw(pruned, replace(config, text=f"{text_file},{short}:0.25", held_out=200).filled())


def test_the_dry_run_looks_at_what_out_holds(pruned, dense, config, tmp_path, recovered):
    assert plan(pruned, config, tmp_path / "new", teacher=dense).missing == []
    assert plan(pruned, config, recovered, teacher=dense).missing == []  # it would be found finished
    (other,) = plan(pruned, replace(config, rank=8), recovered, teacher=dense).missing
    assert "holds another training: rank was 16, now 8" in other
    (own,) = plan(pruned, config, pruned, teacher=dense).missing
    assert "is not empty and not an output of slimgpt recover" in own


def test_a_model_that_was_not_pruned_here_needs_its_teacher_named_and_can_be_looked_at(dense, config, tmp_path):
    other = write_dense(tmp_path / "other", num_hidden_layers=4, seed=3)
    with pytest.raises(ValueError, match="does not say which model it was made from; name the teacher"):
        recover(other, tmp_path / "out", config)
    made = recover(other, tmp_path / "out", config, teacher=dense)
    assert checkpoint_facts(made.folder)["lineage"]["steps"][0]["step"] == "recover"


def test_a_rate_that_makes_it_worse_leaves_the_weights_as_they_came(pruned, dense, config, tmp_path, caplog):
    made = recover(pruned, tmp_path / "out", replace(config, tokens="256", learning_rate=1.0), teacher=dense)
    assert "training did not lower the loss of the held-out text" in caplog.text
    figures = made.lineage.steps[-1].figures
    assert figures["kl_after"] == figures["kl_before"]
    for path in pruned.glob("*.safetensors"):
        assert path.read_bytes() == (made.folder / path.name).read_bytes()


def test_the_teacher_is_the_first_model_of_the_lineage(pruned, dense, config, tmp_path, monkeypatch):
    made_from = f"was made from {dense.name}, which would be its teacher.*name the teacher"
    with pytest.raises(FileNotFoundError, match=made_from):
        recover(pruned, tmp_path / "out", config)
    monkeypatch.chdir(dense.parent)  # where a folder has its name
    assert recover(pruned, tmp_path / "out", replace(config, tokens="128")).lineage.names == "prune, recover"
    other = write_dense(tmp_path / dense.name, num_hidden_layers=4, seed=5)
    monkeypatch.chdir(other.parent)
    with pytest.raises(ValueError, match=f"is not the {dense.name} from which"):
        recover(pruned, tmp_path / "out2", config)


def test_a_teacher_that_does_not_fit_is_refused_at_the_start(pruned, dense, config, tmp_path):
    with pytest.raises(ValueError, match="is the model that would learn from it"):
        recover(pruned, tmp_path / "out", config, teacher=pruned)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"have different vocabularies \(other tokens for the same numbers\)"):
        recover(pruned, tmp_path / "out", config, teacher=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ""}, "tokens is empty; say how many"),
        ({"tokens": "many"}, "tokens is 'many'; it must be a whole number"),
        ({"tokens": "all"}, "tokens is 'all' and method 'distill'; say how many"),
        ({"seq_len": 1}, "seq_len is 1; it must be at least 2"),
        ({"method": "lora", "trainable": "all"}, "method is 'lora' and trainable 'all'"),
        ({"method": "lora", "text": "notes.txt"}, "instructions are 'notes.txt'; they must be a .jsonl"),
        ({"seq_len": 1024}, "seq_len is 1024; .* reads at most 512 tokens at once"),
        ({"batch_size": 100_000}, "a step takes 100000: name a larger text, or lower"),
        ({"tokens": "2T"}, "tokens is 2T, which reads the .* tokens of .* times; the limit is 1,000: ask for fewer"),
        ({"device": "abacus"}, "device 'abacus' is not usable here"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(fields, message, pruned, dense, config, tmp_path):
    with pytest.raises(ValueError, match=message):
        recover(pruned, tmp_path / "out", replace(config, **fields), teacher=dense)
    assert not (tmp_path / "out").exists()


def test_a_short_text_is_read_again_and_again(pruned, dense, config, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    made = recover(pruned, tmp_path / "out", replace(config, text=str(short)), teacher=dense)
    facts = made.lineage.steps[-1].data
    assert facts["tokens"] == 2560 > facts["different_tokens"] > 0
    assert facts["different_tokens"] % (4 * 32) == 0


def test_answers_to_instructions_are_learned_without_a_teacher(pruned, as_in_the_paper, tmp_path):
    made = recover(pruned, tmp_path / "out", as_in_the_paper)
    step, rows = made.lineage.steps[-1], draw(pruned, as_in_the_paper.filled()).held_out

    def loss(folder):
        model, nats, count = load_causal_lm(folder, torch.float32), 0.0, 0
        for row in rows:  # one by one, not padded
            logits_TV = model(input_ids=row["input_ids"][None]).logits[0, :-1]
            nats += functional.cross_entropy(logits_TV, row["labels"][1:], ignore_index=-100, reduction="sum").item()
            count += int((row["labels"][1:] != -100).sum())
        return nats / count

    assert loss(pruned) == pytest.approx(step.figures["cross_entropy_before"], rel=1e-3)
    assert loss(made.folder) == pytest.approx(step.figures["cross_entropy_after"], rel=1e-3)
    assert step.figures["cross_entropy_after"] < 0.9 * step.figures["cross_entropy_before"]
    assert step.config["teacher"] == ""
    assert (step.config["rank"], step.config["seq_len"]) == (8, 256)
    assert set(step.answers[0]) == {"prompt", "pruned", "recovered"}


def test_prompts_are_alpacas_and_only_answers_are_scored(pruned, as_in_the_paper):
    text = draw(pruned, as_in_the_paper.filled())
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    assert (len(text.train), len(text.held_out), text.steps) == (56, 4, 7)
    with pytest.raises(ValueError, match="tokens is 2T, which reads .* times; the limit is 1,000"):
        draw(pruned, replace(as_in_the_paper, tokens="2T").filled())
    row = next(row for row in text.train if "### Input:" in tokenizer.decode(row["input_ids"]))
    scored = row["labels"] != -100
    number = tokenizer.decode(row["input_ids"][scored], skip_special_tokens=True)
    assert tokenizer.decode(row["input_ids"][~scored]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd one.\n\n"
        f"### Input:\n{int(number) - 1}\n\n### Response:\n"
    )
    assert row["input_ids"][-1] == tokenizer.eos_token_id == row["labels"][-1]
    short = draw(pruned, replace(as_in_the_paper, seq_len=int(scored.nonzero()[0]) + 1).filled())
    assert all((row["labels"] != -100).any() for row in (*short.train, *short.held_out))


OFTEN = ("llama", "gemma2", "phi3", "granite")  # biases, a soft cap and norms, fused projections, scales


@pytest.mark.parametrize(
    "case", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.all) for case in CASES]
)
def test_every_family_recovers(case, pruned_family, config, tmp_path):
    dense, pruned = pruned_family(case)
    small = replace(config, text="python")
    made = recover(pruned, tmp_path / "out", small, teacher=dense)
    figures = made.lineage.steps[-1].figures
    ids_NT = held_out(pruned, small)
    assert kl_to(dense, made.folder, ids_NT) == pytest.approx(figures["kl_after"], rel=1e-3)
    assert figures["kl_after"] < figures["kl_before"]
