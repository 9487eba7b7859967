"""One thread at a time builds a model.

transformers builds and loads models under switches of the whole process (default dtype, meta device, skipped
initialisation). Two threads at once, such as two points of a sweep, leave a switch on: every model loaded later keeps
weights without data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from slimgpt.checkpoints.headers import CONFIG, damaged

building = RLock()


@contextmanager
def building_model_of(folder: Path) -> Iterator[None]:
    """Hold ``building`` while the model that a folder's config.json describes is built.

    Raises:
        ValueError: when transformers cannot build it; the message names config.json and what stands in the way.
    """
    with building:
        try:
            yield
        # What comes of an unknown activation or rotary embedding, or of a value that is a text, shares no class.
        except (AssertionError, AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise damaged(
                folder / CONFIG,
                f"transformers cannot build the model that it describes ({reason})",
                "correct that value, or download it again",
            ) from error
