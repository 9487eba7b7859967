"""llm-compressor for real, on tiny models: what is stored against its definition, what stays, and what is refused."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.lineage import Checkpoint, load_lineage
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.weight_files import count_parameters
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.engine.pruner import prune
from slimgpt.files import folder_sha256
from slimgpt.quantization import packages
from slimgpt.quantization.job import QuantizationJob
from slimgpt.quantization.plan import plan
from slimgpt.quantization.quantizer import quantize
from slimgpt.recovery.recoverer import recover
from tests.slimgpt.checkpoints.found_checkpoints import store
from tests.tiny_families import write_baichuan, write_multimodal_gemma3
from tests.tiny_models import write_dense

pytestmark = pytest.mark.skipif(bool(packages.missing_packages()), reason=packages.missing_packages()[:200] or "there")
SCHEMES = ("w4a16", "w8a8", "fp8")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory, text_file):
    return str(text_file)


@pytest.fixture(scope="module")
def config(text):
    return QuantizeConfig(calibration=text, num_samples=8, seq_len=64, device="cpu")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, text):
    """In bfloat16, with another width in each layer; every input is a multiple of 32."""
    place = tmp_path_factory.mktemp("quantize")
    dense = write_dense(
        place / "dense", hidden_size=128, head_dim=32, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    settings = {"calibration": text, "num_samples": 8, "seq_len": 64, "ffn_multiple": 32, "device": "cpu"}
    prune(dense, place / "pruned", PruneConfig(ratio=0.3, **settings))
    return place / "pruned"


@pytest.fixture(scope="module")
def quantized(pruned, config, tmp_path_factory):
    """The folder of each scheme."""
    place = tmp_path_factory.mktemp("quantized")
    for scheme in SCHEMES:
        quantize(pruned, place / scheme, replace(config, scheme=scheme))
    return {scheme: place / scheme for scheme in SCHEMES}


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_fp8_is_each_row_over_its_largest_number_rounded_to_eight_bits(pruned, quantized):
    dense, made = stored(pruned)[f"{Q_PROJ}.weight"].float(), stored(quantized["fp8"])
    scales = dense.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    got = made[f"{Q_PROJ}.weight_scale"].float()
    torch.testing.assert_close(got, scales, rtol=2**-8, atol=0)  # stored in bfloat16
    in_16_bits = dense.bfloat16() / got.bfloat16()  # as the model is stored
    expected = in_16_bits.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(made[f"{Q_PROJ}.weight"].float(), expected.float())


@pytest.mark.parametrize(("scheme", "most", "error"), [("w4a16", 7, 0.25), ("w8a8", 127, 0.02), ("fp8", 448, 0.04)])
def test_weights_stand_on_the_grid_of_their_scale_and_near_what_they_were(pruned, quantized, scheme, most, error):
    model, dense, made = load_causal_lm(quantized[scheme], torch.float32), stored(pruned), stored(quantized[scheme])
    for name, module in model.named_modules():
        if f"{name}.weight_scale" not in made:
            continue
        weight, before = module.weight, dense[f"{name}.weight"].float()
        scales = made[f"{name}.weight_scale"].float()
        scale = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
        on_grid, lowest, highest = weight / scale, -most - 1, most
        assert (f"{name}.weight_zero_point" in made) == (scheme == "w4a16"), name
        if scheme == "w4a16":  # a group's own zero lies anywhere on its grid of 16
            lowest, highest = -15, 15
            groups = on_grid.unflatten(1, (scales.shape[1], -1))
            assert (groups.amax(dim=2) - groups.amin(dim=2)).max() <= 15 + 1e-3, name
        if scheme != "fp8":
            assert (on_grid - on_grid.round()).abs().max() < 1e-3, name
        assert lowest - 1e-3 <= on_grid.min() and on_grid.max() <= highest + 1e-3, name
        assert (weight - before).norm() / before.norm() < error, name
    assert sum(f"{name}.weight_scale" in made for name, _ in model.named_modules()) == 7 * 3


def test_all_else_stays_as_it_was(pruned, quantized):
    before = stored(pruned)
    for scheme, folder in quantized.items():
        after = stored(folder)
        kept = [name for name in before if "_proj" not in name]
        assert kept and all(torch.equal(after[name], before[name]) for name in kept), scheme
        config, source = (json.loads((f / "config.json").read_text()) for f in (folder, pruned))
        assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
        assert config == source
        assert layer_shapes(read_config(folder)) == layer_shapes(read_config(pruned))
        for name in ("tokenizer.json", "slim_llama.py", "per_layer.py", "pruning.json"):
            assert (folder / name).read_bytes() == (pruned / name).read_bytes(), (scheme, name)


def test_the_lineage_tells_parameters_size_and_text(pruned, quantized, config):
    for scheme, folder in quantized.items():
        lineage = load_lineage(folder)
        step = lineage.steps[-1]
        assert lineage.names == "prune, quantize"
        assert lineage.ratio == load_lineage(pruned).ratio
        assert step.figures["parameters_after"] == count_parameters(pruned) == count_parameters(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert step.figures["bytes_after"] == size
        planned = plan(pruned, replace(config, scheme=scheme))
        assert abs(planned.bytes_after - size) < 8192 + 0.01 * size, scheme  # the header
        assert step.input == Checkpoint.open(pruned).digest
        assert bool(step.data) == (scheme != "fp8")


def test_rounding_one_after_the_other_answers_better_than_rounding_each_alone(pruned, quantized, text, config):
    """What GPTQ is for: on the text it saw, 4-bit logits are nearer to the model's than with nearest numbers."""
    from slimgpt.data.calibration import calibrate

    ids_NT = calibrate(pruned, text, num_samples=8, seq_len=64, seed=config.seed).ids_NT
    model, by_gptq = (load_causal_lm(folder, torch.float32) for folder in (pruned, quantized["w4a16"]))
    nearest = load_causal_lm(pruned, torch.float32)
    for name, module in nearest.named_modules():
        if "_proj" in name:
            rows = module.weight.view(module.weight.shape[0], -1, 32)
            scale = rows.abs().amax(dim=-1, keepdim=True) / 7.5
            module.weight.copy_(((rows / scale).round().clamp(-8, 7) * scale).view_as(module.weight))
    with torch.no_grad():
        want, gptq, plain = (m(ids_NT).logits for m in (model, by_gptq, nearest))
    assert (gptq - want).norm() < 0.9 * (plain - want).norm()


def test_it_is_made_again_bit_for_bit_and_found_when_it_is_there(pruned, quantized, config, tmp_path):
    made = quantize(pruned, tmp_path / "again", config)
    assert made.digest == Checkpoint.open(quantized["w4a16"]).digest
    before = folder_sha256(tmp_path / "again")
    assert quantize(pruned, tmp_path / "again", config).digest == made.digest
    assert folder_sha256(tmp_path / "again") == before
    with pytest.raises(
        FileExistsError, match=r"holds another quantisation: .*scheme was w4a16, now fp8; name another OUT"
    ):
        quantize(pruned, tmp_path / "again", replace(config, scheme="fp8"))


def test_interrupted_it_leaves_no_model_and_no_process_and_starts_again(pruned, quantized, config, tmp_path):
    workers: list[psutil.Process] = []

    def stop(done: int, layers: int) -> None:
        assert (done, layers) == (1, 3)
        workers.extend(c for c in psutil.Process().children() if "slimgpt.quantization.worker" in c.cmdline())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(pruned, tmp_path / "out", config, on_layer=stop)
    assert workers and not any(worker.is_running() for worker in workers)
    assert not (tmp_path / "out/config.json").exists()
    layers: list[tuple[int, int]] = []
    made = quantize(pruned, tmp_path / "out", config, on_layer=lambda *done: layers.append(done))
    assert made.digest == Checkpoint.open(quantized["w4a16"]).digest
    assert layers == [(1, 3), (2, 3), (3, 3)]
    assert not (tmp_path / "out/quantizing").exists()


def test_killed_it_leaves_no_process(pruned, text, tmp_path):
    words = ("--calibration", text, "--num-samples", "8", "--seq-len", "64", "--device", "cpu")
    command = [sys.executable, "-m", "slimgpt", "quantize", str(pruned), str(tmp_path / "out"), *words]
    parent = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until, workers = time.monotonic() + 120, []
    while not workers and time.monotonic() < until:
        with contextlib.suppress(psutil.Error):  # another child may just have ended
            workers = [child for child in parent.children() if "slimgpt.quantization.worker" in child.cmdline()]
        time.sleep(0.05)
    parent.kill()
    assert workers and psutil.wait_procs(workers, timeout=60)[1] == []
    assert not (tmp_path / "out/config.json").exists()


def test_what_llm_compressor_says_is_quoted(pruned, config, tmp_path, monkeypatch):
    broken = tmp_path / "packages"
    broken.mkdir()
    (broken / "llmcompressor.py").write_text("raise RuntimeError('no such luck')")
    monkeypatch.setenv("SLIMGPT_QUANTIZE_PACKAGES", str(broken))
    monkeypatch.setattr(packages, "locked_versions", dict)
    with pytest.raises(
        ValueError, match=r"could not quantise .*pruned: RuntimeError: no such luck; see .*quantize.log"
    ):
        quantize(pruned, tmp_path / "out", config)
    assert not (tmp_path / "out/config.json").exists()


def test_without_its_packages_the_command_that_installs_them_is_named_first(pruned, config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_QUANTIZE_PACKAGES", str(tmp_path / "none"))
    message = (
        r"lacks llmcompressor 0.14.0.1\).*-m pip install --no-deps --upgrade --target .*none -r .*llmcompressor.txt"
    )
    with pytest.raises(ValueError, match=message):
        quantize(pruned, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    assert [line for line in plan(pruned, config).missing if "llm-compressor is not installed" in line]


def test_where_a_format_is_slow_is_said_before(pruned, config):
    remarks = {scheme: plan(pruned, replace(config, scheme=scheme)).remark for scheme in ("fp8", "w8a8")}
    assert remarks["fp8"].startswith("for GPUs: on a CPU vLLM takes more than ten times") and not remarks["w8a8"]


def test_norms_of_another_dtype_do_not_widen_all_else(config, tmp_path):
    mixed = write_dense(tmp_path / "mixed", intermediate_size=256, dtype=torch.bfloat16)
    store(mixed, {name: t.float() if "norm" in name else t for name, t in stored(mixed).items()})
    planned = plan(mixed, replace(config, scheme="fp8"))
    quantize(mixed, tmp_path / "small", replace(config, scheme="fp8"))
    made = stored(tmp_path / "small")
    assert {t.dtype for t in made.values()} == {torch.bfloat16, torch.float8_e4m3fn}
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert abs(planned.bytes_after - size) < 8192 + 0.01 * size


def test_settings_for_generating_text_that_contradict_each_other_do_no_harm(pruned, config, tmp_path):
    """As LLaMA-2's: transformers refuses to save a model with them."""
    model, told = tmp_path / "model", '{"temperature": 0.9, "top_p": 0.6}'
    shutil.copytree(pruned, model)
    (model / "generation_config.json").write_text(told)
    quantize(model, tmp_path / "small", replace(config, scheme="fp8"))
    assert (tmp_path / "small/generation_config.json").read_text() == told


def test_a_quantised_model_is_neither_quantised_pruned_nor_trained(quantized, config, tmp_path, text):
    folder = quantized["w8a8"]
    for work in (
        lambda: quantize(folder, tmp_path / "q", config),
        lambda: prune(folder, tmp_path / "p", PruneConfig(calibration=text)),
        lambda: recover(folder, tmp_path / "r", RecoverConfig(text=text)),
    ):
        with pytest.raises(ValueError, match=r"the model is quantised \(compressed-tensors\)"):
            work()


@pytest.mark.parametrize("write", [write_baichuan, write_multimodal_gemma3])
def test_a_model_under_other_names_is_refused_alone_and_planned_behind_its_pruning(write, tmp_path):
    stored, text = write(tmp_path)
    config = QuantizeConfig(scheme="fp8", device="cpu")
    with pytest.raises(ValueError, match="which is read, but not written; prune it first"):
        QuantizationJob(stored, config)
    shapes = layer_shapes(read_config(stored))
    assert QuantizationJob(stored, config, shapes).bytes_after(10**9) == QuantizationJob(text, config).bytes_after(
        10**9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "int3"}, "scheme is 'int3'; it must be one of"),
        ({"group_size": 48}, "group_size is 48; it must be a multiple of 32"),
        ({"group_size": 64, "scheme": "fp8"}, "group_size is 64 and scheme 'fp8', which has one scale for each row"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**given)
