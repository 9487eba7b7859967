"""Write a checkpoint as one GGUF file, which llama.cpp and Ollama run.

slimgpt export pruned pruned.gguf --type q4_k_m
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from torch import Tensor

from deploy.llamacpp.architecture import Architecture, architecture_of
from deploy.llamacpp.blocks import FILE_TYPES, Type, bytes_shape, check_type, in_blocks, kind_of
from deploy.llamacpp.vocabulary import read_tokenizer, write_vocabulary
from slimgpt.checkpoints.gguf_file import ENDING, ROPE_FACTORS
from slimgpt.checkpoints.lineage import checkpoint_digest
from slimgpt.checkpoints.origins import open_shards, read_config
from slimgpt.checkpoints.shards import Shards
from slimgpt.data.calibration import load_tokenizer
from slimgpt.files import check_writable, commit, free_bytes, locked, write_atomically, writing

MODELFILE = ".Modelfile"
_WEIGHTS_PER_SECOND = {"f16": 15e6, "q8_0": 20e6, "q4_k_m": 20e6}  # measured on SmolLM2
_VOCABULARY_BYTES = 20_000_000  # more than any tokenizer takes in the file


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: in the file.
        source: in the checkpoint; empty for the rotary embedding's factors, which the config tells.
        shape: rows and columns, or the length of a vector.
        kind: how its numbers are kept.
        heads: of queries or keys whose rows change places; 0 for other tensors.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    heads: int = 0

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(bytes_shape(self.shape, self.kind)))


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write.

    Attributes:
        model: folder of the checkpoint.
        kind: type of the file.
        architecture: of the model, in llama.cpp.
        tensors: in the order of the file.
    """

    model: Path
    kind: Type
    architecture: Architecture
    tensors: list[Stored]

    @property
    def bytes(self) -> int:
        """Size of the file, but for the vocabulary's few megabytes."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Main memory for the largest tensor: as stored, in float32 (twice while rows change places), as written."""
        return max(10 * int(np.prod(tensor.shape)) + tensor.bytes for tensor in self.tensors)

    @property
    def seconds(self) -> float:
        """Rough time on two CPU cores."""
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors) / _WEIGHTS_PER_SECOND[self.kind]


def plan_export(model: Path, kind: str) -> ExportPlan:
    """What ``export`` would write, from the headers of the weight files.

    Raises:
        ValueError: for another type; where llama.cpp has nothing that computes the same, or no such tokenizer.
    """
    check_type(kind)
    architecture = architecture_of(read_config(model), model)
    read_tokenizer(model)
    tensors = list(_tensors(architecture, open_shards(model), cast(Type, kind), model))
    return ExportPlan(model, cast(Type, kind), architecture, tensors)


def export(plan: ExportPlan, out: Path, *, name: str = "") -> Path:
    """Write the file ``out``, and an Ollama Modelfile beside it, which replace older ones only when complete.

    Args:
        plan: by ``plan_export``.
        out: a new file that ends in .gguf, or an older one.
        name: what the file says it is; by default the name of the model's folder.

    Returns:
        ``out``.

    Raises:
        ValueError: for an ``out`` that is no GGUF file; for weights that 16 bits cannot hold.
        OSError: the disk has no room for it; the message names the folder.
    """
    check_target(plan, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Another export to the same place waits: both would write the same unfinished file.
    with writing("the GGUF file", out.parent), locked(out.parent, wait=True), _partial(out) as partial:
        _write(plan, partial, name or plan.model.absolute().name)
        commit(partial, out)
        write_atomically(out.with_suffix(MODELFILE), _modelfile(plan, out))
    return out


def check_name(out: Path) -> None:
    """Refuse a name that cannot be the new file's.

    Raises:
        ValueError: for another ending, a folder in its place or the Modelfile's, or a file of another kind.
    """
    if out.suffix != ENDING:
        raise ValueError(f"OUT is {out}; give the name of a file that ends in {ENDING}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a new file")
    if (beside := out.with_suffix(MODELFILE)).is_dir():
        raise ValueError(f"{beside} is a folder, and the Modelfile beside {out.name} has that name; give another name")
    if out.is_file():
        with out.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{out} is no GGUF file, so it is not replaced; give another name")


def check_target(plan: ExportPlan, out: Path) -> None:
    """Refuse a target that is something else, or a disk that is too small, before long work.

    Raises:
        ValueError: as ``check_name``.
        OSError: naming the folder, and what it lacks.
    """
    check_name(out)
    check_writable(out.absolute().parent)
    needs, free = plan.bytes + _VOCABULARY_BYTES, free_bytes(out.absolute().parent)
    if free < needs:
        raise OSError(
            f"{out.absolute().parent} has {free / 1e9:.2f} GB free, {out.name} needs {needs / 1e9:.2f} GB; make room"
        )


def _tensors(architecture: Architecture, shards: Shards, kind: Type, model: Path) -> Iterator[Stored]:
    """Every tensor of the file."""
    layers = len(architecture.shapes)
    names = get_tensor_name_map(architecture.name, layers)
    if (factors := architecture.rope_factors()) is not None:
        yield Stored(ROPE_FACTORS, "", factors.shape, GGMLQuantizationType.F32)
    for source in shards.names():
        if source == "lm_head.weight" and architecture.config.tie_word_embeddings:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{model} cannot become GGUF: llama.cpp has no place for {source}")
        shape, heads = tuple(shards.shape(source)[0]), 0
        if architecture.rotates_neighbours and name.startswith("blk."):
            layer = architecture.shapes[int(name.split(".")[1])]
            heads = {"attn_q": layer.num_heads, "attn_k": layer.num_kv_heads}.get(name.split(".")[2], 0)
        yield Stored(name, source, shape, kind_of(kind, name, shape, layers=layers), heads)


def _write(plan: ExportPlan, path: Path, name: str) -> None:
    """The file, one tensor in memory at a time."""
    config = plan.architecture.config
    shards = open_shards(plan.model)
    with closing(GGUFWriter(path, plan.architecture.label)) as writer:
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[plan.kind])
        writer.add_string("slimgpt.checkpoint", checkpoint_digest(plan.model))
        plan.architecture.write_numbers(writer)
        write_vocabulary(writer, plan.model, vocab_size=config.vocab_size, model_type=config.model_type)
        for tensor in plan.tensors:
            shape = bytes_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            writer.write_tensor_data(in_blocks(_weight(plan, tensor, shards), tensor.kind))


def _weight(plan: ExportPlan, tensor: Stored, shards: Shards) -> np.ndarray:
    """A tensor in float32, its rows where llama.cpp wants them."""
    if not tensor.source:
        factors = plan.architecture.rope_factors()
        assert factors is not None, tensor.name
        return factors
    weight = shards.load([tensor.source])[tensor.source].float()
    limit = torch.finfo(torch.float16).max
    if tensor.kind == GGMLQuantizationType.F16 and (largest := float(weight.abs().max())) > limit:
        raise ValueError(
            f"{plan.model}: {tensor.source} holds {largest:.3g}, and f16 reaches {limit:,.0f}: use --type q8_0"
        )
    return (neighbours(weight, tensor.heads) if tensor.heads else weight).numpy()


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of queries or keys, or their biases, where a rotation of neighbours finds them.

    Args:
        weight: [heads * head_dim, ...]; the rotation turned row i of a head with row i + head_dim / 2.
        heads: how many.

    Returns:
        The same rows, of each head: 0, head_dim / 2, 1, head_dim / 2 + 1, ...
    """
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _modelfile(plan: ExportPlan, out: Path) -> str:
    """For ``ollama create``: the file, how much it reads, what ends an answer."""
    lines = [f"FROM ./{out.name}", f"PARAMETER num_ctx {plan.architecture.context_length}"]
    tokenizer = load_tokenizer(plan.model)
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A file beside ``out``, gone afterwards unless it has become ``out``."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
