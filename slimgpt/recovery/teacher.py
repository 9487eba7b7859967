"""Which model a pruned one learns from."""

from pathlib import Path

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.source import BUILT_IN, built_in_folder, resolve_model
from slimgpt.data.calibration import load_tokenizer


def find_teacher(student: Checkpoint, name: str = "") -> Path:
    """The folder of the teacher: the one that is named, or the first model of the lineage.

    Raises:
        ValueError, FileNotFoundError: where there is none, with the remedy.
    """
    if name:
        return resolve_model(name)
    if not student.lineage.steps:
        raise ValueError(f"{student.folder} does not say which model it was made from; name the teacher")
    first = student.lineage.steps[0]
    model, _, revision = first.model.partition("@")
    try:
        folder = resolve_model(BUILT_IN if model == built_in_folder().name else model, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{student.folder} was made from {first.model}, which would be its teacher, and {error}; name the "
            "teacher's folder (--teacher)"
        ) from None
    if first.input and Checkpoint.open(folder).digest != first.input:
        raise ValueError(
            f"{folder} is not the {first.model} from which {student.folder} was made: its weights or config differ; "
            "name the teacher"
        )
    return folder


def check_vocabulary(teacher: Path, student: Path) -> None:
    """Refuse a teacher whose distributions are over other tokens.

    Raises:
        ValueError: naming both.
    """
    sizes = [read_config(folder).vocab_size for folder in (teacher, student)]
    if sizes[0] != sizes[1] or _tokens(teacher) != _tokens(student):
        how = f"{sizes[0]} and {sizes[1]} tokens" if sizes[0] != sizes[1] else "other tokens for the same numbers"
        raise ValueError(
            f"the teacher {teacher} and {student} have different vocabularies ({how}); name a teacher with the same"
        )


def _tokens(folder: Path) -> dict[str, int]:
    return dict(load_tokenizer(folder).get_vocab())
