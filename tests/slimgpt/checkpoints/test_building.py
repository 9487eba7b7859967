"""Threads that build models at the same time, as in a sweep."""

from concurrent.futures import ThreadPoolExecutor

import torch

from slimgpt.config import EvalConfig
from slimgpt.engine.job import Job
from slimgpt.engine.layer_pass import Frame
from slimgpt.evaluation.harness import evaluate

SMALL = EvalConfig(tasks=("none",), perplexity="python", seq_len=32, max_blocks=1, device="cpu")


def test_models_built_by_several_threads_have_their_weights(dense, tiny_config):
    """Without a lock, nearly all of these failed, as did every model that the process loaded afterwards."""
    job = Job(dense, tiny_config())

    def measure(_):
        return evaluate(dense, SMALL).perplexity.perplexity

    def build(_):
        frame = Frame(job.model_config, job.shards, job.family, torch.device("cpu"), torch.float32)
        return all(parameter.is_meta for parameter in frame.model.parameters())

    with ThreadPoolExecutor(4) as pool:
        perplexities = [pool.submit(measure, i) for i in range(12)]
        frames = [pool.submit(build, i) for i in range(12)]
    assert len({future.result() for future in perplexities}) == 1
    assert all(future.result() for future in frames)
    assert measure(0) == perplexities[0].result()
