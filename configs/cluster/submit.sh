#!/usr/bin/env bash
# soundshard on a Ray cluster that is running already, through its dashboard:
#
#   ADDRESS=http://HEAD:8265 configs/cluster/submit.sh prepare source=s3://bucket/clips out=s3://bucket/data
#
# Follows the job's output and ends with its exit status. Interrupting this command leaves the job running; the lines at the start say how to
# see it again and how to stop it. Submitting the same command again goes on where it was.
#
# soundshard must be installed on every node. Ray reads these where its nodes start, before `ray start`, so they cannot be given here:
#   RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...      the same secret on all nodes, and here
#   RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3 RAY_grpc_client_keepalive_time_ms=10000
#   RAY_grpc_client_keepalive_timeout_ms=10000  a node that does not answer is given up after half a minute instead of minutes
#   AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY     credentials: what is submitted with a job can be read in the dashboard
set -euo pipefail

ADDRESS=${ADDRESS:-http://127.0.0.1:8265}
ID=${ID:-soundshard-$(date -u +%Y%m%d-%H%M%S)-$$}
PYTHON=${PYTHON:-python}
# Variables that the job gets from this shell, if they are set here. No secrets.
HANDED_ON=${HANDED_ON:-AWS_ENDPOINT_URL AWS_REGION SOUNDSHARD_CACHE}

[ $# -gt 0 ] || { echo "usage: ${0##*/} JOB [key=value ...], as for the command soundshard" >&2; exit 2; }
ENVIRONMENT=$("$PYTHON" -c 'import json, os, sys; print(json.dumps({"env_vars": {n: os.environ[n] for n in sys.argv[1].split() if n in os.environ}}))' "$HANDED_ON")

echo "again:  ray job logs --follow --address $ADDRESS $ID"
echo "stop:   ray job stop --address $ADDRESS $ID"
"$PYTHON" -m ray.scripts.scripts job submit --address "$ADDRESS" --submission-id "$ID" --runtime-env-json "$ENVIRONMENT" \
  -- soundshard "$@" ray.address=auto || true
# `ray job submit` ends with 1 whatever went wrong, and also when only its connection broke; the cluster knows the status itself.
exec "$PYTHON" - "$ADDRESS" "$ID" <<'PY'
import sys

from ray.job_submission import JobStatus, JobSubmissionClient

job = JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2])
if not job.status.is_terminal():
    sys.exit(f"{job.submission_id} is still running; this is not its end")
sys.exit(0 if job.status == JobStatus.SUCCEEDED else job.driver_exit_code or 1)
PY
