"""A benchmark's report, made up."""

from deploy.bench.results import (
    COUNTS,
    LATENCY_METRICS,
    METRICS,
    SCHEMA,
    THROUGHPUT_METRICS,
    BenchReport,
    Footprint,
    Load,
    Paired,
    Ratio,
    Saving,
)


def paired(metrics, dense, pruned):
    return Paired.of([dict.fromkeys(metrics, v) for v in dense], [dict.fromkeys(metrics, v) for v in pruned], metrics)


def bench_report():
    loads = [
        Load("full", 0, paired((*METRICS, *COUNTS), (100.0, 110.0), (150.0, 143.0))),
        Load("50pct", 2.0, paired((*METRICS, *COUNTS), (20.0, 20.0), (15.0, 10.0))),
    ]
    return BenchReport(
        schema=SCHEMA,
        config={"dtype": "bfloat16", "num_prompts": 32, "input_len": 128, "output_len": 64},
        environment={"vllm": "0.32.0", "device": "a <fast> CPU", "cores": 2},
        loads=loads,
        throughput=paired(THROUGHPUT_METRICS, (200.0, 200.0), (250.0, 300.0)),
        latency=paired(LATENCY_METRICS, (1000.0, 1000.0), (800.0, 700.0)),
        savings={"serving": Saving(0.25, 0.2, Ratio(0.2, 0.15, 0.25), Ratio(0.8, 0.6, 1.0))},
        drift={"serving": 0.99},
        footprints={
            "dense": Footprint(200_000_000, 30.0, 0.5, 1000, 3_000_000_000),
            "pruned": Footprint(150_000_000, 20.0, None, 1500, 2_700_000_000),
        },
        seconds=60.0,
    )
