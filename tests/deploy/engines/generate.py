"""What vLLM answers, and what transformers answers, to the same prompts of token ids."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("vllm_generate.py")
NEW_TOKENS = 16
PROMPTS = [[5, 80, 200, 31, 7, 44, 91, 3], [300, 12, 9, 411, 66], [8] * 40 + [17, 9]]  # the last is past every window

Steps = list[list[tuple[int, float]]]  # for every prompt: new tokens with their log-probabilities


def run_engines(
    engines: list[dict[str, Any]],
    cwd: Path,
    *,
    python: Any = sys.executable,
    env: Any = None,
    prompts: list[list[int]] = PROMPTS,
):
    """The answers of these engines (see vllm_generate.py), one after the other in one child process, and its log."""
    done = subprocess.run(
        [python, "-P", str(SCRIPT)],
        input=json.dumps({"prompts": prompts, "engines": engines}),
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers = json.loads(line.removeprefix("ANSWERS "))
    assert len(answers) == len(engines)
    return answers, log


def tokens(steps: Steps) -> list[list[int]]:
    """The tokens alone."""
    return [[token for token, _ in answer] for answer in steps]


def greedy_steps(model: Any, prompts: list[list[int]] = PROMPTS) -> Steps:
    """Greedy tokens and their log-probabilities from transformers, each step computed from the start."""
    answers = []
    for prompt in prompts:
        ids, steps = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logprobs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(logprobs_V.argmax())
            steps.append((token, float(logprobs_V[token])))
            ids.append(token)
        answers.append(steps)
    assert len({tuple(answer) for answer in tokens(answers)}) == len(prompts)  # prompts matter, or it would mean little
    return answers


def assert_same_steps(got: Steps, want: Steps, case: str) -> None:
    """The same tokens, with the same probabilities."""
    assert tokens(got) == tokens(want), case
    got_PT, want_PT = (torch.tensor([[p for _, p in answer] for answer in steps]) for steps in (got, want))
    torch.testing.assert_close(got_PT, want_PT, rtol=0, atol=2e-3, msg=case)
