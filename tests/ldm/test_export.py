"""What an export may replace, and what it carries."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.stable_diffusion import stable_diffusion, states
from safetensors.torch import load_file, save_file

from ldm import DrawRequest, TextToImage
from ldm.cli import run_command
from ldm.config import dump, load_config
from ldm.export import arguments, main
from ldm.interop.compvis.names import ema_name
from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.denoiser import layout_of
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.identify import DENOISER
from ldm.interop.model_card import model_card
from ldm.training.denoiser_config import TrainConfig
from ldm.training.optim.averages import Snapshot
from ldm.training.optim.snapshot_files import write_snapshot
from text.conversion import flattened


def export_command(*words: str) -> int:
    return run_command(main, arguments(), words)


def test_an_export_draws_the_same_in_half_the_size(dit_folder, tmp_path):
    assert export_command(str(dit_folder), str(tmp_path / "half"), "--fp16") == 0
    files = [folder / "transformer/diffusion_pytorch_model.safetensors" for folder in (dit_folder, tmp_path / "half")]
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    request = DrawRequest(prompt="x", steps=3, scale=3.0, sampler="euler", seed=1)
    pipes = [TextToImage.load(folder, device="cpu", dtype="fp32") for folder in (dit_folder, tmp_path / "half")]
    assert pipes[0].native_size == pipes[1].native_size == 16
    torch.testing.assert_close(*(pipe.pixels(request) for pipe in pipes), atol=0.02, rtol=0)


def test_an_older_export_is_replaced_and_nothing_else_ever(dit_folder, unet_folder, tmp_path, capsys):
    target = shutil.copytree(unet_folder, tmp_path / "model")
    assert export_command(str(dit_folder), str(target)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (target / "unet").exists()
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("rain")
    assert export_command(str(dit_folder), str(diary)) == 2
    assert (diary / "monday.txt").read_text() == "rain"
    assert "diary exists and is not an export of this program" in capsys.readouterr().err


def test_the_notes_of_a_runs_model_are_carried_along(dit_folder, tmp_path):
    shutil.copytree(dit_folder, tmp_path / "run" / "model")
    assert export_command(str(tmp_path / "run"), str(tmp_path / "out")) == 0
    notes, _, listed = (tmp_path / "out" / "foundry.yaml").read_text().partition("export:\n")
    assert notes == "run: {name: tiny}\n" and "  model_index.json\n" in listed


@pytest.mark.parametrize("words", [["nowhere", "out"], ["only-one"]])
def test_a_mistake_is_one_line(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = export_command(*words)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_single_file_and_a_folder_again(tmp_path, capsys):
    write_folder(stable_diffusion(2, prediction="v"), tmp_path / "a", dtype=torch.float32)
    assert export_command(str(tmp_path / "a"), str(tmp_path / "m.safetensors"), "--format", "single-file") == 0
    assert export_command(str(tmp_path / "m.safetensors"), str(tmp_path / "b")) == 0
    assert "predicts v on path scaled_linear_beta, fp32, " in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.suffix != ".yaml")
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@pytest.mark.parametrize("word", ["yes", "no"])
def test_which_of_two_kinds_of_weights_are_exported(word, tmp_path):
    tensors = {name: t.contiguous() for name, t in single_file_tensors(stable_diffusion(1)).items()}
    for name in [name for name in tensors if name.startswith(DENOISER)]:
        tensors[ema_name(name.removeprefix(DENOISER))] = tensors[name] + 1
    save_file(tensors, tmp_path / "m.safetensors")
    assert export_command(str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--ema", word) == 0
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = tensors[f"{DENOISER}input_blocks.0.0.weight"] + (word == "yes")
    assert torch.equal(weights["conv_in.weight"], expected)


@pytest.mark.parametrize("dtype", [["--dtype", "bf16"], ["--fp16"], []])
def test_precisions_on_disk(dit_folder, dtype, tmp_path):
    assert export_command(str(dit_folder), str(tmp_path / "out"), *dtype) == 0
    kinds = {tensor.dtype for path in tmp_path.rglob("*.safetensors") for tensor in load_file(path).values()}
    assert kinds == {{"bf16": torch.bfloat16, "--fp16": torch.float16}.get("".join(dtype[-1:]), torch.float32)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ema", "maybe"], "--ema is 'maybe', expected yes, no, or an average's relative length"),
        (["--ema", "0.1"], "has no snapshots (ema/*.safetensors): train with optim.ema_lengths=[0.05,0.1], or give"),
        (["--step", "3"], "--step is 3, but --ema is yes: give --ema an average's length, as 0.13"),
        (["--step", "3", "--ema", "no"], "--step is 3, but --ema is no: give --ema an average's length"),
        (["--format", "single-file"], "does not end in .safetensors"),
        (["--fp16", "--dtype", "bf16"], "--fp16 and --dtype bf16 ask for two precisions"),
        (["--format", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_what_cannot_be_exported_so(dit_folder, words, told, tmp_path, capsys):
    try:
        code = export_command(str(dit_folder), str(tmp_path / "out"), *words)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_from_python_it_is_saved_in_either_format(dit_folder, tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float32)
    pipe = TextToImage.load(tmp_path / "a")
    pipe.save(tmp_path / "folder")
    assert (
        "# folder\n\nA text-to-image model: a U-Net of widths 32-64" in (tmp_path / "folder" / "README.md").read_text()
    )
    pipe.save(tmp_path / "file.safetensors", format="single-file", dtype="fp16")
    request = DrawRequest(prompt="x", steps=2, scale=3.0, sampler="ddim", seed=1)
    first = pipe.pixels(request)
    assert torch.equal(TextToImage.load(tmp_path / "folder").pixels(request), first)
    assert (TextToImage.load(tmp_path / "file.safetensors").pixels(request) - first).abs().max() < 0.05
    with pytest.raises(ValueError, match="a DiT has no single-file layout"):
        TextToImage.load(dit_folder).save(tmp_path / "dit.safetensors", format="single-file")
    with pytest.raises(ValueError, match="format is 'onnx', expected diffusers or single-file"):
        pipe.save(tmp_path / "x", format="onnx")
    with pytest.raises(ValueError, match=r"dtype is 'int8', expected fp32 \(float32, .*\), bf16 .*, fp16 "):
        pipe.save(tmp_path / "x", dtype="int8")


def stored_tensors(folder: Path, kind: str, pipe: TextToImage) -> dict[str, torch.Tensor]:
    """All tensors of what was written, under the names of the networks that hold them."""
    if kind == "single-file":
        found, names = load_file(folder), single_file_tensors(pipe.parts)
        return {name: found[name] for name in names}
    denoiser = layout_of(pipe.parts.config).folder
    files = {f"{denoiser}/diffusion_pytorch_model": "denoiser", "vae/diffusion_pytorch_model": "vae"}
    return {
        f"{part}.{name}": tensor
        for file, part in (files | {"text_encoder/model": "text"}).items()
        for name, tensor in flattened(load_file(folder / f"{file}.safetensors")).items()
    }


@pytest.mark.parametrize("kind", ["unet", "transformer", "single-file"])
def test_what_was_loaded_in_bf16_is_saved_in_bf16_and_claims_no_more(kind, tmp_path):
    write_folder(stable_diffusion(1, transformer=kind == "transformer"), tmp_path / "a", dtype=torch.float32)
    pipe = TextToImage.load(tmp_path / "a", dtype="bf16", device="cpu")
    target = tmp_path / ("b.safetensors" if kind == "single-file" else "b")
    words = {"format": "single-file"} if kind == "single-file" else {}
    for dtype in ("fp32", "fp16"):
        with pytest.raises(
            ValueError, match=f"loaded in bf16.*{dtype}.*load it with dtype='fp32'.*ldm.export"
        ) as error:
            pipe.save(target, dtype=dtype, **words)
        assert len(str(error.value).splitlines()) == 1 and not target.exists()
    pipe.save(target, **words)
    held = single_file_tensors(pipe.parts) if kind == "single-file" else states(pipe.parts)
    stored = stored_tensors(target, kind, pipe)
    assert stored.keys() == held.keys()
    assert all(stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], held[name]) for name in held)
    assert "bf16" in TextToImage.load(target, dtype="fp32", device="cpu").description
    if kind != "single-file":
        assert "Its weights were rounded to bf16." in (target / "README.md").read_text()


def test_the_card_names_a_precision_to_which_an_export_was_rounded(dit_folder, tmp_path):
    assert export_command(str(dit_folder), str(tmp_path / "half"), "--fp16") == 0
    assert "Its weights were rounded to fp16." in (tmp_path / "half" / "README.md").read_text()
    assert export_command(str(dit_folder), str(tmp_path / "full")) == 0
    assert "rounded" not in (tmp_path / "full" / "README.md").read_text()


def test_a_lora_is_rounded_once(tmp_path):
    """In bfloat16 too, the weight is that of float32, rounded: many small changes are not lost one by one."""
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float32)
    name, generator = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    for i in range(8):
        down, up = 0.02 * torch.randn(2, 64, 1, generator=generator)
        factors = {f"unet.{name}.lora_A.weight": down.T.contiguous(), f"unet.{name}.lora_B.weight": up.clone()}
        save_file(factors, tmp_path / f"{i}.safetensors")
    loras = [(tmp_path / f"{i}.safetensors", 0.7) for i in range(8)]
    exact, rounded = (
        TextToImage.load(tmp_path / "a", lora=loras, dtype=dtype).denoiser.get_parameter(f"{name}.weight")
        for dtype in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.bfloat16 and torch.equal(exact.bfloat16(), rounded)


def test_saved_after_a_lora_it_draws_as_with_it(tmp_path):
    """What was merged is in what is saved."""
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float32)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    down, up = factors[0].T.contiguous(), factors[1].clone()
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    pipe = TextToImage.load(tmp_path / "a", lora=[(tmp_path / "lora.safetensors", 0.5)])
    assert "LoRA lora.safetensors of strength 0.5" in pipe.description
    pipe.save(tmp_path / "b")
    weights = [TextToImage.load(tmp_path / f).denoiser.get_parameter(f"{name}.weight") for f in "ab"]
    assert torch.allclose(weights[1] - weights[0], 0.5 * factors[1] @ factors[0].T, atol=1e-6)


RECORDS: list[dict] = [
    {"note": "no step"},
    {"step": 0, "held_out_loss": 1.9},
    {"step": 50, "loss": 1.2, "lr": 0.001},
    {"step": 100, "held_out_loss": 0.71234},
]


@pytest.fixture
def run(dit_folder, tmp_path) -> Path:
    """A run's folder: its model with the configuration of configs/demo.yaml, its measures and drawings."""
    shutil.copytree(dit_folder, tmp_path / "run" / "model")
    config = load_config(TrainConfig, Path(__file__).parents[2] / "configs" / "demo.yaml")
    (tmp_path / "run" / "model" / "foundry.yaml").write_text(dump(config))
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + '{"half": }')
    (tmp_path / "run" / "samples").mkdir()
    for step in (0, 100):
        (tmp_path / "run" / "samples" / f"step_{step:07d}.png").write_bytes(b"png of step %d" % step)
    return tmp_path / "run"


@pytest.mark.parametrize("given", ["run", "run/model"])
def test_the_card_is_made_of_the_runs_own_configuration_measures_and_drawings(run, given, tmp_path):
    assert export_command(str(tmp_path / given), str(tmp_path / "my-model")) == 0
    card = (tmp_path / "my-model" / "README.md").read_text()
    config = load_config(TrainConfig, Path(__file__).parents[2] / "configs" / "demo.yaml")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "text-to-image" in front["tags"] and card.split("---\n")[2].startswith("\n# my-model\n")
    assert "a DiT of 2 blocks" in card and "predicts velocity on path rectified_flow" in card
    assert config.preview is not None and all(prompt in card for prompt in config.preview.prompts)
    assert f"100 of {config.data.batch_size} pictures: {100 * config.data.batch_size:,} pictures seen" in card
    assert "was 0.7123 at step 100, 1.9000 at step 0" in card
    assert "TODO" not in card and "None" not in card and "$" not in card
    assert (tmp_path / "my-model" / "assets" / "samples.png").read_bytes() == b"png of step 100"
    assert "![Drawings of the model](assets/samples.png)" in card


def test_a_run_without_validation_and_preview_has_a_card(run, tmp_path):
    config = load_config(TrainConfig, Path(__file__).parents[2] / "configs" / "demo.yaml")
    (run / "model" / "foundry.yaml").write_text(dump(replace(config, validation=None, preview=None)))
    assert export_command(str(run), str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"100 of {config.data.batch_size} pictures" in card and "None" not in card and "not cherry-picked" not in card
    )


def test_what_the_card_says_of_diffusers_is_true(run, tmp_path):
    """Its own code, run as it stands."""
    assert export_command(str(run), str(tmp_path / "my-model")) == 0
    code = (tmp_path / "my-model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code.replace("num_inference_steps=30", "num_inference_steps=2"), scope)
    assert scope["image"].size == (16, 16)


def test_the_card_of_an_export_is_carried_along_and_others_are_made_without_a_run(run, dit_folder, tmp_path):
    assert export_command(str(run), str(tmp_path / "first")) == 0
    assert export_command(str(tmp_path / "first"), str(tmp_path / "second"), "--fp16") == 0
    for name in ("README.md", "assets/samples.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert export_command(str(dit_folder), str(tmp_path / "third")) == 0
    card = (tmp_path / "third" / "README.md").read_text()
    assert "## Training" not in card and "samples.png" not in card and "# third" in card


def test_the_card_of_a_model_for_inpainting_asks_for_a_mask():
    card = model_card(stable_diffusion(1, inpainting=True), name="x")
    assert (
        "image=image, mask_image=mask)" in card
        and "n=4, image=image, mask=mask)" in card
        and "--mask mask.png`" in card
    )
    assert "mask" not in model_card(stable_diffusion(1), name="x")


def test_an_average_that_was_never_kept_is_exported_by_its_length(dit_folder, tmp_path):
    """Of two snapshots of step 100, with lengths 0.05 and 0.1, the first itself comes back for its own length."""
    shutil.copytree(dit_folder, tmp_path / "run" / "model")
    weights = load_file(dit_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for number, length in enumerate((0.05, 0.1)):
        shifted = {name: tensor + number + 1 for name, tensor in weights.items()}
        write_snapshot(shifted, tmp_path / "run", Snapshot(100, length))
    assert export_command(str(tmp_path / "run"), str(tmp_path / "out"), "--ema", "0.05") == 0
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(found[name], weights[name] + 1, atol=1e-5) for name in weights)


def test_the_card_of_such_an_average_does_not_tell_of_the_runs_own(run, tmp_path):
    weights = load_file(run / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    for length in (0.05, 0.1):
        write_snapshot(weights, run, Snapshot(100, length))
    assert export_command(str(run), str(tmp_path / "out"), "--ema", "0.07") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| averaged weights | of relative length 0.07 |" in card
    assert "held-out" not in card and "samples.png" not in card and not (tmp_path / "out" / "assets").exists()
