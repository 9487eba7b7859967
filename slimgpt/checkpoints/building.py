"""One thread at a time builds a model.

transformers builds and loads models under switches of the whole process (default dtype, meta device, skipped
initialisation). Two threads at once, such as two points of a sweep, leave a switch on: every model loaded later keeps
weights without data.
"""

from threading import RLock

building = RLock()
