"""What pruning did, layer by layer: ``pruning.json`` in the output folder, and what ``slimgpt inspect`` shows."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from slimgpt.method.shapes import LayerShape


REPORT = "pruning.json"


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        kept_heads, kept_kv_heads, kept_channels: indices in the model that was pruned; empty in a lineage.
        attention_error, ffn_error: ``||WX - W'X||^2 / ||WX||^2`` of o_proj and down_proj over the calibration tokens.
        attention_damping, ffn_damping: share of the mean diagonal added to H; above percdamp: H was ill-conditioned.
        ffn_price: error per parameter of the last channels that went, as ``||WX - W'X||^2`` (of R W where prices are
            in nats); 0 where none went.
        ratio: share of the layer's projection parameters removed.
        seconds: wall time.
    """

    layer: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    dense_num_attention_heads: int
    dense_num_key_value_heads: int
    dense_intermediate_size: int
    kept_heads: list[int] = field(default_factory=list)
    kept_kv_heads: list[int] = field(default_factory=list)
    kept_channels: list[int] = field(default_factory=list)
    attention_error: float
    ffn_error: float
    attention_damping: float
    ffn_damping: float
    ffn_price: float
    ratio: float
    seconds: float

    def shape_of(self, dense: "LayerShape") -> "LayerShape":
        """The pruned layer's shape, given the dense one's."""
        return dataclasses.replace(
            dense,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
        )


@dataclass(frozen=True)
class PruneReport:
    """An entire pruning.

    Attributes:
        ratio: share of the decoder projections' parameters removed.
        model_ratio: share of all parameters removed, embeddings and norms included.
        seconds: wall time of this process; layers replayed after a crash are in ``replayed_layers``.
        peak_memory_bytes: highest resident memory of the process; on a GPU, highest allocated device memory. Of several
            processes the highest, like ``seconds_by_phase``.
        ranks: processes, each with a device of its own.
        activations: where they waited between layers: device, host or disk.
        layers_kept: layers whose channel activations were kept while their channels were chosen; those of the others
            were computed again.
        requested: ``size`` (bytes of the weight files) or ``parameters`` that the result may have at most, where the
            ratio in ``config`` was computed from one of them; or the ``speedup``, times as fast as the dense model.
        predicted_speedup: by the table of milliseconds, where a speedup was requested; else 0.
    """

    base_model: str
    model_type: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[LayerReport]
    ratio: float
    model_ratio: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    device: str
    ranks: int = 1
    activations: str = "device"
    layers_kept: int = 0
    replayed_layers: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    requested: dict[str, float] = field(default_factory=dict)
    predicted_speedup: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As ``pruning.json`` holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "layers": [LayerReport(**layer) for layer in data["layers"]]})


def load_report(folder: str | Path) -> PruneReport:
    """Read ``pruning.json`` of a pruned checkpoint.

    Raises:
        FileNotFoundError: when the folder holds none, so it is not a finished output of ``slimgpt prune``.
        ValueError: when it is damaged or of another version of slimgpt.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {REPORT}: it is not a finished output of slimgpt prune")
    try:
        return PruneReport.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or of another version of slimgpt ({error}); prune again") from None
