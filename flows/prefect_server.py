"""Prefect's own server, without its minute of silence: ``python -m flows.prefect_server start --port 4200``.

Python frees a statement of SQLite's on whichever thread its garbage collector happens to run. On the server's event
loop that waits for the statement's connection, whose own thread may sleep, for up to a minute, until another connection
gives the write lock back, which takes the event loop. So all stands still, and ends with "database is locked": once in
some hundred flow runs. Here a thread of its own collects, and only that one waits. ``temporary PORT`` in place of
``start`` is the server that lives as long as one command.
"""

import gc
import runpy
import sys
import threading
import time

from deploy.engines import vllm_entry

START_S = 30.0
INTERVAL_S = 10.0


def collect_aside(start_s: float = START_S, interval_s: float = INTERVAL_S) -> None:
    """From now on no thread but one of its own collects garbage, first after ``start_s``, then every ``interval_s``."""

    def collect() -> None:
        time.sleep(start_s)
        gc.collect()
        gc.freeze()  # what the start made stays, and is not looked through each time
        while True:
            time.sleep(interval_s)
            gc.collect()

    gc.disable()
    threading.Thread(target=collect, name="garbage", daemon=True).start()


def temporary(port: int) -> None:
    """The server of one command: as Prefect starts it, but tied to the life of the process that did."""
    import uvicorn

    vllm_entry.die_with_parent()
    app = "prefect.server.api.server:create_app"
    uvicorn.run(app, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    collect_aside()
    if sys.argv[1:2] == ["temporary"]:
        temporary(int(sys.argv[2]))
    else:
        sys.argv.insert(1, "server")
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)
