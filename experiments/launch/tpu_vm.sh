#!/usr/bin/env bash
# A recipe on every host of a Cloud TPU slice: makes the slice, installs this commit, mounts the folder that all hosts share, runs.
#
#   experiments/launch/tpu_vm.sh [--dry-run] NAME ZONE TYPE RUNTIME NFS RECIPE [arguments of meetjax align]
#   experiments/launch/tpu_vm.sh hh us-west4-a v5litepod-16 v2-alpha-tpuv5-lite 10.0.0.2:/runs experiments/lora_dpo_hh.py \
#       --set train.mesh=4,4,1 --set train.batch_size=64 --set out=/mnt/runs/hh
#
# NFS is a Filestore share, or another that all hosts can mount at /mnt/runs; data that lies there is read from there. All hosts run
# the same command and JAX finds the others. Run it again after a preemption: the slice is made anew and the run goes on. A slice
# costs until it is deleted: gcloud compute tpus tpu-vm delete NAME --zone ZONE. --dry-run prints the commands, as after
# a preemption, and runs none.
set -euo pipefail

run() { "$@"; }
state_of() { gcloud compute tpus tpu-vm describe "$1" --zone "$2" --format 'value(state)' 2>/dev/null || true; }
if [[ ${1:-} == --dry-run ]]; then
  run() { printf '%q ' "$@"; echo; }
  state_of() { echo PREEMPTED; }
  shift
fi
if (($# < 6)); then
  sed -n '4,6s/^# *//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 runtime=$4 nfs=$5
shift 5
cd "$(dirname "$0")/../.."

on_all() { run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

state=$(state_of "$name" "$zone")
if [[ -n $state && $state != READY ]]; then
  run gcloud compute tpus tpu-vm delete "$name" --zone "$zone" --quiet
fi
if [[ $state != READY ]]; then
  run gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" --version "$runtime"
fi
run git archive --format tar.gz --output /tmp/meetjax.tar.gz HEAD
run gcloud compute tpus tpu-vm scp /tmp/meetjax.tar.gz "$name:/tmp/" --zone "$zone" --worker=all
on_all "set -e
  sudo apt-get install -y -q nfs-common python3.11 python3.11-venv
  sudo mkdir -p /mnt/runs && { mountpoint -q /mnt/runs || sudo mount -t nfs $(printf %q "$nfs") /mnt/runs; }
  mkdir -p ~/meetjax && tar xzf /tmp/meetjax.tar.gz -C ~/meetjax && cd ~/meetjax
  python3.11 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
on_all "cd ~/meetjax && .venv/bin/meetjax align $(printf '%q ' "$@")"
