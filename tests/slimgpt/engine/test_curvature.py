"""The layer-wise passes against autograd through the entire model."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimgpt.checkpoints.families import attention_kernel
from slimgpt.config import PruneConfig
from slimgpt.engine.curvature import Curvature, _drawn
from slimgpt.engine.job import Job
from slimgpt.engine.ranks import Ranks
from tests.tiny_families import CASES, write_family


def by_autograd(folder, job, ids_NT):
    """H and G of every pruned map, from one backward pass through transformers' own model."""
    kernel = attention_kernel(job.model_config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    seen = {}

    def remember(name):
        def hook(_, given, out):
            seen[name] = given[0].detach().flatten(0, 1), out
            out.retain_grad()

        return hook

    names = [
        f"{job.family.layers}.{i}.{m}" for i in range(len(job.shapes)) for m in (job.family.output, job.family.down)
    ]
    for name in names:
        model.get_submodule(name).register_forward_hook(remember(name))
    logits_TV = model(input_ids=ids_NT, use_cache=False).logits.flatten(0, 1)
    drawn_T = _drawn(logits_TV.detach().softmax(dim=1), torch.Generator().manual_seed(job.config.seed))
    functional.cross_entropy(logits_TV, drawn_T, reduction="sum").backward()
    return {name: (x_TD, out.grad.flatten(0, 1)) for name, (x_TD, out) in seen.items()}


@pytest.mark.parametrize("case", sorted(CASES))
def test_moments_are_those_of_autograd_through_the_whole_model(case, tmp_path):
    folder = write_family(tmp_path / case, case)
    job = Job(folder, PruneConfig(schedule="nats", device="cpu", targets="ffn", ffn_multiple=1))
    ids_NT = torch.randint(0, job.model_config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    expected, layers = by_autograd(folder, job, ids_NT), []
    for moments in Curvature(job, ids_NT, Ranks(), tmp_path).layers():
        layers.append(moments.layer)
        for name, part in ((job.family.output, moments.attention), (job.family.down, moments.ffn)):
            x_TD, g_TD = expected[f"{job.family.layers}.{moments.layer}.{name}"]
            for gram, data in ((part.inputs, x_TD), (part.gradients, g_TD)):
                H = (data.double().T @ data.double()).float()
                assert gram.tokens == 60
                torch.testing.assert_close(gram.finish().float(), H, rtol=1e-3, atol=1e-4 * H.diagonal().max().item())
    assert layers == list(reversed(range(len(job.shapes))))


def test_words_are_drawn_from_the_models_distribution():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn_T = _drawn(logits_V.softmax(0).expand(40_000, 4), torch.Generator().manual_seed(0))
    share_V = torch.bincount(drawn_T, minlength=4) / 40_000
    torch.testing.assert_close(share_V, logits_V.softmax(0), rtol=0, atol=0.01)
