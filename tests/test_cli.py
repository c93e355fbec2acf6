"""The command line: help without the extras, examples that run, one line for what is wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vecattention import cli, dispatch

EXTRAS = ("triton", "transformers", "diffusers", "rich", "matplotlib", "av", "torchvision", "safetensors")


def program(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process in which some packages cannot be imported."""
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nfrom vecattention.cli import main\n"
    code += f"code = main({list(arguments)!r})\n"
    code += f"print('imported:', *(n for n in {EXTRAS!r} if sys.modules.get(n)), file=sys.stderr)\nsys.exit(code)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert {"demo", "env", "explain"} <= set(cli.available()) <= set(cli.COMMANDS)
    for name, what in cli.available().items():
        importlib.import_module(f"vecattention.commands.{name}")
        assert name in told and what.split(",")[0].split()[0] in told


def test_a_command_whose_module_is_missing_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "dance", "not there")
    assert "dance" not in cli.available()
    with pytest.raises(SystemExit) as ended:
        cli.main(["dance"])
    assert ended.value.code == 2 and "invalid choice: 'dance'" in capsys.readouterr().err


def test_without_a_command_it_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["env"], ["explain", "--shape", "1,4,2,256,256,64", "--device", "cpu"]])
def test_env_and_explain_need_torch_alone(arguments: list[str]) -> None:
    done = program(*arguments, blocked=EXTRAS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported:\n"
    assert "cannot be imported" in done.stdout, "Triton is blocked, and its backend says so"


@pytest.mark.parametrize("name", sorted(cli.available()))
def test_the_help_of_each_command_ends_with_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(f"vecattention.commands.{name}")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].strip() == command.EXAMPLE
    program_name, first, *rest = shlex.split(command.EXAMPLE)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.parse_args(rest)
    assert (program_name, first) == ("vecattention", name)


@pytest.mark.parametrize("name", ["env", "explain", "demo"])
def test_the_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = importlib.import_module(f"vecattention.commands.{name}").EXAMPLE
    assert cli.main(shlex.split(example)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_env_as_json_holds_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["backends"]) == set(dispatch.BACKENDS)
    assert told["versions"]["torch"] and told["processor"]["cores"] >= 1
    if not told["gpus"]:
        assert told["backends"]["cpu"] == []


def test_explain_says_why_not_and_fails_when_nothing_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--shape", "1,28,4,131072,131072,128", "--device", "cuda"]) == 0
    told = capsys.readouterr().out
    assert "B=1 H=28 Hkv=4 Sq=131072 Sk=131072 D=128 bfloat16 on cuda, causal" in told
    assert "it runs on CPU tensors, these are on cuda" in told
    assert cli.main(["explain", "--shape", "1,28,4,131072,131072,128", "--device", "cuda", "--dtype", "fp64"]) == 1
    assert "none can run this" in capsys.readouterr().out


def test_explain_takes_every_part_of_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--shape 1,4,2,100,300,64 --device cpu --no-causal --q-pooling-size 32 --q-block-size 128 --k-local-size 32"
    words += " --group-k-block 4 --max-scope row --chunk-size 128 --backend cpu"
    assert cli.main(["explain", *words.split()]) == 0
    told = capsys.readouterr().out
    assert (
        "P=32 R=128 B=32 G=4 scope=row" in told and "non-causal" in told and "chunk      100 queries of 4 heads" in told
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("--shape 1,2", "--shape is '1,2', wanted six whole numbers B,H,Hkv,Sq,Sk,D; such as 1,28,4,4096,4096,128"),
        ("--shape 1,28,3,64,64,128", "query has 28 heads, wanted a multiple of key's 3"),
        ("--shape 1,4,4,64,64,100", "query has head_dim 100, wanted one of"),
        ("--shape 1,4,4,65,64,64", "query has Sq=65 rows, wanted at most Sk=64 with causal=True"),
        ("--shape 1,4,4,64,64,64 --dtype int8", "--dtype is 'int8', wanted one of bf16"),
        ("--shape 1,4,4,64,64,64 --device gpu", "--device is 'gpu', wanted cuda, cuda:N, cpu or meta"),
        ("--shape 1,4,4,64,64,64 --max-scope all", "max_scope is 'all', wanted one of ('window', 'row')"),
        ("--shape 1,4,4,64,64,64 --threshold 0", "threshold is 0.0, wanted a number in (0, 1]"),
        ("--shape 1,4,4,64,64,64 --threshold nan", "threshold is nan, wanted a number in (0, 1]"),
        ("--shape 1,4,4,64,64,64 --k-local-size 128", "k_local_size is 128, wanted at most q_pooling_size=64"),
        ("--shape 1,4,4,64,64,64 --backend magic", "backend is 'magic', wanted 'auto' or one of"),
        ("--shape 1,4,4,64,64,64 --chunk-size 0", "chunk_size is 0, wanted at least 1 query"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *words.split()]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1
    assert told.err.startswith(f"vecattention explain: {message}")


def test_traceback_shows_where_an_error_came_from() -> None:
    with pytest.raises(ValueError, match="--shape is '1', wanted six whole numbers"):
        cli.main(["--traceback", "explain", "--shape", "1"])


def test_a_missing_extra_is_named_with_what_to_install() -> None:
    done = program("demo", "--out", "none", blocked=("av", "transformers"))
    assert done.returncode == 2
    line = done.stderr.splitlines()[0]
    assert line.startswith("vecattention demo: this needs the package ") and "vecattention[demo]" in line


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vecattention.commands import env

    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "vecattention env: interrupted\n"
