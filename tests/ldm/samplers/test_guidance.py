"""Classifier-free guidance: its formula, its equality with the eps form, and its evaluations."""

import pytest
import torch

from ldm.diffusion.paths import RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, to_x0
from ldm.samplers.guidance import (
    autoguidance,
    classifier_free,
    composed,
    projected,
    rescaled,
    scheduled,
    within_interval,
)

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


def never(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise AssertionError("evaluated")


def test_a_scale_that_depends_on_the_time():
    guided = classifier_free(cond, uncond, lambda t: 1.0 if t < 0.5 else 4.0)
    assert torch.equal(guided(X, T), classifier_free(cond, uncond, 4.0)(X, T))
    late = classifier_free(cond, never, lambda t: 1.0 if t < 0.5 else 4.0)
    assert torch.equal(late(X, torch.tensor(0.3)), cond(X, torch.tensor(0.3)))


def test_outside_its_interval_guidance_costs_nothing():
    guided = within_interval(classifier_free(cond, uncond, 5.0), cond, 0.4, 0.8)
    assert torch.equal(guided(X, T), classifier_free(cond, uncond, 5.0)(X, T))
    for outside in (0.3, 0.9):
        t = torch.tensor(outside)
        assert torch.equal(within_interval(never, cond, 0.4, 0.8)(X, t), cond(X, t))
    for start, stop in ((0.8, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match=f"guidance interval is {start} to {stop}"):
            within_interval(cond, cond, start, stop)


def test_rescaling_brings_the_deviation_back():
    guided, plain = classifier_free(cond, uncond, 6.0)(X, T), cond(X, T)
    wanted = plain.flatten(1).std(1)
    whole = rescaled(cond, uncond, 6.0, 1.0)(X, T)
    assert torch.allclose(whole.flatten(1).std(1), wanted, rtol=1e-5)
    assert torch.allclose(rescaled(cond, uncond, 6.0, 0.0)(X, T), guided, rtol=1e-6)
    assert torch.allclose(rescaled(cond, uncond, 6.0, 0.7)(X, T), 0.7 * whole + 0.3 * guided, atol=1e-5)
    assert torch.equal(rescaled(cond, never, 1.0, 0.7)(X, T), plain)
    with pytest.raises(ValueError, match="fraction of rescaling is 1.5"):
        rescaled(cond, uncond, 6.0, 1.5)


def test_projection_leaves_only_what_is_across():
    change = projected(cond, uncond, 3.0)(X, T) - cond(X, T)
    along = torch.cosine_similarity(change.flatten(1), cond(X, T).flatten(1))
    assert along.abs().max() < 1e-5 and change.abs().max() > 0.1
    whole = projected(cond, uncond, 3.0, parallel=1.0)(X, T)
    assert torch.allclose(whole, classifier_free(cond, uncond, 3.0)(X, T), atol=1e-5)


def test_the_projected_change_is_no_longer_than_its_limit():
    limited = projected(cond, uncond, 2.0, parallel=1.0, norm_limit=0.5)(X, T) - cond(X, T)
    assert torch.allclose(limited.flatten(1).norm(dim=1), torch.full((3,), 0.5), rtol=1e-5)
    free = projected(cond, uncond, 2.0, parallel=1.0, norm_limit=1e6)(X, T)
    assert torch.allclose(free, classifier_free(cond, uncond, 2.0)(X, T), atol=1e-5)


def test_momentum_adds_to_the_change_of_the_steps_before():
    guided = projected(cond, uncond, 2.0, parallel=1.0, momentum=-0.5)
    change = cond(X, T) - uncond(X, T)
    assert torch.allclose(guided(X, T), cond(X, T) + change, atol=1e-5)
    assert torch.allclose(guided(X, T), cond(X, T) + 0.5 * change, atol=1e-5)


def test_autoguidance_goes_away_from_the_weaker_one():
    assert torch.allclose(autoguidance(cond, uncond, 2.0)(X, T), 2 * cond(X, T) - uncond(X, T), atol=1e-5)


def test_a_scale_over_time():
    """Both rise from no guidance at the noise, and have the scale itself in the mean."""
    assert scheduled("constant", 4.0) == 4.0
    times = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    linear, cosine = scheduled("linear", 4.0), scheduled("cosine", 4.0)
    assert callable(linear) and callable(cosine)
    for scale in (linear, cosine):
        assert [scale(torch.tensor(t)) for t in (1.0, 0.5, 0.0)] == pytest.approx([1.0, 4.0, 7.0])
        assert sum(scale(t) for t in times) / 2000 == pytest.approx(4.0)
    assert linear(torch.tensor(0.25)) == pytest.approx(5.5)
    assert cosine(torch.tensor(0.25)) == pytest.approx(1 + 3 * (1 + 0.5**0.5))
    expected = 5.5 * cond(X, T) - 4.5 * uncond(X, T)
    quarter = torch.tensor(0.25)
    found = classifier_free(lambda x, t: cond(x, T), lambda x, t: uncond(x, T), linear)(X, quarter)
    assert torch.allclose(found, expected, atol=1e-5)


def test_composed_prompts_add_their_differences():
    values = {"cat": torch.tensor([2.0]), "dog": torch.tensor([-1.0]), "": torch.tensor([0.5])}
    cat, dog, nothing = (lambda x, t, value=value: value * x for value in values.values())
    found = composed([cat, dog], [0.5, 2.0], nothing)(torch.tensor([3.0]), torch.tensor(0.5))
    assert torch.equal(found, torch.tensor([3 * (0.5 + 0.5 * 1.5 + 2.0 * -1.5)]))
