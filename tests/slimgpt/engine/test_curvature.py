"""The layer-wise passes against autograd through the entire model."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimgpt.checkpoints.families import attention_kernel
from slimgpt.config import PruneConfig
from slimgpt.engine.curvature import Curvature, _drawn, bounded
from slimgpt.engine.job import Job
from slimgpt.engine.ranks import Ranks
from slimgpt.method import obs
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
            for gram, data in ((part.inputs, x_TD), (part.gradients, bounded(g_TD))):
                H = (data.double().T @ data.double()).float()
                assert gram.tokens == 60
                torch.testing.assert_close(gram.finish().float(), H, rtol=1e-3, atol=1e-4 * H.diagonal().max().item())
    assert layers == list(reversed(range(len(job.shapes))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_with_great_gradients_and_no_inputs_does_not_set_the_price(dtype):
    """BOS in Gemma 3: a norm behind the map multiplies what is nearly nothing, and G would be that token alone."""
    generator = torch.Generator().manual_seed(0)
    x_TD, g_TD = (torch.randn(800, width, generator=generator).to(dtype) for width in (12, 8))
    x_TD[0], g_TD[0] = 1e-3 * x_TD[0], 400 * g_TD[0]
    d_DF = torch.randn(8, 12, generator=generator).double()
    exact = ((g_TD.double() @ d_DF) * x_TD.double()).sum(dim=1).square().mean().item()

    def price(g_TD):
        H, G = obs.Gram(12, "cpu"), obs.Gram(8, "cpu")
        H.add(x_TD)
        G.add(g_TD)
        return torch.trace(G.finish() @ d_DF @ H.finish() @ d_DF.T).item() / 800**2

    assert price(bounded(g_TD)) == pytest.approx(exact, rel=0.2)
    assert price(g_TD) > 50 * exact


def test_gradients_as_they_are_elsewhere_stay_to_the_bit():
    g_BTD = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bounded(g_BTD), g_BTD)
    g_BTD[:, 100:] = 0  # a median of nothing bounds nothing
    assert torch.equal(bounded(g_BTD), g_BTD)


def test_words_are_drawn_from_the_models_distribution():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn_T = _drawn(logits_V.softmax(0).expand(40_000, 4), torch.Generator().manual_seed(0))
    share_V = torch.bincount(drawn_T, minlength=4) / 40_000
    torch.testing.assert_close(share_V, logits_V.softmax(0), rtol=0, atol=0.01)
