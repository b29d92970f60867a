"""Runs inside the environment of transformers 4.34.0: writes models and what they answer.

    python -m tests.hf.old.oracle JOBS.json

The file is a list of jobs. A job without `model` makes a model of random weights from its case and
saves it under DIRECTORY/model; a job with `model` loads that directory. Both write
DIRECTORY/answer.safetensors (inputs, outputs, gradients) and DIRECTORY/answer.json (the order of
the outputs, second names of shared parameters, the configuration, keys that were missing or
unexpected, the error where there was one).
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.hf.old.records import Case, answer, make_inputs


def main() -> int:
    """Do all jobs; one that fails is recorded as such and ends none but itself."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        directory = Path(job["directory"])
        directory.mkdir(parents=True, exist_ok=True)
        try:
            record = _answer(job, directory)
        except Exception:
            record = {"error": traceback.format_exc()}
        (directory / "answer.json").write_text(json.dumps({"case": job["case"], **record}))
    return 0


def _answer(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    case: Case = job["case"]
    loading: dict[str, Any] = {}
    if "model" in job:
        model, loading = _load(case, job["model"])
    else:
        model = _make(case)
        model.save_pretrained(directory / "model", **case["save"])
    inputs = make_inputs(case)
    result = answer(model.eval(), case, inputs)
    tensors = {f"input/{name}": tensor for name, tensor in inputs.items()} | result.tensors
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        tensors[f"gradient/{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "answer.safetensors")
    return {
        "orders": result.orders,
        "second_names": _second_names(model),
        "loading": loading,
        "config": model.config.to_dict(),
    }


def _make(case: Case) -> Any:
    """A model none of whose weights are trivial: no bias is zero, no norm's weight is one.

    The values are representable in bfloat16, which halves the compressed fixture.
    """
    torch.manual_seed(case["seed"])
    model_class = getattr(transformers, case["class"])
    model = model_class(model_class.config_class(**case["config"]), **case["arguments"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            parameter.copy_(parameter.bfloat16())
    return model


def _load(case: Case, directory: str) -> tuple[Any, dict[str, Any]]:
    """A saved model, and the keys of its files that do not fit it."""
    model_class = getattr(transformers, case["class"])
    model, loading = model_class.from_pretrained(
        directory, output_loading_info=True, **case["arguments"]
    )
    return model, {key: list(map(str, names)) for key, names in loading.items()}


def _second_names(model: Any) -> dict[str, str]:
    """Names of a parameter that has another one already."""
    first: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    return {
        name: first[tensor]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if first[tensor] != name
    }


if __name__ == "__main__":
    sys.exit(main())
