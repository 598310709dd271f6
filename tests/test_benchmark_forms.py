from collections.abc import Callable

import pytest
import torch

from pipeline.benchmark.forms import Form, Shape, training_memory, work
from pipeline.benchmark.reference import reference_generator
from pipeline.benchmark.shared import shared_generator
from pipeline.coordinates import full_grid
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator

CONFIG = ModelConfig(size=16, width=24, widths=[24, 20, 16], latent=32, mapping_layers=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [reference_generator, shared_generator])
@pytest.mark.parametrize("points", [256, 50])
def test_the_other_forms_are_the_same_function(build: Callable[[ModelConfig], Generator], points: int) -> None:
    torch.manual_seed(0)
    fast, reference = build_generator(CONFIG).double(), build(CONFIG).double()
    for name, parameter in fast.named_parameters():
        if name.endswith(("noise_strength", "bias")):
            torch.nn.init.normal_(parameter)  # they begin at zero
    reference.load_state_dict(fast.state_dict())
    inputs = torch.randn(2, 32).double(), full_grid(16)[:points], torch.tensor([[1, 2], [3, 4]])
    results, gradients = [], []
    for generator in (fast, reference):
        results.append(generator(*inputs))
        results[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in generator.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-7)


def test_operations_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(16, 64, 2, layer=False)
    reference = reference_generator(ModelConfig(size=16, width=64, latent=32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.synthesis(torch.randn(2, 32), full_grid(16), torch.zeros(2, 2, dtype=torch.int64))
    assert 0.95 < shape.forward_flops / counter.get_total_flops() <= 1.0  # torch's count has the styles in it


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(
    "form",
    [Form("fast", "bf16", "segment"), Form("fast", "fp32", "none"), Form("shared", "bf16"), Form("reference", "fp32")],
)
def test_each_form_computes_forward_and_backward(layer: bool, form: Form) -> None:
    call = work(Shape(8, 16, 2, layer), form, CPU)
    call(False)
    call(True)


def test_memory_is_that_of_the_activations() -> None:
    few = training_memory(Shape(32, 128, 2, False), Form("fast", "fp32"), CPU)
    many = training_memory(Shape(32, 128, 16, False), Form("fast", "fp32"), CPU)
    one_layer = 14 * 32 * 32 * 128 * 4
    assert 9 * one_layer < many - few < 20 * one_layer  # nine layers, each kept once, and what is on its way
