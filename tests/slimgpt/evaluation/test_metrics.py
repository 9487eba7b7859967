"""One metric per task is quoted, whatever lm-eval calls it."""

from slimgpt.evaluation.metrics import percent, quoted_metrics


def test_the_quoted_metric_of_each_kind_of_task():
    metrics = {
        "wikitext2/perplexity": 26.0,
        "wikitext2/perplexity_stderr": 1.0,
        "wikitext/word_perplexity": 30.0,
        "wikitext/bits_per_byte": 0.9,
        "boolq/acc": 0.6,
        "boolq/acc_stderr": 0.1,
        "piqa/acc": 0.6,
        "piqa/acc_norm": 0.7,
        "piqa/acc_norm_stderr": 0.1,
        "gsm8k/exact_match_strict-match": 0.1,
        "gsm8k/exact_match_flexible-extract": 0.2,
        "humaneval/pass_1_create_test": 0.3,
        "wmt16/bleu": 21.0,
        "wmt16/ter": 60.0,
        "own/judged": 0.5,
        "squad/f1": 71.0,
    }
    assert quoted_metrics(metrics) == {
        "boolq": "boolq/acc",
        "piqa": "piqa/acc_norm",
        "gsm8k": "gsm8k/exact_match_strict-match",
        "humaneval": "humaneval/pass_1_create_test",
        "wmt16": "wmt16/bleu",
    }


def test_percent_keeps_metrics_already_on_a_scale_of_100():
    assert percent("piqa/acc_norm", 0.7) == 70
    assert percent("wmt16/bleu", 21.0) == 21
