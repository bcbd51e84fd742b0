"""The help texts, the version, and the command as a process."""

import json
import re
import subprocess
import sys

import pytest

import rfkernels
from rfkernels.cli.main import main

COMMANDS = (
    "demo",
    "train",
    "reflow",
    "distill",
    "sample",
    "invert",
    "edit",
    "eval",
    "compare",
    "bench",
    "doctor",
)


def test_no_arguments_lists_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_defaults(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"rfkernels {command}" in text
    if command == "train":
        assert re.search(r"default:\W*3000", text)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"rfkernels {rfkernels.__version__}"


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "rfkernels", "sample", "nothing", "--out", "x.gif"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_doctor_json_agrees_with_the_package(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    import torch

    assert report["versions"]["rfkernels"] == rfkernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["backends"] == rfkernels.backend_table()
    assert all(row["available"] or row["reason"] for row in report["backends"])


def test_doctor_prints_every_op_and_every_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for row in rfkernels.backend_table():
        assert row["op"] in text
        assert " ".join(row["reason"].split()) in text
