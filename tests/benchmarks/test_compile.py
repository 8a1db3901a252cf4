"""Compiling for devices that are not there, without and with a compiler."""

import csv
import dataclasses
import json

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import benchmarks.compile as command
import models
from benchmarks import hlo, targets
from benchmarks.compile import CompileConfig, Measurement, Subject, make_plan
from benchmarks.targets import CUDA, TPU, find_target
from tests.sweeps import left_to_sweep
from train.errors import UsageError
from train.optim.techniques import TECHNIQUES
from train.parallel import make_mesh

PLATFORMS = ("cuda", "tpu", "rocm")


def subject(**changes):
    settings = {
        "target": "h100",
        "network": "resnet8",
        "technique": "none",
        "batch_size": 8,
        "precision": "bfloat16",
        "shard_params": False,
    }
    return Subject(**settings | changes)


######## Targets ######################################################################


@pytest.mark.parametrize(
    ("name", "compiler", "topology"),
    [
        ("h100", CUDA, "1x1x1"),
        ("h100:1", CUDA, "1x1x1"),
        ("h100:8", CUDA, "1x1x8"),
        ("h100:64", CUDA, "1x8x8"),
        ("v5e:2x2", TPU, "v5e:2x2"),
        ("v5e:16x16", TPU, "v5e:16x16"),
        ("v5p:2x2x1", TPU, "v5p:2x2x1"),
        ("v6e:1x1", TPU, "v6e:1x1"),
    ],
)
def test_targets(name, compiler, topology):
    target = find_target(name)
    assert target.compiler is compiler
    assert target.topology["topology" if compiler is CUDA else "topology_name"] == (
        topology
    )
    assert ("chips_per_host_bounds" in target.topology) is name.endswith(":1x1")
    assert 15e9 < target.memory_bytes < 110e9


@pytest.mark.parametrize(
    "name",
    [
        "h200",
        "h100:",
        "h100:0",
        "h100:9",
        "h100:2x2",
        "v5e",
        "v5e:2x2x1",
        "v5p:2x2",
        "v5e:2x",
        "v5e:02x2",
        "v5e:2xtwo",
        "tpu",
        "V5E:2x2",
    ],
)
def test_an_unknown_target_names_those_there_are(name, run, capsys):
    with pytest.raises(UsageError, match=r"unknown target .* known are, for example, "):
        CompileConfig(target=(name,))
    with pytest.raises(SystemExit):
        run("compile", "--target", name)
    error = capsys.readouterr().err
    assert error.startswith("error: unknown target")
    assert error.count("\n") == 1


@pytest.mark.parametrize("compiler", [CUDA, TPU])
def test_a_missing_compiler_says_what_to_install(compiler, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"`pip install -e . --group {compiler.group}"):
        compiler.load()


######## Counts #######################################################################

TEXT = """
HloModule step

%fused (p: bf16[8,3,3,4]) -> bf16[8,3,3,4] {
  %p = bf16[8,3,3,4]{3,2,1,0} parameter(0)
  %k = bf16[1,1,4,4]{3,2,1,0} constant({...})
  ROOT %c = bf16[8,3,3,4]{3,2,1,0} convolution(%p, %k), window={size=1x1}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8]{0:T(256)} get-tuple-element(%t), index=1
  %permute = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%v)
  %done = f32[8]{0} collective-permute-done(%permute)
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %done)
}

%condition (t.1: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[8], y: bf16[8,3,3,4]) -> f32[64] {
  %x = f32[8]{0:T(256)S(1)} parameter(0)
  %y = bf16[8,3,3,4]{3,2,1,0} parameter(1)
  %w = f32[3,3,4,4]{3,2,1,0} constant({...})
  %conv = (bf16[8,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), custom_call_target="__cudnn$convForward"
  %wide = (f32[8,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%w, %w), custom_call_target="__cudnn$convForward"
  %fusion.1 = bf16[8,3,3,4]{3,2,1,0} fusion(%y), kind=kLoop, calls=%fused
  %reduced = (f32[8]{0}, s32[2]{0}) all-reduce(%x, %n), to_apply=%add
  %n = s32[2]{0} constant({1, 2})
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  %copied = f32[8]{0} copy(%x)
  ROOT %gathered = f32[64]{0} all-gather(%copied), dimensions={0}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("platform", "native", "other"), [("cuda", 2, 1), ("tpu", 3, 0)]
)
def test_instructions_of_a_text_are_counted(platform, native, other):
    counts = hlo.count(TEXT, platform=platform)
    assert counts.fusions == 1
    assert counts.kernels == 4  # two custom calls, the fusion and the copy
    assert (counts.native_convolutions, counts.other_convolutions) == (native, other)
    assert counts.bfloat16_convolutions == native - 1
    assert counts.collectives == {
        "all-reduce": 1,
        "all-gather": 1,
        "reduce-scatter": 0,
        "all-to-all": 0,
        "collective-permute": 1,
    }
    permuted = 4 * 8 + 2 * 4
    assert counts.collective_bytes == (4 * 8 + 4 * 2) + 4 * 64 + permuted


def test_programs_of_this_machine_are_counted():
    mesh = make_mesh(jax.devices()[:4])

    def step(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        total = jax.lax.fori_loop(0, 3, lambda i, t: t + jnp.sin(y).sum(), 0.0)
        return total, jnp.cos(x).sum(axis=0)

    x = jax.ShapeDtypeStruct(
        (8, 6, 6, 3), jnp.float32, sharding=NamedSharding(mesh, P("data"))
    )
    kernel = jax.ShapeDtypeStruct(
        (3, 3, 3, 5), jnp.float32, sharding=NamedSharding(mesh, P())
    )
    everywhere = NamedSharding(mesh, P())
    jitted = jax.jit(step, out_shardings=everywhere)
    text = jitted.lower(x, kernel).compile().as_text()
    counts = hlo.count(text, platform="cuda")
    assert counts.collectives["all-reduce"] in (1, 2)  # XLA may combine them
    assert counts.collective_bytes >= 4 + 4 * 6 * 6 * 3
    assert counts.native_convolutions == 0
    assert counts.other_convolutions == 1
    assert 1 <= counts.fusions <= counts.kernels


def test_a_text_that_is_cut_off_is_no_endless_loop():
    assert hlo._split_type("(f32[8], (s32[]") == ("(f32[8], (s32[]", "")


######## Memory #######################################################################


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5),
        ("Used 512.00M of 15.75G hbm. Exceeded hbm capacity", 0.5),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (29.00G) exceeds available HBM (15.75G).",
            29.0,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_needed_bytes_of_a_message(message, expected):
    found = command.needed_bytes(message)
    assert found == (None if expected is None else int(expected * 2**30))


######## The command ##################################################################


def measurement(found, **changes):
    values = {
        "target": found.target,
        "chips": 1,
        "task": found.task,
        "network": found.network,
        "batch_size": found.batch_size,
        "precision": found.precision,
        "technique": found.technique,
        "shard_params": found.shard_params,
        "compile_seconds": 1.0,
        "needed_bytes": 10**9,
        "memory_bytes": 10**10,
        "convolutions": 20,
        "compiler": "none 0",
    }
    counted = {
        "fusions": 5,
        "kernels": 7,
        "native_convolutions": 20,
        "other_convolutions": 0,
        "collective_bytes": 10**6,
    } | {f"{kind.replace('-', '_')}s": 1 for kind in hlo.COLLECTIVES}
    return Measurement(**values | counted | changes)


def test_what_is_missing_is_compiled_and_misfits_are_named(
    run, monkeypatch, tmp_path, capsys
):
    compiled = []

    def measure(found):
        compiled.append((found.network, found.technique))
        if found.technique == "sam":
            misfit = dict.fromkeys(("fusions", "kernels", "collective_bytes"))
            return measurement(found, needed_bytes=2 * 10**10, **misfit)
        return measurement(found)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(targets.Compiler, "load", lambda self: None)
    folder = tmp_path / "run"
    arguments = ("compile", "--networks", "resnet8", "unet_small")
    arguments += ("--techniques", "none,sam", "--run-dir", folder)
    run(*arguments)
    printed = " ".join(capsys.readouterr().out.split())
    assert compiled == [
        (network, technique)
        for network in ("resnet8", "unet_small")
        for technique in ("none", "sam")
    ]
    assert "resnet8 with sam does not fit h100: it needs 20.0 GB per chip" in printed
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {row["task"] for row in rows} == {"classification", "segmentation"}

    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    assert all(json.loads(line)["commit"] for line in lines)
    (folder / "rows.jsonl").write_text("".join(lines[:3]))
    compiled.clear()
    run(*arguments)
    assert compiled == [("unet_small", "sam")]


def test_networks_are_chosen_by_name_and_task():
    def networks(**settings):
        return list(
            dict.fromkeys(s.network for s in CompileConfig(**settings).subjects)
        )

    assert networks() == ["resnet20", "unet_small", "unet64_small"]
    assert networks(task="segmentation") == ["unet_small"]
    assert networks(networks=("*",), task="translation") == [
        "unet256",
        "unet128",
        "unet64",
        "unet64_small",
    ]
    assert {s.technique for s in CompileConfig().subjects} == {"none", *TECHNIQUES}
    with pytest.raises(
        UsageError, match="no network for segmentation is named resnet8"
    ):
        CompileConfig(networks=("resnet8",), task="segmentation")
    with pytest.raises(UsageError, match="unknown technique 'sma'; did you mean sam"):
        CompileConfig(techniques=("sma",))


def test_a_batch_must_be_shared_by_the_chips():
    with pytest.raises(UsageError, match="batch_size 6 must be a multiple of 4"):
        make_plan(subject(batch_size=6), jax.devices()[:4])


######## Lowering and compiling #######################################################


def exported(found):
    """The whole training step, lowered for accelerators without computing anything."""
    plan = make_plan(found, jax.devices()[:1])
    export = jax.export.export(plan.step, platforms=PLATFORMS)
    return export(plan.abstract_state, plan.abstract_feed)


@pytest.mark.parametrize(
    ("network", "technique"),
    [
        ("resnet8", "perturbed_unit_step"),
        pytest.param("unet_small", "centralize", marks=pytest.mark.slow),
        pytest.param("unet64_small", "barzilai_borwein_step", marks=pytest.mark.slow),
    ],
)
def test_steps_are_lowered_for_accelerators(network, technique):
    found = exported(subject(network=network, technique=technique))
    assert found.platforms == PLATFORMS
    assert "stablehlo.convolution" in found.mlir_module()


# Networks that have more of the blocks of others.
DEEPER = {
    *("resnet34", "resnet34_cifar", "resnet44", "resnet56", "resnet110"),
    *("resnet101", "resnet101_cifar", "resnext101_32x4d", "resnet101_duc_hdc"),
    *("pspnet101", "upanet32", "upanet64", "unet256", "wide_resnet28_10"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        left_to_sweep(name) if name in DEEPER else name
        for name in command._trainable("all")
    ],
)
def test_every_network_is_lowered_for_accelerators(network):
    found = exported(subject(network=network, technique="none"))
    assert found.platforms == PLATFORMS
    convolves = not network.startswith(("vit", "deit"))
    assert convolves <= ("stablehlo.convolution" in found.mlir_module())


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.module"])
def test_a_compiler_that_is_not_there_is_not_installed(module):
    assert not dataclasses.replace(CUDA, module=module).is_installed
    assert dataclasses.replace(CUDA, module="jax.numpy").is_installed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "target"), [(CUDA, "h100"), (TPU, "v5e:1x1")], ids=["cuda", "tpu"]
)
def test_a_step_is_compiled_where_there_is_a_compiler(compiler, target):
    if not compiler.is_installed:
        pytest.skip(f"needs `pip install -e . --group {compiler.group}`")
    compiler.load()
    found = command.measure(subject(target=target))
    assert found.chips == 1
    assert found.native_convolutions >= found.convolutions == 20
    assert found.other_convolutions == 0
    assert found.bfloat16_convolutions >= found.native_convolutions - 1
    assert found.collective_bytes == 0
    state = 2 * 4 * models.describe("resnet8").num_parameters
    assert state < found.argument_bytes < found.needed_bytes < found.memory_bytes
