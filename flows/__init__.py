"""Prefect flows: each reads like the list of its steps.

Importing this package sets the environment: Prefect reads its settings when it is imported, which is after this.
"""

from deploy.engines.vllm_entry import collect_seldom
from tasks.environment import prepare

collect_seldom()
prepare()
