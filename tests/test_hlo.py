import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tests.test_cost import compiled, grid, layer, shape, stack, w, x
from xlir import cost, hlo


def tpu_devices(monkeypatch) -> list[jax.Device]:
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def collectives(text):
    return {kind: (each.count, each.bytes) for kind, each in hlo.collectives(text).items()}


# --- Network ---

ROWS = 8 * 64 * 4  # bytes of one device's block


def in_blocks(body):
    """`body` on each device's [8, 64] block, in groups of 4 along "fsdp"."""
    options = {"in_specs": P("data", "fsdp"), "out_specs": P("data", "fsdp"), "check_vma": False}
    function = jax.shard_map(body, mesh=grid(jax.devices()), **options)
    return collectives(compiled(function, shape(16, 256)).as_text())


@pytest.mark.parametrize(
    ("kind", "body", "received"),
    [
        ("all-reduce", lambda x: lax.psum(x, "fsdp"), 2 * ROWS * 3 / 4),
        ("all-reduce", lambda x: lax.psum(x, ("data", "fsdp")), 2 * ROWS * 7 / 8),
        ("all-reduce", lambda x: lax.psum(x, "data"), 2 * ROWS / 2),
        ("all-gather", lambda x: lax.all_gather(x, "fsdp", axis=1, tiled=True), 3 * ROWS),
        (
            "reduce-scatter",
            lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True),
            ROWS * 3 / 4,
        ),
        ("all-to-all", lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True), ROWS * 3 / 4),
        (
            "collective-permute",
            lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            ROWS,
        ),
    ],
)
def test_collectives_by_kind(kind, body, received):
    assert in_blocks(body) == {kind: (1, received)}


def test_collectives_in_loops_and_branches():
    def mean(x):
        return lax.pmean(x, "fsdp")

    def body(x):
        def step(x, _):
            x = lax.fori_loop(0, 3, lambda i, x: jnp.sin(mean(x)), x)
            return lax.cond(x[0, 0] > 0, lambda x: mean(jnp.cos(mean(x))), mean, x), None

        return lax.scan(step, x, length=5)[0]

    received = 5 * (3 + 2) * 2 * ROWS * 3 / 4
    assert in_blocks(body) == {"all-reduce": (25, received)}


def test_no_collectives():
    assert collectives(compiled(jnp.matmul, x, w).as_text()) == {}


def module(text: str, devices: int = 8) -> str:
    return f"HloModule test, num_partitions={devices}\n\n" + textwrap.dedent(text).lstrip()


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", 2),
    ],
)
@pytest.mark.parametrize(
    ("array", "bytes_each"),
    [("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2), ("f32[8,128]{1,0}", 4), ("pred[8,128]", 1)],
)
def test_replica_groups_and_types(groups, size, array, bytes_each):
    text = module(f"""
        ENTRY %main (p: {array}) -> {array} {{
          %p = {array} parameter(0)
          ROOT %r = {array} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
        }}
        """)
    received = 2 * 8 * 128 * bytes_each * (size - 1) / size
    assert collectives(text) == {"all-reduce": (1, pytest.approx(received))}


# As libtpu 0.0.42 prints it for v5e, shortened: an all-gather interleaved with a matrix product; an
# all-reduce fused with the slicing of its result; a loop without a trip count.
TPU = module("""
    %start (p0: bf16[256,1024]) -> (bf16[256,1024], bf16[1024,1024], u32[]) {
      %p0 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
      %all-gather.24 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
      ROOT %custom-call.2 = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.24), custom_call_target="AsyncCollectiveStart"
    }

    %async_collective_fusion (p0: bf16[256,1024], p1: bf16[1024,1024], p2: u32[], p3: bf16[1024,1024]) -> (bf16[1024,1024], bf16[256,1024], bf16[1024,1024], u32[]) {
      %p3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(3)
      %convolution.35 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%p3, %p3), dim_labels=bf_io->bf
      %p0 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
      %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
      %all-gather.26 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
      %p2 = u32[]{:S(2)} parameter(2)
      ROOT %tuple.60 = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%convolution.35, %p0, %all-gather.26, %p2)
    }

    %done (p0: bf16[256,1024], p1: bf16[1024,1024], p2: u32[]) -> bf16[1024,1024] {
      %p0 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
      %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
      %all-gather.28 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
      %p2 = u32[]{:S(2)} parameter(2)
      ROOT %custom-call.4 = bf16[1024,1024]{1,0:T(8,128)(2,1)} custom-call(%p0, %p1, %all-gather.28, %p2), custom_call_target="AsyncCollectiveDone"
    }

    %all-reduce-scatter.1 (input: bf16[1024,1024]) -> bf16[256,1024] {
      %input = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
      %all-reduce.13 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      %partition-id.9 = u32[] partition-id()
      %constant.277 = u32[] constant(0)
      ROOT %dynamic-slice.59 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.13, %partition-id.9, %constant.277), dynamic_slice_sizes={256,1024}
    }

    %slice (p0: bf16[12,1024,1024], p1: s32[]) -> bf16[1024,1024] {
      %p0 = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
      %p1 = s32[]{:T(128)S(6)} parameter(1)
      %constant.1 = s32[]{:T(128)} constant(0)
      %dynamic-slice.62 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %constant.1, %constant.1), dynamic_slice_sizes={1,1024,1024}
      ROOT %bitcast.59 = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.62)
    }

    %body (carry: (s32[], bf16[256,1024], bf16[12,1024,1024])) -> (s32[], bf16[256,1024], bf16[12,1024,1024]) {
      %constant.2 = s32[]{:T(128)} constant(2)
      %carry = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
      %gte.0 = s32[]{:T(128)} get-tuple-element(%carry), index=0
      %gte.1 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
      %gte.2 = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
      %copy.6 = s32[]{:T(128)S(6)} copy(%gte.0)
      %add.130 = s32[]{:T(128)S(6)} add(%copy.6, %constant.2)
      %weight = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%gte.2, %copy.6), kind=kLoop, calls=%slice
      %async-collective-start = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, /*index=2*/u32[]{:S(2)}) fusion(%gte.1), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
      %gte.3 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
      %gte.4 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
      %gte.5 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2
      %fusion.112 = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%gte.3, %gte.4, %gte.5, %weight), kind=kOutput, calls=%async_collective_fusion
      %gte.6 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.112), index=1
      %gte.7 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.112), index=2
      %gte.8 = u32[]{:S(2)} get-tuple-element(%fusion.112), index=3
      %async-collective-done = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%gte.6, %gte.7, %gte.8), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
      %scattered = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.1
      ROOT %tuple.1 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) tuple(%add.130, %scattered, %gte.2)
    }

    %condition (carry.1: (s32[], bf16[256,1024], bf16[12,1024,1024])) -> pred[] {
      %constant.112 = s32[]{:T(128)} constant(12)
      %carry.1 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
      %gte.9 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
      ROOT %lt.10 = pred[]{:T(512)} compare(%gte.9, %constant.112), direction=LT
    }

    ENTRY %main (x: bf16[256,1024], w: bf16[12,1024,1024]) -> bf16[256,1024] {
      %constant.3 = s32[]{:T(128)S(6)} constant(3)
      %x = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
      %w = bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
      %copy.26 = s32[]{:T(128)S(6)} copy(%constant.3)
      %copy-start = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
      %copy-done = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
      %tuple.61 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) tuple(%copy.26, %copy-done, %w)
      %while.30 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[12,1024,1024]{2,1,0:T(8,128)(2,1)}) while(%tuple.61), condition=%condition, body=%body
      %result = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.30), index=1
      ROOT %copy.27 = bf16[256,1024]{1,0:T(8,128)(2,1)} copy(%result)
    }
    """)  # noqa: E501

TRIPS = 5  # 3, 5, 7, 9, 11
FULL, BLOCK = 2 * 1024 * 1024, 2 * 256 * 1024  # bytes


def test_collectives_in_a_tpu_executable():
    assert collectives(TPU) == {
        "all-gather": (TRIPS, TRIPS * FULL * 3 / 4),
        "reduce-scatter": (TRIPS, TRIPS * FULL * 3 / 4),
    }


def test_hbm_bytes_in_a_tpu_executable():
    # Each trip slices a layer's weight (read, write) and uses it; the gathered input is written and
    # read again. VMEM holds the rest; the first block is read from HBM, the last is written to it.
    in_loop = (2 * FULL + FULL) + (FULL + FULL)
    assert hlo.hbm_bytes(TPU) == pytest.approx(TRIPS * in_loop + 2 * BLOCK, rel=1e-4)


def test_asynchronous_pairs_count_once():
    text = module("""
        %wrapped (p: f32[4,8]) -> f32[4,8] {
          %p = f32[4,8]{1,0} parameter(0)
          ROOT %all-to-all.1 = f32[4,8]{1,0} all-to-all(%p), replica_groups={{0,1,2,3}}, dimensions={0}
        }

        ENTRY %main (x: f32[4,8]) -> f32[16,8] {
          %x = f32[4,8]{1,0} parameter(0)
          %async-start = ((f32[4,8]{1,0}), f32[4,8]{1,0}, s32[]) async-start(%x), calls=%wrapped
          %async-done = f32[4,8]{1,0} async-done(%async-start)
          %permute-start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%async-done), channel_id=1, source_target_pairs={{0,1},{1,2}}
          %permute-done = f32[4,8]{1,0} collective-permute-done(%permute-start)
          %gather-start = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%permute-done), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
          ROOT %gather-done = f32[16,8]{1,0} all-gather-done(%gather-start)
        }
        """)  # noqa: E501
    block = 4 * 8 * 4
    assert collectives(text) == {
        "all-gather": (1, 3 * block),
        "all-to-all": (1, block * 3 / 4),
        "collective-permute": (1, block),
    }
    assert hlo.hbm_bytes(text) == 2 * block + 2 * block + 5 * block


# --- Memory ---

big, wide = shape(512, 256), shape(256, 1024)


def block(weights, x):
    """The sum of squares of what a block of 4 heads and a feed-forward layer make of bfloat16."""
    batch, length, _ = x.shape
    query, key, value = jnp.split((x @ weights[0]).reshape(batch, length, 4, -1), 3, axis=-1)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(x.dtype), value)
    x = x + attended.reshape(x.shape)
    x = x + jax.nn.gelu(x @ weights[1]) @ weights[2]
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


LOOP_FREE = {
    "product": (jnp.matmul, (big, wide)),
    "activation": (lambda x, w: jax.nn.softmax(jax.nn.gelu(x @ w)), (big, wide)),
    "gradient": (jax.value_and_grad(lambda w, x: jnp.tanh(x @ w).mean()), (wide, big)),
    "transpose": (lambda x: jnp.sin(x) + x.T.sum(), (big,)),
    # A length of 100 and heads of 64 do not fill a TPU's tiles of 8 x 128.
    "attention": (
        jax.value_and_grad(block),
        (
            [shape(*sizes, dtype=jnp.bfloat16) for sizes in ((256, 768), (256, 1024), (1024, 256))],
            shape(64, 100, 256, dtype=jnp.bfloat16),
        ),
    ),
}


@pytest.mark.parametrize("name", LOOP_FREE)
def test_traffic_and_arithmetic_agree_with_xla_without_loops(name):
    """XLA counts the bytes of scalars too, and the operations of sums and activations."""
    function, arguments = LOOP_FREE[name]
    traced = jax.jit(function).trace(*arguments)
    executable = traced.lower().compile()
    expected = executable.cost_analysis()
    bytes_moved = hlo.hbm_bytes(executable.as_text())
    assert bytes_moved == pytest.approx(expected["bytes accessed"], rel=0.1)
    if name != "transpose":
        assert cost.flops(traced.jaxpr) == pytest.approx(expected["flops"], rel=0.1)


@pytest.mark.parametrize("name", ["gradient", "attention"])
def test_traffic_and_arithmetic_agree_with_xla_for_a_tpu(name, monkeypatch):
    """XLA counts data in VMEM too, and the bytes of a copy to VMEM four times instead of twice."""
    device = tpu_devices(monkeypatch)[0]
    function, arguments = jax.tree.map(
        lambda x: (
            shape(*x.shape, dtype=x.dtype, sharding=SingleDeviceSharding(device))
            if hasattr(x, "shape")
            else x
        ),
        LOOP_FREE[name],
    )
    traced = jax.jit(function).trace(*arguments)
    executable = traced.lower().compile()
    expected, text = executable.cost_analysis(), executable.as_text()
    everywhere = text.replace("S(1)", "")
    copied = sum(x.bytes for x in hlo.traffic(everywhere) if x.name.startswith("copy-start"))
    counted = hlo.hbm_bytes(everywhere) + copied
    assert counted == pytest.approx(expected["bytes accessed"], rel=0.1)
    assert cost.flops(traced.jaxpr) == pytest.approx(expected["flops"], rel=0.1)
    assert hlo.hbm_bytes(text) < counted


def test_arrays_are_padded_to_tiles():
    text = module("""
        ENTRY %main (p: bf16[4,197,64]) -> f32[197] {
          %p = bf16[4,197,64]{1,2,0:T(8,128)(2,1)} parameter(0)
          ROOT %r = f32[197]{0:T(256)} fusion(%p), kind=kLoop, calls=%sum
        }

        %sum (q: bf16[4,197,64]) -> f32[197] {
          %q = bf16[4,197,64]{1,2,0:T(8,128)(2,1)} parameter(0)
          ROOT %s = f32[197]{0:T(256)} reduce(%q), dimensions={0,2}
        }
        """)
    (fusion,) = hlo.traffic(text)
    # bf16[4,256,64] is read and f32[256] is written.
    assert fusion == hlo.Traffic(132_096.0, 1, "r", "f32[197]", "")


def test_hbm_bytes_of_a_scan_are_those_of_its_trips():
    """All weights are read, one layer per trip; XLA's own analysis counts only one trip."""
    executable = compiled(stack(layer), shape(10, 256, 256), big)
    activations, weight = 4 * 512 * 256, 4 * 256 * 256
    # A trip reads weight and input and writes the product; tanh reads and writes it.
    expected = 10 * (weight + 4 * activations)
    bytes_moved = hlo.hbm_bytes(executable.as_text())
    assert bytes_moved == pytest.approx(expected, rel=0.3)
    assert executable.cost_analysis()["bytes accessed"] < bytes_moved / 5
    assert executable.cost_analysis()["flops"] < 2 * 2 * 512 * 256 * 256


def test_slices_count_by_the_slice():
    rows = compiled(lambda table, i: table[i], shape(50_000, 256), shape(64, dtype=jnp.int32))
    assert hlo.hbm_bytes(rows.as_text()) < 3 * 64 * 256 * 4
    update = jax.jit(lambda a, b: lax.dynamic_update_slice(a, b, (3, 0)), donate_argnums=0)
    text = update.lower(shape(50_000, 256), shape(64, 256)).compile().as_text()
    assert hlo.hbm_bytes(text) < 3 * 64 * 256 * 4


# --- The TPU's compiler, if it is installed ---


def test_compiled_for_a_tpu(monkeypatch):
    """Layers that gather their weights one by one on v5e:2x4, compared with manual counts."""
    mesh = grid(tpu_devices(monkeypatch))
    depth, batch, dim = 6, 4096, 1024
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, None, "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))

    @jax.checkpoint
    def gathered(x, w):
        x = lax.with_sharding_constraint(x, rows)
        return jnp.tanh(x @ lax.with_sharding_constraint(w, whole)), None

    step = jax.jit(jax.value_and_grad(stack(gathered)), out_shardings=(whole, split))
    dtype = jnp.bfloat16
    traced = step.trace(
        shape(depth, dim, dim, dtype=dtype, sharding=split),
        shape(batch, dim, dtype=dtype, sharding=rows),
    )
    executable = traced.lower().compile()
    text = executable.as_text()
    weight = dim * dim * 2

    product = 2 * batch * dim * dim
    assert cost.flops(traced.jaxpr) == depth * 4 * product
    # Loops count once: one product forward, three backward.
    assert executable.cost_analysis()["flops"] < 1.2 * 4 * product / 8

    found = hlo.collectives(text)
    # Forward and backward pass each gather every layer's weight.
    assert found["all-gather"].count == 2 * depth
    assert found["all-gather"].bytes == 2 * depth * weight * 3 / 4
    # Gradients are summed over 8 chips by all-reduce or reduce-scatter, and so is the loss.
    summed = (
        found["all-reduce"].bytes + 2 * found.get("reduce-scatter", hlo.Collective(0, 0.0)).bytes
    )
    assert depth * weight / 4 < summed < 1.01 * depth * 2 * weight * 7 / 8

    arguments, results = depth * weight / 4 + batch * dim * 2 / 8, depth * weight / 4
    assert arguments + results <= hlo.hbm_bytes(text) < 60 * depth * weight
