"""What a training takes, counted from widths: operations, memory; seconds once the device's rate is known.

Letters: D = hidden size, A = heads * head_dim, F = FFN width, V = vocabulary; a token's operations are those of one
multiplication or addition each.
"""

from transformers import PretrainedConfig

from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.output_head import LOGIT_BYTES
from slimgpt.engine.cost import IMPORTS
from slimgpt.engine.rates import measure_rates
from slimgpt.method.shapes import LayerShape
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.text import RecoveryText
from slimgpt.recovery.training import LORA_LOGIT_BYTES, steps_between

# Share of the rate of one large product that a training reaches: norms, softmax, elementwise work, the backward pass of
# attention and the optimizer are not counted, or slower. From SmolLM2 on a CPU (benchmarks/RESULTS.md).
TRAINING_SHARE = 0.3
_LOGIT_COPIES = 5  # of one part: the teacher's and the student's, their logarithms, the probabilities
_LIBRARIES = 500 << 20  # Trainer, accelerate and peft


def _forward(shapes: list[LayerShape], seq_len: int) -> float:
    """Operations per token of the layers; causal attention sees half the square."""
    return sum(2.0 * (s.parameters + seq_len * s.num_heads * s.head_dim) for s in shapes)


def _head(config: PretrainedConfig) -> float:
    return float(2 * config.hidden_size * config.vocab_size)


def operations(job: RecoveryJob, text: RecoveryText) -> float:
    """Of the whole training and the evaluations of the held-out text."""
    c, student = job.config, job.model_config
    forward = _forward(job.shapes, c.seq_len)
    look = forward + _head(student)
    if job.teacher is not None:
        teacher = read_config(job.teacher.folder)
        look += _forward(layer_shapes(teacher), c.seq_len) + _head(teacher)
    back = (2 if c.trainable == "all" else 1) * forward + _head(student)
    held_out = (text.steps / steps_between(text.steps) + 1) * sum(len(row["input_ids"]) for row in text.held_out)
    return float(text.facts["tokens"] * (look + back) + held_out * look)


def seconds(job: RecoveryJob, text: RecoveryText) -> float:
    """Estimated, from the rate of one product just now; reading the text is not part of it."""
    return operations(job, text) / (TRAINING_SHARE * measure_rates(job.device, job.dtype).forward)


def memory_bytes(job: RecoveryJob) -> int:
    """Estimated peak where the training computes."""
    c, item = job.config, job.dtype.itemsize
    teacher = 0
    if job.teacher is not None:
        teacher = sum(s.parameters for s in layer_shapes(read_config(job.teacher.folder))) * item
    embeddings = 2 * job.model_config.vocab_size * job.model_config.hidden_size * item
    own = job.parameters * (4 if c.trainable == "all" else item)
    trained = job.trained * (4 + 4 + 8)  # itself, its gradient, two moments
    tokens = min(c.batch_size * c.seq_len, max(c.seq_len, c.block_tokens))
    residual = 4 if c.trainable == "all" else item
    kept = tokens * sum(_kept(s, item, residual) for s in job.shapes)
    part = LOGIT_BYTES[job.device.type] if job.teacher is not None else LORA_LOGIT_BYTES
    logits = _LOGIT_COPIES * part
    base = IMPORTS + _LIBRARIES if job.device.type == "cpu" else 0
    return int(base + teacher + embeddings + own + trained + kept + logits)


def _kept(shape: LayerShape, item: int, residual: int) -> int:
    """Bytes per token that autograd keeps of a layer."""
    D, A, F = shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size
    kv = shape.num_kv_heads * shape.head_dim
    return 6 * D * residual + item * (2 * D + 4 * A + 4 * kv + 5 * F)
