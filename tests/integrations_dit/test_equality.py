"""Dense mode is the stock pipeline bit for bit; sparse mode is exact attention over the selected keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from integrations_dit.tiny_generators import MAKERS, hunyuan_transformer, wan_transformer

import vecattention
from vecattention.integrations.dit.processors import joint_projections, projections

NEAR = 2e-5  # of latents with standard deviation 1; measured 2e-6


@pytest.mark.parametrize("everything", [{"dense_steps": 1.0}, {"dense_steps": 0, "dense_layers": 1.0}])
def test_with_everything_dense_the_pipeline_is_the_stock_one_bit_for_bit(case, everything) -> None:
    pipe, generate, stock = case
    with vecattention.apply(pipe, threshold=0.9, **everything) as run:
        made = generate(pipe)
    assert torch.equal(made, stock)
    assert run.stats.sparse_calls == 0 and run.stats.dense_calls > 0 and run.stats.mean_density == 1.0


@pytest.mark.parametrize("rule", [{}, {"q_pooling_size": 16}, {"q_pooling_size": 32, "q_block_size": 64}])
def test_with_a_threshold_near_zero_the_pipeline_is_the_stock_one_within_tolerance(case, rule) -> None:
    pipe, generate, stock = case
    with vecattention.apply(pipe, threshold=1e-30, dense_steps=0, **rule) as run:
        made = generate(pipe)
    assert (made - stock).abs().max() < NEAR
    assert run.stats.dense_calls == 0 and run.stats.mean_density == 1.0


def test_sparse_mode_leaves_keys_out_and_repeats_itself(case) -> None:
    pipe, generate, stock = case
    made = []
    for chunk in (None, 64):
        with vecattention.apply(pipe, threshold=0.9, dense_steps=1, q_pooling_size=16, chunk_size=chunk) as run:
            made.append(generate(pipe))
        assert run.stats.sparse_density.nan_to_num(1.0).max() < 0.9
    assert torch.equal(*made)
    assert not torch.equal(made[0], stock)


@pytest.mark.parametrize(("target", "least", "most"), [({"density": 0.3}, 0.25, 0.35), ({"coverage": 0.5}, 0.05, 0.6)])
def test_a_density_or_a_coverage_instead_of_a_threshold(case, target, least, most) -> None:
    pipe, generate, _ = case
    with vecattention.apply(pipe, dense_steps=0, q_pooling_size=16, **target) as run:
        generate(pipe)
    assert least < run.stats.sparse_density.mean() < most
    per_head = {name: torch.tensor([value, 1.0]) for name, value in target.items()}
    with vecattention.apply(pipe, dense_steps=0, q_pooling_size=16, **per_head) as run:
        generate(pipe)
    assert (run.stats.sparse_density[:, 1] > 0.98).all() and (run.stats.sparse_density[:, 0] < 0.9).all()


def test_what_pipelines_do_when_nothing_is_asked_for(case) -> None:
    """A coverage of 0.9 for each head, the maximum of the row, lists for 128 rows; a window where one is asked for."""
    from vecattention.integrations.dit.settings import dit_settings_of

    pipe, generate, stock = case
    with vecattention.apply(pipe, dense_steps=0) as run:
        bare = generate(pipe)
    with vecattention.apply(
        pipe, dense_steps=0, coverage=torch.full((2,), 0.9), q_block_size=128, q_pooling_size=32, max_scope="row"
    ) as same:
        assert torch.equal(generate(pipe), bare)
    assert torch.equal(same.stats.density, run.stats.density)
    assert not torch.equal(bare, stock) and run.stats.density.max() < 1
    base = dit_settings_of(layers=1, heads=2).base.rule
    assert (base["q_pooling_size"], base["q_block_size"], base["max_scope"]) == (32, 128, "row")
    assert dit_settings_of(layers=1, heads=2, q_block_size=16).base.rule["q_pooling_size"] == 16
    window = dit_settings_of(layers=1, heads=2, group_k_block=8192, q_block_size=64).base.rule
    assert (window["max_scope"], window["group_k_block"], window["q_block_size"]) == ("window", 8192, 64)


def test_backends_agree(case) -> None:
    pipe, generate, _ = case
    made = []
    for backend in ("cpu", "reference"):
        with vecattention.apply(pipe, threshold=0.5, dense_steps=0, q_pooling_size=16, backend=backend) as run:
            made.append(generate(pipe, steps=2))
    assert (made[0] - made[1]).abs().max() < NEAR, run


def test_a_wan_layer_is_masked_attention_over_the_selection() -> None:
    model = wan_transformer(layers=1)
    attn, hidden = model.blocks[0].attn1, torch.randn(2, 150, 32)
    rotary = [torch.randn(1, 150, 1, 16).repeat_interleave(2, -1)[..., :16] for _ in range(2)]
    with torch.no_grad(), vecattention.apply(model, threshold=0.7, dense_steps=0, q_pooling_size=16) as run:
        with model.cache_context("cond"):
            got = attn(hidden, rotary_emb=rotary)
        q, k, v = (x.transpose(1, 2) for x in projections(attn, hidden))
        q, k = (_turned(x, *rotary) for x in (q, k))
        rule = {"q_pooling_size": 16, "q_block_size": 128, "max_scope": "row"}  # what pipelines take
        chosen = vecattention.select(q, k, threshold=0.7, causal=False, **rule)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=chosen.mask())
        wanted = attn.to_out[0](out.transpose(1, 2).flatten(2))
    assert (got - wanted).abs().max() < 1e-5
    assert torch.equal(run.stats.layers[0].kept, chosen.kept_pairs().sum(0))
    assert run.stats.layers[0].sparse_pairs == 2 * 150 * 150
    assert torch.allclose(run.stats.density[0], chosen.density().mean(0))


@pytest.mark.parametrize("single", [False, True])
def test_a_hunyuan_layer_is_sparse_for_video_rows_and_dense_for_text_rows(single: bool) -> None:
    model = hunyuan_transformer()
    block = model.single_transformer_blocks[0] if single else model.transformer_blocks[0]
    attn, video, text, lengths = block.attn, torch.randn(2, 130, 32), torch.randn(2, 9, 32), (4, 7)
    rotary = (torch.randn(130, 16), torch.randn(130, 16))
    mask = torch.arange(139) < torch.tensor(lengths)[:, None, None, None] + 130
    with torch.no_grad(), vecattention.apply(model, threshold=0.7, dense_steps=0, q_pooling_size=16) as run:
        with model.cache_context("cond"):
            attn.processor.orders.lengths = lengths
            got = attn(video, encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=rotary)
        stock = attn.processor.stock(attn, video, text, mask, rotary)
        q, k, v = (x.transpose(1, 2) for x in joint_projections(attn, video, text, rotary))
        allowed = mask.expand(2, 2, 139, 139).clone()
        for b, n in enumerate(lengths):
            chosen = vecattention.select(
                q[b : b + 1, :, :130], k[b : b + 1, :, : 130 + n], threshold=0.7, causal=False, q_pooling_size=16,
                q_block_size=128, max_scope="row",
            )  # fmt: skip
            allowed[b, :, :130] = F.pad(chosen.mask()[0], (0, 9 - n))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
        wanted = (
            [out[:, :130], out[:, 130:]] if single else [attn.to_out[0](out[:, :130]), attn.to_add_out(out[:, 130:])]
        )
    for mine, masked in zip(got, wanted, strict=True):
        assert (mine - masked).abs().max() < 1e-5
    assert (got[1] - stock[1]).abs().max() < 1e-5  # text rows, padding too, are the stock ones
    layer = run.stats.layers[1 if single else 0]
    assert layer.sparse_pairs == 130 * 134 + 130 * 137 and layer.dense_pairs == 4 * 134 + 7 * 137
    assert torch.equal(layer.kept, allowed[:, :, :130].sum((0, 2, 3)))


def test_fused_projections_change_nothing() -> None:
    model = wan_transformer()
    arguments = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 16))
    with torch.no_grad(), vecattention.apply(model, threshold=0.8, dense_steps=0, q_pooling_size=16):
        apart = model(*arguments).sample
        model.fuse_qkv_projections()
        fused = model(*arguments).sample
    assert (apart - fused).abs().max() < 1e-5


def test_half_precision() -> None:
    model = wan_transformer().to(torch.bfloat16)
    arguments = (torch.randn(1, 4, 3, 16, 16).bfloat16(), torch.tensor([500.0]), torch.randn(1, 8, 16).bfloat16())
    with torch.no_grad():
        stock = model(*arguments).sample
        with vecattention.apply(model, threshold=1e-30, dense_steps=0):
            sparse = model(*arguments).sample
    assert sparse.dtype == torch.bfloat16
    assert (sparse - stock).abs().max() <= 2**-5 * stock.abs().max()


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_hunyuan_image_to_video_transformers(kind: str) -> None:
    model = hunyuan_transformer(image_condition_type=kind)
    mask = torch.tensor([[1.0] * 5 + [0.0] * 3])
    arguments = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16), "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8), "guidance": torch.tensor([6000.0]),
    }  # fmt: skip
    with torch.no_grad():
        stock = model(**arguments).sample
        with vecattention.apply(model, threshold=1e-30, dense_steps=0) as run:
            sparse = model(**arguments).sample
        with vecattention.apply(model, threshold=0.9, dense_steps=1.0):
            dense = model(*arguments.values()).sample
    assert torch.equal(dense, stock)
    assert (sparse - stock).abs().max() < 1e-5 and run.stats.sparse_calls == 3


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation written with complex numbers: [B, H, S, D]."""
    turn = torch.complex(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_target_is_looked_for_on_some_lists_of_a_long_sequence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that reach the pass over the scores, when it is to look at three lists or a few more."""
    from vecattention import targets
    from vecattention.integrations.dit import processors

    make, generate = MAKERS[kind]
    rows, plain = [], targets.histogram
    monkeypatch.setitem(processors.SAMPLE, "coverage", 3)
    monkeypatch.setattr(targets, "histogram", lambda query, *more: rows.append(query.shape[2]) or plain(query, *more))
    pipe = make()
    with vecattention.apply(pipe, dense_steps=1, q_block_size=16) as run:
        generate(pipe, steps=2)
    assert (
        set(rows) == {3 * 16} and run.stats.sparse_calls
    )  # 192 tokens are 12 lists, of which every fourth is looked at
