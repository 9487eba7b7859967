"""The registry's room works where Prefect is not installed."""

import pkgutil
import subprocess
import sys

import tasks.registry


def test_nothing_in_the_registry_asks_for_prefect():
    modules = [module.name for module in pkgutil.iter_modules(tasks.registry.__path__, "tasks.registry.")]
    assert len(modules) > 8
    # set_model() of the file that MLflow copies needs MLflow's loader around it, not Prefect
    imports = "\n".join(f"import {module}" for module in modules if not module.endswith("pyfunc_model"))
    code = f"import sys\nsys.modules['prefect'] = None\n{imports}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
