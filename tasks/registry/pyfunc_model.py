"""The MLflow model of a pruned checkpoint, logged as code (no pickle): ``predict`` takes prompts and returns text.

MLflow copies this file into the logged model and runs it there. It loads safetensors with the classes of the
``slimgpt`` package that is logged beside it; no code out of a checkpoint is ever run.
"""

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class TextGenerator(PythonModel):
    """Greedy by default; ``params``: ``max_new_tokens`` (64) and ``temperature`` (0)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint in the logged model's ``artifacts/model``."""
        from transformers import AutoConfig, AutoTokenizer

        from slimgpt.checkpoints.loading import load_causal_lm
        from slimgpt.data.bos import lost_bos
        from slimgpt.device import compute_dtype, resolve_device
        from slimgpt.equal_bits import settle_vector_functions

        folder = context.artifacts["model"]
        device = resolve_device("auto")
        dtype = compute_dtype("auto", device, AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_causal_lm(folder, dtype).to(device)
        self.bos = lost_bos(self.tokenizer, self.model.config.model_type)
        settle_vector_functions()

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  MLflow passes it
        model_input: Any,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """Continue each prompt.

        Args:
            context: unused; MLflow passes it.
            model_input: data frame with a column ``prompt``, a list of strings, or one string.
            params: ``max_new_tokens`` and ``temperature``.
        """
        import torch

        if isinstance(model_input, str):
            prompts = [model_input]
        elif hasattr(model_input, "columns"):
            prompts = model_input["prompt"].tolist()
        else:
            prompts = [row["prompt"] if isinstance(row, dict) else str(row) for row in model_input]
        request = {"max_new_tokens": 64, "temperature": 0.0, **(params or {})}
        sampling = {"do_sample": False}
        if request["temperature"] > 0:
            sampling = {"do_sample": True, "temperature": request["temperature"]}
        prompts = [prompt if prompt.startswith(self.bos) else self.bos + prompt for prompt in prompts]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        with torch.inference_mode():
            ids_BT = self.model.generate(
                **batch,
                **sampling,
                max_new_tokens=int(request["max_new_tokens"]),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        texts: list[str] = self.tokenizer.batch_decode(
            ids_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts


set_model(TextGenerator())
