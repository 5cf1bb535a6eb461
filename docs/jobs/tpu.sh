#!/usr/bin/env bash
# A training job on a slice of Cloud TPUs, from the machine where gcloud is set up.
#
#     docs/jobs/tpu.sh create     ask for the slice, and wait until it is there
#     docs/jobs/tpu.sh install    this repository and its requirements on every host
#     docs/jobs/tpu.sh start      the run, or its continuation, in the background on every host
#     docs/jobs/tpu.sh watch      what the first host says
#     docs/jobs/tpu.sh stop       SIGTERM: the run saves and ends
#     docs/jobs/tpu.sh delete     the slice, and with it the costs
#
# What is asked for, as variables:
set -euo pipefail
NAME=${NAME:-gaudi}
ZONE=${ZONE:-us-east5-b}
TYPE=${TYPE:-v6e-16}                    # v6e-8 is one host, v6e-16 four
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}
REPOSITORY=${REPOSITORY:-$(git remote get-url origin 2>/dev/null || true)}
BUCKET=${BUCKET:-}                      # Cloud Storage, with a hierarchical namespace
CONFIG=${CONFIG:-configs/vit_b_gaudi.py}
WORKDIR=${WORKDIR:-/mnt/bucket/runs/vit_b}
DATA=${DATA:-/mnt/bucket/tensorflow_datasets}
OPTIONS=${OPTIONS:-}                    # others of main.py

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot
    while state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
        --format='value(state.state)') && [[ "$state" != ACTIVE ]]; do
        echo "$state"
        case "$state" in FAILED | SUSPEND*) exit 1 ;; esac
        sleep 60
    done
    ;;
install)
    # The images come with an older Python: uv brings one. The bucket is the shared disk.
    on_every_host "
        set -e
        curl -LsSf https://astral.sh/uv/install.sh | sh
        test -d gaudi_jax || git clone $REPOSITORY gaudi_jax
        cd gaudi_jax
        ~/.local/bin/uv venv --python 3.11
        ~/.local/bin/uv pip install -r requirements.txt -e '.[tpu]'
        sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket"
    ;;
start)
    : "${BUCKET:?give the bucket that holds checkpoints and data}"
    on_every_host "
        set -e
        cd gaudi_jax
        mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs $BUCKET /mnt/bucket
        export TFDS_DATA_DIR=$DATA
        nohup .venv/bin/python main.py --config=$CONFIG --workdir=$WORKDIR $OPTIONS \
            > ~/train.log 2>&1 &"
    ;;
watch)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command='tail -f ~/train.log'
    ;;
stop)
    on_every_host 'pkill -TERM -f [m]ain.py'
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    ;;
*)
    sed -n '2,9p' "$0"
    exit 1
    ;;
esac
