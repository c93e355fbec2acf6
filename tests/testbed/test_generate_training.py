"""Training the generator: every step is decided by the seed, a cut run resumes as if it had not been cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vecattention.testbed import ModelError
from vecattention.testbed.generate import Sizes, load, losses, make, muon, network, scenes, stage, train
from vecattention.testbed.generate.run import Run, Settings
from vecattention.testbed.generate.stage import Budget, Stage

TINY = Sizes(size=16, frames=9, base=4, width=32, heads=2, layers=1, wide=32, text=16)


def _settings(out: Path, **more: object) -> Settings:
    out.mkdir(parents=True, exist_ok=True)
    plain = Settings(
        out, Budget(steps=4), Budget(steps=4), sizes=TINY, clips=2, batch=2, films=4, every=1e9
    )  # fmt: skip
    return replace(plain, **more)


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "state.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert Run(_settings(out)).train()
    return out


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_a_run_that_was_cut_and_resumed_ends_in_the_same_weights(whole: Path, tmp_path: Path, cut: int) -> None:
    assert not Run(_settings(tmp_path, pause=cut)).train()
    run = Run(_settings(tmp_path))
    run.restore()
    assert sum(stage.steps for stage in run.stages) == cut
    assert run.train()
    assert _same(_weights(whole), _weights(tmp_path))
    made = [load_file(out / "generator" / part) for out in (whole, tmp_path) for part in PARTS]
    assert all(_same(one, other) for one, other in zip(made[:3], made[3:], strict=True))
    assert _config(whole) == _config(tmp_path)


PARTS = ("vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors",
         "text_encoder/model.safetensors")  # fmt: skip


def _config(out: Path) -> dict[str, object]:
    return json.loads((out / "generator" / "vae" / "config.json").read_text())


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(whole: Path) -> None:
    before, config = _weights(whole), _config(whole)
    run = Run(_settings(whole))
    run.restore()
    assert run.train()
    assert _same(before, _weights(whole)) and _config(whole) == config
    assert len(set(config["latents_std"])) > 1  # the scale of the latents came along


def test_another_seed_ends_elsewhere(whole: Path, tmp_path: Path) -> None:
    Run(_settings(tmp_path, seed=1)).train()
    assert not _same(_weights(whole), _weights(tmp_path))


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--resume finds no .*state.safetensors"):
        Run(_settings(tmp_path)).restore()


def test_a_run_of_other_sizes_is_not_resumed(whole: Path) -> None:
    run = Run(_settings(whole, sizes=replace(TINY, layers=2)))
    with pytest.raises(ValueError, match="--resume finds a run of .*'layers': 1.* wanted .*'layers': 2"):
        run.restore()


@pytest.mark.parametrize("budget", [{}, {"seconds": 3.0, "steps": 4}])
def test_a_stage_ends_by_the_clock_or_by_steps(budget: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted one of the two"):
        Budget(**budget)


def test_a_stage_by_the_clock(tmp_path: Path) -> None:
    run = Run(_settings(tmp_path, autoencoder=Budget(seconds=0.01), denoiser=Budget(seconds=0.01)))
    assert run.train()
    assert [stage.steps for stage in run.stages] == [10, 10] and all(stage.seconds > 0.01 for stage in run.stages)


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    parts = network.build(replace(TINY, size=16), 0)
    learning = Stage(dict(parts.vae.named_parameters()), 5e-3, Budget(steps=60), 1)
    films = scenes.paint(scenes.draw(2, torch.Generator().manual_seed(0)), 9, 16)

    def fidelity() -> float:
        with torch.no_grad():
            made = parts.vae.decode(parts.vae.encode(films).latent_dist.mode()).sample
        return float((made - films).pow(2).mean())

    before = fidelity()
    for _ in range(60):
        learning.step(lambda g: losses.autoencoder_loss(parts, TINY, 4, g))
    assert fidelity() < 0.6 * before


def test_the_average_of_the_weights_is_what_is_kept(whole: Path) -> None:
    state = _weights(whole)
    made = load_file(whole / "generator" / PARTS[1])
    for name, x in made.items():
        assert torch.equal(x, state[f"denoiser.average.{name}"].half())
    assert any(not torch.equal(x, state[f"denoiser.weight.{name}"].half()) for name, x in made.items())


def test_captions_reach_the_transformer_as_the_pipeline_sends_them(whole: Path) -> None:
    pipe = load(whole / "generator")
    parts = network.Parts(pipe.vae, pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    captions = ["a red circle moves left over stripes", ""]
    with torch.no_grad():
        mine = losses.prompt_embeds(parts, losses.tokens(parts, captions))
        theirs, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=network.PROMPT)
    assert (mine - theirs).abs().max() < 1e-6 and (mine[:, 10:] == 0).all() and (mine[0, :8] != 0).all()


def test_encoded_films_are_normal_and_decode_to_the_films(whole: Path) -> None:
    parts = network.build(TINY, 0)
    films = losses.encode(parts, TINY, 12, 4, 0, torch.device("cpu"))
    assert films.latents.shape == (12, 16, 5, 2, 2) and films.ids.shape == (12, network.PROMPT)
    flat = films.latents.float().transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 0.02 and (flat.std(1) - 1).abs().max() < 0.02
    mean, spread = (torch.tensor(parts.vae.config[name]) for name in ("latents_mean", "latents_std"))
    shown = scenes.paint(scenes.draw(4, torch.Generator().manual_seed(0)), TINY.frames, TINY.size)
    with torch.no_grad():
        latent = parts.vae.encode(shown).latent_dist.mode()
    shape = (1, -1, 1, 1, 1)
    assert (films.latents[:4].float() * spread.view(shape) + mean.view(shape) - latent).abs().max() < 0.01


def test_the_pipeline_makes_films_that_depend_on_prompt_and_seed_alone(whole: Path) -> None:
    pipe = load(whole / "generator")
    prompts = ["a red circle moves left over stripes", "a blue star moves up over dots"]
    both = make(pipe, prompts, TINY, seed=1, steps=2)
    assert both.shape == (2, 9, 16, 16, 3) and both.dtype == torch.uint8
    alone = make(pipe, prompts[1:], TINY, seed=1, steps=2)
    assert (alone[0].int() - both[1].int()).abs().max() <= 1
    assert not torch.equal(make(pipe, prompts[1:], TINY, seed=2, steps=2), alone)


def test_what_is_no_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wanted the directory of a Wan pipeline"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="wanted a Wan pipeline that loads"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 3, 1, 2, 2)])
def test_a_step_of_muon_is_an_orthogonal_matrix_of_the_asked_size(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = 100 * torch.randn(shape)
    muon.Muon([p], 0.5).step()
    way = -p.detach().reshape(len(p), -1) / (0.5 * muon.SCALE * max(len(p), p[0].numel()) ** 0.5)
    values = torch.linalg.svdvals(way)
    assert values.min() > 0.5 and values.max() < 1.3
    assert (way * p.grad.reshape(way.shape)).sum() > 0, "down the gradient"


def test_matrices_go_to_muon_and_tables_and_vectors_to_adam() -> None:
    parts = network.build(TINY, 0)
    named = dict(parts.transformer.named_parameters())
    named |= {f"text.{name}": p for name, p in parts.text_encoder.named_parameters()}
    learning = Stage(named, 1e-3, Budget(steps=1), 0)
    by_muon, by_adam = ({id(p) for g in o.param_groups for p in g["params"]} for o in learning.optimisers)
    assert len(by_muon) + len(by_adam) == len(named) and not by_muon & by_adam
    for name in ("text.shared.weight", "scale_shift_table", "blocks.0.attn1.to_q.bias", "blocks.0.attn1.norm_q.weight"):
        assert id(named[name]) in by_adam
    for name in ("patch_embedding.weight", "blocks.0.attn1.to_q.weight", "blocks.0.ffn.net.2.weight"):
        assert id(named[name]) in by_muon


def test_rates_rise_and_fall() -> None:
    rates = [stage.rate_at(i / 100, 1.0) for i in range(101)]
    assert rates.index(max(rates)) == 3 and rates[-1] == pytest.approx(0.02)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_the_command_writes_pipeline_log_picture_and_record(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--autoencoder-steps", "2", "--steps", "2", "--device", "cpu", "--clips", "2",
                 "--batch", "2", "--films", "2", "--test", "2", "--size", "16", "--frames", "9", "--base", "4",
                 "--width", "32", "--heads", "2", "--layers", "1", "--wide", "32"]  # fmt: skip
    train.main([*arguments, "--pause", "3"])
    assert not (tmp_path / "training.json").exists()
    train.main([*arguments, "--resume"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == [2, 2] and set(record["generated"]) == {"films", "colour", "shape", "direction", "all"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("autoencoder", 1), ("autoencoder", 2), ("denoiser", 1), ("denoiser", 2)
    ]  # fmt: skip
    assert (tmp_path / "samples.png").stat().st_size > 500
    assert {path.name for path in tmp_path.iterdir()} == {
        "generator", "log.jsonl", "samples.png", "state.safetensors", "training.json"
    }  # fmt: skip
