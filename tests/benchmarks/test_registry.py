"""The benchmarks' code: every spelling of every case is right on a tiny shape, and files, tables and targets hold together.

Nothing here looks at a time; a benchmark in a test would only measure the neighbours.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FOLDERS = (FOLDER,)
SCHEMA = (
    *("op", "backend", "dtype", "shape_name", "shape", "device", "threads", "isa", "n_iter"),
    *("us_p50", "us_p20", "us_p80", "host_us", "bytes", "gb_s", "pct_copy_peak", "gflop_s"),
    *("err_vs_ref", "speedup_vs_torch", "torch", "triton", "cuda", "driver", "commit", "date"),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The result file of a quick run on a tiny shape."""
    import run as runner

    path = tmp_path_factory.mktemp("results") / "quick.csv"
    command = [
        "--quick",
        "--no-compile",
        "--sizes",
        "tiny",
        "--seconds",
        "0.01",
        "--out",
        str(path),
    ]
    assert runner.main(command) == 0
    return path


def make_table(*arguments: object) -> int:
    """The table script's exit code."""
    import table

    try:
        return table.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_file_has_the_schema_and_every_row_its_numbers(results):
    rows = rows_of(results)
    assert set(SCHEMA) <= set(rows[0])
    assert {row["case"] for row in rows} == {
        "euler",
        "euler_guided",
        "interpolate_drawn",
        "loss_mse",
    }
    assert {"fused", "naive", "best"} <= {row["role"] for row in rows}
    for row in rows:
        assert float(row["us_p20"]) <= float(row["us_p50"]) <= float(row["us_p80"])
        assert int(row["n_iter"]) >= 5
        assert float(row["pct_copy_peak"]) > 0
        assert 0 <= float(row["err_vs_ref"]) <= 4e-6
        assert row["threads"] == str(torch.get_num_threads())
        assert row["shape"] == "4x4x8x8"
    euler = next(row for row in rows if row["case"] == "euler" and row["role"] == "fused")
    assert int(euler["bytes"]) == 3 * 4 * 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float32+bfloat16"])
def test_every_spelling_is_right(dtype):
    import registry
    import run as runner

    options = runner.arguments_of(["--sizes", "tiny", "--no-compile"])
    seen = 0
    for case in registry.all_cases():
        if dtype not in case.dtypes:
            continue
        (setting,) = registry.settings_of(case, ["tiny"], dtype, "cpu")
        with torch.set_grad_enabled(case.gradient):
            built = case.build(setting)
            expected = built.expected()
            names = [runner.key(variant) for variant in built.variants]
            assert len(set(names)) == len(names)
            for variant in runner.with_backends(built.variants, runner.backends(options)):
                assert variant.role in registry.ROLES
                assert variant.memory in registry.MEMORY
                if "compile" not in variant.name:
                    runner.prove(variant, setting, expected)
                    seen += 1
    assert seen > 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_spellings_of_one_case_are_right():
    import registry
    import run as runner

    setting = registry.Setting("tiny-b4", (4, 4, 8, 8), "float32", "cpu")
    (case,) = registry.all_cases("euler")
    torch._dynamo.reset()
    with torch.no_grad():
        built = case.build(setting)
        (in_place,) = [v for v in built.variants if v.role == "compile" and v.memory == "inplace"]
        try:
            runner.prove(in_place, setting, built.expected())
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"torch.compile does not work here: {runner.first_line(error)}")


def test_a_wrong_spelling_gets_no_row(capsys):
    import registry
    import run as runner

    setting = registry.Setting("tiny-b4", (4, 4, 8, 8), "float32", "cpu")
    options = runner.arguments_of(["--sizes", "tiny", "--no-compile", "--seconds", "0.001"])

    def build(setting):
        x = setting.normal(0)
        spellings = [
            registry.Variant("right", "naive", "new", lambda: x + 1),
            registry.Variant("wrong", "fused", "new", lambda: x + 1.001),
            registry.Variant("nan", "best", "new", lambda: x * float("nan")),
        ]
        return registry.Built(spellings, lambda: (x.double() + 1,))

    case = registry.Case("ode_step", "made up", build, lambda s: 8 * s.n)
    found, failed = runner.measure_case(case, setting, options, {})
    assert [row["variant"] for row in found] == ["right"]
    assert failed == 1
    assert "made up float32 tiny-b4 fused/wrong" in capsys.readouterr().err


def test_the_table_is_idempotent_and_touches_only_its_place(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Before\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    assert make_table(results, "--into", page) == 0
    once = page.read_text()
    assert once.startswith("# Before\n\n<!-- bench:begin -->\n")
    assert once.endswith("<!-- bench:end -->\nafter\n")
    assert "| euler_guided | tiny-b4 | `out=` |" in once
    assert "old" not in once
    assert make_table(results, "--into", page) == 0
    assert page.read_text() == once


def test_the_table_refuses_a_page_without_markers_and_a_file_of_another_kind(results, tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.csv"
    page.write_text("no markers")
    other.write_text("a,b\n1,2\n")
    for arguments in ((results, "--into", page), (other,), (tmp_path / "absent.csv",)):
        assert make_table(*arguments) == 2
    assert page.read_text() == "no markers"


def test_the_plot_is_a_picture(results):
    pytest.importorskip("matplotlib")
    import table

    assert table.plot(rows_of(results)).startswith(b"\x89PNG")


def row(**values: object) -> dict[str, str]:
    """A result row with the columns that the targets read."""
    common = {
        "op": "ode_step",
        "case": "euler_guided",
        "dtype": "float32",
        "shape_name": "latent-4x64x64-b4",
        "shape": "4x4x64x64",
    }
    common |= {
        "device": "cpu",
        "cuda": "",
        "host_us": "",
        "backend": "native",
        "variant": "",
        "memory": "out",
    }
    return common | {name: str(value) for name, value in values.items()}


def test_targets_compare_the_quickest_rows():
    import targets

    rows = [
        row(role="fused", us_p50=10, host_us=0.7),
        row(role="naive", memory="new", us_p50=40),
        row(role="naive", memory="new", us_p50=31),  # 3.1x: the quickest counts
        row(role="compile", us_p50=9),  # 0.9x: slower than compile
    ]
    states = {
        outcome.text: outcome for outcome in targets.check(rows) if outcome.state != "not measured"
    }
    assert states["guided Euler, out=, against naive eager"].measured == "3.10x"
    assert states["guided Euler, out=, against naive eager"].state == "reached"
    assert states["euler_guided float32 (out) against torch.compile"].state == "missed"
    assert states["overhead of euler_guided float32 (out, native)"].state == "reached"


def test_targets_name_cases_and_spellings_that_exist():
    import registry
    import targets

    assert tuple(targets.SIZES.values()) == tuple(registry.SHAPES)
    setting = registry.Setting("tiny-b4", (4, 4, 8, 8), "float32", "cpu")
    for target in targets.RATIOS:
        (case,) = registry.all_cases(target.case)
        variants = case.build(setting).variants
        assert any(v.role == "fused" and v.memory == target.ours for v in variants), target.text
        assert any(
            v.role == target.role
            and target.memory in (None, v.memory)
            and target.variant in (None, v.name)
            for v in variants
        ), target.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "--only: must be one of"),
        (["--sizes", "3"], "--sizes: must be of"),
        (["--seconds", "0"], "--seconds: must be positive"),
        (["--dtypes", "int8"], "--dtypes: must be of"),
        (["--backend", "none"], "--backend: must be of"),
    ],
)
def test_bad_options_get_one_line(capsys, arguments, said):
    import run as runner

    with pytest.raises(SystemExit) as stop:
        runner.arguments_of(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_json_is_the_rows(capsys):
    import run as runner

    command = ["--only", "randn", "--sizes", "tiny", "--no-compile", "--seconds", "0.01", "--json"]
    assert runner.main(command) == 0
    assert {found["op"] for found in json.loads(capsys.readouterr().out)} == {"random"}


def test_the_script_runs_by_its_path_alone():
    """``python -P`` puts no folder on the path, as in benchmarks/gpu.sh."""
    # Where the package is imported from the source tree, the new process must find it there too.
    path = os.pathsep.join(p for p in sys.path if p and p != str(FOLDER))
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "run.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
