"""One Prefect task a file: prune, evaluate, package, benchmark, report, register."""
