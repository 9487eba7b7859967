"""The dry run of chains: what their stages would take, said where the work would begin."""

from dataclasses import dataclass

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from slimgpt.quantities import in_millions
from tasks.environment import RunFolder
from tasks.preflight.chain import Chain, Keep

HEADER = ("stage", "weight files", "memory", "time")


@dataclass(frozen=True)
class ForecastStage:
    """What a stage would take.

    Attributes:
        name: as in the lineage, behind the name of its chain where there are several.
        bytes_after: expected size of the weight files that it leaves.
        memory_bytes, seconds: estimated; how long evaluation and benchmark take is not.
    """

    name: str
    bytes_after: int
    memory_bytes: int
    seconds: float

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row of a table with HEADER."""
        memory, minutes = f"about {self.memory_bytes / 1e9:.1f} GB", self.seconds / 60
        time = f"about {self.seconds:,.0f} s" if minutes < 10 else f"about {minutes:,.0f} min"
        return self.name, f"{in_millions(self.bytes_after)} MB", memory, time


@dataclass(frozen=True)
class Forecast:
    """What chains would do.

    Attributes:
        stages: in their order.
        folders: where each chain would write.
        disk_bytes: that is to be written still; 0 where earlier runs have made all models.
    """

    stages: tuple[ForecastStage, ...]
    folders: tuple[str, ...]
    disk_bytes: int


@task(name="say what would happen", cache_policy=NO_CACHE, persist_result=False)
def forecast(wanted: dict[str, tuple[Chain, RunFolder]], keep: Keep = "last") -> Forecast:
    """Estimate each stage of chains that have passed their checks; a table on the flow run's page says the same.

    Args:
        wanted: every chain and its folder, by a name; empty for the only one.
        keep: whether what the stages before the last one make stays.
    """
    stages = tuple(
        ForecastStage(f"{name} {stage.name}".strip(), stage.bytes_after, stage.memory_bytes, stage.seconds)
        for name, (chain, _) in wanted.items()
        for stage in chain.stages
    )
    rows = [dict(zip(HEADER, stage.cells, strict=True)) for stage in stages]
    create_table_artifact(rows, key="forecast", description="Dry run: nothing was made")
    get_run_logger().info("dry run: every check has passed; nothing was made")
    disk = sum(chain.missing_bytes(folder, keep) for chain, folder in wanted.values())
    return Forecast(stages, tuple(str(folder.root) for _, folder in wanted.values()), disk)
