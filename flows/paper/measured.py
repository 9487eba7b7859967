"""What was measured, in a JSON file beside the page: added to after every run, so that an interrupted one goes on."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimgpt.files import locked, write_atomically


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of one model of one run.

    Attributes:
        table, run, ratio, side: of the paper's run; ``side`` is dense, pruned or recovered.
        model: the dense model's name.
        digest: of its weights and config.
        own: whether it is taken for the paper's model, measured as the paper does.
        samples_share, recovery_tokens, limit, max_blocks: as requested: 1, nothing, 0 and 0 is the paper's protocol.
        figures: by measure.
        date, device, dtype, commit: when, on what, and of which version of this project.
        versions: of the packages that decide the figures.
    """

    table: str
    run: str
    ratio: float
    side: str
    model: str
    digest: str
    own: bool
    samples_share: float
    limit: int
    max_blocks: int
    figures: dict[str, float]
    date: str
    device: str
    dtype: str
    commit: str
    versions: dict[str, str]
    recovery_tokens: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Two with the same key are the same measurement."""
        return (self.table, self.run, self.ratio, self.side, *self.source)

    @property
    def source(self) -> tuple[str, str, float, str, int, int]:
        """The model and the protocol, whose figures stand in one column."""
        return self.model, self.digest, self.samples_share, self.recovery_tokens, self.limit, self.max_blocks

    @property
    def title(self) -> str:
        """Of that column."""
        cut = [f"{self.samples_share:g} of the sequences"] if self.samples_share != 1 else []
        cut += [f"recovered on {self.recovery_tokens} tokens"] if self.recovery_tokens else []
        cut += [f"limit {self.limit}"] if self.limit else []
        cut += [f"{self.max_blocks} blocks of text"] if self.max_blocks else []
        return self.model + (f" ({', '.join(cut)})" if cut else "")


def read_measured(file: Path) -> list[Measured]:
    """All that was measured so far.

    Raises:
        ValueError: when the file is damaged.
    """
    if not file.is_file():
        return []
    try:
        return [Measured(**entry) for entry in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or move it away to begin anew") from None


def add_measured(file: Path, new: list[Measured]) -> list[Measured]:
    """Add to the file, complete or not at all; returns all. A figure that was measured again replaces the older one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent, wait=True):
        known = {one.key: one for one in read_measured(file)}
        for one in new:
            before = known.get(one.key)
            known[one.key] = dataclasses.replace(one, figures={**before.figures, **one.figures}) if before else one
        rows = sorted(known.values(), key=lambda one: tuple(map(str, one.key)))
        write_atomically(file, json.dumps([dataclasses.asdict(one) for one in rows], indent=1) + "\n")
    return rows
