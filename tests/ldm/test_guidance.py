"""Classifier-free guidance: its formula, its equality with the eps form, and its evaluations."""

import pytest
import torch

from ldm.diffusion.paths import RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, to_x0
from ldm.guidance import classifier_free, drop_captions

X, T = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)


def cond(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + t


def uncond(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x - t


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_formula(scale):
    expected = (1 - scale) * uncond(X, T) + scale * cond(X, T)
    assert torch.allclose(classifier_free(cond, uncond, scale)(X, T), expected, atol=1e-5)


def test_scale_one_is_the_conditional_function_and_evaluates_nothing_else():
    def forbidden(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("evaluated")

    assert torch.equal(classifier_free(cond, forbidden, 1.0)(X, T), cond(X, T))


def test_each_function_is_evaluated_once_on_the_same_inputs():
    seen = []

    def record(function):
        def call(x, t):
            seen.append((function, x, t))
            return function(x, t)

        return call

    classifier_free(record(cond), record(uncond), 3.0)(X, T)
    assert {function for function, *_ in seen} == {cond, uncond} and len(seen) == 2
    assert all(x is X and t is T for _, x, t in seen)


@pytest.mark.parametrize(
    ("prediction", "path"),
    [
        ("eps", ScaledLinearBetaPath()),
        ("v", ScaledLinearBetaPath()),
        ("v", RectifiedFlowPath()),
        ("velocity", RectifiedFlowPath()),
        ("velocity", ScaledLinearBetaPath()),
    ],
)
def test_same_as_guiding_the_networks_own_output(prediction: Prediction, path):
    def network(function):
        return lambda x, t: to_x0(prediction, function(x, t), x, path, t)

    in_x0 = classifier_free(network(cond), network(uncond), 5.0)(X, T)
    in_output = network(lambda x, t: uncond(x, t) + 5.0 * (cond(x, t) - uncond(x, t)))(X, T)
    assert torch.allclose(in_x0, in_output, atol=1e-4)


def test_answers_of_the_two_functions_are_left_alone():
    answers = {"cond": cond(X, T), "uncond": uncond(X, T)}
    guided = classifier_free(lambda x, t: answers["cond"], lambda x, t: answers["uncond"], 4.0)
    guided(X, T)
    assert torch.equal(answers["cond"], cond(X, T)) and torch.equal(answers["uncond"], uncond(X, T))


def test_captions_are_dropped_each_by_its_own_number():
    captions, uniforms = ["a", "b", "c", "d"], torch.tensor([0.05, 0.1, 0.0, 0.999])
    assert drop_captions(captions, uniforms, 0.1) == ["", "b", "", "d"]
    assert drop_captions(captions, uniforms, 0.0) == captions
    assert drop_captions(captions, uniforms, 1.0) == [""] * 4
