import sys
import types

import pytest
import torch
from torch import Tensor

from ldm.denoisers import Condition, DiTConfig, UNetConfig
from ldm.denoisers import attention as attention_module
from ldm.denoisers.attention import Attention, attention, choose_attention, describe_attention

LENGTH, KEYS = 6, 5
KERNELS = {"explicit": attention_module._explicit_attention, "chosen (SDPA)": attention}
MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])[:, None, None]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bhld,bhmd->bhlm", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() if mask is None else scores.exp() * mask
    return torch.einsum("bhlm,bhmd->bhld", weights / weights.sum(-1, keepdim=True), v)


def make_qkv(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, LENGTH, 8), (2, 3, KEYS, 8), (2, 3, KEYS, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(function, qkv: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    qkv = [tensor.clone().requires_grad_() for tensor in qkv]
    out = function(*qkv, mask)
    return [out.detach(), *torch.autograd.grad((out * torch.arange(8, dtype=out.dtype)).sum(), qkv)]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "masked"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_kernels_equal_the_formula_and_its_gradients(kernel, mask):
    qkv = make_qkv(torch.float64)
    ours, true = with_gradients(kernel, qkv, mask), with_gradients(reference, qkv, mask)
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "masked"])
def test_bfloat16_training_is_close_to_the_formula(mask):
    qkv = make_qkv(torch.bfloat16)
    true = with_gradients(reference, [tensor.double() for tensor in qkv], mask)
    for ours, expected in zip(with_gradients(attention, qkv, mask), true, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_masked_keys_have_no_influence(kernel):
    q, k, v = make_qkv(torch.float32)
    hidden = ~MASK.transpose(2, 3)
    changed = kernel(q, torch.where(hidden, 100.0, k), torch.where(hidden, -100.0, v), MASK)
    assert torch.equal(kernel(q, k, v, MASK), changed)


@pytest.mark.parametrize(
    ("device", "dtype", "scores", "needs_grad", "expected"),
    [
        ("cpu", torch.bfloat16, 64 * 64, True, True),
        ("cpu", torch.bfloat16, 1024 * 32, True, True),
        ("cpu", torch.bfloat16, 512 * 512, True, False),
        ("cpu", torch.bfloat16, 64 * 64, False, False),
        ("cpu", torch.float32, 64 * 64, True, False),
        ("mps", torch.bfloat16, 64 * 64, True, False),
        ("cuda", torch.bfloat16, 64 * 64, True, False),
    ],
)
def test_where_explicit_products_are_used(device, dtype, scores, needs_grad, expected):
    assert attention_module._explicit_is_faster(device, dtype, scores, needs_grad) == expected


def test_attention_chooses_by_its_tensors(monkeypatch):
    seen = []

    def record(device_type: str, dtype: torch.dtype, scores: int, needs_grad: bool) -> bool:
        seen.append((device_type, dtype, scores, needs_grad))
        return False

    monkeypatch.setattr(attention_module, "_explicit_is_faster", record)
    q, k, v = make_qkv(torch.bfloat16)
    attention(q, k, v)
    attention(q, k, v.requires_grad_())
    with torch.no_grad():
        attention(q, k, v)
    call = ("cpu", torch.bfloat16, LENGTH * KEYS)
    assert seen == [(*call, False), (*call, True), (*call, False)]


@pytest.fixture
def fake_xformers(monkeypatch):
    """Installs memory_efficient_attention(q, k, v) in the place of xformers' own."""

    def install(function) -> None:
        ops = types.ModuleType("xformers.ops")
        ops.memory_efficient_attention = function  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        probe.cache_clear()

    probe = attention_module._xformers
    yield install
    probe.cache_clear()


def working(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What memory_efficient_attention computes, in its order B x L x H x d."""
    return reference(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2)


def test_xformers_is_probed_once_and_its_failure_named(fake_xformers):
    calls = []

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        raise NotImplementedError("No operator found\nfor these inputs")

    fake_xformers(broken)
    for _ in range(2):
        found = attention_module._xformers("cpu", torch.float32)
        assert found == (None, "NotImplementedError: No operator found")
    assert len(calls) == 1


def test_xformers_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    attention_module._xformers.cache_clear()
    kernel, failure = attention_module._xformers("cpu", torch.float32)
    assert kernel is None and "xformers" in failure
    attention_module._xformers.cache_clear()


def test_xformers_that_runs_is_used_except_under_a_mask(fake_xformers):
    strides = []

    def recording(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strides.append(q.is_contiguous())
        return working(q, k, v)

    fake_xformers(recording)
    kernel, _ = attention_module._xformers("cpu", torch.float32)
    assert kernel is recording
    strides.clear()

    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in make_qkv(torch.float64))
    found = attention(q, k, v, xformers=kernel)
    torch.testing.assert_close(found, reference(q, k, v, None), rtol=0, atol=1e-12)
    assert strides == [True]
    found = attention(q, k, v, MASK, xformers=kernel)
    torch.testing.assert_close(found, reference(q, k, v, MASK), rtol=0, atol=1e-12)
    assert strides == [True]


def test_xformers_is_never_touched_on_a_cpu(monkeypatch):
    def forbidden(*_) -> None:
        raise AssertionError("xformers was asked for on a CPU")

    monkeypatch.setattr(attention_module, "_xformers", forbidden)
    q, k, v = make_qkv(torch.float32)
    attention(q, k, v)
    describe_attention("cpu", 64)
    choose_attention(Attention(16, 16, heads=2, qkv_bias=True), torch.device("cpu"), torch.float32)


CONFIGS = {
    "dit": DiTConfig(depth=2, width=32, heads=2, sample_size=8),
    "unet": UNetConfig(
        block_out_channels=(8, 16), attention_levels=(False, True), layers_per_block=1, heads=2, norm_num_groups=4
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_network_is_compiled_in_one_piece_and_probes_nothing_in_forward(kind, fake_xformers, monkeypatch):
    """`fullgraph` raises for any graph break; .item() would be one."""
    used = []

    def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used.append(q.shape)
        return working(q, k, v)

    fake_xformers(counting)
    network = CONFIGS[kind].build(latent_channels=4, context_width=24)
    kernel, _ = attention_module._xformers("cpu", torch.float32)
    monkeypatch.setattr(attention_module, "_xformers", lambda *_: (kernel, ""))
    choose_attention(network, torch.device("cuda"), torch.float32)  # where it would run
    monkeypatch.setattr(attention_module, "_xformers", lambda *_: pytest.fail("probed in forward"))
    used.clear()

    torch.manual_seed(0)
    condition = Condition(torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 24))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), condition
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    expected = network(*inputs).prediction
    assert used
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs).prediction, expected)
    torch.compiler.reset()


def test_description_is_one_line_that_names_kernel_and_reason(monkeypatch):
    assert "explicit" in describe_attention("cpu", 64)
    assert "SDPA" in describe_attention("cpu", 1024)
    assert "SDPA" in describe_attention(torch.device("cpu"), 64, torch.float32)
    monkeypatch.setattr(attention_module, "_xformers", lambda *_: (None, "no module xformers"))
    assert "SDPA (xformers not used: no module xformers)" in describe_attention("cuda:0", 64)
    monkeypatch.setattr(attention_module, "_xformers", lambda *_: (attention, ""))
    lines = [describe_attention(device, length) for device in ("cpu", "cuda") for length in (64, 4096)]
    assert "xformers" in lines[-1]
    assert all("\n" not in line for line in lines)


def test_attention_layer_equals_pytorchs():
    torch.manual_seed(0)
    ours = Attention(16, 16, heads=4, qkv_bias=True)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    projections = (ours.to_q, ours.to_k, ours.to_v)
    theirs.in_proj_weight.data = torch.cat([layer.weight for layer in projections])
    theirs.in_proj_bias.data = torch.cat([layer.bias for layer in projections])
    theirs.out_proj.load_state_dict(ours.to_out[0].state_dict())
    x, context = torch.randn(2, LENGTH, 16), torch.randn(2, KEYS, 16)
    expected = theirs(x, context, context, key_padding_mask=~MASK[:, 0, 0], need_weights=False)[0]
    torch.testing.assert_close(ours(x, context, MASK), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (DiTConfig(depth=1, width=32, heads=2, sample_size=16), 64),
        (DiTConfig(depth=1, width=32, heads=2, sample_size=16, patch_size=4), 16),
        (UNetConfig(block_out_channels=(32, 64), attention_levels=(True, False)), 256),
        (UNetConfig(block_out_channels=(32, 64, 64), attention_levels=(False, True, False)), 64),
        (UNetConfig(block_out_channels=(32, 64, 64), attention_levels=(False, False, False)), 16),
    ],
)
def test_the_longest_sequence_is_that_of_the_finest_level_that_attends(config, length):
    assert config.attention_length(16) == length
