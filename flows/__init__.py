"""Prefect flows: each reads like the list of its steps.

Importing this package sets the environment: Prefect reads its settings when it is imported, which is after this.
"""

import gc

from tasks.environment import prepare

gc.set_threshold(10_000)  # imports make objects that stay; to look through them each 700 is a tenth of a start
prepare()
