"""What one machine needs, on loopback: Prefect's server, MLflow's server, and a worker with the deployments registered.

python -m flows.local up         # as often as you like: what runs already is left alone
python -m flows.local status
python -m flows.local down
python -m flows.local register   # only the deployments, on a Prefect server that runs; for workers in containers

State, logs and pids lie in one folder: SLIMGPT_RUNS, else ./runs. Ports: PREFECT_PORT, MLFLOW_PORT. A server of your
own is used instead of a local one where PREFECT_API_URL or MLFLOW_TRACKING_URI (http) names it, and PostgreSQL and S3
hold the local ones' state where their variables say so: see docs/flows.md.
"""

import subprocess
import sys

from flows.local.machine import Local


def main(arguments: list[str]) -> int:
    """The command line."""
    try:
        local = Local.here()
        if arguments == ["up"]:
            local.up()
        elif arguments == ["down"]:
            print(f"stopped: {', '.join(local.down()) or 'nothing was running'}")
            return 0
        elif arguments == ["register"]:
            local.register()
            print(f"registered the deployments at {local.prefect_url}")
            return 0
        elif arguments != ["status"]:
            raise ValueError(f"{' '.join(arguments)!r} is not a command; use up, down, register or status")
        for service in local.services:
            print(f"{service.name:8} {f'pid {service.pid()}' if service.pid() else 'not running':14} {service.log}")
        states = {service.name: f" (state: {service.state})" for service in local.services}
        print(f"Prefect  {local.prefect_url.removesuffix('/api')}{states.get('prefect', '')}")
        print(f"MLflow   {local.mlflow_url}{states.get('mlflow', '')}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
