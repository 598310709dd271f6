"""The generator as MLflow serves it: models-from-code, weights in safetensors, nothing pickled.

    model = mlflow.pyfunc.load_model("models:/cips@champion")
    model.predict(None, params={"seed": 1, "n": 4})                    uint8 (4, size, size, 3)
    model.predict(None, params={"seed": 1, "n": 4, "size": 1024})      the same pictures on a denser grid
    model.predict([7, 3], params={"seed": 1, "truncation": 0.7})       pictures number 7 and 3 of seed 1

    mlflow models serve -m models:/cips@champion --env-manager local --port 5001
    curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \\
         -d '{"inputs": [7, 3], "params": {"seed": 1, "truncation": 0.7}}'

Over HTTP `"inputs": []` asks for pictures 0 .. n - 1, and the answer is {"predictions": nested lists}.
Picture i of a seed is the same whatever else is asked for; noise is fixed.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator
from pipeline.models.sampling import sample_images

WEIGHTS, CONFIG = "generator.safetensors", "model.json"
IN_FLIGHT = 1 << 16
"""Pixels computed at once; bounds memory, changes no picture."""
MAX_PIXELS = 1 << 26
"""Most pixels of one answer: 1,024 pictures of 256 x 256."""

SIGNATURE = ModelSignature(
    # No input schema: with one, MLflow would refuse `predict(None, params=...)`.
    outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
    params=ParamSchema(
        [
            ParamSpec("seed", DataType.long, 0),
            ParamSpec("n", DataType.long, 16),
            ParamSpec("truncation", DataType.double, 1.0),
            ParamSpec("size", DataType.long, 0),
        ]
    ),
)


def load_generator_files(weights: str | Path, config: str | Path) -> Generator:
    """A generator in eval mode from a safetensors file and a `ModelConfig` as JSON."""
    settings = ModelConfig.model_validate(json.loads(Path(config).read_text(encoding="utf-8")))
    pixels = min(settings.max_pixels_in_flight or IN_FLIGHT, IN_FLIGHT)
    generator = build_generator(settings.model_copy(update={"max_pixels_in_flight": pixels}))
    generator.load_state_dict(safetensors.torch.load_file(weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return generator.eval().requires_grad_(False).to(device)


def draw(generator: Generator, numbers: Sequence[int], seed: int, truncation: float, size: int) -> np.ndarray:
    """Pictures of a seed by their numbers, uint8 (N, size, size, 3); size 0 is native.

    One at a time: in a batch, the last bits of a picture would depend on its neighbours.
    """
    size = size or generator.size
    images = np.empty((len(numbers), size, size, 3), dtype=np.uint8)
    for place, number in enumerate(numbers):
        image_1HWC = sample_images(generator, [number], seed=seed, truncation=truncation, size=size, noise="fixed")
        images[place] = image_1HWC[0].cpu().numpy()
    return images


def check(numbers: Sequence[int], seed: int, truncation: float, size: int, native: int) -> None:
    """Raises MlflowException (HTTP 400) for what cannot be drawn."""
    problems = []
    if not numbers:
        problems.append("no picture is asked for: give n >= 1, or numbers of pictures as input")
    if not 0 <= seed < 2**32:
        problems.append(f"seed must be in [0, 2^32), got {seed}")
    if not 0.0 <= truncation <= 2.0:
        problems.append(f"truncation must be in [0, 2], got {truncation}")
    if size < 0 or size == 1:
        problems.append(f"size must be 0 (native, {native}) or at least 2, got {size}")
    if not problems and len(numbers) * (size or native) ** 2 > MAX_PIXELS:
        problems.append(
            f"{len(numbers)} pictures of {size or native} x {size or native} are more than {MAX_PIXELS:,} "
            "pixels; ask for fewer at once"
        )
    if not problems and not 0 <= min(numbers) <= max(numbers) < 2**32:
        problems.append("numbers of pictures must be in [0, 2^32)")
    if problems:
        raise MlflowException.invalid_parameter_value("; ".join(problems))


# MLflow would guess a signature from the type of `model_input`. This model has one, so that argument has no
# type, about which MLflow warns in a way that only recording silences.
with warnings.catch_warnings(record=True):

    class ServedGenerator(PythonModel):
        """Draws pictures; see the top of this file."""

        def load_context(self, context: Any) -> None:
            """Reads the weights; called once, when MLflow loads the model."""
            self.generator = load_generator_files(context.artifacts["weights"], context.artifacts["config"])

        def predict(  # type: ignore[no-untyped-def]
            self, context: Any, model_input, params: dict[str, Any] | None = None
        ) -> np.ndarray:
            """uint8 (N, size, size, 3): pictures 0 .. n - 1, or those whose numbers are the input."""
            given = {"seed": 0, "n": 16, "truncation": 1.0, "size": 0} | (params or {})
            seed, size, truncation = int(given["seed"]), int(given["size"]), float(given["truncation"])
            numbers = _numbers(model_input, int(given["n"]))
            check(numbers, seed, truncation, size, self.generator.size)
            return draw(self.generator, numbers, seed, truncation, size)


def _numbers(model_input: Any, count: int) -> Sequence[int]:
    """The input as numbers of pictures: a list or array of integers, a table's cells; nothing: the first."""
    values = np.asarray([] if model_input is None else model_input).reshape(-1)
    if values.size == 0 or (values.dtype == object and values.tolist() == [None]):  # [] and null in JSON
        return range(max(0, count))
    if values.dtype.kind not in "iu":
        raise MlflowException.invalid_parameter_value(
            f"the input must be whole numbers of pictures such as [0, 1, 2], got {values.dtype} values"
        )
    return [int(value) for value in values]


mlflow.models.set_model(ServedGenerator())
