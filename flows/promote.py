"""Move an alias of a registered model by gates: the flow behind the deployment ``promote``.

slimgpt promote NAME --version 2 --to champion      # the same on the command line, without Prefect
"""

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from tasks.environment import prepare
from tasks.registry.gates import GateConfig
from tasks.registry.promotion import CHAMPION, Moved
from tasks.registry.promotion import promote as move
from tasks.registry.promotion import rollback as move_back

GATES = GateConfig()


@flow(name="promote", persist_result=False)
def promote(
    name: str, version: int, to: str = CHAMPION, gates: GateConfig = GATES, by: str = "", runs: str = ""
) -> Moved:
    """Let an alias point to a version that passes the gates; the version that had it keeps the alias ``previous``.

    Args:
        name: Name in the registry.
        version: Which version.
        to: The alias.
        gates: What the version must measure up to.
        by: Who promotes, for the audit trail; empty for the name of the user who runs this.
        runs: Folder of the runs, whose registry holds NAME; empty for ./runs or SLIMGPT_RUNS.
    """
    moved = move(name, version, to, gates, prepare(runs), by=by)
    rows = [{"gate": gate.name, "measured": gate.value, "limit": gate.limit} for gate in moved.gates]
    create_table_artifact(rows, key="promote-gates", description=f"{name} version {version} is {to}")
    get_run_logger().info("%s", moved.summary)
    return moved


@flow(name="rollback", persist_result=False)
def rollback(name: str, alias: str = CHAMPION, by: str = "", runs: str = "") -> Moved:
    """Give an alias back to the version that had it before.

    Args:
        name: Name in the registry.
        alias: The alias.
        by: Who rolls back, for the audit trail; empty for the name of the user who runs this.
        runs: Folder of the runs, whose registry holds NAME; empty for ./runs or SLIMGPT_RUNS.
    """
    moved = move_back(name, prepare(runs), alias=alias, by=by)
    get_run_logger().info("%s", moved.summary)
    return moved
