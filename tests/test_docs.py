"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import unlocked as ul
from unlocked.cli import main

ROOT = Path(__file__).parent.parent


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = found.group(1).replace("epochs=10", "epochs=1")
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    accuracy = float(capsys.readouterr().out.split()[0])
    assert 0.05 < accuracy <= 1.0
    resumed = ul.Trainer.resume(tmp_path / "runs" / "mine")
    for a, b in zip(resumed.averaged().parameters(), names["trainer"].averaged().parameters()):
        assert torch.equal(a, b)


def test_the_table_of_methods_is_the_printed_one(capsys):
    main(["methods", "--markdown"])
    assert (ROOT / "docs" / "methods.md").read_text().endswith(capsys.readouterr().out)
    for kind in (*ul.credit.ALL, *ul.consensus.ALL):
        assert f"`{kind.name}" in (ROOT / "README.md").read_text()


def test_every_command_the_readme_names_exists(capsys):
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    commands = set(re.findall(r"(?:^|`)unlocked ([a-z]+)", text, re.M))
    assert commands >= {"train", "compare", "methods", "report", "export"}
    for command in commands:
        assert main([command, "--help"]) == 0, command
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", text):
        assert f"\n{target}:" in makefile, target
