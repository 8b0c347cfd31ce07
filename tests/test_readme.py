"""Every command of README.md and tools/README.md is one that its tool understands, and is run by a test."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("mmengine")
pytest.importorskip("triton")

from datasets import make_coco
from tiny import DETECTOR, TOOLS, tool, write_config

ROOT = Path(__file__).parents[1]
README, TOOLS_README = (path.read_text() for path in (ROOT / "README.md", TOOLS / "README.md"))
TOUR = "tests/tools/test_tour.py::test_few_steps"
# Tool, with its first word where it has a choice of them -> the test that runs it. Those of a GPU run on one.
TESTS = {
    "benchmark.py modules": "tests/tools/test_benchmark.py::test_on_a_gpu",
    "benchmark.py ops": "tests/tools/test_benchmark.py::test_on_a_gpu",
    "benchmark.py models": "tests/tools/test_benchmark.py::test_on_a_gpu",
    "benchmark.py latency": "tests/tools/test_benchmark.py::test_latency",
    "benchmark.py report": "tests/tools/test_benchmark.py::test_latency",
    "benchmark.py tune": "tests/tools/test_benchmark_tune.py::test_on_a_gpu",
    "check_data.py": "tests/tools/test_check_data.py::test_whole_data_pass",
    "compare.py": "tests/tools/test_compare.py::test_two_variations_from_end_to_end",
    "convert.py": "tests/tools/test_convert.py::test_official_layout",
    "demo.py": "tests/tools/test_demo.py::test_demo",
    "dist_test.sh": "tests/tools/test_test.py::test_two_processes",
    "dist_train.sh": "tests/tools/test_train.py::test_two_processes",
    "draw_digits.py": TOUR,
    "export.py checkpoint": TOUR,
    "export.py onnx": TOUR,
    "export.py program": TOUR,
    "get_flops.py": "tests/tools/test_get_flops.py::test_table",
    "infer.py": TOUR,
    "make_cards.py": "tests/test_model_cards.py::test_check_names_what_differs_and_writing_mends_it",
    "make_zoo.py": "tests/tools/test_make_zoo.py::test_page_has_what_the_cards_have",
    "slurm_train.sh": "tests/tools/test_train.py::test_slurm_script",
    "test.py": TOUR,
    "train.py": TOUR,
    "visualize.py attention": "tests/tools/test_visualize.py::test_pictures",
    "visualize.py features": "tests/tools/test_visualize.py::test_pictures",
    "visualize.py predictions": "tests/tools/test_visualize.py::test_predictions",
}
# Commands without a tool -> the test that runs them, or the line of a file that does on the way to the tests.
OTHERS = {
    "make setup": "Makefile::test: setup",
    "make demo": "tests/tools/test_demo.py::test_demo",
    "make test": ".ci/run::make test",
    "make test-all": "Makefile::$(BIN)/python -m pytest -n auto\n",
    "make zoo": "tests/tools/test_make_zoo.py::test_page_has_what_the_cards_have",
    "pip install -e .": "tests/test_package.py::test_wheel_imports",
    "pip install -e '.[openmmlab]'": "Makefile::-e '.[test]'",
    "pip install -e '.[export]'": "Makefile::-e '.[test]'",
    "pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python-headless": (
        "Makefile::--no-deps opencv-python-headless"
    ),
    "python -m densezoo.env": "tests/test_env.py::test_report",
    "python tests/test_exporting.py": "tests/test_exporting.py::test_models",
}


def commands(text: str) -> list[str]:
    """Return the commands in blocks without a language, and those in backticks between words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    words = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [line for language, block in blocks if not language for line in block.splitlines() if line]
    inline = [" ".join(command.split()) for command in re.findall(r"`([^`]+)`", words)]
    return found + [command for command in inline if re.match(r"(python|pip \w+|make|tools/\S+) ", command)]


def of_tools(text: str) -> list[str]:
    """Return the commands that run a tool."""
    return [command for command in commands(text) if re.match(r"(python )?tools/(?!NAME)", command)]


def parser_of(name: str, monkeypatch, arguments: list[str] | None = None) -> ArgumentParser:
    """Return the parser of a tool; it reads the arguments, if given."""

    class Parsed(Exception):
        pass

    def parse(self, *_, read=ArgumentParser.parse_args):
        if arguments is not None:
            read(self, arguments)
        raise Parsed(self)

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as end:
        tool(Path(name).stem).main()
    return end.value.args[0]


def test_commands_are_known():
    for command in commands(README) + commands(TOOLS_README):
        assert command in OTHERS or command in of_tools(README) + of_tools(TOOLS_README) or "NAME" in command, command


@pytest.mark.parametrize("command", sorted(set(of_tools(README) + of_tools(TOOLS_README))))
def test_tools_understand(command, monkeypatch):
    words = shlex.split(command.removeprefix("python "))
    script, *arguments = words[0].removeprefix("tools/"), *words[1:]
    if script == "dist_train.sh":
        script, arguments = "train.py", [arguments[0], *arguments[2:]]
    parser_of(script, monkeypatch, arguments)


# A paragraph may tell of several tools, each followed by what it takes.
TOLD = re.findall(r"\*\*(\w+\.\w+)\*\*(.*?)(?=\*\*|\n\n|\Z)", TOOLS_README, re.DOTALL)


def test_every_tool_is_told_of():
    tools = {path.name for path in TOOLS.iterdir() if path.suffix in (".py", ".sh") and path.name[0] != "_"}
    assert [name for name, _ in TOLD] == sorted({name for name, _ in TOLD}, key=[name for name, _ in TOLD].index)
    assert {name for name, _ in TOLD} == tools


@pytest.mark.parametrize(("name", "text"), [pytest.param(*told, id=told[0]) for told in TOLD])
def test_options_and_tests_of_a_tool(name, text, monkeypatch):
    choices = None
    if name.endswith(".py"):
        parser = parser_of(name, monkeypatch)
        first = next((action for action in parser._actions if not action.option_strings), None)
        choices = first and first.choices
        parsers = [parser, *(choices.values() if isinstance(choices, dict) else ())]
        options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"(?<=[`\[])--[\w-]+", text)) <= options
    assert {key for key in TESTS if key.split()[0] == name} == {f"{name} {word}" for word in choices or ()} or {name}


@pytest.mark.parametrize("command", [*TESTS, *OTHERS])
def test_a_test_runs(command):
    file, _, runner = (TESTS | OTHERS)[command].partition("::")
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        assert runner in text
        return
    assert runner in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    if command in TESTS:
        script, *word = command.split()
        assert Path(script).stem in text and all(re.search(rf"[\"']{w}[\"']", text) for w in word)


@pytest.mark.parametrize("target", [command for command in OTHERS if command.startswith("make ")])
def test_targets(target):
    done = subprocess.run(["make", "-n", *target.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tests = {"make demo": "tools/demo.py", "make zoo": "tools/make_zoo.py", "make setup": ""}
    assert tests.get(target, "-m pytest -n auto") in done.stdout


@pytest.mark.slow
def test_blocks_run(tmp_path, monkeypatch):
    """The commands in blocks, one after the other as they are written, on a small model and two images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    (tmp_path / "tools").symlink_to(TOOLS)
    images = make_coco(tmp_path / "data/coco")
    shutil.copytree(images / "val2017", "photos")
    config = Path("configs/nat/mask-rcnn_nat-tiny_fpn_3x_coco.py")
    config.parent.mkdir(parents=True)
    write_config(config, DETECTOR, images, "train_cfg.update(max_epochs=36, val_interval=36)\n")
    torch.save(timm.create_model("dinat_mini").state_dict(), "dinat_mini_in1k_224.pth")
    work_dir = Path("work_dirs", config.stem)
    for command in of_tools(README):
        if "--sizes" in command or "benchmark.py" in command:
            continue
        # As many processes as cores, and the hash that the weights have.
        command = command.replace(f"{config} 8", f"{config} 2")
        for published in Path("published").glob("*.safetensors"):
            command = re.sub(r"published/\S+\.safetensors", str(published), command)
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        for file in work_dir.glob("epoch_36.pth"), work_dir.glob("metrics.json"):
            [shutil.copy(path, tmp_path) for path in file]
    assert len(list(Path("predictions").glob("*_drawn.png"))) == 2
    assert list(Path("published").glob("*.onnx")) and Path("dinat_mini.safetensors").is_file()
