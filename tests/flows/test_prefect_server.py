"""Garbage of SQLite's that is collected aside holds up nobody who has to give a lock back."""

import subprocess
import sys

import pytest

# Two connections, as Prefect's server has them: one has the write lock, the other's thread waits for it.
CODE = """
import gc, sqlite3, sys, threading, time
from flows.prefect_server import collect_aside

def connect():
    return sqlite3.connect("db", timeout=10, check_same_thread=False, isolation_level=None)

one, other = connect(), connect()
one.execute("PRAGMA journal_mode = WAL")
one.execute("CREATE TABLE t (x)")
if sys.argv[1] == "aside":
    collect_aside(1, 1)
one.execute("BEGIN IMMEDIATE")
cycle = [other.execute("SELECT 1 UNION SELECT 2")]  # a statement that has not come to its end
cycle[0].fetchone()
cycle.append(cycle)

def write():
    try:
        other.execute("INSERT INTO t VALUES (1)")
        print("written")
    except sqlite3.OperationalError:  # its text may be that of the statement freed meanwhile: "not an error"
        print("locked out")

waiting = threading.Thread(target=write)
waiting.start()
time.sleep(0.5)
del cycle
kept = [[] for _ in range(100_000)]  # as any work does: Python's collector would run now
time.sleep(2)
one.execute("COMMIT")
waiting.join()
"""


@pytest.mark.parametrize(("collector", "end"), [("python's", "locked out"), ("aside", "written")])
def test_the_thread_that_has_to_give_the_lock_back_does_not_wait_for_the_one_that_wants_it(tmp_path, collector, end):
    done = subprocess.run([sys.executable, "-c", CODE, collector], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (end, "")
