import re
import xml.etree.ElementTree as ET

import pytest

from deploy.bench_report import METRICS, BenchReport, Ratio
from deploy.report import Comparison, notes, rows, to_html, to_markdown
from slimgpt.report import LayerReport, PruneReport


def layer(i):
    return LayerReport(
        layer=i,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        dense_num_attention_heads=8,
        dense_num_key_value_heads=4,
        dense_intermediate_size=128,
        kept_heads=[0, 1, 2, 3],
        kept_kv_heads=[0, 1],
        kept_channels=list(range(96)),
        attention_error=0.01 * i,
        ffn_error=0.02,
        attention_damping=0.01,
        ffn_damping=0.01,
        ffn_price=1e-6,
        ratio=0.25,
        seconds=1.0,
    )


@pytest.fixture
def comparison():
    pruning = PruneReport(
        base_model="org/<b>model</b>|x",
        model_type="llama",
        config={"ratio": 0.25, "schedule": "log", "seed": 0},
        calibration={"name": "python", "origin": "python", "num_samples": 4, "seq_len": 64},
        layers=[layer(i) for i in range(3)],
        ratio=0.251,
        model_ratio=0.2,
        parameters_before=100_000_000,
        parameters_after=80_000_000,
        bytes_before=200_000_000,
        bytes_after=160_000_000,
        seconds=12.0,
        peak_memory_bytes=10**9,
        device="cpu",
        versions={"torch": "2.13.0"},
    )
    sides = {
        "dense": [dict.fromkeys(METRICS, 100.0), dict.fromkeys(METRICS, 110.0)],
        "pruned": [dict.fromkeys(METRICS, 150.0), dict.fromkeys(METRICS, 140.0)],
    }
    asked = {"dtype": "bfloat16", "num_prompts": 32, "input_len": 128, "output_len": 64}
    machine = {"vllm": "0.32.0", "device": "a <fast> CPU", "cores": 2}
    seconds = {"dense": 30.0, "pruned": 20.0}
    bench = BenchReport(
        config=asked,
        environment=machine,
        **sides,
        ratios={name: Ratio(1.4, 1.3, 1.5) for name in METRICS},
        drift=0.99,
        start_seconds=seconds,
        load_seconds=seconds,
        file_bytes={"dense": 2, "pruned": 1},
        kv_cache_tokens={"dense": 1, "pruned": 2},
        seconds=60.0,
    )
    dense = {"wikitext2/perplexity": 26.0, "piqa/acc": 0.7, "piqa/acc_stderr": 0.05, "hs/acc": 0.3, "hs/acc_norm": 0.4}
    pruned = {"wikitext2/perplexity": 52.0, "piqa/acc": 0.6, "piqa/acc_stderr": 0.05, "hs/acc": 0.3, "hs/acc_norm": 0.3}
    return Comparison(
        title="tiny <slim>", pruning=pruning, dense=dense, pruned=pruned, bench=bench, data=["Calibration: python."]
    )


def test_rows_hold_every_figure_with_its_change(comparison):
    found = {row.figure: row.cells[1:] for row in rows(comparison)}
    assert found["Parameters"] == ("100.0 M", "80.0 M", "-20.0%")
    assert found["Perplexity, wikitext2"] == ("26.00", "52.00", "x 2.00")
    assert found["piqa (acc)"] == ("70.0 ± 5.0 %", "60.0 ± 5.0 %", "-10.0 points")
    assert found["hs (acc_norm)"] == ("40.0 %", "30.0 %", "-10.0 points")  # acc_norm where the task has it
    assert found["Mean of 2 tasks"] == ("55.0 %", "45.0 %", "-10.0 points")
    assert found["Throughput, new tokens"] == ("105 tokens/s", "145 tokens/s", "x 1.40 (1.30 to 1.50)")


def test_html_and_markdown_show_the_same_rows(comparison):
    html, markdown = to_html(comparison), to_markdown(comparison)
    for row in rows(comparison):
        assert f"| {row.figure} | {row.dense} | {row.pruned} | {row.change} |" in markdown
        assert all(f"<td>{cell}</td>" in html for cell in row.cells)
    for note in notes(comparison):
        assert note in markdown


def test_html_needs_no_network_and_escapes_what_it_is_given(comparison):
    html = to_html(comparison)
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(\s*['\"]?http", html)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html)
    assert "tiny &lt;slim&gt;" in html
    assert "<slim>" not in html
    assert "<b>model" not in html
    assert "<fast>" not in html
    assert "light dark" in html
    assert 'name="viewport"' in html


def test_plots_are_well_formed_and_share_no_ids(comparison):
    plots = re.findall(r"<svg .*?</svg>", to_html(comparison), flags=re.DOTALL)
    assert len(plots) == 4
    ids = [element.get("id") for plot in plots for element in ET.fromstring(plot).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0
    for plot in plots:
        targets = set(re.findall(r"url\(#([^)]+)\)", plot)) | set(re.findall(r'href="#([^"]+)"', plot))
        assert targets <= set(ids)
        assert "currentColor" in plot
        assert "#010203" not in plot


def test_without_a_benchmark_the_report_says_why(comparison):
    import dataclasses

    skipped = dataclasses.replace(comparison, bench=None, skipped=["benchmark: vLLM is not installed"])
    assert "Skipped: benchmark: vLLM is not installed" in to_markdown(skipped)
    assert to_html(skipped).count("<svg ") == 2
    assert not any("tokens/s" in cell for row in rows(skipped) for cell in row.cells)
