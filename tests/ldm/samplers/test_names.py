"""Names of samplers and time grids as A1111, ComfyUI and InvokeAI write them."""

import warnings

import pytest

from ldm.samplers import SAMPLERS, TIME_GRIDS, sampler_and_grid, sampler_named
from ldm.samplers.names import spellings, squeezed

# modules/sd_samplers_kdiffusion.py and modules/sd_samplers_timesteps.py of A1111 v1.9.4: name, alias, own schedule.
A1111 = [
    ("DPM++ 2M", "k_dpmpp_2m", "karras"), ("DPM++ SDE", "k_dpmpp_sde", "karras"),
    ("DPM++ 2M SDE", "k_dpmpp_2m_sde", "exponential"), ("DPM++ 2M SDE Heun", "k_dpmpp_2m_sde_heun", "exponential"),
    ("DPM++ 2S a", "k_dpmpp_2s_a", "karras"), ("DPM++ 3M SDE", "k_dpmpp_3m_sde", "exponential"),
    ("Euler a", "k_euler_ancestral", "normal"), ("Euler a", "k_euler_a", "normal"), ("Euler", "k_euler", "normal"),
    ("LMS", "k_lms", "normal"), ("Heun", "k_heun", "normal"), ("DPM2", "k_dpm_2", "karras"),
    ("DPM2 a", "k_dpm_2_a", "karras"), ("DPM fast", "k_dpm_fast", "exponential"),
    ("DPM adaptive", "k_dpm_ad", "exponential"), ("Restart", "restart", "karras"), ("DDIM", "ddim", "ddim_uniform"),
    ("PLMS", "plms", "ddim_uniform"), ("UniPC", "unipc", "sgm_uniform"), ("LCM", "k_lcm", "normal"),
]  # fmt: skip
COMFYUI = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS", "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "ddim": "DDIM", "lcm": "LCM",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "dpmpp_3m_sde": "DPM++ 3M SDE", "uni_pc": "UniPC", "ddpm": "DDPM",
    "uni_pc_bh2": "UniPC bh2",
}  # fmt: skip


def label(name: str) -> str:
    return SAMPLERS[sampler_named(name)].label


@pytest.mark.parametrize(("name", "alias", "automatic"), A1111)
def test_a1111s_names(name, alias, automatic):
    for written in (name, name.upper(), alias, f" {name.lower()} "):
        assert label(written) == name
    assert sampler_and_grid(name, "Automatic") == (sampler_named(name), automatic)
    assert sampler_and_grid(f"{name} Automatic") == (sampler_named(name), automatic)


@pytest.mark.parametrize(("name", "expected"), COMFYUI.items())
def test_comfyuis_names(name, expected):
    assert label(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpm++ 2m karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Karras", ("dpmpp_2m_sde", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Heun Karras", ("dpmpp_2m_sde_heun", "karras")),
        ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM++ SDE Exponential", ("dpmpp_sde", "exponential")),
        ("Euler a Karras", ("euler_ancestral", "karras")),
        ("LMS Karras", ("lms", "karras")),
        ("DPM2 a Karras", ("dpm2_ancestral", "karras")),
        ("Euler SGM Uniform", ("euler", "sgm_uniform")),
        ("Euler SGMUniform", ("euler", "sgm_uniform")),
        ("DPM++ 2M Align Your Steps", ("dpmpp_2m", "align_your_steps")),
        ("Euler Uniform", ("euler", "normal")),
        ("Euler DDIM", ("euler", "ddim_uniform")),
        ("DDIM", ("ddim", None)),
        ("UniPC 2", ("unipc_2", None)),
        ("k_dpm_2_a_ka", ("dpm2_ancestral", "karras")),
        ("k_dpmpp_2m_sde_exp", ("dpmpp_2m_sde", "exponential")),
        ("dpmpp_sde_k", ("dpmpp_sde", "karras")),
        ("Restart Karras", ("restart", "karras")),
        ("DPM fast", ("dpm_fast", "exponential")),
    ],
)
def test_a_sampler_and_its_grid_in_one_name(name, expected):
    assert sampler_and_grid(name) == expected == sampler_and_grid(*expected)
    assert expected[1] is None or sampler_and_grid(name, expected[1].upper()) == expected


def test_every_sampler_with_every_grid():
    for key, sampler in SAMPLERS.items():
        for grid in TIME_GRIDS if sampler.own_grid is None else (sampler.own_grid,):
            for name in (f"{key}_{grid}", f"{sampler.label} {grid.replace('_', ' ').title()}"):
                assert sampler_and_grid(name) == (key, grid)


def test_no_two_samplers_have_a_spelling_in_common():
    names = [(key, sampler.label, *sampler.other_names) for key, sampler in SAMPLERS.items()]
    assert len(spellings({key: others for key, *others in names})) == len(
        {(squeezed(name), key) for key, *others in names for name in (key, *others)}
    )


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("DPM++ 2M Karras", "exponential", "sampler 'DPM.. 2M Karras' names the time grid karras, but the time grid is "
         "exponential: leave out one"),
        ("Euler Karras", "1,0.5,0", "names the time grid karras, but the time grid is 1,0.5,0: leave out one"),
        ("DPM++ 2M Karas", None, "no sampler 'DPM.. 2M Karas', did you mean dpmpp_2m"),
        ("Karras", None, "no sampler 'Karras'"),
        ("euler", "turbo", "no time grid 'turbo': There are trailing, .*kl_optimal"),
    ],
)  # fmt: skip
def test_what_is_contrary_or_unknown_is_refused(name, grid, message):
    with pytest.raises(ValueError, match=message):
        sampler_and_grid(name, grid)


@pytest.mark.parametrize(
    ("name", "grid", "own"),
    [
        ("DPM fast", "karras", "exponential"), ("dpm_adaptive", "1,0.5,0", "exponential"),
        ("Restart", "SGM Uniform", "karras"), ("DPM fast Karras", None, "exponential"),
    ],
)  # fmt: skip
def test_a_grid_that_is_not_followed_is_one_warning(name, grid, own):
    with pytest.warns(UserWarning, match="chooses its own times: the time grid .* is ignored") as seen:
        found = sampler_and_grid(name, grid)
    assert found == (sampler_named(name), own) and len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler_and_grid(*found) == found
        assert sampler_and_grid(name.removesuffix(" Karras"), "log_snr" if own == "exponential" else own) == found
