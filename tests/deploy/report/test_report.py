import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import pytest

from deploy.bench.results import BenchReport
from deploy.report.comparison import Comparison, notes, rows, to_markdown
from deploy.report.page import to_html
from deploy.report.plots import bench_plots
from slimgpt.checkpoints.lineage import Lineage, prune_step
from slimgpt.report import LayerReport, PruneReport
from tests.browser import CHROMIUM, browser
from tests.deploy.bench_report import bench_report


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
    bench = bench_report()
    dense = {
        "wikitext2/perplexity": 26.0,
        "wikitext2/perplexity_stderr": 1.0,
        "piqa/acc": 0.7,
        "piqa/acc_stderr": 0.05,
        "hs/acc": 0.3,
        "hs/acc_norm": 0.4,
    }
    pruned = {"wikitext2/perplexity": 52.0, "piqa/acc": 0.6, "piqa/acc_stderr": 0.05, "hs/acc": 0.3, "hs/acc_norm": 0.3}
    return Comparison(
        title="tiny <slim>",
        lineage=Lineage((prune_step(pruning),)),
        dense=dense,
        pruned=pruned,
        bench=bench,
        data=["Calibration: python."],
        perplexity_change=(1.9, 2.1),
        serve=["slimgpt serve models:/tiny@challenger"],
        parameters="prune:\n  ratio: 0.25\n",
    )


def test_rows_hold_every_figure_with_its_change(comparison):
    cells = {row.figure: row.cells[1:] for row in rows(comparison)}
    assert cells["Parameters"] == ("100.0 M", "80.0 M", "-20.0%")
    assert cells["Perplexity, wikitext2"] == ("26.00 ± 1.96", "52.00", "x 2.00 (1.90 to 2.10)")
    assert cells["piqa (acc)"] == ("70.0 ± 9.8 %", "60.0 ± 9.8 %", "-10.0 points")  # 95 %: 1.96 standard errors of 5 %
    assert cells["hs (acc_norm)"] == ("40.0 %", "30.0 %", "-10.0 points")  # acc_norm where the task has it
    assert cells["Mean of 2 tasks"] == ("55.0 %", "45.0 %", "-10.0 points")
    assert cells["Throughput, new tokens"] == ("105 tokens/s", "146 tokens/s", "x 1.40 (1.30 to 1.50)")
    assert cells["At 2 requests/s: whole request, p95"] == ("20 ms", "12 ms", "x 0.62 (0.50 to 0.75)")
    assert cells["Offline throughput, new tokens"] == ("200 tokens/s", "275 tokens/s", "x 1.38 (1.25 to 1.50)")
    assert cells["Offline, one request alone"] == ("1000 ms", "750 ms", "x 0.75 (0.70 to 0.80)")
    assert cells["Time saved, all at once"] == ("", "20.0% of 25.0% possible", "efficiency 0.80 (0.60 to 1.00)")
    assert cells["Tokens that fit the KV cache"] == ("1,000", "1,500", "x 1.50")
    assert cells["Peak memory, KV cache included"] == ("3.00 GB", "2.70 GB", "x 0.90")
    assert "Loading the weights" not in cells  # one of the two is not known


def test_sizes_of_a_tiny_model_are_told_apart(comparison):
    step = comparison.lineage.steps[0]
    tiny = {"parameters_before": 23_656, "parameters_after": 18_272, "bytes_before": 49_712, "bytes_after": 38_944}
    step = dataclasses.replace(step, figures={**step.figures, **tiny})
    cells = {row.figure: row.cells for row in rows(dataclasses.replace(comparison, lineage=Lineage((step,))))}
    assert cells["Parameters"][1:] == ("0.024 M", "0.018 M", "-22.8%")
    assert cells["Weight files"][1:] == ("0.05 MB", "0.039 MB", "-21.7%")


def test_a_budget_stands_beside_what_was_reached(comparison):
    step = comparison.lineage.steps[0]
    step = dataclasses.replace(step, figures={**step.figures, "requested_size": 165_000_000})
    cells = {row.figure: row.cells for row in rows(dataclasses.replace(comparison, lineage=Lineage((step,))))}
    assert cells["Weight files"][3] == "-20.0% (at most 165.0 MB requested)"
    assert cells["Parameters"][3] == "-20.0%"
    asked = {"requested_speedup": 1.4, "predicted_speedup": 1.41}
    step = dataclasses.replace(step, figures={**step.figures, **asked})
    cells = {row.figure: row.cells for row in rows(dataclasses.replace(comparison, lineage=Lineage((step,))))}
    assert cells["Projection parameters removed"][3] == "requested x 1.40 as fast, predicted x 1.41"


def test_two_steps_are_measured_from_the_model_that_is_compared_with(comparison):
    first = dataclasses.replace(comparison.lineage.steps[0], input="a", output="b")
    sizes = {"parameters_before": 80e6, "parameters_after": 72e6, "projections_before": 59.7e6}
    second = dataclasses.replace(
        first, input="b", output="c", figures=first.figures | sizes | {"projections_after": 51.7e6}
    )
    twice = dataclasses.replace(comparison, lineage=Lineage((first, second)))
    found = {row.figure: row.cells[1:] for row in rows(twice)}
    assert found["Parameters"] == ("100.0 M", "72.0 M", "-28.0%")
    removed = 1 - 51.7e6 / first.figures["projections_before"]
    requested = 1 - 0.75 * first.figures["projections_after"] / first.figures["projections_before"]
    assert found["Projection parameters removed"] == ("", f"{removed:.2%}", f"requested {requested:.2%}")
    beside_the_first = {row.figure: row.cells[1:] for row in rows(dataclasses.replace(twice, dense_digest="b"))}
    assert beside_the_first["Parameters"] == ("80.0 M", "72.0 M", "-10.0%")
    assert beside_the_first["Projection parameters removed"] == ("", f"{8 / 59.7:.2%}", "requested 25.00%")
    assert beside_the_first["... of org/<b>model</b>|x"][1] == f"{removed:.2%}"
    assert sum(note.startswith("prune org/<b>model</b>|x: ") for note in notes(twice)) == 2


def test_html_and_markdown_show_the_same_rows(comparison):
    html, markdown = to_html(comparison), to_markdown(comparison)
    for row in rows(comparison):
        assert f"| {row.figure} | {row.dense} | {row.pruned} | {row.change} |" in markdown
        assert all(f">{cell}</t" in html for cell in row.cells)
    for note in notes(comparison):
        assert note in markdown
    for text in (html, markdown):
        assert "slimgpt serve models:/tiny@challenger" in text
        assert comparison.parameters in text


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
    assert len(plots) == 6
    ids = [element.get("id") for plot in plots for element in ET.fromstring(plot).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0
    for plot in plots:
        targets = set(re.findall(r"url\(#([^)]+)\)", plot)) | set(re.findall(r'href="#([^"]+)"', plot))
        assert targets <= set(ids)
        assert "currentColor" in plot
        assert "#010203" not in plot


def test_one_load_makes_no_plot_of_latency_against_load():
    report = bench_report()
    assert [plot.name for plot in bench_plots(report)] == ["throughput", "load", "latency"]
    alone = dataclasses.replace(report, loads=report.loads[:1])
    assert [plot.name for plot in bench_plots(alone)] == ["throughput", "latency"]


def test_without_a_benchmark_the_report_says_why(comparison):
    skipped = dataclasses.replace(comparison, bench=None, skipped=["benchmark: vLLM is not installed"])
    assert "Skipped: benchmark: vLLM is not installed" in to_markdown(skipped)
    assert to_html(skipped).count("<svg ") == 3
    assert not any("tokens/s" in cell for row in rows(skipped) for cell in row.cells)


# A long name, a long command and many tasks are what breaks a narrow page.
WIDE = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('pre, .scroll, svg'))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
            || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline'))
  .map(e => e.outerHTML.slice(0, 200))
"""
PLOTS = "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
CONTRAST = """
(() => { const s = getComputedStyle(document.body), light = c => c.match(/\\d+/g).slice(0, 3).map(Number)
  .reduce((a, b) => a + b) / 3; return [light(s.backgroundColor), light(s.color)]; })()
"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium-headless-shell, or chromium")
def test_a_real_browser_shows_it_without_overflow_on_phone_and_desktop_in_light_and_dark(comparison, tmp_path):
    long = dataclasses.replace(comparison, title="an-organisation/" + "a-rather-long-model-name-" * 3 + "slim")
    (tmp_path / "report.html").write_text(to_html(long))
    with browser(tmp_path / "profile") as page:
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                page.open(tmp_path / "report.html", width=width, scheme=scheme)
                assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
                page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
                assert page.run(WIDE) == []
                plots = page.run(PLOTS)
                assert len(plots) == 6
                assert all(300 < w <= min(width, 560) and 150 < h < w for w, h in plots)
                behind, ink = page.run(CONTRAST)
                assert (behind > 230 and ink < 60) if scheme == "light" else (behind < 40 and ink > 200)
        assert page.complaints == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium-headless-shell, or chromium")
def test_the_browser_check_detects_errors(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<p style='width: 2000px'>wide</p><script>console.error('no'); throw 1</script><img src='http://127.0.0.1:9/x'>"
    )
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "bad.html", width=400, scheme="light")
        assert len(page.run(WIDE)) >= 1
        assert sum("127.0.0.1:9" in complaint for complaint in page.complaints) >= 1
        assert any('"error"' in complaint for complaint in page.complaints)


def test_a_benchmark_of_every_kind_round_trips_through_json_with_a_number_for_every_metric():
    bench = bench_report()
    assert BenchReport.from_dict(json.loads(json.dumps(bench.to_dict()))) == bench
    metrics = bench.metrics
    assert metrics["offline_latency/ratio/mean_latency_ms"] == 0.75
    assert metrics["offline_throughput/dense/output_throughput"] == 200
    assert metrics["load_50pct/ratio/p95_e2el_ms"] == 0.625
    assert "pruned/load_seconds" not in metrics
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_answers_stand_in_both_reports_as_text(comparison):
    said = {"prompt": "The sky is", "teacher": " blue.", "pruned": " <b>`green`</b>\nand", "recovered": " blue"}
    step = dataclasses.replace(comparison.lineage.steps[0], answers=[said])
    answered = dataclasses.replace(comparison, lineage=Lineage((step,)))
    assert "## Answers" in to_markdown(answered)
    assert "- pruned: `<b>'green'</b> and`" in to_markdown(answered)
    assert "<li><small>pruned</small>  &lt;b&gt;`green`&lt;/b&gt;\nand</li>" in to_html(answered)
    assert "Answers" not in to_markdown(comparison) + to_html(comparison)
