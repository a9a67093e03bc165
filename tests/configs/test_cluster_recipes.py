"""The cluster recipes: the scripts run with a stand-in Slurm and Ray, the manifests agree with the code and with each other.

What only a real cluster can show (Slurm, Ray's symmetric-run, the dashboard) was tried by hand; here is what a change of this repository could break.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import yaml

from configs import load
from pipeline.prepare import PrepareConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VARIANTS = ["cuda", "rocm"]

STUBS = {
    # Slurm with two nodes: every command runs on both at once, and stops when srun is stopped.
    "srun": """while [[ "$1" == --* ]]; do shift; done
echo "$*" >>"$LOG/srun"
trap 'kill $(jobs -p) 2>/dev/null' TERM
for node in n1 n2; do SLURMD_NODENAME=$node "$@" & done
while [ -n "$(jobs -pr)" ]; do wait -n; done""",
    "scontrol": """if [ "$1" = show ]; then tr , '\\n' <<<"$3"; else echo "$*" >>"$LOG/scontrol"; kill -9 0; fi""",
    "squeue": 'cat "$LOG/left"',
    "hostname": "echo 10.1.2.3 fe80::1",
    "sleep": "exec /bin/sleep 0.05",
    # Ray: the first node runs the command, the other ends as soon as the head is gone.
    "ray": """"$PYTHON" -c 'import json, os, sys; print(json.dumps({"argv": sys.argv[1:], **os.environ}))' "$@" >"$LOG/$SLURMD_NODENAME.json"
[ "${NO_RAY:-}" ] && exit 1
[ "$SLURMD_NODENAME" = n1 ] || exit 1
while [ "$1" != -- ]; do shift; done
shift
"$@" """,
    "soundshard": 'echo "$*" >>"$LOG/soundshard"; [ "${DEAD_FIRST_NODE:-}" ] && exec /bin/sleep 30; exit "${STATUS_WANTED:-0}"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on the first of two nodes."""
    venv, log = tmp_path / "venv" / "bin", tmp_path / "log"
    venv.mkdir(parents=True)
    log.mkdir()
    (log / "left").write_text("n1,n2\n")
    for name, body in STUBS.items():
        (venv / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (venv / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM", "ROCR", "HIP"))}
    return clean | {
        "PATH": f"{venv}:{os.environ['PATH']}",
        "VENV": str(venv.parent),
        "LOG": str(log),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": f"77{os.getpid()}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "n1",
        "ROCR_VISIBLE_DEVICES": "0,1,2",
        "COMMAND": "featurise data=/d out=/o",
    }


def batch(variant: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run the batch script in a process group of its own; its exit status and standard error."""
    script = str(RECIPES / f"slurm_{variant}.sbatch")
    with subprocess.Popen(["bash", script], env=environment, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as running:
        try:
            _, errors = running.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    return running.returncode, errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_slurm_ends_with_the_jobs_own_status(slurm: dict[str, str], variant: str) -> None:
    log = Path(slurm["LOG"])
    for status in ("0", "2"):
        ended, errors = batch(variant, slurm | {"STATUS_WANTED": status})
        assert str(ended) == status, errors
    assert (log / "soundshard").read_text() == "featurise data=/d out=/o ray.address=10.1.2.3:6379\n" * 2
    head, worker = (json.loads((log / f"{node}.json").read_text()) for node in ("n1", "n2"))
    assert head["argv"] == worker["argv"]
    assert head["argv"][:5] == ["symmetric-run", "--address", "10.1.2.3:6379", "--min-nodes", "2"]
    assert head["RAY_AUTH_MODE"] == "token" and re.fullmatch("[0-9a-f]{64}", head["RAY_AUTH_TOKEN"])
    assert head["RAY_AUTH_TOKEN"] == worker["RAY_AUTH_TOKEN"] and head["RAY_AUTH_TOKEN"] not in " ".join(head["argv"])
    assert int(head["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) > 30
    assert not Path(head["RAY_TMPDIR"]).exists() and not Path(head["STATUS"]).exists()
    if variant == "rocm":
        assert head["HIP_VISIBLE_DEVICES"] == "0,1,2" and "ROCR_VISIBLE_DEVICES" not in head
        assert head["argv"][head["argv"].index("--num-gpus") + 1] == "4"


def test_slurm_without_ray_is_a_failure(slurm: dict[str, str]) -> None:
    ended, errors = batch("cuda", slurm | {"NO_RAY": "1"})
    assert ended == 1 and "Ray did not start" in errors


def test_a_dead_first_node_starts_the_slurm_job_anew(slurm: dict[str, str]) -> None:
    log = Path(slurm["LOG"])
    (log / "left").write_text("n2\n")
    assert batch("cuda", slurm | {"DEAD_FIRST_NODE": "1"})[0] == -signal.SIGKILL  # what Slurm does with it
    assert (log / "scontrol").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"


def test_the_slurm_variants_differ_in_their_gpus_only() -> None:
    cuda, rocm = ((RECIPES / f"slurm_{variant}.sbatch").read_text().splitlines() for variant in VARIANTS)
    assert all(re.search("NVIDIA|slurm_cuda|export VENV|symmetric-run --address", line) for line in set(cuda) - set(rocm))
    for line in ("#SBATCH --exclusive", "#SBATCH --no-kill", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=1"):
        assert any(written.startswith(line) for written in cuda)


def test_submit_hands_on_no_secrets_and_ends_with_the_jobs_status(slurm: dict[str, str], tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(
        '#!/usr/bin/env bash\ncase $1 in -c) exec "$PYTHON_HERE" "$@";; -m) printf "%s\\n" "$@" >"$LOG/submit"; exit 1;; -) exit 5;; esac\n'
    )
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "PYTHON_HERE": sys.executable, "AWS_REGION": "eu 7", "AWS_SECRET_ACCESS_KEY": "secret", "ID": "job-9"}
    environment = {name: value for name, value in slurm.items() if not name.startswith(("AWS_", "SOUNDSHARD_"))} | given
    script = str(RECIPES / "submit.sh")
    assert subprocess.run([script, "prepare", "source=a b"], env=environment, check=False, capture_output=True).returncode == 5
    submitted = (Path(slurm["LOG"]) / "submit").read_text().splitlines()
    assert submitted[-4:] == ["soundshard", "prepare", "source=a b", "ray.address=auto"]
    assert json.loads(submitted[submitted.index("--runtime-env-json") + 1]) == {"env_vars": {"AWS_REGION": "eu 7"}}
    assert "secret" not in " ".join(submitted)
    assert subprocess.run([script], env=environment, check=False, capture_output=True).returncode == 2


@pytest.fixture(scope="module")
def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    options, job = yaml.safe_load_all((RECIPES / "rayjob.yaml").read_text())
    return options, job


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def test_the_rayjobs_options_are_prepares(manifests: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    options, job = manifests
    ((name, text),) = options["data"].items()
    (tmp_path / name).write_text(text)
    config = load.load(PrepareConfig, [f"config={tmp_path / name}"])
    assert config.ray.address == "auto" and config.tower.device == "cuda" and config.source.startswith("s3://")
    pod = groups(job)["head"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert job["spec"]["entrypoint"] == f"soundshard prepare config={mounts['options']}/{name}"
    assert {"name": "options", "configMap": {"name": options["metadata"]["name"]}} in pod["volumes"]
    gpu = groups(job)["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.decode_threads * int(gpu["nvidia.com/gpu"]) <= int(gpu["cpu"])


def test_every_rayjob_container_is_set_up_alike(manifests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, job = manifests
    assert set(job["spec"]) == {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and job["spec"]["backoffLimit"] > 0
    (ray,) = (wanted for wanted in PROJECT["project"]["dependencies"] if wanted.startswith("ray["))
    assert cluster["rayVersion"].startswith(ray.partition("==")[2].rstrip("*"))
    for name, group in groups(job).items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        first = groups(job)["head"]["template"]["spec"]["containers"][0]
        assert [container[key] for key in ("image", "env", "envFrom", "securityContext")] == [
            first[key] for key in ("image", "env", "envFrom", "securityContext")
        ]
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
        assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"])
        assert not any("SECRET" in variable["name"] for variable in container["env"])
    assert groups(job)["head"]["rayStartParams"]["num-cpus"] == "0"


def test_a_silent_node_is_given_up_within_a_minute_everywhere(manifests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    pattern = r"(RAY_(?:health_check|grpc_client_keepalive)_\w+)=(\d+)"
    settings = [dict(re.findall(pattern, (RECIPES / name).read_text())) for name in ("slurm_cuda.sbatch", "slurm_rocm.sbatch", "submit.sh")]
    kubernetes = {variable["name"]: variable["value"] for variable in groups(manifests[1])["head"]["template"]["spec"]["containers"][0]["env"]}
    assert settings[0] and settings[0] == settings[1] == settings[2] == {name: kubernetes[name] for name in settings[0]}
    period_ms = 3000  # Ray's own
    failures = int(settings[0]["RAY_health_check_failure_threshold"])
    assert failures * (period_ms + int(settings[0]["RAY_health_check_timeout_ms"])) < 60_000


def test_the_dockerfile_holds_what_the_project_installs() -> None:
    lines = (RECIPES / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    project = PROJECT["project"]
    assert sorted(copied) == sorted([*PROJECT["tool"]["setuptools"]["packages"], "pyproject.toml", project["readme"], *project["license-files"]])
    (base,) = (line for line in lines if line.startswith("FROM"))
    assert base == f"FROM python:{project['requires-python'].removeprefix('>=').partition(',')[0]}-slim"
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] != "root" and users[-1] != "0"
    assert lines.index(f"USER {users[-1]}") > max(number for number, line in enumerate(lines) if line.startswith("RUN"))
