"""GitHub's workflows, as far as they run here, and its form for bugs. actionlint, which `dev.py test` runs, checks the
form of workflows alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosting.host import CARRIER_VERSIONS
from release import archive, manager

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yml")}
JOBS = {name: yaml.safe_load(text)["jobs"] for name, text in TEXTS.items()}
STEPS = [step for jobs in JOBS.values() for job in jobs.values() for step in job.get("steps", ())]


def run_step(script: str, folder: Path, **env: str) -> None:
    """As GitHub runs a step on Linux."""
    missing = [tool for tool in ("bash", "git", "jq", "python3") if shutil.which(tool) is None]
    if missing or os.name == "nt":
        pytest.skip(f"it runs on Linux alone; missing here: {missing}")
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_they_use_and_name_is_there():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", one) for one in used), "GitHub's own, by commit"
    noted = [re.findall(r"uses: (actions/\S+ # v\d+\.\d+\.\d+)$", text, re.MULTILINE) for text in TEXTS.values()]
    assert sum(map(len, noted)) == len(used), "the version that the commit is stands behind it"
    assert len({one for found in noted for one in found}) == len(set(used)) == 3, "one commit of each action"
    called = [job["uses"] for jobs in JOBS.values() for job in jobs.values() if "uses" in job]
    assert called and all((ROOT / one).is_file() for one in called)
    paths = [path for text in TEXTS.values() for path in re.findall(r"(?<=\s)(?:pack/)?(tests/[\w./]+)", text)]
    assert len(paths) >= 5 and all((ROOT / path).exists() for path in paths)
    assert set(JOBS["tests"]["versions"]["strategy"]["matrix"]["comfyui"]) == set(CARRIER_VERSIONS)


def test_the_form_for_bugs_asks_for_what_a_bug_needs():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    form, config = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in ("bug.yml", "config.yml"))
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in asked)
    needed = [field["id"] for field in asked if field.get("validations", {}).get("required")]
    assert needed == ["what", "log", "comfyui", "pack", "model", "packs", "workflow"]
    headings = re.findall(r"^#+ (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for text in (*(link["url"] for link in config["contact_links"]), form["body"][0]["attributes"]["value"]):
        assert set(re.findall(r"ComfyUI-VSF#([\w-]+)", text)) <= anchors


def test_what_is_published_was_tested_and_the_token_goes_nowhere_else():
    publish = JOBS["publish"]["publish"]
    assert set(publish["needs"]) == {"version", "tests"} and JOBS["publish"]["tests"]["needs"] == "version"
    checked, published, tagged = publish["steps"][-3:]
    assert checked["run"] == "python dev.py release" and "env" not in checked
    assert "release-venv" in published["run"] and "secrets" in published["env"]["TOKEN"]
    assert TEXTS["publish"].count("secrets.") == 1 and tagged["run"].startswith("gh api")
    assert published["run"].endswith("/python tests/release/publish.py"), "the token is in no command line"


def test_the_token_is_in_no_command_line_and_in_no_childs_environment(tmp_path):
    """comfy-cli is a stand-in that says what it was called with; the script is run as the workflow does."""
    package = tmp_path / "comfy_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    look = "print(sys.argv[1:]); print('TOKEN' in os.environ)"
    others = "print(open('/proc/self/cmdline').read())" if Path("/proc/self/cmdline").exists() else ""
    (package / "__main__.py").write_text(f"import os, sys\ndef main():\n    {look}\n    {others}\n")
    script = JOBS["publish"]["publish"]["steps"][-2]["run"].split()[-1]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TOKEN": "a-secret"}
    done = subprocess.run([sys.executable, ROOT / script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called, inherited, *seen = done.stdout.splitlines()
    assert called.endswith("'node', 'publish', '--token', 'a-secret']") and inherited == "False"
    assert "a-secret" not in "".join(seen)
    done = subprocess.run([sys.executable, ROOT / script], env={**env, "TOKEN": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "TOKEN is not set" in done.stderr


def test_a_version_is_published_while_it_has_no_tag(tmp_path):
    (script,) = [step["run"] for step in JOBS["publish"]["version"]["steps"] if step.get("id") == "version"]
    output, project = tmp_path / "output", tmp_path / "pyproject.toml"
    project.write_text('[tool.other]\nversion = "9.9.9"\n\n[project]\nversion = "1.2.3"\n')
    archive.git("init", "--quiet", str(tmp_path))
    archive.git(*manager.AUTHOR, "commit", "--quiet", "--allow-empty", "--message=x", folder=tmp_path)
    for tags, said in (((), "new=1.2.3\n"), (("v1.2.30", "v1.2"), "new=1.2.3\n"), (("v1.2.3",), "")):
        for tag in tags:
            archive.git("tag", tag, folder=tmp_path)
        output.write_text("")
        run_step(script, tmp_path, GITHUB_OUTPUT=str(output))
        assert output.read_text() == said


@pytest.mark.parametrize(("open_issue", "command"), [("", "issue create --title"), ("7", "issue comment 7 --body")])
def test_a_weekly_failure_is_one_issue_that_names_the_jobs_and_steps(tmp_path, open_issue, command):
    (report,) = JOBS["weekly"]["report"]["steps"]
    steps = [{"name": "Run every test", "conclusion": "failure"}, {"name": "Set up job", "conclusion": "success"}]
    jobs = [
        {"name": "on ComfyUI's main branch", "conclusion": "failure", "steps": steps},
        {"name": "on ComfyUI's newest release", "conclusion": "success", "steps": [steps[1]]},
    ]
    (tmp_path / "jobs").write_text(json.dumps({"jobs": jobs}))
    gh = tmp_path / "gh"
    answers = (
        f'case "$2" in list) echo "{open_issue}";; view) cat {tmp_path}/jobs;; *) echo "$@" >> {tmp_path}/said;; esac'
    )
    gh.write_text(f"#!/bin/sh\n{answers}\n")
    gh.chmod(0o755)
    run_step(report["run"], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", ID="5", RUN="https://run")
    said = (tmp_path / "said").read_text()
    assert said.count("issue ") == 1 and command in said
    assert "Failed: on ComfyUI's main branch: Run every test. " in said and "https://run" in said


@pytest.mark.parametrize(("which", "ref"), [("newest release", "v0.40.0"), ("main branch", "")])
def test_the_weekly_run_takes_comfyuis_newest_release_and_its_main_branch(tmp_path, which, ref):
    suite = JOBS["weekly"]["suite"]
    assert which in suite["strategy"]["matrix"]["which"] and len(suite["strategy"]["matrix"]["which"]) == 2
    (step,) = [step for step in suite["steps"] if step.get("id") == "which"]
    gh = tmp_path / "gh"
    gh.write_text("#!/bin/sh\necho v0.40.0\n")
    gh.chmod(0o755)
    output = tmp_path / "output"
    run_step(step["run"], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", WHICH=which, GITHUB_OUTPUT=str(output))
    assert output.read_text() == f"ref={ref}\n"
    (comfyui,) = [step for step in suite["steps"] if step.get("with", {}).get("path") == "ComfyUI"]
    assert comfyui["with"]["ref"] == "${{ steps.which.outputs.ref }}"
    assert suite["steps"][-1]["run"] == "python dev.py test" and suite["env"] == {
        "COMFYUI_PATH": "${{ github.workspace }}/ComfyUI"
    }


def test_no_workflow_may_do_more_than_it_needs():
    """Nothing but reading, but for the tag of a release and the weekly issue, in jobs that run no test."""
    may = {}
    for name, text in TEXTS.items():
        top = yaml.safe_load(text)["permissions"]
        assert set(top.values()) <= {"read"}
        may |= {(name, job): made.get("permissions", top) for job, made in JOBS[name].items()}
    writes = {where: {k for k, v in rights.items() if v == "write"} for where, rights in may.items()}
    assert {where: found for where, found in writes.items() if found} == {
        ("publish", "publish"): {"contents"},
        ("weekly", "report"): {"issues"},
    }
